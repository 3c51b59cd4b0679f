"""Models and prompts that both sides of a comparison read, made once in the cache.

    python -m tests.benchmarks.materials SETTINGS    prints where they are; both are JSON
"""

import json
import math
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lit_rlhf.models.download import cache_dir
from lit_rlhf.models.sources import fetch
from tests.benchmarks.settings import Materials, Settings

TINY_VOCABULARY = 4096
#: Drawn prompts at least, so that consecutive iterations see different ones.
PROMPTS = 64
_PLAIN_WORD = re.compile(r" [a-z]{3,}|t\d+")


def prepare(settings: Settings) -> Materials:
    """Makes what is missing of the settings' materials."""
    folder = cache_dir() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    model = fetch("smollm2") if settings.model == "smollm2" else _once(folder / "tiny", _make_tiny)
    if settings.work == "rollout":
        countdown = _once(folder / f"{settings.model}_countdown", lambda target: make_countdown(model, target))
        return Materials(folder=str(folder), model=str(countdown))
    count = max(PROMPTS, 2 * settings.completions // settings.group)
    prompts = folder / f"prompts_{settings.model}_{settings.prompt_length}_{count}.jsonl"
    if not prompts.exists():
        rows = draw_prompts(AutoTokenizer.from_pretrained(model), count, settings.prompt_length)
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings.work == "grpo":
        return Materials(folder=str(folder), model=str(model), prompts=str(prompts))
    reward = _once(folder / f"{settings.model}_reward", lambda target: _make_reward(model, target))
    return Materials(folder=str(folder), model=str(model), prompts=str(prompts), reward=str(reward))


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, made under another name first: what was interrupted does not look complete."""
    if not target.exists():
        fresh = target.with_name(f".{target.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        make(fresh)
        fresh.rename(target)
    return target


def _make_tiny(target: Path) -> None:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=1024, tie_word_embeddings=True, **special,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(target)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(TINY_VOCABULARY)}, unk_token="t3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2", padding_side="left"
    ).save_pretrained(target)


def _make_reward(model: Path, target: Path) -> None:
    torch.manual_seed(0)  # of the score head, which is new
    tokenizer = AutoTokenizer.from_pretrained(model)
    scorer = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    scorer.config.pad_token_id = tokenizer.pad_token_id
    scorer.save_pretrained(target)
    tokenizer.save_pretrained(target)


def draw_prompts(tokenizer: PreTrainedTokenizerFast, count: int, length: int) -> list[dict]:
    """``count`` prompts of ``length`` random words, each of which is one token, also when they stand in a text."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    words = [i for i, text in enumerate(texts) if _PLAIN_WORD.fullmatch(text) and i not in tokenizer.all_special_ids]
    draw, rows = random.Random(0), []
    while len(rows) < count:
        ids = draw.choices(words, k=length)
        text = tokenizer.decode(ids)
        if tokenizer(text)["input_ids"] == ids:
            rows.append({"prompt": text, "ids": ids})
    return rows


@torch.no_grad()
def make_countdown(model: Path, target: Path) -> None:
    """A model of the same shape that counts down: after token i it says i - 1, with certainty.

    So a completion ends at a known step, whatever decodes it, in any precision: one whose prompt ends with the token
    ``eos + n`` has n tokens, the last of them the end of sequence. Embeddings are random, hence nearly orthogonal, and
    so long that the layers cannot turn them; row i - 1 of the head points where the embedding of token i does. The
    layers are the model's own and cost what they cost.
    """
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    embedding = language_model.get_input_embeddings().weight
    directions = torch.nn.functional.normalize(torch.randn_like(embedding), dim=-1)
    width = embedding.shape[1]
    embedding.copy_(directions * 1000 * math.sqrt(width))
    head = torch.nn.Linear(width, len(embedding), bias=False)
    head.weight.copy_(directions.roll(-1, dims=0) * 200 / math.sqrt(width))  # a logit of 200 against less than 100
    language_model.config.tie_word_embeddings = False
    language_model.set_output_embeddings(head)
    language_model.base_model.norm.weight.fill_(1.0)
    language_model.save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)


if __name__ == "__main__":
    print(json.dumps(asdict(prepare(Settings(**json.loads(sys.argv[1]))))))
