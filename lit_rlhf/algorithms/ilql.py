"""Implicit language Q-learning: values of tokens from rewarded completions, without sampling, that guide decoding.

Snell et al. 2022 (arXiv:2206.11871): implicit Q-learning (Kostrikov et al. 2021, arXiv:2110.06169) on the token MDP,
where a state is a prompt with the tokens so far and an action the next token. The maximum over actions, which would
reach tokens that the data do not hold, is replaced by an expectile over the data's actions. The policy itself is
fine-tuned on the data; when it writes, its logits are moved by the advantages.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.algorithms.rewarded import RewardedBatch, collate_rewarded, token_rewards
from lit_rlhf.checks import check_number
from lit_rlhf.data.completions import check_max_length
from lit_rlhf.functional import bellman_targets, conservative_loss, expectile_loss, masked_mean
from lit_rlhf.functional.masked import zero_masked
from lit_rlhf.models.guided import Head, QHeads, save_guidance
from lit_rlhf.models.policy import Policy, disable_dropout
from lit_rlhf.rollout.philox import derive_seed


class ILQL(OfflineAlgorithm):
    """ILQL (arXiv:2206.11871, section 4): twin Q heads with target networks and a V head on the policy's hidden states.

    With Q' the smaller of the two targets, means over the completions' tokens:

        L = sum_i (r_t + gamma V(s_{t+1}) - Q_i(s_t, a_t))^2             Q, V(after the end) = 0
            + |tau - 1(u < 0)| u^2,  u = Q'(s_t, a_t) - V(s_t)           V, an expectile
            + cql_coef * sum_i [log sum_a exp Q_i(s_t, a) - Q_i(s_t, a_t)]
            - lm_coef * log policy(a_t | s_t)

    The reward r of a completion is that of its last token. Decoding draws from policy(a|s) exp(beta (Q'(s, a) - V(s))).

    Batches are dicts of columns: ``prompt`` (texts or chats; may be missing), ``completion``, ``reward``. All heads and
    the policy share the backbone, which learns from all parts of the loss.

    Args:
        policy: the model that is trained; its folder, exported, decodes with guidance (``lit-rlhf sample``).
        beta: of decoding, at least 0; part of the export, not of the loss.
        gamma: discount.
        expectile: tau, in (0, 1); towards 1 V becomes the best that the data reach.
        cql_coef: weight of the conservative term, at least 0.
        lm_coef: weight of the policy's own likelihood, at least 0.
        polyak: how far the targets move towards the heads in an optimiser step, in (0, 1].
        max_length: the longest sequence in tokens, prompt and end included; by default the policy's context.
        **offline: log_every_n_steps, optimizer, scheduler, seed; see ``OfflineAlgorithm``.

    Raises:
        UserError: a value out of its range; a batch without these columns, or a reward that is no number.
    """

    shardable = False  # its targets follow outside the graph

    def __init__(
        self,
        *,
        policy: Policy,
        beta: float = 1.0,
        gamma: float = 0.99,
        expectile: float = 0.7,
        cql_coef: float = 0.1,
        lm_coef: float = 1.0,
        polyak: float = 0.005,
        max_length: int | None = None,
        **offline: Any,
    ) -> None:
        super().__init__(**offline)
        self.beta = check_number("algorithm.beta", beta, at_least=0)
        self.gamma = check_number("algorithm.gamma", gamma, at_least=0, at_most=1)
        self.expectile = check_number("algorithm.expectile", expectile, above=0, below=1)
        self.cql_coef = check_number("algorithm.cql_coef", cql_coef, at_least=0)
        self.lm_coef = check_number("algorithm.lm_coef", lm_coef, at_least=0)
        self.polyak = check_number("algorithm.polyak", polyak, above=0, at_most=1)
        self.max_length = check_max_length(max_length, policy)
        disable_dropout(policy)
        self.policy = policy
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed))
            self.q_heads = QHeads(policy.hidden_size, policy.base.config.get_text_config().vocab_size, count=2)
            self.v_head = Head(policy.hidden_size, 1)

    def collate(self, batch: Any) -> MicroBatch:
        return collate_rewarded(batch, self.policy, self.max_length, "ILQL")

    def loss(self, inputs: RewardedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        actions, mask = inputs.completions.response_ids, inputs.completions.response_mask
        output = self.policy(*inputs.completions.tokens)
        hidden = output.hidden.float()
        values = self.v_head(hidden).squeeze(-1)  # (B, T + 1)
        before = hidden[:, :-1]
        q_values = self.q_heads(before)
        wanted = bellman_targets(token_rewards(inputs), values[:, 1:], mask, self.gamma)
        taken = [chosen(q, actions) for q in q_values]
        q_loss = sum(masked_mean((q - wanted).square(), mask) for q in taken)
        v_loss = expectile_loss(values[:, :-1], chosen(self.q_heads.target(before), actions), mask, self.expectile)
        cql_loss = sum(conservative_loss(q, actions, mask) for q in q_values)
        nll = -masked_mean(output.logprobs, mask)
        loss = q_loss + v_loss + self.cql_coef * cql_loss + self.lm_coef * nll
        metrics = {
            "loss/q": q_loss,
            "loss/v": v_loss,
            "loss/cql": cql_loss,
            "loss/lm": nll,
            "q/mean": masked_mean(torch.minimum(*taken), mask),
            "q/state_value": masked_mean(values[:, :-1], mask),
            "q/return": masked_mean(self._returns(inputs), mask),
        }
        return loss, {name: value.detach() for name, value in metrics.items()}

    def _returns(self, inputs: RewardedBatch) -> Tensor:
        """(B, T) what was really earned from each token on, discounted."""
        mask = inputs.completions.response_mask
        left = mask.flip(-1).long().cumsum(-1).flip(-1) - 1
        return zero_masked(inputs.rewards.unsqueeze(1) * self.gamma ** left.clamp(min=0), mask)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if not self.guard.bad:
            self.q_heads.follow(self.polyak)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "targets": self.q_heads.targets.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.q_heads.targets.load_state_dict(state["targets"])

    def export(self, folder: Path) -> None:
        """Writes the policy in Hugging Face format, and beside it the Q heads that guide its decoding."""
        super().export(folder)
        save_guidance(folder, self.q_heads.targets, beta=self.beta, prior=1.0)


def chosen(q_values: Tensor, actions: Tensor) -> Tensor:
    """(B, T, vocabulary) values and (B, T) token ids -> (B, T), the values of those tokens."""
    return q_values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
