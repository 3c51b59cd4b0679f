"""Samples and progress, in real fits of toy modules that report as the algorithms do."""

import io
import json
import math
import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console
from torch.utils.data import DataLoader

from lit_rlhf.callbacks import Progress, Samples
from lit_rlhf.errors import UserError
from lit_rlhf.run_folder import read_samples

BATCHES = 3


class Toy(LightningModule):
    """Reports to callbacks as the algorithms do; learns nothing."""

    online = True

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def tell(self, hook, *args):
        for callback in self.trainer.callbacks:
            if hasattr(callback, hook):
                getattr(callback, hook)(self.trainer, self, *args)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(torch.ones(BATCHES, 1))

    val_dataloader = train_dataloader


class ToyOnline(Toy):
    def on_train_epoch_start(self):
        for token in range(5):
            self.tell("on_phase", "rollout", token + 1, 5)
        self.tell("on_phase", "score", 1, 1)

    def on_train_epoch_end(self):
        iteration = self.current_epoch + 1
        row = {
            "iteration": iteration,
            "objective/scores": 0.4123,
            "objective/kl": 1.934,
            "rollout/response_length": 18.21,
            "loss/total": 7.0,
            "time/iteration": 12.44,
        }
        self.tell("on_row", row)
        rows = [sample(iteration, "train", i) for i in range(4)]
        self.tell("on_samples", iteration, rows + [sample(iteration, "validation", i) for i in range(2)])


class ToyOffline(Toy):
    online = False

    def on_train_batch_end(self, outputs, batch, batch_idx):
        row = {"iteration": self.global_step, "loss/total": 0.5117, "reward_model/accuracy": 0.81}
        if batch_idx == BATCHES - 1:
            row["val/reward_model/accuracy"] = 0.75
        self.tell("on_row", row)


def sample(iteration, split, i):
    return {
        "iteration": iteration,
        "split": split,
        "prompt": f"prompt {i}",
        "completion": "A <b>film</b>\u2028 for ünïcode 🎬\nand more",
        "score": math.inf if i == 1 else 0.5,
        "components": {"model": math.nan if i == 1 else 0.5},
        "gold": {"vader": 0.25},
        "kl": 1.5,
        "length": 4,
    }


def fit(model, *callbacks, epochs=4, validate=False, folder=None, **kwargs):
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        default_root_dir=folder,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        **{"logger": False, **kwargs},
    )
    trainer.fit(model)
    return trainer


# --- samples ---


def test_samples_keep_the_first_of_every_nth_iteration_and_all_of_validation(tmp_path):
    fit(ToyOnline(), Samples(every_n_iterations=2, max_samples=3), folder=tmp_path)
    kept = [(row["iteration"], row["split"], row["prompt"]) for row in read_samples(tmp_path)]
    validation = {i: [(i, "validation", "prompt 0"), (i, "validation", "prompt 1")] for i in range(1, 5)}
    train = {i: [(i, "train", f"prompt {k}") for k in range(3)] for i in (2, 4)}
    assert kept == validation[1] + train[2] + validation[2] + validation[3] + train[4] + validation[4]


def test_every_line_is_strict_json_and_text_comes_back_as_it_was(tmp_path):
    fit(ToyOnline(), Samples(), epochs=1, folder=tmp_path)
    data = (tmp_path / "samples.jsonl").read_bytes()
    assert "🎬".encode() in data

    def refuse(constant):
        raise AssertionError(f"bare {constant} in JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in data.decode().split("\n")[:-1]]
    assert rows[0] == sample(1, "train", 0)
    assert rows[1] == sample(1, "train", 1) | {"score": None, "components": {"model": None}}
    assert rows == read_samples(tmp_path)


def test_a_prompt_that_utf8_cannot_hold_does_not_stop_the_run(tmp_path):
    callback = Samples()
    trainer = fit(ToyOnline(), callback, epochs=1, folder=tmp_path)
    callback.on_samples(trainer, None, 2, [sample(2, "train", 0) | {"prompt": "a\ud800b"}])
    assert read_samples(tmp_path)[-1]["prompt"] == "a?b"


class Collects(Logger):
    name = version = ""

    def __init__(self):
        super().__init__()
        self.tables = []

    def log_metrics(self, *_, **__):
        pass

    log_hyperparams = log_metrics

    def log_samples(self, rows, step):
        self.tables.append((step, rows))


def test_loggers_that_have_sample_tables_get_the_kept_rows(tmp_path):
    logger = Collects()
    fit(ToyOnline(), Samples(max_samples=1), epochs=2, folder=tmp_path, logger=logger)
    assert [step for step, _ in logger.tables] == [1, 2]
    rows = [sample(1, "train", 0), sample(1, "validation", 0), sample(1, "validation", 1)]
    assert str(logger.tables[0][1]) == str(rows)


@pytest.mark.parametrize(("iteration", "left"), [(3, [1, 2, 3]), (0, []), (-1, []), (9, [1, 2, 3, 4])])
def test_resume_cuts_the_samples_after_the_checkpoint(tmp_path, iteration, left):
    fit(ToyOnline(), Samples(), folder=tmp_path)
    lines = (tmp_path / "samples.jsonl").read_text().split("\n")
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write('{"iteration": 1, "prompt": "cut within a kill\'s é'.encode()[:-1])
    callback = Samples()
    trainer = fit(ToyOnline(), callback, folder=tmp_path, epochs=0)
    callback.resume_from(iteration)
    assert sorted({row["iteration"] for row in read_samples(tmp_path)}) == left
    callback.on_samples(trainer, None, 5, [sample(5, "validation", 0)])
    rewritten = (tmp_path / "samples.jsonl").read_text().split("\n")
    assert rewritten[: 6 * len(left)] == lines[: 6 * len(left)]
    assert len(rewritten) == 6 * len(left) + 2


def test_a_broken_line_among_the_samples_is_named(tmp_path):
    callback = Samples()
    fit(ToyOnline(), callback, folder=tmp_path)
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b"\0\0\n")
    with pytest.raises(UserError, match=rf"samples\.jsonl, line {6 * 4 + 1} is not JSON"):
        callback.resume_from(3)


def test_a_cut_ordered_before_there_is_a_folder_happens_when_there_is(tmp_path):
    fit(ToyOnline(), Samples(), folder=tmp_path)
    callback = Samples(max_samples=1)
    callback.resume_from(-1)
    fit(ToyOnline(), callback, epochs=1, folder=tmp_path)
    fit(ToyOnline(), callback, epochs=1, folder=tmp_path)  # not again
    assert [row["iteration"] for row in read_samples(tmp_path)] == [1] * 6


@pytest.mark.parametrize("arguments", [{"every_n_iterations": 0}, {"max_samples": -1}])
def test_too_small_values_are_refused(arguments):
    (name, value), = arguments.items()
    with pytest.raises(UserError, match=f"{name}={value}"):
        Samples(**arguments)


# --- progress ---


def plain(model, **kwargs):
    progress = Progress()
    progress.console = Console(file=io.StringIO(), width=40)  # narrower than a line: it must not be wrapped
    fit(model, progress, **kwargs)
    return progress.console.file.getvalue().splitlines()


def test_without_a_terminal_each_iteration_is_one_line():
    shown = "reward 0.412  kl 1.93  length 18.2  12.4 s"
    assert plain(ToyOnline()) == [f"iteration {i}/4  {shown}" for i in range(1, 5)]


def test_of_several_runs_on_one_terminal_each_has_labelled_lines_and_no_bars():
    progress = Progress(label="[3]")
    progress.console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    fit(ToyOnline(), progress)
    shown = "reward 0.412  kl 1.93  length 18.2  12.4 s"
    assert progress.console.file.getvalue().splitlines() == [f"[3]  iteration {i}/4  {shown}" for i in range(1, 5)]


def test_a_validation_has_its_line():
    class Validates(ToyOnline):
        def on_train_start(self):
            self.tell("on_row", {"iteration": 0, "val/objective/scores": 0.1649, "val/objective/kl": -1e-6})

    lines = plain(Validates(), epochs=1)
    assert lines[0] == "iteration 0/1  val reward 0.165  val kl 0.000"
    assert len(lines) == 2


def test_an_offline_stage_gets_about_twenty_lines_and_its_last_step():
    lines = plain(ToyOffline(), epochs=50)  # 150 steps
    steps = [int(re.match(r"step (\d+)/150  loss 0\.512  accuracy 0\.810", line)[1]) for line in lines]
    assert 15 <= len(steps) <= 25
    assert steps == sorted(set(steps))
    assert lines[-1] == "step 150/150  loss 0.512  accuracy 0.810  val accuracy 0.750"


def test_the_total_of_an_offline_stage_counts_optimiser_steps():
    assert plain(ToyOffline(), epochs=2, accumulate_grad_batches=2)[-1].startswith("step 4/4 ")  # 3 batches: 2 steps
    assert plain(ToyOffline(), epochs=-1, max_steps=5)[-1].startswith("step 5/5 ")


def test_a_slow_offline_stage_is_not_silent(monkeypatch):
    monkeypatch.setattr("lit_rlhf.callbacks.progress._LINE_SECONDS", 0.0)
    assert len(plain(ToyOffline(), epochs=50)) == 150


class Watch(Callback):
    """Renders the bars at every hook after Progress has handled it."""

    def __init__(self, progress, width=120):
        self.progress = progress
        self.width = width
        self.seen = []

    def look(self, *_):
        page = Console(file=io.StringIO(), width=self.width, color_system=None)
        page.print(self.progress._bars.get_renderable())
        self.seen += [re.sub(r"[━╸╺ ]+", " ", line).strip() for line in page.file.getvalue().splitlines()]

    on_phase = on_row = on_train_batch_end = on_validation_batch_end = look


def live(model, **kwargs):
    progress = Progress()
    progress.console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    watch = Watch(progress)
    fit(model, progress, watch, **kwargs)
    return progress, watch.seen


def test_on_a_terminal_bars_show_iterations_with_reward_and_kl_and_the_phase():
    progress, seen = live(ToyOnline(), validate=True)
    for phase in ("rollout 1/5", "rollout 5/5", "score 1/1", "update 1/3", "update 3/3", "validation 3/3"):
        assert any(line.startswith(phase) for line in seen), phase
    assert any(line.startswith("iteration 0/4") for line in seen)
    assert any(re.match(r"iteration 4/4 .*reward 0\.412 kl 1\.93 length 18\.2 0:00:00 left", line) for line in seen)
    assert "reward 0.412" in progress.console.file.getvalue()
    assert progress._bars is None


def test_on_a_terminal_an_offline_stage_shows_its_steps():
    _, seen = live(ToyOffline(), epochs=2, validate=True)
    assert any(re.match(r"step 6/6 .*loss 0\.512 accuracy 0\.810", line) for line in seen)
    assert any(line.startswith("validation 2/3") for line in seen)
    assert not any(line.startswith("update") for line in seen)


def test_on_eighty_columns_nothing_but_the_end_of_a_row_is_cut():
    progress = Progress()
    progress.console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    watch = Watch(progress, width=80)
    fit(ToyOnline(), progress, watch)
    assert any(re.match(r"iteration 3/4 0:00:00 reward 0\.412 kl 1\.93 length 18\.2", line) for line in watch.seen)
    assert any(re.fullmatch(r"rollout 5/5 0:00:00", line) for line in watch.seen)


def test_the_time_left_counts_only_what_this_process_did():
    progress = Progress()
    progress._first = (100.0, 10)  # resumed at iteration 10
    assert progress._remaining(now=100.0, count=10, total=20) == ""
    assert progress._remaining(now=200.0, count=12, total=20) == "0:06:40 left"  # 50 s an iteration, 8 left
    assert progress._remaining(now=100.0 + 2 * 3600, count=11, total=20) == "18:00:00 left"
    assert progress._remaining(now=200.0, count=12, total=None) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_an_exception_ends_the_bars(terminal):
    class Fails(ToyOnline):
        def training_step(self, *_):
            raise RuntimeError("deliberate")

    progress = Progress()
    progress.console = Console(file=io.StringIO(), force_terminal=terminal)
    with pytest.raises(RuntimeError, match="deliberate"):
        fit(Fails(), progress)
    assert progress._bars is None
    assert not progress.console._live_stack


def test_the_trainer_adds_no_bar_of_its_own_and_the_model_prints_above_ours():
    progress = Progress()
    progress.console = Console(file=io.StringIO())
    model = ToyOnline()
    trainer = fit(model, progress, epochs=1)
    assert trainer.progress_bar_callback is progress
    model.print("a note")
    assert progress.console.file.getvalue().endswith("a note\n")


def test_validation_alone_shows_its_phase():
    progress = Progress()
    progress.console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    watch = Watch(progress)
    trainer = Trainer(callbacks=[progress, watch], logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.validate(ToyOnline(), verbose=False)
    assert any(line.startswith("validation 3/3") for line in watch.seen)
    assert not any("iteration" in line for line in watch.seen)
    assert progress._bars is None
