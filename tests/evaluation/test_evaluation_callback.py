"""What is measured at every validation of a run, of any datamodule."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import TINY, run_here
from ppo_runs import fit, make
from tiny import Prompts, letters, tiny_policy
from torch.utils.data import DataLoader

from lit_rlhf.algorithms import SFT
from lit_rlhf.callbacks import Checkpoints, Evaluation, KLGuard
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation import DistinctN
from lit_rlhf.metrics import lookup
from lit_rlhf.rewards import ConstrainedReward
from lit_rlhf.run_folder import read_metrics

VALIDATED = {"data": Prompts(validation=True), "check_val_every_n_epoch": 1, "max_epochs": 3}


class Texts(Prompts):
    def val_dataloader(self):
        return DataLoader([{"text": text} for text in ("hello there", "a b c", "zebra")], batch_size=2)


def watched(trainer, callback, **changes):
    """The validation rows of a run, and its completions."""
    watch = fit(trainer, make(**changes), callbacks=[callback], **VALIDATED)
    rows = [row for row in watch.rows if "val/objective/scores" in row]
    texts = [[s for s in watch.samples if s["split"] == "validation" and s["iteration"] == n] for n in (1, 2, 3)]
    return rows, texts


def test_every_validation_of_a_users_datamodule_is_measured_against_the_first(trainer):
    rows, samples = watched(trainer, Evaluation(text=Texts()), gold=letters)
    assert len(rows) == len(samples) == 3
    for row, completions in zip(rows, samples, strict=True):
        distinct = DistinctN(2)
        distinct.update([s["completion"] for s in completions])
        share = float(distinct.compute())
        assert row.get("val/text/distinct_2") == (None if math.isnan(share) else pytest.approx(share))
        pairs = list(zip(completions, samples[0], strict=True))
        wins = sum((a["score"] > b["score"]) + 0.5 * (a["score"] == b["score"]) for a, b in pairs) / len(pairs)
        assert row["val/win_rate/score"] == row["val/win_rate/gold/letters"] == pytest.approx(wins)
        assert {"val/text/self_bleu", "val/text/empty_rate", "val/win_rate/score/equal_length"} <= set(row)
        assert all(lookup(name) for name in row)
    assert rows[0]["val/win_rate/score"] == 0.5
    assert len({row["val/text/perplexity"] for row in rows}) == 3  # of a policy that moves


def test_the_perplexity_is_that_of_the_policy_now(trainer):
    ppo = make(lr=0.0)
    row = fit(trainer, ppo, callbacks=[Evaluation(text=Texts(), max_texts=1)], **VALIDATED).rows[-1]
    ids = torch.tensor([ppo.policy.tokenizer("hello there")["input_ids"] + [ppo.policy.tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = ppo.policy.model(input_ids=ids, labels=ids).loss.exp()
    assert row["val/text/perplexity"] == pytest.approx(float(expected), rel=1e-4)


def test_scores_of_a_reward_that_learns_are_not_compared_over_time(trainer):
    reward = ConstrainedReward(objective=letters, constraint=letters, threshold=100.0)
    rows, _ = watched(trainer, Evaluation(), reward=reward, gold=letters)
    assert "val/win_rate/score" not in rows[-1]
    assert "val/win_rate/gold/letters" in rows[-1]


def test_the_best_checkpoint_is_chosen_by_any_of_them_and_a_resumed_run_compares_with_the_same_start(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("held.jsonl").write_text('{"text": "hello there"}\n{"text": "a film"}\n')
    settings = [
        "callbacks=evaluation", "data@callbacks.evaluation.text=jsonl", "callbacks.evaluation.text.path=held.jsonl",
        "callbacks.evaluation.text.prompt_column=null", "optimized_metric=val/text/perplexity",
        "trainer.check_val_every_n_epoch=1", "reward=length", "reward.target=1", "optimizer.lr=0.05",
        "callbacks.checkpoint.keep_last=4",
    ]  # fmt: skip
    result = run_here("train", *TINY, *settings, "trainer.max_epochs=4", "paths.output_dir=run")
    assert result.code == 0, result.err
    values = {row["iteration"]: row["val/text/perplexity"] for row in read_metrics(Path("run"))}
    assert len(set(values.values())) == 5
    best = min((n for n in values if n), key=lambda n: values[n])  # the start has no checkpoint
    assert Path("run/checkpoints/best.ckpt").resolve().name == f"step={2 * best:08d}-epoch={best:04d}.ckpt"
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["best/val/text/perplexity"] == min(values.values())
    assert read_metrics(Path("run"))[0]["val/win_rate/score"] == 0.5
    for more in (["trainer.max_epochs=2"], ["trainer.max_epochs=4", "ckpt_path=auto"]):
        assert run_here("train", *TINY, *settings, *more, "paths.output_dir=resumed").code == 0
    one, other = (
        [{k: v for k, v in row.items() if k.startswith(("val/text", "val/win"))} for row in read_metrics(Path(name))]
        for name in ("run", "resumed")
    )
    assert one == other
    assert {"val/text/perplexity", "val/win_rate/score"} <= set(one[-1])
    assert all(math.isfinite(value) for row in one for value in row.values())


class FailsOnce:
    """Of the first validation's second batch."""

    on_failure = "skip_batch"

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, completions, **columns):
        self.calls += 1
        if self.calls == 3:
            raise UserError("no answer")
        return letters(prompts, completions)


def test_what_a_failing_reward_left_out_of_the_first_validation_is_not_missed_in_later_ones(trainer):
    rows, samples = watched(trainer, Evaluation(), reward=FailsOnce())
    assert [row["val/rollout/skipped_batches"] for row in rows] == [1, 0, 0]
    assert 0 < len(samples[0]) < len(samples[2])
    pairs = list(zip(samples[2], samples[0], strict=False))  # the last ones were left out
    assert [a["prompt"] for a, _ in pairs] == [b["prompt"] for _, b in pairs]
    wins = sum((a["score"] > b["score"]) + 0.5 * (a["score"] == b["score"]) for a, b in pairs) / len(pairs)
    assert rows[2]["val/win_rate/score"] == pytest.approx(wins)


def test_the_start_is_not_a_validation_that_was_taken_back(trainer, tmp_path):
    rows, lr = [], 0.06
    for name in ("back", "slow"):
        guard = KLGuard(max_kl=13, max_rollbacks=10)
        callbacks = [Evaluation(), guard, Checkpoints(dirpath=tmp_path / name)]
        ppo = make(optimizer=partial(torch.optim.Adam, lr=lr))
        watch = fit(trainer, ppo, callbacks=callbacks, enable_checkpointing=True, **{**VALIDATED, "max_epochs": 2})
        rows.append([row["val/win_rate/score"] for row in watch.rows[-2:]])
        assert (guard.rollback.count > 0) == (name == "back")
        lr *= 0.5**guard.rollback.count
    assert rows[0] == rows[1]
    assert rows[0][0] == 0.5


def test_what_cannot_be_measured_is_refused(trainer):
    with pytest.raises(UserError, match="text must be a LightningDataModule, got 'notes'"):
        Evaluation(text="notes")
    with pytest.raises(UserError, match="max_texts"):
        Evaluation(max_texts=0)
    offline = trainer(callbacks=[Evaluation()], max_epochs=1)
    with pytest.raises(UserError, match="evaluation: SFT completes no prompts"):
        offline.fit(SFT(policy=tiny_policy()), datamodule=Texts())
