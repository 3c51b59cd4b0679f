"""Any loader works, micro-batches change nothing, rows come when they should, and a resumed run is the same run."""

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lit_rlhf.algorithms.offline import MicroBatch, OfflineAlgorithm, WindowLoader
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import CSVLogger

DATA = [float(x) for x in range(1, 24)]  # 23 numbers: 6 batches of 4, the last one of 3


class Line(OfflineAlgorithm):
    """Fits w to numbers x: loss = mean (w x / 10 - 1)^2 over the positive ones. Dropout makes it random."""

    def __init__(self, dropout: float = 0.0, **common: Any) -> None:
        super().__init__(optimizer=lambda ps: torch.optim.Adam(ps, lr=0.01), **common)
        self.w = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.dropout = nn.Dropout(dropout)
        self.seen: list[list[float]] = []
        self.weights: list[float] = []

    def collate(self, batch: Any) -> MicroBatch:
        x = torch.as_tensor(batch, dtype=torch.float32)
        kept = x[x > 0]
        return MicroBatch({"x": kept}, terms=len(kept), sequences=len(x), tokens=10 * len(x))

    def loss(self, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training:
            self.seen.append(inputs["x"].tolist())
        x = inputs["x"][:, None] / 10
        loss = (self.dropout(self.w) * x - 1).square().mean()
        return loss, {"reward/size": inputs["x"].abs().mean()}

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        return {**means, "reward/double": 2 * means["reward/size"]} if "reward/size" in means else means


class Numbers(L.LightningDataModule):
    """A datamodule that knows nothing of lit_rlhf."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(DATA, batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([1.0, 2.0, 3.0], batch_size=2)


def make_trainer(folder: Path, *callbacks: Callback, **options: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        quiet["enable_checkpointing"] = False
    return L.Trainer(
        default_root_dir=folder, logger=CSVLogger(save_dir=folder), callbacks=list(callbacks), **{**quiet, **options}
    )


def flat(batches: list[list[float]]) -> list[float]:
    return [number for batch in batches for number in batch]


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def fit(folder: Path, module: Line, *callbacks: Callback, data: Any = None, ckpt: str | None = None, **options: Any):
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.fit(module, datamodule=data or Numbers(), ckpt_path=ckpt)
    return trainer


class TestData:
    def test_works_with_a_plain_loader_and_with_a_datamodule(self, tmp_path):
        by_datamodule, by_loader = Line(), Line()
        fit(tmp_path / "a", by_datamodule, max_epochs=1)
        make_trainer(tmp_path / "b", max_epochs=1).fit(by_loader, Numbers().train_dataloader())
        assert by_datamodule.seen == by_loader.seen
        assert sorted(flat(by_loader.seen)) == DATA
        assert torch.equal(by_datamodule.w, by_loader.w)

    def test_one_epoch_is_one_pass_and_passes_differ(self, tmp_path):
        module = Line()
        fit(tmp_path, module, max_epochs=2)
        first, second = flat(module.seen[:6]), flat(module.seen[6:])
        assert sorted(first) == sorted(second) == DATA
        assert first != second

    def test_the_order_is_a_function_of_the_seed(self, tmp_path):
        modules = [Line(seed=0), Line(seed=0), Line(seed=1)]
        for number, module in enumerate(modules):
            torch.manual_seed(number)  # the global generator has no say
            fit(tmp_path / str(number), module, max_epochs=1)
        assert modules[0].seen == modules[1].seen != modules[2].seen

    def test_limit_train_batches_ends_an_epoch_and_the_next_starts_a_new_pass(self, tmp_path):
        for number, limit in enumerate((3, 0.5)):
            module = Line()
            fit(tmp_path / str(number), module, max_epochs=2, limit_train_batches=limit)
            assert len(module.seen) == 6
            assert module.loader.passes.number == 1

    def test_fit_without_data_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="without data"):
            make_trainer(tmp_path, max_epochs=1).fit(Line())

    def test_a_loader_without_length_is_refused(self, tmp_path):
        class Stream(IterableDataset):
            def __iter__(self):
                return iter(DATA)

        with pytest.raises(UserError, match="no length"):
            make_trainer(tmp_path, max_epochs=1).fit(Line(), DataLoader(Stream(), batch_size=4))

    def test_a_loader_that_ends_early_is_refused(self, tmp_path):
        class Short:
            def __len__(self):
                return 3

            def __iter__(self):
                return iter([[1.0], [2.0]])

        with pytest.raises(UserError, match="length of 3, but ended after 2"):
            make_trainer(tmp_path, max_epochs=1).fit(Line(), Short())

    def test_an_empty_loader_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="yields no batches"):
            make_trainer(tmp_path, max_epochs=1).fit(Line(), DataLoader([1.0], batch_size=2, drop_last=True))


BATCHES = [[1.0, 2.0, 3.0], [4.0, -1.0, -1.0], [5.0, 6.0, 7.0], [8.0, 9.0, -1.0], [10.0, -1.0, -1.0]]


class TestMicroBatches:
    def test_gradient_is_that_of_the_window_in_one_piece(self, tmp_path):
        """By hand: windows of two batches have 4, 5 and 1 positive numbers."""
        gradients = {}

        class Spy(Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                gradients.setdefault(name, []).append(pl_module.w.grad.clone())

        windows = [flat(BATCHES[i : i + 2]) for i in (0, 2, 4)]
        for name, batches, accumulate in (("split", BATCHES, 2), ("whole", windows, 1)):
            loader = DataLoader(batches, batch_size=None)
            make_trainer(tmp_path / name, Spy(), max_epochs=1, accumulate_grad_batches=accumulate).fit(Line(), loader)
        assert len(gradients["split"]) == 3  # the last window has one batch only
        torch.testing.assert_close(gradients["split"], gradients["whole"])

    def test_weights_follow_the_terms(self):
        loader = WindowLoader(
            loader=BATCHES, length=5, epoch_batches=5, micro_batches=2, collate=Line().collate_share, seed=0
        )
        weights = [batch.weight for batch in loader]
        assert weights == pytest.approx([2 * 3 / 4, 2 * 1 / 4, 2 * 3 / 5, 2 * 2 / 5, 2.0])


class TestRows:
    def test_rows_come_every_n_steps_and_at_the_end_of_an_epoch(self, tmp_path):
        fit(tmp_path, Line(log_every_n_steps=4), max_epochs=2, limit_val_batches=0)
        assert [(r["iteration"], r["episode"], r["tokens"]) for r in rows_of(tmp_path)] == [
            ("4", "16", "160"),
            ("6", "23", "230"),
            ("8", "31", "310"),
            ("12", "46", "460"),
        ]

    def test_a_metric_is_the_mean_over_the_terms_since_the_last_row(self, tmp_path):
        module = Line(log_every_n_steps=4)
        fit(tmp_path, module, max_epochs=1, limit_val_batches=0)
        numbers = [flat(module.seen[:4]), flat(module.seen[4:])]
        for row, seen in zip(rows_of(tmp_path), numbers, strict=True):
            assert float(row["reward/size"]) == pytest.approx(sum(seen) / len(seen))
            assert float(row["reward/double"]) == pytest.approx(2 * sum(seen) / len(seen))

    def test_the_learning_rate_is_that_of_the_steps_own(self, tmp_path):
        def halving(optimizer, num_training_steps):
            assert num_training_steps == 6
            return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        fit(tmp_path, Line(log_every_n_steps=1, scheduler=halving), max_epochs=1, limit_val_batches=0)
        assert [float(r["optim/lr"]) for r in rows_of(tmp_path)] == [0.01 * 0.5**i for i in range(6)]

    def test_validation_joins_the_row_of_its_step(self, tmp_path):
        fit(tmp_path, Line(log_every_n_steps=2), max_epochs=1, val_check_interval=3)
        rows = rows_of(tmp_path)
        assert [r["iteration"] for r in rows] == ["2", "3", "4", "6"]
        # the mean of 1, 2 and 3, in batches of two and one
        assert [r["val/reward/size"] for r in rows] == ["", "2.0", "", "2.0"]
        assert all(r["loss/total"] for r in rows)

    def test_the_sanity_check_writes_nothing(self, tmp_path):
        fit(tmp_path, Line(log_every_n_steps=100), max_epochs=1, num_sanity_val_steps=2)
        assert [r["iteration"] for r in rows_of(tmp_path)] == ["6"]

    def test_several_validation_loaders_count_together(self, tmp_path):
        class Several(Numbers):
            def val_dataloader(self) -> list[DataLoader]:
                return [super(Several, self).val_dataloader(), DataLoader([9.0], batch_size=1)]

        trainer = make_trainer(tmp_path, max_epochs=1)
        trainer.fit(Line(), datamodule=Several())
        assert float(trainer.callback_metrics["val/reward/size"]) == (1 + 2 + 3 + 9) / 4

    def test_validation_metrics_reach_callbacks_that_monitor_them(self, tmp_path):
        checkpoint = ModelCheckpoint(dirpath=tmp_path / "c", monitor="val/loss/total", save_top_k=1)
        trainer = fit(tmp_path, Line(), checkpoint, max_epochs=1)
        assert float(checkpoint.best_model_score) == float(trainer.callback_metrics["val/loss/total"])

    def test_dropout_is_active_in_training_and_not_in_validation(self, tmp_path):
        losses = []

        class Spy(Line):
            def loss(self, inputs):
                losses.append((self.training, self.dropout.training))
                return super().loss(inputs)

        module = Spy(dropout=0.5).eval()
        fit(tmp_path, module, max_epochs=1)
        assert set(losses) == {(True, True), (False, False)}

    def test_log_every_n_steps_below_one_is_refused(self):
        with pytest.raises(UserError, match="log_every_n_steps must be at least 1, got 0"):
            Line(log_every_n_steps=0)


RESUME = {
    "steps": {"max_epochs": 3, "limit_val_batches": 0},
    "steps_and_validation": {"max_epochs": 3, "val_check_interval": 3},
    "accumulation": {"max_epochs": 3, "limit_val_batches": 0, "accumulate_grad_batches": 4},
    "max_steps": {"max_steps": 15, "limit_val_batches": 0},
}


def run(folder: Path, ckpt: str | None = None, **options: Any) -> tuple[Line, list[dict[str, str]]]:
    module = Line(dropout=0.3, log_every_n_steps=2)
    # after steps (that hook of the callback runs before the module's), after validation, at the end of an epoch
    kinds = {"step": {"every_n_train_steps": 1}, "epoch": {"save_on_train_epoch_end": True}}
    if "val_check_interval" in options:
        kinds["validation"] = {"monitor": "val/loss/total", "save_on_train_epoch_end": False}
    callbacks = [
        ModelCheckpoint(dirpath=folder / name, filename="{step}", save_top_k=-1, **kind) for name, kind in kinds.items()
    ]
    fit(folder, module, *callbacks, ckpt=ckpt, **options)
    return module, rows_of(folder)


class TestResume:
    @pytest.mark.parametrize("case", RESUME)
    def test_a_resumed_run_is_the_same_run_to_the_bit(self, tmp_path, case):
        whole, rows = run(tmp_path / "whole", **RESUME[case])
        checkpoints = sorted((tmp_path / "whole").glob("*/*.ckpt"))
        assert len(checkpoints) > 6
        for path in checkpoints:
            folder = tmp_path / path.parent.name / path.stem
            folder.mkdir(parents=True)
            # the dead run had written rows after its checkpoint
            (folder / "metrics.csv").write_bytes((tmp_path / "whole" / "metrics.csv").read_bytes())
            module, resumed = run(folder, ckpt=str(path), **RESUME[case])
            assert torch.equal(module.w, whole.w), path
            assert resumed == rows, path
            assert module.axes == whole.axes

    @pytest.mark.parametrize("steps", [2, 6, 8])
    def test_a_run_that_max_steps_ended_goes_on_to_all_its_epochs(self, tmp_path, steps):
        whole, rows = run(tmp_path / "whole", max_epochs=2, limit_val_batches=0)
        run(tmp_path / "split", max_epochs=2, max_steps=steps, limit_val_batches=0)
        (checkpoint,) = (tmp_path / "split" / "epoch").glob(f"*step={steps}.ckpt")
        module, resumed = run(tmp_path / "split", ckpt=str(checkpoint), max_epochs=2, limit_val_batches=0)
        assert module.axes == whole.axes
        assert torch.equal(module.w, whole.w)
        assert resumed[-1] == rows[-1]

    def test_a_checkpoint_between_two_steps_keeps_the_gradients_and_what_was_measured(self, tmp_path):
        class Save(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

        options = {"max_epochs": 1, "accumulate_grad_batches": 3, "limit_val_batches": 0, "enable_checkpointing": True}
        whole = Line()
        fit(tmp_path / "whole", whole, Save(), **options)
        for number in range(5):
            module = Line()
            fit(tmp_path / str(number), module, ckpt=str(tmp_path / f"{number}.ckpt"), **options)
            assert torch.equal(module.w, whole.w), number
            assert rows_of(tmp_path / str(number)) == rows_of(tmp_path / "whole"), number

    def test_checkpoints_load_with_weights_only_and_hold_what_trains(self, tmp_path):
        run(tmp_path, max_epochs=1)
        checkpoint = torch.load(next((tmp_path / "step").iterdir()), weights_only=True)
        assert set(checkpoint["state_dict"]) == {"w"}

    def test_another_number_of_batches_is_refused(self, tmp_path):
        run(tmp_path, max_epochs=1)
        path = next((tmp_path / "step").iterdir())

        class Fewer(Numbers):
            def train_dataloader(self):
                return DataLoader(DATA, batch_size=8)

        with pytest.raises(UserError, match="6 batches an epoch, but here the train dataloader gives 3"):
            fit(tmp_path / "b", Line(), data=Fewer(), ckpt=str(path), max_epochs=1)

    def test_total_steps_count_windows(self, tmp_path):
        steps = []

        def scheduler(optimizer, num_training_steps):
            steps.append(num_training_steps)
            return torch.optim.lr_scheduler.ConstantLR(optimizer)

        for number, options in enumerate(({"max_epochs": 3, "accumulate_grad_batches": 4}, {"max_steps": 5})):
            trainer = fit(tmp_path / str(number), Line(scheduler=scheduler), **options)
            assert trainer.global_step == steps[-1]
        assert steps == [3 * math.ceil(6 / 4), 5]
