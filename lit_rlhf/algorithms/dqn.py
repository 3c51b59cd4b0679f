"""Deep Q-learning on the token MDP: the baseline that values tokens by the best continuation it believes in.

Mnih et al. 2015 (Nature 518) with double Q-learning (van Hasselt et al. 2016, arXiv:1509.06461), fitted to completions
that are already there (fitted Q iteration, Ernst et al. 2005). Against ILQL it keeps the maximum over all tokens, those
that the data never tried included, and has neither V nor a language model in its policy: what goes wrong with it is the
reason for ILQL.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.ilql import chosen
from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.algorithms.rewarded import RewardedBatch, collate_rewarded, token_rewards
from lit_rlhf.checks import check_number
from lit_rlhf.data.completions import check_max_length
from lit_rlhf.functional import bellman_targets, masked_mean
from lit_rlhf.models.guided import QHeads, save_guidance
from lit_rlhf.models.policy import Policy, disable_dropout
from lit_rlhf.rollout.philox import derive_seed


class DQN(OfflineAlgorithm):
    """Double deep Q-learning (arXiv:1509.06461, eq. 4) on fixed completions, a Q head on the policy's hidden states.

    L = mean over tokens of (r_t + gamma Q'(s_{t+1}, argmax_a Q(s_{t+1}, a)) - Q(s_t, a_t))^2, with Q' the target
    network and 0 after the end. The reward of a completion is that of its last token.

    Decoding draws from softmax(Q / temperature), or takes the best token (``sampler=greedy``); the language model has
    no say. Batches are dicts of columns: ``prompt`` (texts or chats; may be missing), ``completion``, ``reward``.

    Args:
        policy: the model whose backbone is trained; its folder, exported, decodes by Q.
        temperature: of decoding, above 0; part of the export, not of the loss.
        gamma: discount.
        polyak: how far the target moves towards the head in an optimiser step, in (0, 1].
        max_length: the longest sequence in tokens, prompt and end included; by default the policy's context.
        **offline: log_every_n_steps, optimizer, scheduler, seed; see ``OfflineAlgorithm``.

    Raises:
        UserError: a value out of its range; a batch without these columns, or a reward that is no number.
    """

    shardable = False  # its targets follow outside the graph
    leaves_weights_out = True  # the language-model head's

    def __init__(
        self,
        *,
        policy: Policy,
        temperature: float = 1.0,
        gamma: float = 0.99,
        polyak: float = 0.005,
        max_length: int | None = None,
        **offline: Any,
    ) -> None:
        super().__init__(**offline)
        self.temperature = check_number("algorithm.temperature", temperature, above=0)
        self.gamma = check_number("algorithm.gamma", gamma, at_least=0, at_most=1)
        self.polyak = check_number("algorithm.polyak", polyak, above=0, at_most=1)
        self.max_length = check_max_length(max_length, policy)
        disable_dropout(policy)
        self.policy = policy
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed))
            self.q_heads = QHeads(policy.hidden_size, policy.base.config.get_text_config().vocab_size, count=1)

    def collate(self, batch: Any) -> MicroBatch:
        return collate_rewarded(batch, self.policy, self.max_length, "deep Q-learning")

    def loss(self, inputs: RewardedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        actions, mask = inputs.completions.response_ids, inputs.completions.response_mask
        hidden = self.policy(*inputs.completions.tokens).hidden.float()
        (q_values,) = self.q_heads(hidden)  # (B, T + 1, vocabulary)
        best = q_values[:, 1:].detach().argmax(-1)
        following = chosen(self.q_heads.target(hidden[:, 1:]), best)
        wanted = bellman_targets(token_rewards(inputs), following, mask, self.gamma)
        taken = chosen(q_values[:, :-1], actions)
        loss = masked_mean((taken - wanted).square(), mask)
        metrics = {
            "loss/q": loss,
            "q/mean": masked_mean(taken, mask),
            "q/state_value": masked_mean(q_values[:, :-1].amax(-1), mask),
        }
        return loss, {name: value.detach() for name, value in metrics.items()}

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
        """Writes the policy in Hugging Face format, and beside it the Q head that decodes."""
        super().export(folder)
        save_guidance(folder, self.q_heads.targets, beta=1 / self.temperature, prior=0.0)
