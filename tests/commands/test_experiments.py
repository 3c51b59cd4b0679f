"""The experiments run from their headers' commands, on a tiny model; those of the human ratings in test_pipeline.py."""

import csv
import json
import re
from pathlib import Path

import pytest
from command_line import run_here, write_ratings
from local_server import Server
from tiny import tiny_policy

SHORT = [
    "policy.lora=null", "trainer.precision=32-true", "trainer.accelerator=cpu", "trainer.max_epochs=2", "logger=csv",
    "algorithm.rollout_batch_size=8", "algorithm.minibatch_size=8", "sampler.max_new_tokens=4", "optimizer.lr=1e-3",
    "paths.output_dir=run",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    policy = tiny_policy(max_position_embeddings=1024)
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    policy.save(folder)
    return folder


@pytest.fixture
def run(folder, model, monkeypatch):
    """Runs an experiment; gives the rows of metrics and of held-out samples."""
    monkeypatch.setattr("lit_rlhf.report.build_report", lambda folder: None)

    def run(name: str, *own: str) -> tuple[list[dict], list[dict]]:
        result = run_here("train", f"experiment={name}", f"policy.path={model}", *SHORT, *own)
        assert result.code == 0, result.err
        with open("run/metrics.csv", newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        samples = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
        return rows, [row for row in samples if row["split"] == "validation"]

    return run


def test_arithmetic_shows_how_and_verifies_the_sum(run):
    rows, samples = run("arithmetic", "data.val_count=4")
    assert all(row["prompt"].startswith("3 + 4 = 7\n6 + 2 = 8\n") for row in samples)
    assert "val/reward/verifier" in rows[0]


def test_json_asks_in_a_chat_and_watches_whether_the_answer_is_right(run):
    rows, samples = run("json")
    assert len({row["prompt"] for row in samples}) == 24
    assert all(re.match(r"user: \w+ is \d+ years old. Write that as JSON", row["prompt"]) for row in samples)
    assert {"val/reward/json", "val/gold/verifier"} <= set(rows[0])


def test_length_learns_from_the_openings_of_reviews(run, folder, monkeypatch):
    monkeypatch.setenv("LIT_RLHF_CACHE", str(folder))
    write_ratings(folder, 300)
    rows, samples = run("length", "data.eval_prompts=4")
    for row in samples:
        assert row["components"]["length"] == pytest.approx(-0.1 * abs(len(row["completion"].split()) - 8))
    assert "val/reward/length" in rows[-1]


def test_detoxification_raises_the_multiplier_while_completions_are_not_kind_enough(run, folder, monkeypatch):
    monkeypatch.setenv("LIT_RLHF_CACHE", str(folder))
    write_ratings(folder, 300)
    rows, samples = run("detoxification", "data.eval_prompts=4")
    first, second = (row for row in rows if "reward/multiplier" in row)
    assert first["reward/multiplier"] == 0
    assert second["reward/multiplier"] == pytest.approx(0.4 - first["reward/constraint"])
    assert {"objective", "constraint", "multiplier"} == set(samples[0]["components"])


def test_helpfulness_shows_a_judge_the_whole_conversation(run):
    with Server(lambda body: {"choices": [{"message": {"content": "Score: 10"}}]}) as server:
        rows, samples = run("helpfulness", f"reward.base_url={server.url}", "reward.model=any")
    asked = [request.body["messages"][0]["content"] for request in server.requests]
    assert any("assistant: When do you have time?" in question for question in asked)
    assert len({str(row["prompt"]) for row in samples}) == 16
    assert rows[-1]["val/reward/judge"] == 1
