"""A scorer: any sequence classifier of transformers with its tokenizer, for training reward models and using them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_rlhf.distributed import rank, whole
from lit_rlhf.errors import UserError
from lit_rlhf.models.attention import use_fitting_attention
from lit_rlhf.models.sources import not_loaded, resolve_model

_NO_LIMIT = 10**6  # tokenizers without a length limit say 1e30


class Scorer(nn.Module):
    """Texts (B) to logits (B, labels).

    Encoders read the text through their own pooling. A causal model reads its logits at the last token that is not the
    pad token; where the end-of-sequence token doubles as pad, one that ends a text is therefore skipped.

    Args:
        model: a sequence classifier.
        tokenizer: its tokenizer; pads on the right, and with the end-of-sequence token where it has no pad token.
        max_length: longer texts lose their end, in tokens; None means the tokenizer's limit. It is saved with the
            tokenizer, so that scoring reads what training read.

    Raises:
        UserError: ``max_length`` does not fit the model, or the tokenizer has neither a pad nor an eos token.
    """

    def __init__(
        self, *, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> None:
        super().__init__()
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise UserError("the reward model's tokenizer has neither a pad nor an eos token; set one before training")
        context = _context_length(model)
        if max_length is None:
            max_length = min(context, tokenizer.model_max_length)
        if not 1 <= max_length <= context:
            raise UserError(f"max_length={max_length} must be at least 1 and at most the model's {context} tokens")
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        tokenizer.padding_side = "right"
        tokenizer.model_max_length = max_length
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls, *, path: str, labels: int | None = None, max_length: int | None = None, trust_remote_code: bool = False
    ) -> "Scorer":
        """Loads a model by hub name, folder or short name (``minilm``).

        Args:
            path: where the model is.
            labels: number of outputs; a head of another size is made anew, at random. None keeps the model's own head.
            max_length: see the class.
            trust_remote_code: run the Python code that comes with the model, which can do anything.

        Raises:
            UserError: nothing can be loaded from ``path``, or it has no classification head and ``labels`` is None.
        """
        folder = resolve_model(path)
        trust = {"trust_remote_code": trust_remote_code}
        options = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **trust, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
        except Exception as error:  # of whatever is in the folder
            raise not_loaded("path", path, "sequence classifier", error) from error
        use_fitting_attention(model)
        if labels is None and report["missing_keys"]:
            raise UserError(
                f"{path} is not a trained sequence classifier: it has no weights for {sorted(report['missing_keys'])}. "
                "Train it first (algorithm=reward_model), or name a model that has a classification head."
            )
        return cls(model=model, tokenizer=tokenizer, max_length=max_length)

    def tokenize(self, texts: Sequence[str]) -> list[Tensor]:
        """Token ids of each text. A text without tokens becomes one end-of-sequence (or pad) token."""
        tokenizer = self.tokenizer
        nothing = [tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id]
        rows = tokenizer(list(texts), truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
        return [torch.tensor(ids or nothing) for ids in rows]

    def pad(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Token ids of B texts -> (B, T) ids and their mask, padded on the right."""
        lengths = torch.tensor([len(ids) for ids in rows])
        ids = pad_sequence(list(rows), batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, T) ids and mask -> (B, labels) logits in fp32."""
        return self.model(input_ids=ids, attention_mask=mask).logits.float()

    def save(self, folder: Path) -> None:
        """Writes model and tokenizer in Hugging Face's format, in the first process; every process must call it."""
        weights = {name: whole(x) for name, x in self.model.state_dict().items()}
        if rank() == 0:
            self.model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)


def _context_length(model: PreTrainedModel) -> int:
    """The longest text that the model reads, in tokens."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            return part.num_embeddings - part.padding_idx - 1  # RoBERTa's positions begin after that of the padding
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or _NO_LIMIT
