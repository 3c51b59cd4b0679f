"""Every algorithm against the exact optimum of a problem small enough to be solved: one table.

    python -m tests.benchmarks.exact_optimum                       all algorithms, 3 seeds
    python -m tests.benchmarks.exact_optimum ppo grpo --seeds 1    some of them
    python -m tests.benchmarks.exact_optimum --jobs 2              two processes, one thread each

A seed makes the reference, the reward table and the run. An algorithm is added as one function and its line in
``SOLVERS``: it gets a ``World`` and a seed, trains ``world.policy`` by its own public interface (a Lightning fit, on
prompts or on completions of the reference), and says what it found. ``target`` says what it is measured by, unless that
is the KL-regularised optimum: best-of-n's closed form, a Q by dynamic programming, the minimiser of a loss over all
pairs (``preference_goals.py``). A regret over its bound is named and makes the exit status 1.
"""

import argparse
import functools
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
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
    IPO,
    KTO,
    ORPO,
    PPO,
    RAFT,
    RLOO,
    TRPO,
    DrGRPO,
    ExpertIteration,
    OnlineDPO,
    Reinforce,
    ReinforcePP,
    RobustDPO,
)
from lit_rlhf.algorithms.kto import LabelledBatch
from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.algorithms.rewarded import RewardedBatch
from lit_rlhf.baseline import NoBaseline, ValueBaseline
from lit_rlhf.clip import AdaptiveKLPenalty, SymmetricClip
from lit_rlhf.exact import Distance, ExactProblem, letters_policy, table_reward
from lit_rlhf.kl import FixedKL, NoKL
from lit_rlhf.models.critic import SeparateCritic
from lit_rlhf.models.guided import GuidedModel, smallest
from lit_rlhf.models.policy import Policy
from lit_rlhf.quiet import quiet
from lit_rlhf.rollout.sampler import Sampler

from .preference_goals import Loss, cdpo_loss, ipo_loss, kto_loss, kto_target, minimum_of, orpo_loss

# Each of several letters: a rotary network without a beginning of sequence cannot count equal ones, so that after the
# prompt "a" the completions' prefixes "", "a" and "aa" would be one state, and p* out of its reach.
PROMPTS = ("ab", "ba", "cd", "eab")
BETA = 0.5
STEPS = 3
BOUND = 0.05  # of a regret


@dataclass
class World:
    """A problem, and the policy that is to solve it; the problem's reference is the policy before training."""

    policy: Policy
    reward: Any
    problem: ExactProblem
    rows: list[dict[str, Any]]


@dataclass
class Found:
    """What a run came to.

    Args:
        logprobs: (X, Y) log-probabilities of the policy, or of the decoding where that is no policy's softmax.
        errors: by name ("Q", "V"), |learned - exact| of every entry of a table that dynamic programming gives.
    """

    logprobs: Tensor
    errors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Solver:
    """How an algorithm is run and measured.

    Args:
        run: trains ``world.policy`` by a seed.
        target: log-probabilities (X, Y) of the best policy for a goal of the algorithm's own; None is p*. Its regret
            is KL(target || policy) as a share of KL(target || reference).
        loss: smallest at the target; where it is given, its excess over that as a share of the reference's is the
            regret instead.
        bound: of the regret.
    """

    run: Callable[[World, int], Found]
    target: Callable[[ExactProblem], Tensor] | None = None
    loss: Loss | None = None
    bound: float = BOUND

    def measure(self, problem: ExactProblem, logprobs: Tensor) -> Distance:
        """The distance of a policy (X, Y) from the target, its regret in terms of this algorithm's goal."""
        if self.target is None:
            return problem.measure(logprobs)
        target = self.target(problem)
        if self.loss is not None:
            least, first, found = (self.loss(problem, x) for x in (target, problem.reference, logprobs))
        else:
            least = 0.0
            first, found = (
                torch.where(target > -torch.inf, target.exp() * (target - x), 0).sum()
                for x in (problem.reference, logprobs)
            )
        return replace(problem.measure(logprobs, target), regret=float((found - least) / (first - least)))


def make_world(seed: int) -> World:
    policy, reward = letters_policy(seed=seed), table_reward(seed=seed)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    problem = ExactProblem(policy=policy, rows=rows, reward=reward, beta=BETA, max_new_tokens=STEPS)
    return World(policy, reward, problem, rows)


@torch.no_grad()
def policy_found(world: World) -> Found:
    return Found(world.problem.logprobs(world.policy))


def exact_gradient(world: World, seed: int, steps: int = 300, lr: float = 7e-3) -> Found:
    """What is left without any noise of sampling: by Adam on J itself, of which every completion is known."""
    settings = decaying(lr)
    optimizer = settings["optimizer"](world.policy.parameters())
    scheduler = settings["scheduler"](optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-world.problem.objective(world.problem.logprobs(world.policy))).backward()
        optimizer.step()
        scheduler.step()
    return policy_found(world)


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

    def run(world: World, seed: int) -> Found:
        module = algorithm(
            policy=world.policy, reward=world.reward, sampler=Sampler(max_new_tokens=STEPS), seed=seed,
            **{"kl": FixedKL(coef=BETA), **decaying(lr), **settings},
        )  # fmt: skip
        # As one batch, for every pass over a loader has its own seed, and setting it takes longer than all this.
        prompts = [row["prompt"] for row in world.rows]
        batch = prompts * (module.rollout_batch_size // module.group_size // len(prompts))
        fit(module, [{"prompt": batch}], max_epochs=iterations)
        return policy_found(world)

    return Solver(run)


def fit(module: L.LightningModule, loader: Any, **trainer: Any) -> None:
    L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **trainer,
    ).fit(module, loader)  # fmt: skip


def imitation(algorithm: type[OnlineAlgorithm], target: Callable[[ExactProblem], Tensor], **settings: Any) -> Solver:
    """One iteration of an algorithm that imitates some of its completions: its target is a distribution.

    What it minimises is KL(target || policy), of which n imitated completions of a prompt leave about
    (completions that matter - 1) / (2 n) nats.
    """
    solver = online(algorithm, iterations=1, kl=NoKL(), **settings)
    return Solver(solver.run, target=target)


RIGHT = 0.5  # what expert iteration takes for right


def of_the_right(problem: ExactProblem) -> Tensor:
    return torch.where(problem.scores >= RIGHT, problem.reference, -torch.inf).log_softmax(-1)


# ---- offline --------------------------------------------------------------------------------------------------------


def preference(
    make: Callable[..., OfflineAlgorithm],
    target: Callable[[ExactProblem], Tensor] | None = None,
    *,
    pairs: int,
    batch_size: int,
    epochs: int,
    lr: float,
    flipped: float = 0.0,
) -> Solver:
    """An algorithm of pairs, on preferences drawn from the reward; DPO's optimum is p* at the problem's beta."""

    def run(world: World, seed: int) -> Found:
        drawn = world.problem.preferences(pairs, seed=seed, flipped=flipped)
        module = make(policy=world.policy, seed=seed, **decaying(lr))
        module.collate = lambda numbers: world.problem.pair_batch(drawn[numbers])
        fit(module, numbered(pairs, batch_size), max_epochs=epochs)
        return policy_found(world)

    return Solver(run, target)


def kto(*, completions: int, batch_size: int, epochs: int, lr: float) -> Solver:
    """KTO on completions of the reference, desirable with probability sigmoid(r / beta), by its loss.

    A KL would not do: the loss is bounded, so that what a completion of very low probability costs it is next to
    nothing and has no gradient, while it is many nats. Even on the exact loss Adam leaves some good ones there, and
    which ones depends on the draws: other rates and batch sizes left 0.02 to 0.13 of the loss.
    """

    def run(world: World, seed: int) -> Found:
        problem, generator = world.problem, torch.Generator().manual_seed(seed)
        module = KTO(policy=world.policy, beta=BETA, seed=seed, **decaying(lr))
        drawn = drawn_completions(problem, completions, generator)
        desirable = torch.rand(completions, generator=generator) < torch.sigmoid(problem.scores.flatten()[drawn] / BETA)

        def collate(numbers: Tensor) -> MicroBatch:
            rows, count = drawn[numbers], problem.shape[1]
            mismatched = rows - rows % count + rows.roll(1) % count
            tokens = problem.completion_batch(rows)
            batch = LabelledBatch(tokens, desirable[numbers], problem.completion_batch(mismatched))
            return MicroBatch(batch, len(rows), len(rows), tokens.count)

        module.collate = collate
        fit(module, numbered(completions, batch_size), max_epochs=epochs)
        return policy_found(world)

    return Solver(run, functools.partial(kto_target, beta=BETA), functools.partial(kto_loss, beta=BETA), bound=0.1)


def drawn_completions(problem: ExactProblem, count: int, generator: torch.Generator) -> Tensor:
    """(count,) rows of the problem's rollout, as the reference draws them for prompts that are equally likely."""
    shares = problem.reference.exp().flatten() / problem.shape[0]
    return torch.multinomial(shares, count, replacement=True, generator=generator)


def numbered(count: int, batch_size: int) -> DataLoader:
    return DataLoader(range(count), batch_size=batch_size, shuffle=True, collate_fn=torch.tensor)


GUIDE = 1.0  # beta of ILQL's decoding
EXPECTILE = 0.7
CONSERVATIVE = 0.1  # weight of ILQL's CQL term, its default


def expectile_of(values: Tensor, logprobs: Tensor) -> Tensor:
    """The expectile of a distribution over values: v with tau E[(q - v)+] = (1 - tau) E[(v - q)+], by bisection."""
    low, high = values.min(), values.max()
    for _ in range(60):
        middle = (low + high) / 2
        over = (logprobs.exp() * torch.where(values > middle, EXPECTILE, EXPECTILE - 1) * (values - middle).abs()).sum()
        low, high = (middle, high) if over > 0 else (low, middle)
    return low


def conservative(targets: Tensor, logprobs: Tensor, coef: float = CONSERVATIVE) -> Tensor:
    """Where squared error and CQL term balance: min_q sum_a p_a [(q_a - y_a)^2 - c q_a] + c log sum_a exp q_a.

    By Newton's method; the goal is strictly convex.
    """
    shares, q = logprobs.exp(), targets
    for _ in range(50):
        soft = q.softmax(0)
        slope = 2 * shares * (q - targets) + coef * (soft - shares)
        q = q - torch.linalg.solve((2 * shares + coef * soft).diag() - coef * soft.outer(soft), slope)
    return q


Step = Callable[[Tensor, Tensor], Tensor]  # of numbers (V,) by token and log ref (V,), at one prefix
Table = list[dict[tuple[int, ...], Tensor]]  # for every prompt: prefix -> numbers


@dataclass
class QGoal:
    """What Q-learning converges to, and how it decodes: softmax(prior * log ref + weight * Q).

    Args:
        fit: Bellman targets -> the Q (V,) whose loss is smallest there.
        value: Q (V,) -> V, of which Bellman targets are made.
    """

    weight: float
    prior: float
    value: Step
    fit: Step = lambda targets, _: targets

    def tables(self, problem: ExactProblem) -> tuple[Table, Table]:
        """Q (V,) and V () by dynamic programming."""
        targets = problem.action_values(lambda y, ref: self.value(self.fit(y, ref), ref))
        q_table: Table = []
        v_table: Table = []
        for tree, conditionals in zip(targets, problem.next_tokens(), strict=True):
            q_table.append({prefix: self.fit(y, conditionals[prefix]) for prefix, y in tree.items()})
            v_table.append({prefix: self.value(q, conditionals[prefix]) for prefix, q in q_table[-1].items()})
        return q_table, v_table

    def decoding(self, problem: ExactProblem) -> Tensor:
        """(X, Y) log-probabilities of completions decoded by that Q."""
        rows = []
        for q_values, conditionals in zip(self.tables(problem)[0], problem.next_tokens(), strict=True):
            steps = {p: (self.prior * conditionals[p] + self.weight * q).log_softmax(-1) for p, q in q_values.items()}
            rows.append([sum(steps[c[:t]][c[t]] for t in range(len(c))) for c in problem.completions])
        return torch.tensor(rows).double()


ILQL_GOAL = QGoal(weight=GUIDE, prior=1.0, value=expectile_of, fit=conservative)
DQN_GOAL = QGoal(weight=1.0, prior=0.0, value=lambda q, _: q.max())


def errors(problem: ExactProblem, learned: Tensor, exact: Table) -> Tensor:
    """|learned - exact| of every entry; ``learned`` (X * Y, T, ...) before each token of ``problem.rollout``."""
    found = {}
    for row, values in enumerate(learned):
        prompt, completion = divmod(row, problem.shape[1])
        for t in range(len(problem.completions[completion])):
            found[prompt, problem.completions[completion][:t]] = values[t]
    return torch.cat([
        (found[prompt, prefix].double() - wanted).abs().reshape(-1)
        for prompt, tree in enumerate(exact) for prefix, wanted in tree.items()
    ])  # fmt: skip


def q_learning(
    make: Callable[..., OfflineAlgorithm], goal: QGoal, *, completions: int, batch_size: int, epochs: int, lr: float
) -> Solver:
    """Q-learning on completions of the reference with their rewards, against decoding by the exact Q.

    The regret is KL(exact decoding || decoding) as a share of KL(exact decoding || reference).
    """

    def run(world: World, seed: int) -> Found:
        problem, generator = world.problem, torch.Generator().manual_seed(seed)
        module = make(policy=world.policy, seed=seed, **decaying(lr))
        drawn = drawn_completions(problem, completions, generator)

        def collate(numbers: Tensor) -> MicroBatch:
            rows = drawn[numbers]
            batch = RewardedBatch(problem.completion_batch(rows), problem.scores.flatten()[rows].float())
            tokens = batch.completions
            return MicroBatch(batch, int(tokens.response_mask.sum()), len(rows), tokens.count)

        module.collate = collate
        fit(module, numbered(completions, batch_size), max_epochs=epochs)
        return q_found(problem, module, goal)

    return Solver(run, target=goal.decoding)


@torch.no_grad()
def q_found(problem: ExactProblem, module: ILQL | DQN, goal: QGoal) -> Found:
    """Decoding guided by the learned Q, and how far Q and V are from the exact ones."""
    policy, heads = module.policy, module.q_heads.targets
    guided = GuidedModel(policy.model, heads, beta=goal.weight, prior=goal.prior)
    logprobs = problem.logprobs(Policy(model=guided, tokenizer=policy.tokenizer))
    rows = problem.rollout
    hidden = policy(rows.prompt_ids, rows.prompt_mask, rows.response_ids, rows.response_mask).hidden.float()
    q_exact, v_exact = goal.tables(problem)
    found = Found(logprobs, {"Q": errors(problem, smallest(heads, hidden), q_exact)})
    if isinstance(module, ILQL):
        found.errors["V"] = errors(problem, module.v_head(hidden).squeeze(-1), v_exact)
    return found


# With a bound on the ratio, four steps an iteration; without one they have to be on-policy, one each.
BOUNDED = {"iterations": 120, "lr": 2e-3, "rollout_batch_size": 1024, "minibatch_size": 256}
ON_POLICY = {"iterations": 200, "lr": 3e-3, "rollout_batch_size": 1024, "minibatch_size": 1024}
PAIRS = {"pairs": 1_600_000, "batch_size": 8192, "epochs": 4, "lr": 1e-2}
FLIPPED = 0.1  # share of labels that robust DPO finds turned round, and that conservative DPO expects
ODDS_WEIGHT = 1.0  # of ORPO: enough for its optimum to differ clearly from that of supervised fine-tuning
SOLVERS: dict[str, Solver] = {
    "exact gradient": Solver(exact_gradient),
    "ppo": online(PPO, **BOUNDED, ppo_epochs=1),
    "ppo, kl penalty": online(PPO, **BOUNDED, ppo_epochs=1, clip=AdaptiveKLPenalty(target=0.02)),
    # Its step is as long near the optimum as far from it: it needs a critic that leaves little noise in its direction.
    "trpo": online(
        TRPO, critic=SeparateCritic, iterations=90, lr=5e-3, epochs=6, rollout_batch_size=512, minibatch_size=512,
        max_kl=0.005, lam=1.0,
    ),
    "a2c": online(A2C, **ON_POLICY, value_coef=0.1),
    "reinforce": online(Reinforce, **{**ON_POLICY, "iterations": 300}, baseline=NoBaseline()),
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
        RAFT, lambda problem: problem.best_of(4), rollout_batch_size=131072, group_size=4, minibatch_size=1024,
        epochs=16, lr=1e-2,
    ),
    "expert iteration": imitation(
        ExpertIteration, of_the_right, rollout_batch_size=65536, threshold=RIGHT, minibatch_size=4096, epochs=24,
        lr=5e-3,
    ),
    "dpo": preference(functools.partial(DPO, beta=BETA), **PAIRS),
    "robust dpo": preference(
        functools.partial(RobustDPO, beta=BETA, label_smoothing=FLIPPED), flipped=FLIPPED, **PAIRS
    ),
    "cdpo": preference(
        functools.partial(DPO, beta=BETA, label_smoothing=FLIPPED),
        minimum_of(cdpo_loss, beta=BETA, smoothing=FLIPPED),
        **PAIRS,
    ),
    "ipo": preference(functools.partial(IPO, beta=BETA), minimum_of(ipo_loss, beta=BETA), **PAIRS),
    "orpo": preference(
        functools.partial(ORPO, beta=ODDS_WEIGHT), minimum_of(orpo_loss, weight=ODDS_WEIGHT), **PAIRS
    ),
    "kto": kto(completions=1_000_000, batch_size=1024, epochs=1, lr=2e-3),
    "ilql": q_learning(
        functools.partial(ILQL, expectile=EXPECTILE, gamma=1.0, cql_coef=CONSERVATIVE, beta=GUIDE, polyak=0.1),
        ILQL_GOAL,
        completions=400_000, batch_size=512, epochs=1, lr=3e-3,
    ),
    "dqn": q_learning(
        functools.partial(DQN, gamma=1.0, temperature=1.0, polyak=0.1),
        DQN_GOAL,
        completions=400_000, batch_size=512, epochs=1, lr=3e-3,
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
    errors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Row:
    name: str
    results: list[Result] = field(default_factory=list)
    bound: float = BOUND

    @property
    def worst(self) -> float:
        return max(result.regret for result in self.results)

    @property
    def over(self) -> bool:
        return self.worst > self.bound

    def text(self) -> str:
        columns = [
            f"{self.name:<24}",
            f"{self.mean('regret'):8.3f}",
            f"{self.worst:8.3f}",
            *(f"{self.mean(name):8.3f}" for name in ("kl", "total_variation")),
            f"{max(r.seconds for r in self.results):8.1f}",
            f"  over {self.bound}" if self.over else "",
        ]  # fmt: skip
        return " ".join(columns).rstrip()

    def mean(self, name: str) -> float:
        return statistics.mean(getattr(result, name) for result in self.results)

    def errors(self) -> list[str]:
        """A line for each table of values that was compared: the mean and the largest error, over all seeds."""
        together = {name: torch.cat([r.errors[name] for r in self.results]) for name in self.results[0].errors}
        return [f"{self.name} {name}: {x.mean():.3f} mean, {x.max():.3f} largest" for name, x in together.items()]


HEADER = f"{'algorithm':<24} {'regret':>8} {'worst':>8} {'KL':>8} {'TV':>8} {'CPU s':>8}"


def solve(name: str, seed: int) -> Result:
    """Runs one algorithm on one seed's problem, and measures it."""
    solver, world = SOLVERS[name], make_world(seed)
    start = time.process_time()
    found = solver.run(world, seed)
    seconds = time.process_time() - start
    distance = solver.measure(world.problem, found.logprobs)
    return Result(distance.regret, distance.kl, distance.total_variation, seconds, found.errors)


def prepare() -> None:
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("algorithms", nargs="*", choices=[*SOLVERS, []], default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, with a thread each")
    arguments = parser.parse_args()
    prepare()
    print(
        f"{len(PROMPTS)} prompts, {make_world(0).problem.shape[1]} completions each, beta {BETA}, seeds: "
        f"{arguments.seeds}. Regret: mean and worst; KL to the reference, total variation to the target: means;\n"
        "CPU seconds of the slowest seed"
    )
    print(HEADER, flush=True)
    rows = [Row(name, bound=SOLVERS[name].bound) for name in arguments.algorithms or SOLVERS]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn"), initializer=prepare) as pool:
        runs = [(row, [pool.submit(solve, row.name, seed) for seed in range(arguments.seeds)]) for row in rows]
        for row, results in runs:
            row.results = [result.result() for result in results]
            print(row.text(), flush=True)
    if lines := [line for row in rows for line in row.errors()]:
        print("\n|learned - exact| of every prompt, prefix and token, in units of the reward:", *lines, sep="\n")
    return int(any(row.over for row in rows))


if __name__ == "__main__":
    sys.exit(main())
