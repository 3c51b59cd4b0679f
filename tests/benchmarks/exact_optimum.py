"""Every algorithm against the exact optimum of a problem small enough to be solved: one table.

    python -m tests.benchmarks.exact_optimum                       all algorithms, 3 seeds
    python -m tests.benchmarks.exact_optimum ppo grpo --seeds 1    some of them

A seed makes the reference, the reward table and the run. An algorithm is added as one function and its line in
``SOLVERS``: it gets a ``World`` and a seed, trains ``world.policy`` by its own public interface (a Lightning fit on
``world.rows`` for online algorithms, on ``world.problem.preferences(...)`` for offline ones), and returns the policy,
or the log-probabilities (X, Y) of its decoding where that is no policy's softmax. ``target`` and ``regret`` say what it
is measured by, unless that is the KL-regularised optimum: best-of-n's closed form, a Q by dynamic programming.
"""

import argparse
import functools
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_rlhf.algorithms import (
    A2C,
    DAPO,
    DPO,
    DQN,
    GRPO,
    GSPO,
    ILQL,
    PPO,
    RAFT,
    RLOO,
    TRPO,
    DrGRPO,
    ExpertIteration,
    OnlineDPO,
    Reinforce,
    ReinforcePP,
)
from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.algorithms.pairs import PairBatch
from lit_rlhf.algorithms.rewarded import RewardedBatch
from lit_rlhf.baseline import NoBaseline, ValueBaseline
from lit_rlhf.batch import CompletionBatch
from lit_rlhf.clip import AdaptiveKLPenalty, SymmetricClip
from lit_rlhf.exact import ExactProblem, letters_policy, table_reward
from lit_rlhf.kl import FixedKL, NoKL
from lit_rlhf.models.guided import GuidedModel
from lit_rlhf.models.policy import Policy
from lit_rlhf.quiet import quiet
from lit_rlhf.rollout.sampler import Sampler

PROMPTS = ("a", "b", "cd", "eab")
BETA = 0.5
STEPS = 3


@dataclass
class World:
    """A problem, and the policy that is to solve it; the problem's reference is the policy before training."""

    policy: Policy
    reward: Any
    problem: ExactProblem
    rows: list[dict[str, Any]]


@dataclass
class Solver:
    """How an algorithm is run and measured.

    Args:
        run: trains ``world.policy``; returns it, or log-probabilities (X, Y).
        target: log-probabilities (X, Y) of the best policy for this algorithm's goal.
        regret: how far log-probabilities (X, Y) are from that goal, 0 at the target and 1 at the reference.
        bound: the regret that the algorithm has to reach.
    """

    run: Callable[[World, int], Policy | Tensor]
    target: Callable[[ExactProblem], Tensor] = lambda problem: problem.optimum
    regret: Callable[[ExactProblem, Tensor], float] = lambda problem, logprobs: problem.measure(logprobs).regret
    bound: float = 0.05


def make_world(seed: int) -> World:
    policy, reward = letters_policy(seed=seed), table_reward(seed=seed)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    problem = ExactProblem(policy=policy, rows=rows, reward=reward, beta=BETA, max_new_tokens=STEPS)
    return World(policy, reward, problem, rows)


# ---- online ---------------------------------------------------------------------------------------------------------


def decaying(lr: float) -> dict[str, Any]:
    """Adam whose rate falls to 0 in a straight line: what is left at the end is not the noise of the last steps."""
    return {
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=lr),
        "scheduler": lambda optimizer, num_training_steps: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.0, 1 - step / num_training_steps)
        ),
    }


def online(algorithm: type[OnlineAlgorithm], *, iterations: int, lr: float, **settings: Any) -> Solver:
    """An online algorithm with the KL as k1 in the reward, weighted by the problem's beta."""

    def run(world: World, seed: int) -> Policy:
        module = algorithm(
            policy=world.policy, reward=world.reward, sampler=Sampler(max_new_tokens=STEPS), seed=seed,
            **{"kl": FixedKL(coef=BETA), **decaying(lr), **settings},
        )  # fmt: skip
        # As one batch, for every pass over a loader has its own seed, and to set it takes longer than to write this much.
        prompts = [row["prompt"] for row in world.rows]
        batch = prompts * (module.rollout_batch_size // module.group_size // len(prompts))
        fit(module, [{"prompt": batch}], max_epochs=iterations)
        return world.policy

    return Solver(run)


def fit(module: L.LightningModule, loader: Any, **trainer: Any) -> None:
    L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **trainer,
    ).fit(module, loader)  # fmt: skip


def imitation(algorithm: type[OnlineAlgorithm], target: Callable[[ExactProblem], Tensor], **settings: Any) -> Solver:
    """One iteration of an algorithm that imitates some of its completions: its target is a distribution.

    What it minimises is KL(target || policy), so that is its regret, as a share of KL(target || reference). A finite
    sample leaves about (completions that matter - 1) / (2 x sample) nats.
    """

    def regret(problem: ExactProblem, logprobs: Tensor) -> float:
        best = target(problem)
        parts = [torch.where(best > -torch.inf, best.exp() * (best - x), 0) for x in (logprobs, problem.reference)]
        return float(parts[0].sum() / parts[1].sum())

    solver = online(algorithm, iterations=1, lr=1e-2, kl=NoKL(), minibatch_size=512, **settings)
    return Solver(solver.run, target=target, regret=regret, bound=0.1)


RIGHT = 0.5  # what expert iteration takes for right


def of_the_right(problem: ExactProblem) -> Tensor:
    return torch.where(problem.scores >= RIGHT, problem.reference, -torch.inf).log_softmax(-1)


# ---- offline --------------------------------------------------------------------------------------------------------


def rows_as_tokens(problem: ExactProblem, rows: Tensor) -> CompletionBatch:
    """Completions by their number among all of the problem's: as tokens, for a text would get an end of sequence."""
    chosen = problem.rollout[rows]
    return CompletionBatch(
        prompt_ids=chosen.prompt_ids, prompt_mask=chosen.prompt_mask, response_ids=chosen.response_ids,
        response_mask=chosen.response_mask,
    )  # fmt: skip


def drawn_pairs(problem: ExactProblem, count: int, seed: int) -> Tensor:
    """(count, 2) numbers of completions: two draws of the reference for a prompt, the preferred one first.

    P(chosen) = sigmoid(r(chosen) - r(rejected)), Bradley-Terry, as in ``ExactProblem.preferences``.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(problem.shape[0], (count,), generator=generator)
    pairs = torch.multinomial(problem.reference.exp()[prompts], 2, generator=generator)
    one, other = problem.scores[prompts].gather(1, pairs).unbind(-1)
    lost = torch.rand(count, generator=generator) > torch.sigmoid(one - other)
    return torch.where(lost.unsqueeze(1), pairs.flip(1), pairs) + prompts.unsqueeze(1) * problem.shape[1]


def dpo(*, pairs: int, batch_size: int, epochs: int, lr: float) -> Solver:
    """DPO on preferences drawn from the reward: at the problem's beta its optimum is p*."""

    def run(world: World, seed: int) -> Policy:
        drawn = drawn_pairs(world.problem, pairs, seed)
        module = DPO(policy=world.policy, beta=BETA, seed=seed, **decaying(lr))

        def collate(numbers: Tensor) -> MicroBatch:
            rows, places = drawn[numbers].unique(return_inverse=True)
            completions = rows_as_tokens(world.problem, rows)
            return MicroBatch(
                PairBatch(completions, *places.unbind(-1)), len(numbers), 2 * len(numbers), completions.count
            )

        module.collate = collate
        fit(module, numbered(pairs, batch_size), max_epochs=epochs)
        return world.policy

    return Solver(run)


def numbered(count: int, batch_size: int) -> DataLoader:
    return DataLoader(range(count), batch_size=batch_size, shuffle=True, collate_fn=torch.tensor)


GUIDE = 1.0  # beta of ILQL's decoding
EXPECTILE = 0.7


def expectile_of(values: Tensor, logprobs: Tensor) -> Tensor:
    """The expectile of a distribution over values: v with tau E[(q - v)+] = (1 - tau) E[(v - q)+], by bisection."""
    low, high = values.min(), values.max()
    for _ in range(60):
        middle = (low + high) / 2
        over = (logprobs.exp() * torch.where(values > middle, EXPECTILE, EXPECTILE - 1) * (values - middle).abs()).sum()
        low, high = (middle, high) if over > 0 else (low, middle)
    return low


Value = Callable[[Tensor, Tensor], Tensor]  # see ``ExactProblem.action_values``


def guided_optimum(problem: ExactProblem, weight: float, prior: float, value: Value) -> Tensor:
    """(X, Y) log-probabilities of decoding by softmax(prior * log ref + weight * Q), Q by dynamic programming."""
    table = []
    for prompt, tree in enumerate(problem.action_values(value)):
        mass: dict[tuple[int, ...], float] = {}
        for completion, logprob in zip(problem.completions, problem.reference[prompt].tolist(), strict=True):
            for length in range(len(completion) + 1):
                prefix = completion[:length]
                mass[prefix] = mass.get(prefix, 0.0) + math.exp(logprob)
        steps = {}
        for prefix, q_values in tree.items():
            conditional = torch.tensor([mass[(*prefix, token)] for token in range(len(q_values))]).double().log()
            steps[prefix] = (prior * conditional + weight * q_values).log_softmax(-1)
        table.append([
            sum(float(steps[completion[:t]][completion[t]]) for t in range(len(completion)))
            for completion in problem.completions
        ])  # fmt: skip
    return torch.tensor(table).double()


def q_learning(
    make: Callable[..., OfflineAlgorithm], *, value: Value, weight: float, prior: float, completions: int,
    batch_size: int, epochs: int, lr: float, bound: float,
) -> Solver:  # fmt: skip
    """Q-learning on completions of the reference with their rewards, against decoding by the exact Q.

    The regret is KL(exact decoding || decoding) as a share of KL(exact decoding || reference).
    """

    def run(world: World, seed: int) -> Tensor:
        problem, generator = world.problem, torch.Generator().manual_seed(seed)
        module = make(policy=world.policy, seed=seed, **decaying(lr))
        drawn = torch.multinomial((problem.reference.exp() / problem.shape[0]).flatten(), completions, replacement=True,
                                  generator=generator)  # fmt: skip

        def collate(numbers: Tensor) -> MicroBatch:
            rows = drawn[numbers]
            batch = RewardedBatch(rows_as_tokens(problem, rows), problem.scores.flatten()[rows].float())
            tokens = batch.completions
            return MicroBatch(batch, int(tokens.response_mask.sum()), len(rows), tokens.count)

        module.collate = collate
        fit(module, numbered(completions, batch_size), max_epochs=epochs)
        heads = module.q_heads.targets
        guided = GuidedModel(world.policy.model, heads, beta=weight, prior=prior)
        with torch.no_grad():
            return problem.logprobs(Policy(model=guided, tokenizer=world.policy.tokenizer))

    def target(problem: ExactProblem) -> Tensor:
        return guided_optimum(problem, weight, prior, value)

    def regret(problem: ExactProblem, logprobs: Tensor) -> float:
        best = target(problem)
        apart, at_first = ((best.exp() * (best - x)).sum() for x in (logprobs, problem.reference))
        return float(apart / at_first)

    return Solver(run, target=target, regret=regret, bound=bound)


# With a bound on the ratio, four steps an iteration; without one they have to be on-policy, one each.
BOUNDED = {"iterations": 100, "lr": 5e-3, "rollout_batch_size": 512, "minibatch_size": 128}
ON_POLICY = {"iterations": 250, "lr": 5e-3, "rollout_batch_size": 256, "minibatch_size": 256}
SOLVERS: dict[str, Solver] = {
    "ppo": online(PPO, **{**BOUNDED, "iterations": 150}, ppo_epochs=1),
    "ppo, kl penalty": online(PPO, **{**BOUNDED, "iterations": 150}, ppo_epochs=1, clip=AdaptiveKLPenalty(target=0.02)),
    # Its step is as long near the optimum as far from it, so it has to be short.
    "trpo": online(TRPO, iterations=80, lr=1e-2, rollout_batch_size=512, minibatch_size=512, max_kl=0.005, lam=1.0),
    "a2c": online(A2C, **ON_POLICY, value_coef=0.1),
    "reinforce": online(  # what a baseline saves: completions
        Reinforce, iterations=200, lr=5e-3, rollout_batch_size=1024, minibatch_size=1024, baseline=NoBaseline()
    ),
    "reinforce, batch mean": online(Reinforce, **ON_POLICY),
    "reinforce, value": online(Reinforce, **ON_POLICY, baseline=ValueBaseline()),
    "reinforce++": online(ReinforcePP, **BOUNDED),
    "rloo": online(RLOO, **BOUNDED, group_size=4),
    "grpo": online(GRPO, **BOUNDED, group_size=8),
    "dr grpo": online(DrGRPO, **BOUNDED, group_size=8),
    "dapo": online(DAPO, **BOUNDED, group_size=8),
    "gspo": online(GSPO, **BOUNDED, group_size=8, clip=SymmetricClip()),
    "online dpo": online(OnlineDPO, **BOUNDED, group_size=2),
    "raft, best of 4": imitation(
        RAFT, lambda problem: problem.best_of(4), rollout_batch_size=32768, group_size=4, epochs=25
    ),
    "expert iteration": imitation(
        ExpertIteration, of_the_right, rollout_batch_size=16384, threshold=RIGHT, epochs=30
    ),
    "dpo": dpo(pairs=800_000, batch_size=4096, epochs=4, lr=5e-3),
    "ilql": q_learning(
        functools.partial(ILQL, expectile=EXPECTILE, gamma=1.0, cql_coef=0.0, beta=GUIDE, polyak=0.1),
        value=expectile_of, weight=GUIDE, prior=1.0, completions=400_000, batch_size=512, epochs=1, lr=3e-3, bound=0.1,
    ),
    "dqn": q_learning(
        functools.partial(DQN, gamma=1.0, temperature=1.0, polyak=0.1), value=lambda values, _: values.max(),
        weight=1.0, prior=0.0, completions=400_000, batch_size=512, epochs=1, lr=3e-3, bound=0.1,
    ),
}  # fmt: skip


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What one seed gave."""

    regret: float
    kl: float
    total_variation: float
    seconds: float


@dataclass
class Row:
    name: str
    bound: float
    results: list[Result] = field(default_factory=list)

    def text(self) -> str:
        regrets = [result.regret for result in self.results]
        columns = [
            f"{self.name:<24}", f"{statistics.mean(regrets):8.4f}", f"{max(regrets):8.4f}", f"{self.bound:6.2f}",
            *(f"{statistics.mean(getattr(r, name) for r in self.results):8.3f}" for name in ("kl", "total_variation")),
            f"{max(r.seconds for r in self.results):8.1f}",
            "" if max(regrets) <= self.bound else "  over its bound",
        ]  # fmt: skip
        return " ".join(columns)


HEADER = f"{'algorithm':<24} {'regret':>8} {'worst':>8} {'bound':>6} {'KL':>8} {'TV':>8} {'CPU s':>8}"


def solve(name: str, seed: int) -> Result:
    """Runs one algorithm on one seed's problem, and measures it."""
    solver, world = SOLVERS[name], make_world(seed)
    start = time.process_time()
    found = solver.run(world, seed)
    seconds = time.process_time() - start
    with torch.no_grad():
        logprobs = found if isinstance(found, Tensor) else world.problem.logprobs(found)
    distance = world.problem.measure(logprobs, solver.target(world.problem))
    regret = solver.regret(world.problem, logprobs)
    return Result(regret, distance.kl, distance.total_variation, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("algorithms", nargs="*", choices=[*SOLVERS, []], default=[])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)
    print(f"{len(PROMPTS)} prompts, {make_world(0).problem.shape[1]} completions each, beta {BETA}, seeds: "
          f"{arguments.seeds}. Regret: mean and worst; KL to the reference, total variation to the target: means;\n"
          "CPU seconds of the slowest seed")
    print(HEADER)
    for name in arguments.algorithms or SOLVERS:
        row = Row(name, SOLVERS[name].bound, [solve(name, seed) for seed in range(arguments.seeds)])
        print(row.text(), flush=True)


if __name__ == "__main__":
    main()
