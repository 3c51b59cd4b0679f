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
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_rlhf.algorithms import (
    A2C,
    DAPO,
    GRPO,
    GSPO,
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
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.baseline import NoBaseline, ValueBaseline
from lit_rlhf.clip import AdaptiveKLPenalty, SymmetricClip
from lit_rlhf.exact import ExactProblem, letters_policy, table_reward
from lit_rlhf.kl import FixedKL, NoKL
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
        fit(module, [{"prompt": [row["prompt"] for row in world.rows]}], max_epochs=iterations)
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


# With a bound on the ratio, four steps an iteration; without one they have to be on-policy, one each.
BOUNDED = {"iterations": 100, "lr": 5e-3, "rollout_batch_size": 512, "minibatch_size": 128}
ON_POLICY = {"iterations": 250, "lr": 5e-3, "rollout_batch_size": 256, "minibatch_size": 256}
SOLVERS: dict[str, Solver] = {
    "ppo": online(PPO, **{**BOUNDED, "iterations": 150}, ppo_epochs=1),
    "ppo, kl penalty": online(PPO, **{**BOUNDED, "iterations": 150}, ppo_epochs=1, clip=AdaptiveKLPenalty(target=0.02)),
    # Its step is as long near the optimum as far from it, so it has to be short.
    "trpo": online(TRPO, iterations=60, lr=1e-2, rollout_batch_size=512, minibatch_size=512, max_kl=0.005, lam=1.0),
    "a2c": online(A2C, **ON_POLICY, value_coef=0.1),
    "reinforce": online(Reinforce, **ON_POLICY, baseline=NoBaseline()),
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
        ExpertIteration, of_the_right, rollout_batch_size=16384, threshold=RIGHT, epochs=10
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
