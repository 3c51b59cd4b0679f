"""A policy in this process that answers: the writer and the judge of constitutional AI."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.judged import decode_completions
from lit_rlhf.checks import check_int
from lit_rlhf.data.prompts import prompt_problem
from lit_rlhf.data.tokenize import tokenize_prompts
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.sampler import Sampler

Chat = list[dict[str, str]]
_EPISODES = 2**32  # completions of one stream


class ChatModel:
    """Answers chats, and says how likely each of several answers is. Loaded at its first use.

    A tokenizer without a chat template gets the chats as ``Human: ...`` and ``Assistant: ...`` paragraphs.

    Args:
        path: short name, hub name or folder of a causal language model, e.g. the ``model`` folder of an SFT run.
        max_new_tokens: of an answer. One that the limit cuts ends with its last whole sentence, if it has one.
        temperature: of sampling; 0 takes the likeliest token each time.
        batch_size: chats answered together.
        attention: one of transformers' implementations; None as in ``Policy.from_pretrained``.

    Raises:
        UserError: a value out of its range; at the first use, nothing can be loaded from ``path``.
    """

    def __init__(
        self,
        *,
        path: str,
        max_new_tokens: int = 128,
        temperature: float = 0.7,
        batch_size: int = 16,
        attention: str | None = None,
    ) -> None:
        self.path = path
        self.batch_size = check_int("batch_size", batch_size, at_least=1)
        self.attention = attention
        self.sampler = Sampler(max_new_tokens=max_new_tokens, temperature=temperature, chunk_size=self.batch_size)
        self._policy: Policy | None = None

    @property
    def policy(self) -> Policy:
        if self._policy is None:
            policy = Policy.from_pretrained(path=self.path, attention=self.attention).eval()
            self._policy = policy.to("cuda" if torch.cuda.is_available() else "cpu")
        return self._policy

    def settings(self) -> dict[str, Any]:
        """What its answers depend on."""
        return {
            "path": self.path,
            "max_new_tokens": self.sampler.max_new_tokens,
            "temperature": self.sampler.temperature,
        }

    def write(self, chats: Sequence[Chat], *, seed: int, stream: int) -> list[str]:
        """One answer to each chat. Answer i is a function of (seed, stream, i) and of the model."""
        prompts = self._prompts(chats, stream)
        rollout = self.sampler.generate(
            self.policy.decoder(), prompts, seed=seed, stop_ids=self.policy.stop_ids,
            pad_id=self.policy.tokenizer.pad_token_id,
        ).to("cpu")  # fmt: skip
        texts = decode_completions(rollout, self.policy.tokenizer)
        return [
            text.strip() if finished else whole_sentences(text.strip())
            for text, finished in zip(texts, rollout.finished.tolist(), strict=True)
        ]

    @torch.no_grad()
    def choose(self, chats: Sequence[Chat], options: Sequence[str]) -> Tensor:
        """(B, options) the probability of each option as the beginning of the answer, among the options."""
        columns = []
        for option in options:
            ids = torch.tensor(self.policy.tokenizer(option, add_special_tokens=False)["input_ids"])
            parts = []
            for start in range(0, len(chats), self.batch_size):
                prompts = self._prompts(chats[start : start + self.batch_size], 0)
                answer = ids.expand(len(prompts), -1).to(prompts.prompt_ids.device)
                tokens = (prompts.prompt_ids, prompts.prompt_mask, answer, torch.ones_like(answer, dtype=torch.bool))
                parts.append(self.policy(*tokens).logprobs.sum(-1).cpu())
            columns.append(torch.cat(parts))
        return torch.stack(columns, -1).softmax(-1)

    def _prompts(self, chats: Sequence[Chat], stream: int) -> Any:
        plain = self.policy.tokenizer.chat_template is None
        return tokenize_prompts(
            [{"prompt": as_paragraphs(chat) if plain else chat} for chat in chats],
            self.policy.tokenizer,
            episodes=stream * _EPISODES + torch.arange(len(chats)),
            max_new_tokens=self.sampler.max_new_tokens,
            context_length=self.policy.context_length,
        ).to(next(self.policy.parameters()).device)


def as_paragraphs(chat: Chat) -> str:
    """A chat as text, with the opening of the answer.

    >>> as_paragraphs([{"role": "user", "content": "Hi"}])
    'Human: Hi\\n\\nAssistant:'
    """
    names = {"assistant": "Assistant", "system": "System"}
    turns = [f"{names.get(message['role'], 'Human')}: {message['content']}" for message in chat]
    return "\n\n".join([*turns, "Assistant:"])


def whole_sentences(text: str) -> str:
    """The text up to its last full stop, question or exclamation mark; all of it if there is none.

    >>> whole_sentences("It is late. We should g"), whole_sentences("no end in si")
    ('It is late.', 'no end in si')
    """
    found = re.match(r".*[.!?][\"')\]]?(?=\s|$)", text, flags=re.S)
    return found[0] if found else text


def require_chat(prompt: Any) -> Chat:
    """A prompt as a chat: a text is what the user says.

    Raises:
        UserError: it is neither, or empty.
    """
    if problem := prompt_problem(prompt):
        raise UserError(f"a prompt is a text or a list of messages; this one {problem:.200}")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
