"""The base of every algorithm that learns from its own completions: stages 1 to 4 and 6, and what Lightning needs."""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.algorithms.attempts import PatientLoader
from lit_rlhf.algorithms.base import Algorithm, require_plain
from lit_rlhf.algorithms.controllers import schedule_metrics, update_controllers
from lit_rlhf.algorithms.halves import add_gradients
from lit_rlhf.algorithms.held_out import HeldOut
from lit_rlhf.algorithms.judged import Anchors, Judged, describe, sample_rows
from lit_rlhf.algorithms.judging import anchor, complete, judge
from lit_rlhf.algorithms.means import RunningMean
from lit_rlhf.batch import Experience, PromptBatch, Rollout
from lit_rlhf.checks import check_int, check_number
from lit_rlhf.clip import Clip
from lit_rlhf.data.passes import SeededPasses
from lit_rlhf.data.tokenize import PromptRows, Row
from lit_rlhf.distributed import FSDP2Strategy, rank, world_size
from lit_rlhf.entropy import EntropyBonus
from lit_rlhf.errors import UserError
from lit_rlhf.functional import full_kl, kl_estimate, masked_mean, ratio_stats
from lit_rlhf.functional.masked import zero_masked
from lit_rlhf.kl import FixedKL, KLPenalty
from lit_rlhf.models.policy import Policy, PolicyOutput, disable_dropout
from lit_rlhf.models.reference import make_reference, require_same_reference
from lit_rlhf.rewards.scoring import Reward, freeze
from lit_rlhf.rewards.shaping import ScoreShaper, place_scores
from lit_rlhf.rollout.loader import RolloutLoader, exact_div
from lit_rlhf.rollout.sampler import Sampler

log = logging.getLogger(__name__)

CriticFactory = Callable[[Policy], nn.Module]


class OnlineAlgorithm(Algorithm):
    """Alternates a rollout phase with epochs of updates over its experience; one Lightning epoch is one iteration.

    A subclass gives ``advantages`` (stage 5) and ``loss`` (stage 7), with a critic also ``value_loss``, and may
    ``select`` what is learned from (stage 6).

    Args:
        policy: the model that is trained.
        reward: ``reward(prompts, completions, **columns)``, see ``rewards/scoring.py``.
        gold: a second reward that is only measured, never learned from.
        critic: makes the critic from the policy; None for algorithms without one.
        kl: the penalty on the KL to the reference; a fixed coefficient of 0.05 by default.
        sampler: how completions are drawn.
        scores: what a score goes through before it becomes a token reward.
        rollout_batch_size: completions of one iteration.
        group_size: completions of each prompt; an iteration has ``rollout_batch_size / group_size`` prompts.
        minibatch_size: completions of one optimiser step; the trainer's ``accumulate_grad_batches`` splits it further.
        epochs: passes over the experience of an iteration.
        target_kl: an iteration's updates stop once a minibatch's approximate KL to the rollout policy, a mean over its
            tokens, exceeds this; None never stops.
        **common: see ``Algorithm``.

    Raises:
        UserError: sizes that do not divide; at ``fit``, a sampler that cuts the distribution.
    """

    online = True
    #: The smallest ``group_size``; 2 where a completion is compared with others of its prompt.
    smallest_group = 1
    #: What a loss is a mean over in a minibatch: "tokens" that count alike, or "completions".
    loss_over = "tokens"
    #: What its passes over the experience, and the rows that it learns from, are called in its config.
    epochs_key = "algorithm.epochs"
    experience_key = "algorithm.rollout_batch_size"
    #: Set by an algorithm that bounds its updates, and by one whose loss has an entropy bonus.
    clip: Clip | None = None
    entropy: EntropyBonus | None = None

    def __init__(
        self,
        *,
        policy: Policy,
        reward: Reward,
        gold: Reward | None = None,
        critic: CriticFactory | None = None,
        kl: KLPenalty | None = None,
        sampler: Sampler | None = None,
        scores: ScoreShaper | None = None,
        rollout_batch_size: int = 32,
        group_size: int = 1,
        minibatch_size: int = 16,
        epochs: int = 1,
        target_kl: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.sampler = sampler or Sampler()
        if unknown := [token for token in self.sampler.stop_tokens if token >= policy.vocabulary]:
            raise UserError(
                f"sampler.stop_tokens={list(self.sampler.stop_tokens)}: the policy's vocabulary has "
                f"{policy.vocabulary} tokens, so {unknown[0]} is none"
            )
        if not callable(reward):
            raise UserError(f"config key 'reward' is {reward!r}: an online algorithm needs a reward to learn from")
        check_int(self.epochs_key, epochs, at_least=1)
        self.rollout_batch_size = check_int("algorithm.rollout_batch_size", rollout_batch_size, at_least=1)
        self.group_size = check_int("algorithm.group_size", group_size, at_least=self.smallest_group)
        self.minibatch_size = check_int("algorithm.minibatch_size", minibatch_size, at_least=1)
        exact_div(rollout_batch_size, group_size, "algorithm.rollout_batch_size", "algorithm.group_size")
        exact_div(self.experience_size, minibatch_size, self.experience_key, "algorithm.minibatch_size")
        disable_dropout(policy)
        self.policy = policy
        self.critic = critic(policy) if critic is not None else None
        if self.critic is not None:
            disable_dropout(self.critic)
        # Not as submodules: a reward that is a network must not enter the optimiser, the checkpoint or train().
        object.__setattr__(self, "reward", reward)
        object.__setattr__(self, "gold", gold)
        self.kl = kl if kl is not None else FixedKL()
        copy.deepcopy(self.kl).update(0.0, rollout_batch_size)  # refuses now what it would refuse after an iteration
        self.scores = scores or ScoreShaper()
        self.epochs = epochs
        self.target_kl = None if target_kl is None else check_number("algorithm.target_kl", target_kl, above=0)
        self.reference = make_reference(policy)
        self.reference_id = self.reference.fingerprint()
        self.loader: RolloutLoader | None = None
        self._loader_state: dict[str, Any] | None = None
        self.iteration = 0
        self.last_kl = 0.0  # of the newest iteration, in nats per completion
        self.tokens = 0
        self.pending: dict[str, float] = {}  # metrics of the iteration under way, its samples, its validation
        self.samples: list[dict[str, Any]] = []
        self.held_out = HeldOut(self)
        self.minibatch_kl = RunningMean()  # approximate KL of the minibatch under way

    # ---- what a subclass gives ------------------------------------------------------------------------------------

    def advantages(self, rewards: Tensor, rollout: Rollout, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Stage 5: token rewards (B, T), values (B, T + 1) -> advantages (B, T) and, with a critic, returns (B, T)."""
        raise NotImplementedError

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: the policy's loss, a mean over the batch's response tokens, and metrics, masked as the loss is."""
        raise NotImplementedError

    def value_loss(self, batch: Experience, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7 of an algorithm with a critic: the loss of its values (B, T), which is added to the policy's."""
        raise NotImplementedError

    def select(self, experience: Experience) -> Experience:
        """Stage 6: the ``experience_size`` rows that are learned from; all of them by default."""
        return experience

    @property
    def experience_size(self) -> int:
        """Rows of an iteration that are learned from."""
        return self.rollout_batch_size

    def mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """The mean of (B, T) that losses are, see ``loss_over``."""
        return masked_mean(x, mask)

    def clipped_loss(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The surrogate within the bounds of ``clip``, a mean as losses are, and its metrics.

        All are (B, T), or (B, 1) where a whole completion is one action.
        """
        losses, clipped = self.clip.at(self.progress).surrogate(logprobs, old_logprobs, advantages, mask)
        loss = self.mean(losses, mask)
        return loss, {"loss/policy": loss.detach(), "policy/clipfrac": masked_mean(clipped, mask)}

    # ---- stages 1 to 5: the rollout phase -------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, iteration: int, rows: list[Row]) -> Experience:
        """Stages 1 to 5 for one iteration's prompts; the experience stays on the CPU."""
        episodes = iteration * self.rollout_batch_size + torch.arange(len(rows))
        judged = self.judge(rows, episodes, self.seed)
        rollout, anchors, mask = judged.rollout, judged.anchors, judged.rollout.response_mask
        coef = self.kl.at(self.progress)
        described = describe(judged, coef, charged=self.kl_in_reward)
        self.samples = sample_rows(judged, iteration + 1, "train")
        self.call_hook("on_rollout", described)
        with self.phase("advantage"):
            rewards = place_scores(self.scores(judged.scores.whole, rollout.finished), mask)  # 4 shape
            rewards = rewards + judged.scores.dense
            if self.kl_in_reward:
                rewards = rewards - coef * anchors.kl
            advantages, returns = self.advantages(rewards, rollout, anchors.values)  # 5 advantage
        if hasattr(self.reward, "learn_from"):
            self.reward.learn_from(judged.scores)
        self.tokens += int(mask.sum())
        self.pending.update(described)
        if self.group_size > 1:
            groups = judged.scores.total.reshape(-1, self.group_size)
            self.pending["rollout/constant_groups"] = float((groups == groups[:, :1]).all(-1).float().mean())
        self.pending["rollout/tokens_per_second"] = int(mask.sum()) / self.pending["time/rollout"]
        experience = Experience(
            prompt_ids=rollout.prompt_ids,
            prompt_mask=rollout.prompt_mask,
            response_ids=rollout.response_ids,
            response_mask=mask,
            logprobs=anchors.logprobs,
            ref_logprobs=anchors.ref_logprobs,
            advantages=advantages,
            values=None if anchors.values is None else anchors.values[:, :-1],
            returns=returns,
        )
        return self.select(experience)

    def judge(self, rows: list[Row], episodes: Tensor, seed: int) -> Judged:
        """Stages 1 to 3: completes prompts and measures the completions. Used by training and validation alike."""
        return judge(self, rows, episodes, seed)

    def rollout(self, prompts: PromptBatch, seed: int) -> Rollout:
        """Stage 1, see ``judging.complete``."""
        return complete(self, prompts, seed)

    def anchor(self, rollout: Rollout) -> Anchors:
        """Stage 3, see ``judging.anchor``."""
        return anchor(self, rollout)

    @property
    def forwards_alone(self) -> bool:
        """Whether this process can make more forward passes than the others; sharded weights need all of them."""
        return not isinstance(self.trainer.strategy, FSDP2Strategy)

    def both(self, *tokens: Tensor) -> tuple[PolicyOutput, PolicyOutput]:
        """What policy and reference say of the same tokens."""
        full = self.kl.estimator == "full"
        return tuple(m(*tokens, temperature=self.temperature, keep_logits=full) for m in (self.policy, self.reference))

    def kl_of(self, output: PolicyOutput, ref_logprobs: Tensor, ref_logits: Tensor | None, mask: Tensor) -> Tensor:
        """The KL to the reference per token, (B, T), 0 where the mask is False."""
        if self.kl.estimator == "full":
            return zero_masked(full_kl(output.logits, ref_logits), mask)
        return kl_estimate(zero_masked(output.logprobs, mask), zero_masked(ref_logprobs, mask), self.kl.estimator)

    @property
    def kl_in_reward(self) -> bool:
        """Whether the rewards pay for the KL to the reference."""
        return not self.kl.in_loss

    @property
    def temperature(self) -> float:
        """Of the distribution whose log-probabilities are compared; for greedy evaluation that is the plain softmax."""
        return self.sampler.temperature or 1.0

    # ---- stages 6 to 8: updates -----------------------------------------------------------------------------------

    def batch_loss(self, batch: Experience, share: float = 1.0) -> Tensor:
        tokens = (batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.response_mask)
        # A loss over completions counts them alike, however long they are; everything else is over tokens.
        by_tokens, count = self.loss_over == "tokens", float(batch.response_mask.sum())
        weight = share * (batch.weight if by_tokens else 1.0)
        output = self.respond(*tokens)
        self.call_hook("on_update", batch, output.logprobs.detach())
        loss, metrics = self.policy_loss(batch, output, tokens)
        if self.critic is not None:
            if loss.requires_grad and getattr(self.critic, "apart", False) and world_size() == 1:
                # Frees the policy's activations before the critic has its own.
                add_gradients(self, weight * loss, within_loss=True)
                loss = loss.detach()
            values = self.critic(output, *tokens)[:, :-1]
            value_loss, value_metrics = self.value_loss(batch, values)  # 7 loss
            metrics |= {"value/mean": masked_mean(values.detach(), batch.response_mask), **value_metrics}
            numbers = {"value": zero_masked(values.detach(), batch.response_mask)}
            loss = self.guard.spoiled(loss + value_loss, numbers)
        for name, x in {**metrics, "loss/total": loss}.items():
            over = float(len(batch)) if name.startswith("loss/") and not by_tokens else count
            self.step_means.add({name: x.detach()}, over)
        if self.target_kl is not None and "policy/approxkl" in metrics:
            self.minibatch_kl.add({"kl": metrics["policy/approxkl"]}, count)
        return loss * weight

    def policy_loss(
        self, batch: Experience, output: PolicyOutput, tokens: tuple[Tensor, ...]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7 without the critic, with the KL to the reference where it is in the loss."""
        loss, metrics = self.loss(batch, output)  # 7 loss
        metrics = {**self.update_metrics(batch, output), **metrics}
        if self.kl.in_loss:
            metrics["loss/kl"] = self.kl_loss(batch, output, tokens)
            loss = loss + self.pending["objective/kl_coef"] * metrics["loss/kl"]
        numbers = {"log-probability": zero_masked(output.logprobs.detach(), batch.response_mask)}
        if "policy/ratio_max" in metrics:
            numbers["probability ratio"] = metrics["policy/ratio_max"].detach()
        return self.guard.spoiled(loss, numbers), metrics

    def step_batches(self) -> list[Experience]:
        return [batch.to(self.device) for batch in self.loader.step_batches()]

    def rows_of(self, batch: Experience) -> int:
        return len(batch)

    def halves_of(self, batch: Experience) -> tuple[tuple[Experience, float], ...]:
        cut = (len(batch) // self.unit + 1) // 2 * self.unit
        terms = batch.response_mask.sum(-1) if self.loss_over == "tokens" else batch.response_mask.new_ones(len(batch))
        halves = slice(cut), slice(cut, None)
        return tuple((batch[rows].trim(), float(terms[rows].sum() / terms.sum())) for rows in halves)

    def forget_step(self) -> None:
        super().forget_step()
        self.minibatch_kl.sums = {}

    def respond(self, *tokens: Tensor) -> PolicyOutput:
        """The policy's forward pass in a training step."""
        return self.policy(*tokens, temperature=self.temperature, **self.forward_settings())

    def update_metrics(self, batch: Experience, output: PolicyOutput) -> dict[str, Tensor]:
        """How far the policy is from the one that made the rollout, and its entropy."""
        stats = ratio_stats(output.logprobs, batch.logprobs, batch.response_mask)
        stats["entropy"] = masked_mean(output.entropy.detach(), batch.response_mask)
        return {f"policy/{name}": stat for name, stat in stats.items()}

    def forward_settings(self) -> dict[str, Any]:
        """Keyword arguments of the policy's forward pass in a training step."""
        settings: dict[str, Any] = {"entropy": True, "keep_logits": self.kl.in_loss and self.kl.estimator == "full"}
        if self.entropy is not None:
            settings["entropy_grad"] = self.entropy.at(self.progress) != 0
            settings["entropy_top_k"] = self.entropy.top_k
        return settings

    def kl_loss(self, batch: Experience, output: PolicyOutput, tokens: tuple[Tensor, ...]) -> Tensor:
        """The KL to the reference, a mean as losses are, through which gradients flow."""
        ref_logits = None
        if self.kl.estimator == "full":  # the buffer holds no logits: they would be gigabytes
            with torch.no_grad():
                ref_logits = self.reference(*tokens, temperature=self.temperature, keep_logits=True).logits
        return self.mean(self.kl_of(output, batch.ref_logprobs, ref_logits, batch.response_mask), batch.response_mask)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Not in on_train_batch_end: a checkpoint callback's own hook of that name runs before the module's.
        self.pending["policy/updates"] = self.pending.get("policy/updates", 0.0) + (not self.guard.bad)
        if self.target_kl is None:
            return
        kl = self.minibatch_kl.compute().get("kl", 0.0)
        if kl > self.target_kl and self.loader.position < len(self.loader):
            self.loader.stop()
            self.pending["policy/early_stopped"] = 1.0

    def on_train_epoch_start(self) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.finish_iteration()

    def finish_iteration(self) -> None:
        """Stage 8, the end of an iteration: the KL controller, counters, the row of metrics, the samples."""
        if self.loader.position < len(self.loader):
            return  # max_steps ended the run inside the iteration; a run with more steps goes on from here
        if spent := self.kl.budget is not None and self.pending["objective/kl"] > self.kl.budget:
            self.trainer.should_stop = True  # already here: then this iteration is the last to be validated
        self.held_out.run_if_missed()
        row = {"policy/early_stopped": 0.0, **self.pending, **self.means.compute(), **schedule_metrics(self)}
        row["optim/lr"] = self.learning_rate
        row["optim/skipped_steps"] = self.guard.take_skipped()
        row["time/iteration"] = time.perf_counter() - self._started
        row["time/update"] = row["time/iteration"] - sum(row.get(f"time/{s}", 0.0) for s in _STAGES)
        update_controllers(self, row)
        self.iteration += 1
        self.call_hook("on_experience", self.loader.experience)
        self.loader.finish()
        samples, self.samples, self.pending = self.samples, [], {}
        self.log_row(row)
        self.call_hook("on_samples", self.iteration, samples)
        self.last_kl = row["objective/kl"]
        if spent:
            self.stop_over_budget()

    def stop_over_budget(self) -> None:
        """Ends the run because its KL is over the budget; a resumed run that has spent it trains no further."""
        self.trainer.should_stop = True
        self.stopped_by = "kl.budget"
        log.warning("iteration %d: the KL, %.3g nats, is over kl.budget=%g: the run stops", self.iteration,
                    self.last_kl, self.kl.budget)  # fmt: skip

    @property
    def controllers(self) -> dict[str, Any]:
        """Those that the algorithm has, whose state goes into the checkpoint."""
        parts = {"kl": self.kl, "clip": self.clip, "entropy": self.entropy}
        return {name: part for name, part in parts.items() if part is not None}

    def ends_after(self, iteration: int) -> bool:
        """Whether the run ends with this iteration, whose steps are done."""
        bounds = ((self.trainer.max_epochs, iteration), (self.trainer.max_steps, self.trainer.global_step))
        return self.trainer.should_stop or any(bound and 0 < bound <= done for bound, done in bounds)

    @property
    def progress(self) -> float:
        """The share of the run's optimiser steps that is done, in [0, 1]; 0 where their number is not known."""
        total = self.total_steps()
        return 0.0 if total is None else min(1.0, self.trainer.global_step / max(1, total))

    # ---- validation -----------------------------------------------------------------------------------------------

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """See ``HeldOut.step``."""
        self.held_out.step(batch)

    def on_validation_epoch_end(self) -> None:
        self.held_out.end()

    # ---- Lightning ------------------------------------------------------------------------------------------------

    @property
    def axes(self) -> dict[str, int]:
        return {"iteration": self.iteration, "episode": self.iteration * self.rollout_batch_size, "tokens": self.tokens}

    @property
    def within_epoch(self) -> bool:
        loader = self.loader
        return loader is not None and loader.experience is not None and loader.position < len(loader)

    def steps_per_epoch(self) -> int:
        return self.epochs * (self.experience_size // self.minibatch_size)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        micro_batches = self.trainer.accumulate_grad_batches
        exact_div(self.minibatch_size, micro_batches, "algorithm.minibatch_size", "trainer.accumulate_grad_batches")
        for name in () if self.trainer.fast_dev_run else ("limit_train_batches", "val_check_interval"):
            value = getattr(self.trainer, name)
            if value != 1.0 or isinstance(value, int):  # an int is a number of batches
                raise UserError(
                    f"trainer.{name}={value} would cut an iteration, which is one epoch of an online algorithm, short; "
                    "set trainer.max_epochs, trainer.check_val_every_n_epoch or algorithm.rollout_batch_size instead"
                )
        if stage == "fit" and self.total_steps() is None:
            for name, controller in self.controllers.items():
                if controller.at(0.0) != controller.at(1.0):
                    raise UserError(
                        f"{name} changes over the whole run, and trainer.max_time alone does not say how long that is; "
                        "set trainer.max_epochs or trainer.max_steps as well"
                    )
        self.place_rewards(self.trainer.strategy.root_device, str(self.trainer.precision))
        if stage == "fit":
            if self.reward_has_state:
                require_plain("the reward's state_dict()", self.reward.state_dict())
            self.sampler.require_training()
            for model in (self.policy, self.critic):
                if model is not None:
                    model.train()  # without dropout that only lets gradient checkpointing work
            self.take_over_loader()

    def place_rewards(self, device: torch.device, precision: str) -> None:
        """Freezes reward and gold on ``device``; those with a model score in bfloat16 if training is in it."""
        for scorer in (self.reward, self.gold):
            freeze(scorer, device, torch.bfloat16 if precision.startswith("bf16") else None)

    def train_dataloader(self) -> RolloutLoader:
        if self.loader is not None and self._loader_state is None:
            self._loader_state = self.loader.state_dict()  # a second fit, or a reloaded loader, goes on
        self.loader = PatientLoader(
            algorithm=self,
            prompts=PromptRows(SeededPasses(self.user_loader(), self.seed), self.group_size),
            collect=self.collect,
            rollout_batch_size=self.rollout_batch_size,
            experience_size=self.experience_size,
            unit=self.unit,
            minibatch_size=self.minibatch_size,
            micro_batches=self.trainer.accumulate_grad_batches,
            epochs=self.epochs,
            seed=self.seed,
            rank=rank(),
            world=world_size(),
        )
        if self._loader_state is not None:
            self.loader.load_state_dict(self._loader_state)
            self._loader_state = None
        return self.loader

    def on_train_start(self) -> None:
        super().on_train_start()
        self._started = time.perf_counter()
        stopped = self.pending.get("policy/early_stopped")  # then Lightning itself goes on to the iteration's end
        if self.loader.experience is not None and self.loader.position >= len(self.loader) and not stopped:
            # The checkpoint was written after an iteration's last step and before its end, which Lightning skips.
            self.finish_iteration()
        elif self.kl.budget is not None and self.last_kl > self.kl.budget:
            self.stop_over_budget()
        self.catch_up()

    def state(self) -> dict[str, Any]:
        return {
            "loader": None if self.loader is None else self.loader.state_dict(),
            "iteration": self.iteration,
            "tokens": self.tokens,
            "last_kl": self.last_kl,
            "pending": dict(self.pending),
            "samples": list(self.samples),
            "minibatch_kl": self.minibatch_kl.state(),
            "controllers": {name: controller.state_dict() for name, controller in self.controllers.items()},
            "scores": self.scores.state_dict(),
            "reference": self.reference_id,
            "reward": self.reward.state_dict() if self.reward_has_state else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        require_same_reference(state["reference"], self.reference_id)
        self._loader_state = state["loader"]
        self.iteration, self.tokens, self.last_kl = state["iteration"], state["tokens"], state["last_kl"]
        self.pending, self.samples = dict(state["pending"]), list(state["samples"])
        self.minibatch_kl.load_state(state["minibatch_kl"])
        for name, controller in self.controllers.items():
            controller.load_state_dict(state["controllers"][name])
        self.scores.load_state_dict(state["scores"])
        if self.reward_has_state:
            self.reward.load_state_dict(state["reward"])

    @property
    def reward_has_state(self) -> bool:
        """Whether the reward keeps something that a resumed run needs; networks are frozen, so they do not."""
        return hasattr(self.reward, "load_state_dict") and not isinstance(self.reward, nn.Module)

    def export(self, folder: Any) -> None:
        """Writes the policy (Hugging Face format) and the critic; every process must call it."""
        self.policy.save(folder)
        if self.critic is not None:
            self.critic.save(folder)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a stage of the rollout phase and tells callbacks that it began."""
        self.call_hook("on_phase", name, 0, 1)
        start = time.perf_counter()
        yield
        if not self.trainer.validating:
            self.pending[f"time/{name}"] = time.perf_counter() - start


_STAGES = ("rollout", "score", "anchor", "gather", "advantage")
