"""TRPO, trust region policy optimisation (Schulman et al. 2015, arXiv:1502.05477), for language models.

Against PPO the bound on an update is a bound: one natural-gradient step an iteration, whose KL to the rollout policy,
exact over the vocabulary, never passes ``max_kl``. That step is not an optimiser's. It happens at an iteration's first
minibatch, over the whole iteration; the optimiser trains the critic alone, in ordinary steps, so accumulation,
clipping, schedules and checkpoints stay Lightning's. (Manual optimisation would give all of them up.)
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lit_rlhf.algorithms.online import CriticFactory, OnlineAlgorithm
from lit_rlhf.batch import Experience, Rollout
from lit_rlhf.checks import check_int, check_number
from lit_rlhf.distributed import world_size
from lit_rlhf.errors import UserError
from lit_rlhf.functional import clipped_value_loss, conjugate_gradient, full_kl, gae, masked_mean, masked_whiten
from lit_rlhf.functional.masked import zero_masked
from lit_rlhf.models.critic import ValueHead
from lit_rlhf.models.policy import PolicyOutput


class _Part(NamedTuple):
    """Some rows of an iteration, with what the rollout policy says of them."""

    batch: Experience
    old: PolicyOutput
    share: float  # of the iteration's tokens


class TRPO(OnlineAlgorithm):
    """TRPO: maximises mean_t(rho_t A_t) subject to mean_t KL(old || policy) <= max_kl (eq. 14), means over tokens.

    The step is ``sqrt(2 max_kl / x^T F x) x`` with ``F x = g`` (appendix C): g the gradient of the objective, F the
    Fisher matrix, of which only products are taken, by differentiating the KL twice. It is halved until the objective
    grows and the KL holds, or not taken at all.

    Args:
        critic: makes the critic from the policy; a value head by default. Its loss never reaches the policy's weights.
        max_kl: the limit, > 0, in nats per token.
        damping: added to F's diagonal, >= 0.
        cg_steps: products of the conjugate gradient.
        line_search_steps: how often the step is halved at most.
        epochs: the critic's passes over the experience of an iteration.
        gamma: discount.
        lam: lambda of generalised advantage estimation.
        whiten_advantages: mean 0 and variance 1 over the iteration's response tokens.
        **online: as for ``PPO``; ``minibatch_size`` is that of the critic's steps and of a forward pass. The logits of
            the iteration's tokens are kept during the step.

    Raises:
        UserError: a number is out of its range, or the KL to the reference in the loss.
    """

    shardable = False  # its products with the Fisher matrix differentiate twice
    leaves_weights_out = True

    def __init__(
        self,
        *,
        critic: CriticFactory = ValueHead,
        max_kl: float = 0.01,
        damping: float = 0.01,
        cg_steps: int = 10,
        line_search_steps: int = 10,
        epochs: int = 2,
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten_advantages: bool = True,
        **online: Any,
    ) -> None:
        super().__init__(critic=critic, epochs=epochs, **online)
        self.max_kl = check_number("algorithm.max_kl", max_kl, above=0)
        self.damping = check_number("algorithm.damping", damping, at_least=0)
        self.cg_steps = check_int("algorithm.cg_steps", cg_steps, at_least=1)
        self.line_search_steps = check_int("algorithm.line_search_steps", line_search_steps, at_least=1)
        self.gamma = check_number("algorithm.gamma", gamma, at_least=0, at_most=1)
        self.lam = check_number("algorithm.lam", lam, at_least=0, at_most=1)
        self.whiten_advantages = whiten_advantages
        if self.kl.in_loss:
            raise UserError("kl.place=loss: TRPO's objective is the advantages' alone; use kl.place=reward")

    def advantages(self, rewards: Tensor, rollout: Rollout, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 5: generalised advantage estimation."""
        advantages, returns = gae(rewards, values[:, :-1], rollout.response_mask, self.gamma, self.lam)
        return masked_whiten(advantages, rollout.response_mask) if self.whiten_advantages else advantages, returns

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        if self.loader.position == 1:  # the first of this iteration
            self.update_policy(self.loader.experience)
        return super().training_step(batch, batch_idx)

    def respond(self, *tokens: Tensor) -> PolicyOutput:
        with torch.no_grad():
            return super().respond(*tokens)

    def loss(self, batch: Experience, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: ARG002
        """Stage 7: nothing; the policy has had its step."""
        return output.logprobs.new_zeros(()), {}

    def value_loss(self, batch: Experience, values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 7: what the critic learns by."""
        loss, _ = clipped_value_loss(values, batch.values, batch.returns, batch.response_mask, None)
        return loss, {"loss/value": loss.detach()}

    def optimized_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.critic.parameters() if p.requires_grad]

    # ---- the policy's step ----------------------------------------------------------------------------------------

    def update_policy(self, experience: Experience) -> None:
        """Takes the step, or none; logs the KL and the gain of the objective that it made."""
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        before = parameters_to_vector(parameters).detach()

        def step(size: int) -> None:
            try:
                self._step(experience, size, parameters, before)
            except Exception:
                vector_to_parameters(before, parameters)
                raise

        alone = world_size() == 1
        self.halving.run("update", min(self.minibatch_size, len(experience)), step, allowed=alone)

    def _step(self, experience: Experience, size: int, parameters: list[nn.Parameter], before: Tensor) -> None:
        # In full precision, and by attention that can be differentiated twice.
        with torch.autocast(self.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            parts = list(self._parts(experience, size))
            gradient = self._gradient(parts, parameters, self._surrogate)
            direction = conjugate_gradient(
                lambda vector: self._fisher(parts, parameters, vector), gradient, self.cg_steps
            )
            curvature = direction.dot(self._fisher(parts, parameters, direction))
            step = (2 * self.max_kl / curvature.clamp(min=1e-12)).sqrt() * direction
            kl = gain = 0.0
            finite = self.guard.check(float(step.sum()), self.trainer.global_step + 1, "natural-gradient step")
            with torch.no_grad():
                for halved in range(self.line_search_steps if finite else 0):
                    vector_to_parameters(before + step / 2**halved, parameters)
                    gain, kl = (sum(float(f(part)) * part.share for part in parts) for f in (self._surrogate, self._kl))
                    if gain > 0 and kl <= self.max_kl:
                        break
                else:
                    vector_to_parameters(before, parameters)
                    kl = gain = 0.0
        self.pending.update({"policy/update_kl": kl, "loss/policy": -gain})

    def _parts(self, experience: Experience, size: int) -> Iterator[_Part]:
        tokens = float(experience.response_mask.sum())
        for start in range(0, len(experience), size):
            batch = experience[start : start + size].trim().to(self.device)
            with torch.no_grad():
                old = self._forward(batch)
            yield _Part(batch, old, float(batch.response_mask.sum()) / tokens)

    def _forward(self, batch: Experience) -> PolicyOutput:
        tokens = (batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.response_mask)
        return self.policy(*tokens, temperature=self.temperature, keep_logits=True)

    def _surrogate(self, part: _Part) -> Tensor:
        """mean_t(rho_t A_t) less that of the rollout policy, so that 0 is no gain."""
        mask = part.batch.response_mask
        log_ratio = zero_masked(self._forward(part.batch).logprobs, mask) - zero_masked(part.old.logprobs, mask)
        return masked_mean(log_ratio.expm1() * part.batch.advantages, mask)

    def _kl(self, part: _Part) -> Tensor:
        """mean_t KL(old || policy), exact over the vocabulary."""
        return masked_mean(full_kl(part.old.logits, self._forward(part.batch).logits), part.batch.response_mask)

    def _gradient(self, parts: list[_Part], parameters: list[nn.Parameter], objective: Any) -> Tensor:
        return sum(_flat(torch.autograd.grad(objective(part), parameters)) * part.share for part in parts)

    def _fisher(self, parts: list[_Part], parameters: list[nn.Parameter], vector: Tensor) -> Tensor:
        """F v + damping v; F is the KL's second derivative at the rollout policy."""
        product = self.damping * vector
        for part in parts:
            slope = _flat(torch.autograd.grad(self._kl(part), parameters, create_graph=True))
            product = product + _flat(torch.autograd.grad(slope.dot(vector), parameters)) * part.share
        return product


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
