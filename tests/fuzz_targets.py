"""What readers of outside text must stand: any input gives a value or a UserError. For the suite and for tests.fuzz.

Each target takes bytes. It raises nothing but what is a finding.
"""

import contextlib
import csv
import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from tiny import tiny_policy

from lit_rlhf.chat import as_paragraphs, require_chat, whole_sentences
from lit_rlhf.config import flatten, refuse_no_member
from lit_rlhf.config_types import check_types, fits
from lit_rlhf.data.completions import answer_text, encode
from lit_rlhf.data.dataset import DatasetPrompts
from lit_rlhf.data.prompts import prompt_problem
from lit_rlhf.data.text_files import infer
from lit_rlhf.data.tokenize import render, split_rows
from lit_rlhf.errors import UserError, printable
from lit_rlhf.overrides import decode_key, encode_key, quote, replace_parts, split_override
from lit_rlhf.report_text import settings_line
from lit_rlhf.rewards import JsonReward, VerifierReward
from lit_rlhf.rewards.http import _seconds
from lit_rlhf.rewards.judge import read_score, read_verdict
from lit_rlhf.run_folder import METRICS, SAMPLES, SUMMARY, read_metrics, read_samples, read_summary, write_summary

POLICY = tiny_policy()
POLICY.tokenizer.chat_template = (
    "{% for m in messages %}{% if m['role'] == 'error' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
)
KEYS = [
    "trainer.gradient_clip_val", "trainer.max_epochs", "optimizer.lr", "kl.coef", "reward._target_", "data.prompts",
]  # fmt: skip


def data_file(data: bytes) -> None:
    """A file of data in each text format: rows, all of them good, or a UserError of one line."""
    with tempfile.TemporaryDirectory() as folder:
        for format in ("jsonl", "csv"):
            file = Path(folder) / f"a.{format}"
            file.write_bytes(data)
            rows = _rows(file, strict=True)
            kept = _rows(file, strict=False)
            if rows is not None:
                assert repr(rows) == repr(kept)


def _rows(file: Path, strict: bool) -> list[Any] | None:
    read = DatasetPrompts(
        format=file.suffix[1:], path=str(file), strict=strict, types={"reward": "number", "label": "bool"}
    )
    try:
        read.setup()
    except UserError as error:
        if "\n" in str(error) or "a." not in str(error):
            raise AssertionError(f"not one line that names the file: {error}") from error
        return None
    rows = list(read.train_rows)
    for row in rows:
        assert prompt_problem(row["prompt"]) is None
        assert isinstance(row["label"], bool)
        assert math.isfinite(row["reward"])
    assert rows
    read.collate(rows)
    return rows


def csv_rows(data: bytes) -> None:
    """What Python's own writer writes of texts is read back as these texts."""
    texts = [text.replace("\0", "") for text in data.decode(errors="ignore").split("|")]
    texts = [text or "x" for text in texts if text == "" or text.strip()]
    if not texts:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.csv"
        buffer = io.StringIO()
        csv.writer(buffer).writerows([["prompt", "n"], *([text, 1] for text in texts)])
        file.write_bytes(buffer.getvalue().encode())
        read = DatasetPrompts(format="csv", path=str(file))
        read.setup()
        assert [row["prompt"] for row in read.train_rows] == texts


def chat(data: bytes) -> None:
    """Anything that JSON can hold, as a prompt, a completion and a batch."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        problem = prompt_problem(value)
        with contextlib.suppress(UserError):
            assert isinstance(render(value, POLICY.tokenizer), str)
        with contextlib.suppress(UserError):
            messages = require_chat(value)
            assert problem is None
            as_paragraphs(messages)
        with contextlib.suppress(UserError):
            ids, count = encode(0, value, value, "completion", POLICY.tokenizer, 64)
            assert 0 <= count < len(ids) <= 64
        for batch in (value, {"prompt": value}, {"prompt": [value], "x": value}):
            with contextlib.suppress(UserError):
                split_rows(batch)
        answer_text(value)


def overrides(data: bytes) -> None:
    """Overrides as somebody typed them, and values that are written as overrides and read back by Hydra."""
    text = data.decode(errors="replace")
    typed = text.split("|")
    with contextlib.suppress(UserError):
        refuse_no_member(typed)
    replace_parts(typed)
    for override in typed:
        split_override(override)
    if "-" not in text:
        assert decode_key(encode_key(text)) == text
    value: Any = text
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
    if _plain(value):
        (read,) = OverridesParser.create().parse_overrides([f"key={quote(value)}"])
        assert _same(OmegaConf.to_container(OmegaConf.create({"x": read.value()}))["x"], value)


def _plain(value: Any) -> bool:
    """What a config holds: no text that refers to another key, keys that are names."""
    if isinstance(value, str):
        return "${" not in value
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(key.isidentifier() and key.isascii() and _plain(item) for key, item in value.items())
    return True


def _same(read: Any, value: Any) -> bool:
    if isinstance(value, dict) and isinstance(read, dict):
        return len(read) == len(value) and all(_same(read[k], v) for k, v in value.items())
    if isinstance(value, list) and isinstance(read, list):
        return len(read) == len(value) and all(map(_same, read, value))
    return repr(read) == repr(value)


def config_values(data: bytes) -> None:
    """A node of a config, whatever it holds, against the types of what it makes."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        for hint in (int, float | None, list[str], tuple[float, ...], dict[str, Any]):
            assert fits(value, hint) in (True, False)
        for key in KEYS:
            group, _, name = key.partition(".")
            with contextlib.suppress(UserError):
                check_types({name: value, "_target_": "lightning.Trainer"}, group)
            with contextlib.suppress(UserError):
                check_types({name: value}, group)
        settings_line(value)
        if isinstance(value, dict):
            flatten(value)


def run_files(data: bytes) -> None:
    """The files of a run folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, read in ((METRICS, read_metrics), (METRICS, write_summary), (SAMPLES, read_samples),
                           (SUMMARY, read_summary)):  # fmt: skip
            (folder / file).write_bytes(data)
            with contextlib.suppress(UserError):
                read(folder)
            (folder / file).unlink(missing_ok=True)


def replies(data: bytes) -> None:
    """What servers and models say: headers, scores, verdicts, answers."""
    text = data.decode(errors="replace")
    assert isinstance(_seconds(text), float)
    assert min(max(0.5, _seconds(text)), 60.0) >= 0.5
    score = read_score(text, 1, 10)
    assert score is None or 1 <= score <= 10
    assert read_verdict(text) in (None, 0.0, 0.5, 1.0)
    for reward in (VerifierReward(), VerifierReward(pattern="Answer: (.*)")):
        (right,) = reward([""], [text], answer=[7])
        assert right in (0.0, 1.0)
        with contextlib.suppress(UserError):
            reward([""], [text], answer=[text])
    assert JsonReward(required_keys=["a"], partial=True)([""], [text])[0] in (0.0, 1.0)
    assert whole_sentences(text) == text or text.startswith(whole_sentences(text))
    shown = printable(text)
    assert not set(shown) & {"\x1b", "\x07", "\r", "\x9b", "\u202e"}
    infer(text.split("|"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (data_file, csv_rows, chat, overrides, config_values, run_files, replies)
}
