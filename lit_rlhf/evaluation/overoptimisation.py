"""How far a proxy reward can be trusted: gold reward over the distance from the first policy.

Gao, Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization" (arXiv:2210.10760). Their distance is
d = sqrt(KL(policy || first policy)) in sqrt(nats), and R(d), the gold reward less that of the first policy, follows

    R_bon(d) = d (alpha - beta d)          best-of-n
    R_RL(d)  = d (alpha - beta log d)      reinforcement learning
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlhf.config import read_config
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.statistics import Interval, bootstrap
from lit_rlhf.run_folder import EVALUATION, METRICS, SAMPLES, read_rows, whole_lines

#: What beta is multiplied by, as a function of the distance; 0 at a distance of 0.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "best_of_n": lambda d: d.square(),
    "rl": lambda d: torch.xlogy(d, d),
}

#: Of the completions of each prompt, those among which the best is chosen.
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_BEST_OF_N = "best_of_n"
_MEASURED = {"kl": "objective/kl", "proxy": "reward/model", "gold": "gold/model"}


class Fit(NamedTuple):
    """R(d) of one form, with intervals.

    Attributes:
        form: ``best_of_n`` or ``rl``.
        alpha: the slope where optimisation begins (for ``rl`` at d = 1).
        beta: what bends the curve down; about 0 if nothing is over-optimised.
        r_squared: share of the variance of R that the curve explains.
    """

    form: str
    alpha: Interval
    beta: Interval
    r_squared: float

    def __call__(self, distance: Tensor) -> Tensor:
        """R at distances of any shape."""
        return self.alpha.value * distance - self.beta.value * FORMS[self.form](distance)

    @property
    def peak(self) -> float:
        """The distance at which R is highest, infinite where beta is not positive.

        Computed from alpha and beta; it may lie beyond the data.
        """
        alpha, beta = self.alpha.value, self.beta.value
        if beta <= 0:
            return math.inf
        return alpha / (2 * beta) if self.form == "best_of_n" else math.exp(alpha / beta - 1)


def read_sweep(folder: Path) -> list[dict[str, float]]:
    """What the runs of a multirun of ``experiment=overoptimisation_sweep`` measured, iteration by iteration.

    Returns:
        Rows of ``comparisons`` (that the proxy has seen), ``kl_coef``, ``seed``, ``iteration``, ``kl`` (nats per
        completion), ``proxy`` and ``gold``: the mean scores of the iteration's completions as the models give them.

    Raises:
        UserError: there is no such job in the folder, or a file of one cannot be read.
    """
    rows = []
    for job in _jobs(folder, "ppo"):
        config = read_config(job / "ppo", needs=["kl", "seed"])
        settings = {"comparisons": _comparisons(job), "kl_coef": config.kl.coef, "seed": config.seed}
        metrics = job / "ppo" / METRICS
        columns, logged = read_rows(metrics)
        if missing := [name for name in _MEASURED.values() if name not in columns]:
            raise UserError(f"{metrics} has no column {missing[0]}; there are {', '.join(columns)}")
        for row in logged:
            if all(name in row for name in _MEASURED.values()):  # not the validation before training
                measured = {key: float(row[name]) for key, name in _MEASURED.items()}
                rows.append({**settings, "iteration": int(row["iteration"]), **measured})
    return rows


def read_best_of_n(folder: Path, parts: int = 10) -> list[dict[str, float]]:
    """What the best of n completions by each proxy score, from evaluations in the jobs' folders ``best_of_n``.

    Those of ``lit-rlhf eval run=<job>/ppo checkpoint=null samples_per_prompt=64 paths.output_dir=<job>/best_of_n``.

    Args:
        folder: of a multirun of ``experiment=overoptimisation_sweep``.
        parts: into how many parts the prompts are dealt out, so that intervals over prompts can be had.

    Returns:
        Rows of ``comparisons``, ``seed``, ``part``, ``n``, ``kl`` (nats per completion), ``proxy`` and ``gold``: mean
        scores of the chosen completions of the part's prompts.

    Raises:
        UserError: there is no such evaluation, or its files cannot be read.
    """
    rows = []
    for job in _jobs(folder, _BEST_OF_N):
        settings = {"comparisons": _comparisons(job), "seed": read_config(job / "ppo", needs=["seed"]).seed}
        proxy, gold = _scores(job / _BEST_OF_N)
        for n in (n for n in COUNTS if n <= proxy.shape[1]):
            best = torch.stack([best_of_n(proxy, scores, n) for scores in (proxy, gold)])
            for part in range(min(parts, len(proxy))):
                means = dict(zip(("proxy", "gold"), best[:, part::parts].mean(1).tolist(), strict=True))
                rows.append({**settings, "part": part, "n": n, "kl": best_of_n_kl(n), **means})
    return rows


def _scores(evaluation: Path) -> tuple[Tensor, Tensor]:
    """(B, N) scores by proxy and gold of the policy's completions in the folder of an evaluation."""
    try:
        count = json.loads((evaluation / EVALUATION).read_text())["samples_per_prompt"]
        rows = [row for row in map(json.loads, whole_lines(evaluation / SAMPLES)) if row["policy"] == "policy"]
        scores = torch.tensor([[row["components"]["model"], row["gold"]["model"]] for row in rows], dtype=torch.double)
        prompts = [row["prompt"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{evaluation} is no evaluation by two reward models: {error!r}") from None
    if not rows or prompts != prompts[: len(rows) // count] * count:  # all prompts, then all of them again
        raise UserError(f"{evaluation / SAMPLES} does not hold {count} completions of each prompt at one temperature")
    proxy, gold = scores.reshape(count, -1, 2).unbind(-1)
    return proxy.T, gold.T


def _jobs(folder: Path, part: str) -> list[Path]:
    """The folders of a multirun's jobs that hold the folder ``part``."""
    jobs = sorted(path.parent for path in Path(folder).glob(f"*/{part}"))
    if not jobs:
        raise UserError(f"{folder} is no multirun of experiment=overoptimisation_sweep: there is no {part} in its jobs")
    return jobs


def _comparisons(job: Path) -> int:
    return read_config(job / "proxy", needs=["data"]).data.pairs_per_epoch



def fit(distance: Tensor, reward: Tensor, form: str, *, runs: Tensor | None = None) -> Fit:
    """Least squares of a form of R to measurements (N,), with intervals from the bootstrap over them.

    Args:
        distance: sqrt(KL) in sqrt(nats), at least 0.
        reward: gold reward less that of the first policy.
        form: ``best_of_n`` or ``rl``.
        runs: (N,) numbers of the runs that they come from; a run's measurements are then drawn together, because one
            follows from the other.

    Raises:
        UserError: there is no such form, distances below 0 or not finite numbers, fewer than three of them, or a single
            run, of which there is no interval.
    """
    if form not in FORMS:
        raise UserError(f"form={form!r} is not one of {', '.join(FORMS)}")
    if distance.shape != reward.shape or distance.ndim != 1 or len(distance) < 3:
        raise UserError(f"a fit needs as many rewards as distances, three or more: got {tuple(distance.shape)} "
                        f"distances and {tuple(reward.shape)} rewards")  # fmt: skip
    if runs is not None and (runs.shape != distance.shape or len(runs.unique()) < 2):
        raise UserError("a fit's runs are a number for each measurement, of two runs or more: one has no spread")
    distance, reward = distance.double(), reward.double()
    if not (torch.isfinite(distance).all() and torch.isfinite(reward).all() and (distance >= 0).all()):
        raise UserError("distances and rewards must be finite, and distances not below 0")
    rows = torch.stack([distance, -FORMS[form](distance), reward], dim=1)
    alpha, beta = (bootstrap(rows, lambda x, weights, i=i: _solve(x, weights)[:, i], groups=runs) for i in range(2))
    found = Fit(form, alpha, beta, 0.0)
    left = (reward - found(distance)).square().sum() / (reward - reward.mean()).square().sum()
    return found._replace(r_squared=float(1 - left))


def _solve(rows: Tensor, weights: Tensor) -> Tensor:
    """alpha and beta (R, 2) of each of R weightings (R, N) of rows (N, 3)."""
    features, targets = rows[:, :2], rows[:, 2]
    gram = torch.einsum("rn,ni,nj->rij", weights, features, features)
    moments = torch.einsum("rn,ni,n->ri", weights, features, targets)
    # Where a sample holds too few distances for both, the smallest solution.
    return torch.einsum("rij,rj->ri", torch.linalg.pinv(gram, hermitian=True), moments)


def best_of_n_kl(n: int) -> float:
    """KL(best of n || the policy that is drawn from) in nats, log n - (n - 1) / n (Stiennon et al. 2020, app. G.3).

    >>> best_of_n_kl(1)
    0.0
    """
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Tensor, gold: Tensor, n: int) -> Tensor:
    """The gold score that the completion with the highest proxy score of ``n`` has on average, (B,).

    Unbiased, from all subsets of N >= n completions at once (Nakano et al. 2021, arXiv:2112.09332, app. I): of the
    completions in ascending order of the proxy, the i-th is the best of C(i - 1, n - 1) among C(N, n) subsets. Of
    several with the same proxy score, each is as likely to be taken.

    Args:
        proxy, gold: (B, N), scores of N completions of each prompt.

    Raises:
        UserError: n is not between 1 and N.
    """
    count = proxy.shape[1]
    if not 1 <= n <= count:
        raise UserError(f"the best of {n} cannot be known from {count} completions of each prompt")
    ways = [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]
    weights = torch.tensor(ways, dtype=torch.double)
    ordered, order = proxy.sort(dim=1)
    gold = gold.double().gather(1, order)
    # Alike scores share the weight of their places.
    new = torch.ones_like(ordered, dtype=torch.long)
    new[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).long()
    run = new.cumsum(1) - 1
    shared = torch.zeros(gold.shape, dtype=torch.double).scatter_add_(1, run, weights.expand_as(gold))
    sizes = torch.zeros(gold.shape, dtype=torch.double).scatter_add_(1, run, torch.ones_like(gold))
    return (gold * (shared / sizes.clamp(min=1)).gather(1, run)).sum(1)
