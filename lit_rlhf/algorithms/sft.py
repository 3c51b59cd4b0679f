"""Supervised fine-tuning: the policy learns to write texts like those of a dataset.

The first stage of InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, section 3.1). Maximises the log-likelihood of the
target tokens, token by token, given the tokens before them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lit_rlhf.algorithms.base import OptimizerFactory, SchedulerFactory
from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm
from lit_rlhf.data.completions import check_max_length, encode
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import Policy


class SFT(OfflineAlgorithm):
    """Causal language modelling on texts, or on completions of prompts.

    Loss: L = - (1 / N) sum log policy(x_t | x_<t) over the N target tokens of an optimiser step, however many
    micro-batches it has. Batches are dicts of columns:

    - ``text``: list of str. Every token is a target except the first, which nothing precedes, unless the tokenizer
      itself begins texts with a token of its own (SmolLM2's does not).
    - ``prompt`` and ``completion``: the completion's tokens are the targets. A prompt is a text or a chat, rendered as
      in a rollout; the two are tokenised apart, as they are in a rollout.

    The end-of-sequence token is appended and is a target, so the policy learns to stop. A sequence longer than
    ``max_length`` loses its end, the end-of-sequence token included.

    Args:
        policy: the model that is trained.
        max_length: the longest sequence in tokens, prompt and end included; by default the policy's context.
        log_every_n_steps: see ``OfflineAlgorithm``.
        optimizer, scheduler, seed, max_skipped_steps: see ``Algorithm``.

    Raises:
        UserError: ``max_length`` is not within the policy's context; a batch without these columns; an empty text.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        max_length: int | None = None,
        log_every_n_steps: int = 10,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        seed: int = 0,
        max_skipped_steps: int = 10,
    ) -> None:
        common = {"optimizer": optimizer, "scheduler": scheduler, "seed": seed, "max_skipped_steps": max_skipped_steps}
        super().__init__(log_every_n_steps=log_every_n_steps, **common)
        self.policy = policy
        self.max_length = check_max_length(max_length, policy)

    def collate(self, batch: Any) -> MicroBatch:
        rows = _columns(batch)
        column = "text" if "text" in batch else "completion"
        sequences = [
            encode(number, prompt, text, column, self.policy.tokenizer, self.max_length)
            for number, (prompt, text) in enumerate(rows)
        ]
        ids = [torch.tensor(tokens) for tokens, _ in sequences]
        targets = [torch.arange(len(tokens)) >= max(prompt, 1) for tokens, prompt in sequences]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.policy.tokenizer.pad_token_id)
        lengths = torch.tensor([len(tokens) for tokens in ids])
        target_mask = pad_sequence(targets, batch_first=True)
        return MicroBatch(
            inputs={
                "input_ids": input_ids,
                "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
                "target_mask": target_mask,
            },
            terms=int(target_mask.sum()),
            sequences=len(rows),
            tokens=int(lengths.sum()),
        )

    def loss(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        ids, targets = inputs["input_ids"], inputs["target_mask"]
        logits = self._logits(ids, inputs["attention_mask"], targets[:, 1:])
        wanted = ids[:, 1:][targets[:, 1:]]
        loss = F.cross_entropy(logits.float(), wanted)
        return loss, {"sft/token_accuracy": (logits.detach().argmax(-1) == wanted).float().mean()}

    def _logits(self, ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        """(N, vocabulary): the logits that choose the N tokens where ``wanted`` (B, T - 1).

        The language-model head is a large part of a small model, so it runs at these positions only. They differ by
        row, which transformers' own ``logits_to_keep`` cannot express.
        """
        chosen = F.pad(wanted, (0, 1))
        head = self.policy.base.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _module, args: (args[0][chosen].unsqueeze(0), *args[1:]))
        try:
            return self.policy.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        finally:
            hook.remove()

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        if "loss/total" not in means:
            return means
        return {**means, "sft/perplexity": float(torch.tensor(means["loss/total"], dtype=torch.float64).exp())}


def _columns(batch: Any) -> list[tuple[Any, Any]]:
    """(prompt or None, text) of every row of a batch.

    Raises:
        UserError: the batch has neither ``text`` nor ``prompt`` and ``completion``, or their lengths differ.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"the dataloader yields {type(batch).__name__}; a batch for SFT is a dict with 'text'")
    if "text" in batch:
        texts = batch["text"]
        prompts = [None] * len(texts)
    elif "prompt" in batch and "completion" in batch:
        prompts, texts = batch["prompt"], batch["completion"]
    else:
        raise UserError(
            f"a batch for SFT needs 'text', or 'prompt' and 'completion'; this one has {sorted(map(str, batch))}"
        )
    if isinstance(texts, str) or len(texts) == 0 or len(texts) != len(prompts):
        raise UserError(
            f"a batch for SFT holds lists of equal length, but its texts are {texts!r:.80}, its prompts {prompts!r:.80}"
        )
    return list(zip(prompts, texts, strict=True))
