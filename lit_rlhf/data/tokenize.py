"""From a datamodule's batch to a PromptBatch: the only place where prompts are tokenised."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lit_rlhf.batch import PromptBatch
from lit_rlhf.data.passes import END_OF_PASS, SeededPasses
from lit_rlhf.errors import UserError

Row = dict[str, Any]
TOKEN_KEYS = ("input_ids", "attention_mask")
_ARGUMENTS = {"prompts", "completions", "completion_ids", "tokenizer"}  # of a reward, besides the columns


def split_rows(batch: Any) -> list[Row]:
    """The rows of a prompt batch: a dict with ``prompt``, or ``input_ids`` and ``attention_mask``, and other columns.

    Raises:
        UserError: it is no dict, has neither key, or its columns differ in length.
    """
    if not isinstance(batch, Mapping):
        raise UserError(
            f"the dataloader yields {type(batch).__name__}; a prompt batch is a dict with 'prompt' (a list of texts or "
            "chats) or with 'input_ids' and 'attention_mask'"
        )
    if "prompt" not in batch and "input_ids" not in batch:
        raise UserError(
            f"the dataloader's batches have the keys {sorted(map(str, batch))} but neither 'prompt' nor 'input_ids'"
        )
    if "prompt" not in batch and "attention_mask" not in batch:
        raise UserError("the dataloader's batches have 'input_ids' without 'attention_mask': which tokens count?")
    key = "prompt" if "prompt" in batch else "input_ids"
    if isinstance(batch[key], str) or not hasattr(batch[key], "__len__") or getattr(batch[key], "ndim", 2) == 1:
        raise UserError(f"the dataloader yields single rows ('{key}' is not a list); give it a batch_size")
    if is_transposed(batch[key]):
        raise UserError(
            "the batch holds chats that the default collate function of a DataLoader has turned inside out; give it "
            "collate_fn=lambda rows: {key: [row[key] for row in rows] for key in rows[0]}"
        )
    size = len(batch[key])
    for name, column in batch.items():
        if not hasattr(column, "__len__") or isinstance(column, str) or len(column) != size:
            length = len(column) if hasattr(column, "__len__") else "no"
            raise UserError(f"column '{name}' of the prompt batch has {length} entries, but '{key}' has {size}")
    if taken := sorted(_ARGUMENTS & set(batch)):
        raise UserError(
            f"a column of the prompt batch is called '{taken[0]}', which is an argument of every reward; rename "
            "it, or name the columns to pass on without it (data.columns)"
        )
    if odd := [name for name in batch if not isinstance(name, str)]:
        raise UserError(f"a column of the prompt batch is called {odd[0]!r}; its name must be a text")
    if size == 0:
        raise UserError(f"'{key}' of a prompt batch is empty: the dataset yields a batch without rows")
    columns = {name: _as_list(column, name) for name, column in batch.items()}
    return [{name: column[i] for name, column in columns.items()} for i in range(size)]


def is_transposed(prompts: Any) -> bool:
    """Whether each "chat" is one turn of all chats: {"role": [...], "content": [...]}."""
    return (
        isinstance(prompts, list)
        and bool(prompts)
        and all(isinstance(turn, Mapping) and not isinstance(turn.get("role", ""), str) for turn in prompts)
    )


def _as_list(column: Any, name: str) -> list[Any]:
    if isinstance(column, Tensor) and name not in TOKEN_KEYS:
        return column.tolist()
    return list(column)


class PromptRows:
    """Draws any number of prompts from a user's loader, across its batches and passes; each ``group_size`` times."""

    def __init__(self, passes: SeededPasses, group_size: int = 1) -> None:
        self.passes = passes
        self.group_size = group_size
        self._left: list[Row] = []  # rows of the current batch that are still to be drawn
        self._drawn = 0  # rows of the current batch already drawn

    def draw(self, count: int) -> list[Row]:
        """``count`` rows; those of one prompt stand next to each other."""
        rows: list[Row] = []
        prompts = count // self.group_size
        while len(rows) < prompts:
            if not self._left:
                batch = self.passes.next_batch()
                if batch is END_OF_PASS:
                    continue
                self._left, self._drawn = split_rows(batch), 0
            take = min(prompts - len(rows), len(self._left))
            rows += self._left[:take]
            self._left, self._drawn = self._left[take:], self._drawn + take
        return [row for row in rows for _ in range(self.group_size)]

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes.state_dict(), "drawn": self._drawn if self._left else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        passes = dict(state["passes"])
        self._left, self._drawn = [], 0
        if state["drawn"] is None:
            self.passes.load_state_dict(passes)
            return
        passes["batch"] -= 1  # stopped inside this batch: fetch it again, drop the rows already drawn
        self.passes.load_state_dict(passes)
        self._left = split_rows(self.passes.next_batch())[state["drawn"] :]
        self._drawn = state["drawn"]


def tokenize_prompts(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    episodes: Tensor,
    max_new_tokens: int,
    context_length: int | None,
) -> PromptBatch:
    """Rows to a left-padded PromptBatch.

    Texts are tokenised as they are; chats go through the tokenizer's chat template with the opening of the answer.

    Raises:
        UserError: an empty prompt, a prompt that leaves no room for ``max_new_tokens`` in the context, or a chat for a
            tokenizer without a template. The prompt is named.
    """
    sequences = [_token_ids(row, tokenizer) for row in rows]
    for number, (ids, row) in enumerate(zip(sequences, rows, strict=True)):
        shown = _short(row.get("prompt", row.get("input_ids")))
        if len(ids) and (worst := int(ids.max())) >= len(tokenizer):
            raise UserError(f"prompt {number} of the batch has the token id {worst}; the policy knows {len(tokenizer)}")
        if len(ids) == 0:
            raise UserError(f"prompt {number} of the batch has no tokens: {shown}")
        if context_length is not None and len(ids) + max_new_tokens > context_length:
            raise UserError(
                f"prompt {number} of the batch has {len(ids)} tokens; with sampler.max_new_tokens={max_new_tokens} it "
                f"does not fit the policy's context of {context_length}: {shown}"
            )
    masks = [torch.ones(len(ids), dtype=torch.bool) for ids in sequences]
    pad = tokenizer.pad_token_id
    columns = [name for name in rows[0] if name != "prompt" and name not in TOKEN_KEYS]
    for name in {name for row in rows for name in row}:
        if any(name not in row for row in rows):
            raise UserError(f"some batches of prompts have the column '{name}' and others do not")
    return PromptBatch(
        prompt_ids=pad_sequence(sequences, batch_first=True, padding_value=pad, padding_side="left"),
        prompt_mask=pad_sequence(masks, batch_first=True, padding_value=False, padding_side="left"),
        episodes=episodes,
        prompts=[
            row["prompt"] if "prompt" in row else tokenizer.decode(ids, skip_special_tokens=True)
            for row, ids in zip(rows, sequences, strict=True)
        ],
        columns={name: [row[name] for row in rows] for name in columns},
    )


def _token_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    if "prompt" not in row:
        ids, mask = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["attention_mask"]).bool()
        return ids[mask].long().cpu()
    prompt = row["prompt"]
    if isinstance(prompt, str) and not prompt.strip():
        return torch.empty(0, dtype=torch.long)
    return torch.tensor(prompt_ids(prompt, tokenizer), dtype=torch.long)


def prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt: of a text with the tokenizer's special tokens, of a chat as its template writes it.

    Some tokenizers put an end of sequence after every text (``add_eos_token``). A prompt goes on, so it loses that.
    """
    if not isinstance(prompt, str):
        return tokenizer(render(prompt, tokenizer), add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt)["input_ids"]
    if ids[-1:] == [tokenizer.eos_token_id]:
        own = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids if ids[-len(own) :] == own else ids[:-1]
    return ids


def render(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt as the policy reads it: chats through the template, texts unchanged."""
    if isinstance(prompt, str):
        return prompt
    if not (isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) and "role" in m for m in prompt)):
        raise UserError(
            f"a prompt is a text or a list of messages {{'role': …, 'content': …}}, got {_short(prompt)}"
        )
    if tokenizer.chat_template is None:
        raise UserError(
            "the prompts of data are chats, but the tokenizer of policy has no chat template; use prompts that are "
            "texts, or a policy that was made for chats"
        )
    return render_chat(prompt, tokenizer, "policy", add_generation_prompt=True)


def render_chat(chat: list[Any], tokenizer: PreTrainedTokenizerBase, owner: str, **settings: Any) -> str:
    """A chat as the template of ``owner``, "policy" or "reward model", writes it; ``settings`` are the template's.

    Raises:
        UserError: the template refuses it.
    """
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **settings)
    except Exception as error:  # of the template, which is code of the model's, in a sandbox
        raise UserError(
            f"the {owner}'s chat template fails on {_short(chat)}: {type(error).__name__}: {error}"
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
