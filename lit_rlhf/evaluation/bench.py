"""The place where policies are measured one after another, by the same rewards on the same data."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from lit_rlhf.config import instantiate
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.held_out import documents, measure_texts
from lit_rlhf.evaluation.policies import load_policy, load_weights, named_by, said_of
from lit_rlhf.evaluation.summary import Rows, summarize, verified
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference, make_reference, require_same_reference
from lit_rlhf.rewards.scoring import score
from lit_rlhf.train import Run, build, read_checkpoint, resolve_precision

#: Names of the policy and of what it is compared with, in tables and files; others go by what they were given as.
POLICY, REFERENCE = "policy", "reference"


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and with what.

    Attributes:
        config: of a training run: policy, data, rewards, sampler, trainer.
        checkpoint: with the policy's weights; None: those that ``config.policy`` has from the start.
        started: whether the policy before its training is known, so that there is something to compare with.
        own_reward: whether the reward is the one that the run learned from.
        measures: "completions", "text", "pairs": what there is data for.
    """

    config: DictConfig
    checkpoint: Path | None
    started: bool
    own_reward: bool
    measures: frozenset[str]


@dataclass
class Measured:
    """What was found out so far, by policy: rows and summaries by temperature, and perplexities."""

    rows: dict[str, dict[str, Rows]] = field(default_factory=dict)
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)
    perplexity: dict[str, dict[str, Any]] = field(default_factory=dict)

    def in_order(self, names: Sequence[str]) -> "Measured":
        """The same with the policies in the order of ``names``."""
        parts = (self.rows, self.policies, self.perplexity)
        return Measured(*({name: part[name] for name in names if name in part} for part in parts))


def names_of(config: DictConfig, subject: Subject) -> list[str]:
    """All that are measured, in the order of tables.

    Raises:
        UserError: a name stands for two of them.
    """
    known = config.reference is not None or (subject.started and subject.checkpoint is not None)
    names = [POLICY, *([REFERENCE] if known else []), *map(str, config.against)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"against={list(config.against)} names {twice[0]} twice")
    return names


def contestants(config: DictConfig, subject: Subject, bench: "Bench") -> Iterator[tuple[str, Policy]]:
    """Names and policies of all that are measured, each made when its turn comes and let go afterwards.

    What the policy started from comes before the checkpoint is loaded into it.
    """
    if not bench.needs_policies:
        return
    policy = bench.first_policy()
    stored = None
    if subject.checkpoint is not None:
        stored = read_checkpoint(subject.checkpoint)
        bench.restore(stored["lit_rlhf"])  # before anybody is measured
    if config.reference is not None:
        with named_by("reference"):
            reference = load_policy(str(config.reference))
        bench.measured_to(reference)
        yield REFERENCE, reference
        del reference
    elif subject.started:
        bench.measured_to(policy)
        if subject.checkpoint is not None:
            yield REFERENCE, policy
    if stored is not None:
        load_weights(policy, subject.checkpoint, stored)
    yield POLICY, policy
    for other in map(str, config.against):
        with named_by("against"):
            policy = load_policy(other)
        yield other, policy


class _Keep(L.Callback):
    """Keeps the rows of a validation."""

    def __init__(self) -> None:
        self.rows: Rows = []

    def on_samples(self, _trainer: Any, _module: Any, _iteration: int, rows: Rows) -> None:
        self.rows = rows


class _Itself:
    """A reference that is the policy: where there is none to measure the KL to."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(self, *tokens: torch.Tensor, **settings: Any) -> Any:
        return self.policy(*tokens, **settings)

    def place(self, *_: Any, **_settings: Any) -> None:
        """Nothing to do: the weights are the policy's."""


class Bench:
    """Data, rewards and sampler, made once for all policies.

    Args:
        subject: what is evaluated.
        samples: completions of each prompt.
        temperatures: of sampling; None is the sampler's own.
        config: of the command.
    """

    def __init__(self, subject: Subject, samples: int, temperatures: list[float | None], config: DictConfig) -> None:
        self.subject, self.samples, self.temperatures = subject, samples, temperatures
        self.run: Run | None = None
        self.reference: Reference | None = None
        self.vocabulary: dict[str, int] = {}  # of the reference
        self.prompts: list[str] = []
        base = subject.config
        precision = {"precision": resolve_precision(base)}
        if "completions" in subject.measures:
            self.run = build(OmegaConf.masked_copy(base, [key for key in base if key not in ("text", "pairs")]))
            self.run.trainer.loggers = []  # their rows would not say of whom they are
            self.run.algorithm.critic = None  # nobody asks it
            _repeat(self.run.datamodule, samples)
            self.trainer, self.judges = self.run.trainer, _judges(self.run.algorithm.reward, self.run.algorithm.gold)
        else:
            L.seed_everything(base.seed, workers=True, verbose=False)
            self.trainer = instantiate(OmegaConf.merge(base.trainer, precision), "trainer", logger=False)
            made = [instantiate(base.get(part), part) for part in ("reward", "gold")]
            self.judges = _judges(*made)
        self.device = self.trainer.strategy.root_device
        self.texts = documents(base.text) if "text" in subject.measures else []
        self.right = self._right(config)

    def _right(self, config: DictConfig) -> list[str]:
        if config.verifiers is None:
            return [name for prefix, judge in self.judges.items() for name in verified(judge, prefix)]
        if not isinstance(config.verifiers, ListConfig):
            raise UserError(f"verifiers={config.verifiers} must be a list of components, such as '[reward/verifier]'")
        return list(map(str, config.verifiers))

    @property
    def needs_policies(self) -> bool:
        return bool(self.subject.measures & {"completions", "text"})

    def first_policy(self) -> Policy:
        return self.run.algorithm.policy if self.run else instantiate(self.subject.config.policy, "policy")

    def measured_to(self, policy: Policy) -> None:
        """Makes ``policy``, as it is now, what KLs are measured to."""
        if self.run is None:
            return
        algorithm = self.run.algorithm
        if policy is algorithm.policy:
            self.reference = algorithm.reference
            algorithm.add_module("start", policy)  # moved to the device with the rest, whoever is being measured
        else:
            self.reference = make_reference(policy)
        self.vocabulary = policy.tokenizer.get_vocab()

    def restore(self, state: dict[str, Any]) -> None:
        """Gives the run's own reward what it had learned, for all policies alike.

        Raises:
            UserError: the policy started from other weights than it does now.
        """
        if self.run is None:
            return
        algorithm = self.run.algorithm
        if state.get("reference") is not None:
            require_same_reference(state["reference"], algorithm.reference_id)
        if self.subject.own_reward and state.get("reward") is not None and algorithm.reward_has_state:
            algorithm.reward.load_state_dict(state["reward"])

    def measure(self, name: str, policy: Policy, found: Measured) -> None:
        """Adds what ``policy`` does to ``found``."""
        if self.run is not None:
            algorithm = self.run.algorithm
            algorithm.policy = policy
            knows = self.reference is not None and policy.tokenizer.get_vocab() == self.vocabulary
            algorithm.reference = self.reference if knows else _Itself(policy)
            found.rows[name], found.policies[name] = {}, {}
            for temperature in self.temperatures:
                if temperature is not None:
                    algorithm.sampler.temperature = temperature
                key = f"{algorithm.sampler.temperature:g}"
                # Data and rewards are made for the first two.
                with nullcontext() if name in (POLICY, REFERENCE) else said_of(name):
                    rows, metrics = self._complete()
                settings = {"samples": self.samples, "right": self._known(rows), "kl": knows and name != REFERENCE}
                found.rows[name][key] = rows
                found.policies[name][key] = summarize(rows, metrics, **settings)
        if self.texts:
            with self.trainer.precision_plugin.forward_context():
                found.perplexity[name] = measure_texts(policy.to(self.device), self.texts)

    def _known(self, rows: Rows) -> list[str]:
        names = {f"reward/{name}" for name in rows[0]["components"]} | {f"gold/{name}" for name in rows[0]["gold"]}
        if unknown := set(self.right) - names:
            raise UserError(f"verifiers: there is no component {min(unknown)}; they are {', '.join(sorted(names))}")
        return self.right

    def _complete(self) -> tuple[Rows, dict[str, float]]:
        """The rows and metrics of all held-out prompts."""
        keep, (trainer, algorithm) = _Keep(), (self.run.trainer, self.run.algorithm)
        trainer.callbacks.append(keep)
        trainer.validate(algorithm, datamodule=self.run.datamodule, verbose=False)
        trainer.callbacks.remove(keep)
        if not keep.rows:
            raise UserError("there are no held-out prompts: the data's val_dataloader is empty")
        prompts = [row["prompt"] for row in keep.rows]
        self.prompts = self.prompts or prompts[: len(prompts) // self.samples]
        if prompts != self.prompts * self.samples:  # they could not be compared
            raise UserError(
                "the held-out prompts are not the same each time: the data gives others when it is asked again, or a "
                "reward that failed has left a batch out"
            )
        names = algorithm.last_row.items()
        return keep.rows, {name.removeprefix("val/"): value for name, value in names if name.startswith("val/")}


def _judges(reward: Any, gold: Any) -> dict[str, Any]:
    return {key: judge for key, judge in (("reward", reward), ("gold", gold)) if judge is not None}


def _repeat(datamodule: L.LightningDataModule, times: int) -> None:
    """Lets a datamodule give its held-out prompts several times over, which are then other episodes."""
    single = datamodule.val_dataloader

    def repeated() -> Any:
        loaders = single()
        return list(loaders if isinstance(loaders, list | tuple) else [loaders]) * times

    if times > 1:
        datamodule.val_dataloader = repeated


def prefer(judge: Any, rows: Rows, others: Rows) -> list[float]:
    """For every row whether a judge of pairs prefers it to the other's."""
    texts = [[row["completion"] for row in side] for side in (rows, others)]
    scores = score(judge, [row["prompt"] for row in rows], texts[0], {"reference": texts[1]})
    shares = scores.total
    if ((shares < 0) | (shares > 1)).any():
        raise UserError("judge: it must say from 0 to 1 how surely it prefers a completion to that in 'reference'")
    return shares.tolist()
