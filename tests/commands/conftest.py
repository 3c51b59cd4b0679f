"""A folder to run commands in, and tiny models for them to train."""

from pathlib import Path

import pytest
from classifiers import save_classifier
from tiny import tiny_policy
from transformers import BertTokenizerFast


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, Path]:
    """Folders in Hugging Face's format: a random policy and a random encoder with a WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tiny_policy().save(folder / "policy")
    save_classifier(folder / "encoder", "bert", head=False)
    _word_piece().save_pretrained(folder / "encoder")
    return {"policy": folder / "policy", "encoder": folder / "encoder"}


def _word_piece():
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    pieces += ["snippet", "number", "fine", "dull", "thing", "movies"]
    return BertTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)})


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
