"""What online and offline algorithms share: optimiser set-up, rows of metrics, checkpoints of what trains."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops.progress import _BatchProgress
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW, Optimizer
from transformers import get_scheduler

from lit_rlhf import __version__
from lit_rlhf.algorithms import halves
from lit_rlhf.algorithms.means import RunningMean
from lit_rlhf.algorithms.steps import StepGuard
from lit_rlhf.callbacks.checkpoints import Checkpoints
from lit_rlhf.checkpoint_io import write_to_files
from lit_rlhf.data.passes import HeldOutSource
from lit_rlhf.distributed import FSDP2Strategy, gather, like, rank, shard, whole, world_size
from lit_rlhf.errors import UserError
from lit_rlhf.generators import from_plain, get_generators, set_generators, to_plain
from lit_rlhf.halving import Halving
from lit_rlhf.machine import decode_dtype
from lit_rlhf.models.cast import cast_dtype
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference
from lit_rlhf.precision import use_half_weights
from lit_rlhf.run_folder import sync_rows

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[..., torch.optim.lr_scheduler.LRScheduler]


def default_optimizer(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=1e-5, weight_decay=0.0)


def default_scheduler(optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return get_scheduler("constant", optimizer)


def make_optimizer(factory: OptimizerFactory, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The factory's optimiser; raises UserError for a value that it refuses."""
    try:
        return factory(parameters)
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"config key 'optimizer': {error}") from error


def with_gradients(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def require_plain(what: str, state: Any) -> None:
    """Raises UserError if a state holds something that a checkpoint cannot give back: only plain types and tensors."""
    if isinstance(state, dict):
        for key, value in state.items():
            require_plain(f"{what}[{key!r}]", value)
    elif isinstance(state, list | tuple):
        for number, value in enumerate(state):
            require_plain(f"{what}[{number}]", value)
    elif type(state) not in (bool, int, float, str, type(None)) and not isinstance(state, Tensor):
        raise UserError(
            f"{what} is a {type(state).__module__}.{type(state).__name__}; a checkpoint holds numbers, texts, lists, "
            "dicts and tensors alone"
        )


def _lr_change(before: dict[str, Any] | None, now: dict[str, Any] | None) -> float:
    """The quotient of two configs' ``optimizer.lr``: the optimiser's state brings the old rate back."""
    old, new = (((config or {}).get("optimizer") or {}).get("lr") for config in (before, now))
    return new / old if all(isinstance(rate, int | float) and rate > 0 for rate in (old, new)) else 1.0


class Algorithm(L.LightningModule):
    """A LightningModule with an optimiser from a factory, rows of metrics, and checkpoints of what trains.

    Subclassed by ``OnlineAlgorithm`` and ``OfflineAlgorithm`` only.

    Args:
        optimizer: makes the optimiser from the parameters that train; AdamW with lr 1e-5 by default.
        scheduler: called with ``optimizer=`` and, if it takes it, ``num_training_steps=``; a constant rate by default.
        seed: of everything random in the run.
        max_skipped_steps: optimiser steps in a row that are skipped because of a loss, gradient, log-probability, ratio
            or value that is not finite; then the run ends, with a checkpoint. Also batches in a row that are left out
            because of a reward that is not finite.
    """

    online: bool
    #: Whether FSDP2 can shard its models.
    shardable = True
    #: Whether the loss of a micro-batch is the mean of its parts'.
    splits = True
    #: Rows next to each other in a batch that stay together.
    unit = 1
    #: Whether weights that train get no gradient from the loss.
    leaves_weights_out = False
    #: The config key that ended the run before its bound, if one did.
    stopped_by: str | None = None
    #: The policy that the run starts from, where it is compared with.
    reference: Reference | None = None

    def __init__(
        self,
        *,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
        seed: int = 0,
        max_skipped_steps: int = 10,
    ) -> None:
        super().__init__()
        if seed < 0:
            raise UserError(f"seed must not be negative, got {seed}")
        self.optimizer_factory = optimizer or default_optimizer
        self.scheduler_factory = scheduler or default_scheduler
        self.seed = seed
        self.guard = StepGuard(max_skipped_steps)
        self.means = RunningMean()
        self.step_means = RunningMean()  # of the optimiser step under way
        self.halving = Halving()
        self.lr_scale = 1.0  # what the scheduled learning rate is multiplied by in every step
        self.last_row: dict[str, float] = {}
        self.last_logged = 0  # iteration of the newest row
        self._gradients: dict[str, Tensor] = {}  # of a checkpoint made between two steps, until training starts
        self._before_validation: list[Any] | None = None  # the global generators then, while one is under way
        self._generators: list[Any] | None = None  # the global ones of a checkpoint, until training starts
        self.config: dict[str, Any] | None = None  # the run's, where there is one; goes into every checkpoint
        self.strict_loading = False  # checkpoints hold only what trains

    @property
    def axes(self) -> dict[str, int]:
        """The x axes of every row: iteration, episode, tokens."""
        raise NotImplementedError

    def total_steps(self) -> int | None:
        """Optimiser steps of the whole run; None where ``max_time`` alone ends it.

        Not ``trainer.estimated_stepping_batches``: that loads the dataloader before a resume has restored its state.
        """
        by_steps = self.trainer.max_steps if self.trainer.max_steps > 0 else None
        epochs = self.trainer.max_epochs if self.trainer.max_epochs and self.trainer.max_epochs > 0 else None
        bounds = [b for b in (by_steps, epochs and epochs * self.steps_per_epoch()) if b]
        return min(bounds, default=None)

    def steps_per_epoch(self) -> int:
        raise NotImplementedError

    @property
    def within_epoch(self) -> bool:
        """Whether batches of the current epoch are still to come."""
        raise NotImplementedError

    def optimized_parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves: all that trains, unless the algorithm moves some of it by itself."""
        return [p for p in self.parameters() if p.requires_grad]

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = make_optimizer(self.optimizer_factory, self.optimized_parameters())
        if isinstance(self.trainer.strategy, FSDP2Strategy) and type(optimizer).__module__.startswith("bitsandbytes."):
            raise UserError(
                "config key 'optimizer': bitsandbytes cannot step the sharded weights of trainer=fsdp2; optimizer="
                "adamw can, with sharded moments"
            )
        takes_steps = "num_training_steps" in inspect.signature(self.scheduler_factory).parameters
        steps = {"num_training_steps": self.total_steps()} if takes_steps else {}
        try:
            scheduler = self.scheduler_factory(optimizer=optimizer, **steps)
        except (TypeError, ValueError) as error:
            unbounded = " Set trainer.max_epochs or trainer.max_steps." if steps == {"num_training_steps": None} else ""
            raise UserError(f"config key 'scheduler': {error}{unbounded}") from error
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in with_gradients(optimizer)]))
        self._gradient_norm = float(norm)
        scaler = self.scaler
        # While a scale is being found, overflow is part of the method.
        counts = scaler is None or scaler.get_scale() <= 1
        if self.guard.check(self._gradient_norm, self.trainer.global_step + 1, counts=counts):
            self.step_means.add({"optim/grad_norm": norm}, 1 / world_size())  # all know it: together they count once
            self.means.take(self.step_means)
            return
        self.forget_step()
        if scaler is None:  # which else skips the step by itself
            for parameter in with_gradients(optimizer):
                parameter.grad = None  # a parameter without a gradient is none of the optimiser's business

    @property
    def learning_rate(self) -> float:
        """Of the next optimiser step."""
        return self.trainer.optimizers[0].param_groups[0]["lr"] * self.lr_scale

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Only for the step: many schedulers compute the next rate from the one that they find.
        groups = self.trainer.optimizers[0].param_groups
        scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * self.lr_scale
        try:
            super().optimizer_step(*args, **kwargs)
        finally:
            for group, rate in zip(groups, scheduled, strict=True):
                group["lr"] = rate
        # Lightning frees gradients after the next forward pass, whose activations would lie beside them.
        self.trainer.optimizers[0].zero_grad()

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Nothing: gradients are freed right after each step, and those that are there belong to the next one."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ARG002
        return halves.step_loss(self, batch)

    def backward(self, loss: Tensor, *args: Any, within_loss: bool = False, **kwargs: Any) -> None:
        run = partial(super().backward, loss, *args, **kwargs)
        run() if within_loss else halves.backward(self, loss, run)

    def forget_step(self) -> None:
        """Drops what was measured in the step under way."""
        self.step_means.sums = {}

    def batch_loss(self, batch: Any, share: float = 1.0) -> Tensor:
        """The loss of a micro-batch, with its weight in the optimiser step, times ``share``."""
        raise NotImplementedError

    def step_batches(self) -> list[Any]:
        """The micro-batches of the step under way, so far."""
        raise NotImplementedError

    def rows_of(self, batch: Any) -> int:
        """The rows of a micro-batch."""
        raise NotImplementedError

    def halves_of(self, batch: Any) -> tuple[tuple[Any, float], ...]:
        """A micro-batch's halves, each with its share of the terms that the loss is a mean over."""
        raise NotImplementedError

    def on_train_batch_end(self, *_: Any) -> None:
        if self.guard.verdict is not None:
            raise UserError(f"{self.guard.verdict}. {self.save_state()}")

    def save_state(self) -> str:
        """Writes a checkpoint where the run keeps them; says so. Every process must call it."""
        callback = self.trainer.checkpoint_callback
        try:
            if isinstance(callback, Checkpoints):
                path = callback.save(self.trainer, self)
            elif folder := getattr(callback, "dirpath", None):
                path = Path(folder) / "last.ckpt"
                self.trainer.save_checkpoint(path, weights_only=False)
            else:
                return "There is no checkpoint of it: the trainer has no callback that writes any"
        except (UserError, OSError) as error:
            return f"There is no checkpoint of it: {error}"
        return f"The checkpoint {path} is of this moment; ckpt_path={path} goes on from there"

    @property
    def scaler(self) -> Any:
        """What scales losses up for the backward pass (16-mixed), or None."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as Lightning does, but lets fused optimisers through, which it refuses in every mixed precision.

        Raises:
            UserError: a fused optimiser in 16-mixed, which gets its gradients scaled.
        """
        if not gradient_clip_val or self.guard.bad:
            return
        if self.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UserError(
                "trainer.gradient_clip_val with trainer.precision=16-mixed needs optimizer.fused=false: a fused "
                "optimiser gets gradients that are still scaled. bf16-mixed has no scale"
            )
        parameters = with_gradients(optimizer)
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif self._gradient_norm > gradient_clip_val:  # measured right before, which need not be done twice
            for parameter in parameters:
                parameter.grad.mul_(gradient_clip_val / (self._gradient_norm + 1e-6))

    def log_row(self, metrics: dict[str, float]) -> None:
        """Sends one row to every logger, to ``trainer.callback_metrics`` and to callbacks with the hook ``on_row``.

        A hook of its own, because most callbacks' ``on_train_epoch_end`` runs before the module's.
        """
        row = {**self.axes, **metrics}
        self.last_row, self.last_logged = row, self.axes["iteration"]
        for logger in self.loggers:
            logger.log_metrics(row, step=self.axes["iteration"])
        self.trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in row.items()})
        self.call_hook("on_row", row)

    def call_hook(self, name: str, *args: Any) -> None:
        """Calls ``callback.<name>(trainer, module, *args)`` on every callback that has it."""
        for callback in self.trainer.callbacks:
            hook = getattr(callback, name, None)
            if hook is not None:
                hook(self.trainer, self, *args)

    def setup(self, stage: str) -> None:
        # Every process sees all prompts and batches and takes its share of their rows itself.
        self.trainer._accelerator_connector.use_distributed_sampler = False
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            # Its engine also takes the steps over: it clips, accumulates and steps by itself. Lightning's plugin for it
            # takes neither frozen batches nor a backward pass that halves them.
            raise UserError(
                "trainer.strategy is DeepSpeed, which is not supported: it loads checkpoints as pickles, which can run "
                "code, and leaves no way to skip a step whose gradient is not finite. trainer=fsdp2 shards weights, "
                "gradients and optimiser states as ZeRO-3 does"
            )
        write_to_files(self.trainer.strategy)
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            policy = getattr(self, "policy", None)
            if self.leaves_weights_out or (policy is not None and policy.reads_more_than_text):
                strategy._ddp_kwargs["find_unused_parameters"] = True  # else it waits for their gradients
            if strategy.world_size == 1:  # nothing to average; and its wrapper allows a step only one backward pass
                strategy.configure_ddp = lambda: None
        sharded = isinstance(strategy, FSDP2Strategy)
        use_half_weights(strategy, sharded=sharded)
        if self.reference is not None:
            precision = str(self.trainer.precision)
            cast = cast_dtype(precision, sharded=sharded)
            self.reference.place(strategy.root_device, cast, all_weights=precision.endswith("-true"))
        loop = self.trainer.fit_loop.epoch_loop.val_loop if stage == "fit" else self.trainer.validate_loop
        source = loop._data_source
        loop._data_source = HeldOutSource(source.instance, source.name, self.seed)

    def configure_model(self) -> None:
        """Shards the models that train where the strategy is FSDP2."""
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDP2Strategy):
            self.shard(strategy.device_mesh["data_parallel"])
        elif isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
            raise UserError(f"trainer.strategy is {type(strategy).__name__}; sharded training is trainer=fsdp2")

    def shard(self, mesh: DeviceMesh) -> None:
        """Shards every model of the algorithm, its reference too, over the processes of ``mesh``."""
        if not self.shardable:
            raise UserError(f"{type(self).__name__} cannot be sharded; trainer=ddp trains it in several processes")
        for module in self.children():
            module.shard(mesh, self.decode_dtype) if isinstance(module, Policy) else shard(module, mesh)
        if self.reference is not None:
            self.reference.shard(mesh)

    @property
    def decode_dtype(self) -> torch.dtype:
        """Of the weights that complete prompts."""
        return decode_dtype(str(self.trainer.precision))

    def run_validation(self) -> None:
        """Runs the validation loop from within the fit, where the fit loop itself does not."""
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False  # a checkpoint's progress is that of the validation before
        self.trainer.validating = True
        self._before_validation = to_plain(get_generators())
        loop.run()
        self.trainer.training = True

    def take_over_loader(self) -> None:
        """Makes the fit loop ask this module for its train loader, which then wraps the user's (``user_loader``).

        The user's loader may come from any datamodule or straight from ``fit``; neither needs to know of the wrapper.
        """
        source = self.trainer.fit_loop._data_source
        if source.instance is self:
            raise UserError("Trainer.fit was called without data: give it a datamodule or a train dataloader")
        self._user_source = source
        self.trainer.fit_loop._data_source = type(source)(self, "train_dataloader")

    def user_loader(self) -> Any:
        """The train loader that the user gave to ``fit``.

        Raises:
            UserError: there is none.
        """
        loader = self._user_source.dataloader()
        if loader is None:
            raise UserError(f"{type(self._user_source.instance).__name__}.train_dataloader() returns None")
        return loader

    def on_train_start(self) -> None:
        """Cuts what was logged after the checkpoint that this run continues from; takes up its gradients."""
        validated_first = bool(self.last_row)
        self.cut_rows(self.last_logged if self.trainer.ckpt_path or validated_first else -1)
        parameters = dict(self.named_parameters())
        for parameter in parameters.values():
            parameter.grad = None  # as after every step
        for name, gradient in self._gradients.items():
            parameters[name].grad = like(parameters[name], gradient)
        self._gradients = {}
        if self._generators is not None:
            set_generators(from_plain(self._generators))
            self._generators = None

    def catch_up(self) -> None:
        """Lets the next epoch begin as any other where the checkpoint was of the last step of one, now over."""
        loop = self.trainer.fit_loop
        epochs = loop.epoch_progress.current
        if not (loop.restarted_mid_epoch and epochs.processed == epochs.started):
            return
        # Lightning would not count it as begun, and take its first batch for one that a validation follows.
        loop._restarting = loop.epoch_loop.restarting = False  # FitLoop's own setter has exceptions
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()
        loop.epoch_loop.batch_progress.increment_completed()
        loop.epoch_loop._batches_that_stepped += 1
        self.call_hook("on_caught_up")

    def on_validation_model_zero_grad(self) -> None:
        """The last hook of a fit before the validation's loaders may draw random numbers."""
        super().on_validation_model_zero_grad()
        self._before_validation = to_plain(get_generators())

    def on_validation_end(self) -> None:
        self._before_validation = None

    def cut_rows(self, iteration: int) -> None:
        """Cuts what was logged of iterations after ``iteration``."""
        for target in [*self.loggers, *self.trainer.callbacks]:
            if hasattr(target, "resume_from"):
                target.resume_from(iteration, self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["config"] = self.config
        if self.trainer.is_global_zero:  # a checkpoint counts on the rows before it
            sync_rows({self.trainer.default_root_dir, *(logger.save_dir for logger in self.loggers)})
        self._set_progress(checkpoint)
        # Between two steps, gradients are half summed: without them the resumed run's next step would differ.
        summing = self.trainer.fit_loop.epoch_loop._should_accumulate()
        checkpoint["lit_rlhf"] = {
            "version": __version__,
            "means": self.means.state(),
            "step_means": self.step_means.state(),
            "guard": self.guard.state_dict(),
            "halving": self.halving.state(),
            "lr_scale": self.lr_scale,
            "last_logged": self.last_logged,
            "gradients": gather(self._summed_gradients()) if summing else [],
            # For callbacks and other code of the user's
            "generators": gather(self._before_validation or to_plain(get_generators())),
            **self.state(),
        }

    def _set_progress(self, checkpoint: dict[str, Any]) -> None:
        """Makes of Lightning's counters those from which it resumes rightly."""
        loops = checkpoint["loops"]["fit_loop"]
        epochs = loops["epoch_progress"]
        validating = self.trainer.validating  # which is done again, as after a checkpoint of the step before it
        # Also at an epoch's end: max_steps may have ended the run, and with it the epoch.
        if self.within_epoch or validating:
            for progress in epochs.values():
                progress["processed"] = progress["completed"] = progress["started"] - 1
        elif 0 < epochs["current"]["started"] == epochs["current"]["processed"]:  # also where a resume has ended it
            for progress in epochs.values():
                progress["completed"] = progress["processed"] - 1
        if validating:
            batches = loops["epoch_loop.batch_progress"]
            for progress in (batches["total"], batches["current"]):
                progress["completed"] = progress["processed"] - 1
            within_step = self.trainer.fit_loop.epoch_loop._should_accumulate()
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - (not within_step)
            loops["epoch_loop.val_loop.batch_progress"] = _BatchProgress().state_dict()
        checkpoint["epoch"] = epochs["current"]["completed"]

    def _summed_gradients(self) -> dict[str, Tensor]:
        return {n: whole(p.grad).cpu() for n, p in self.named_parameters() if p.grad is not None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "lit_rlhf" not in checkpoint:
            raise UserError("this checkpoint was not written by a lit_rlhf algorithm: its training state is missing")
        state = checkpoint["lit_rlhf"]
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        # Sharded weights are not in it: the strategy has loaded them from files of their own.
        if missing := trained ^ set(checkpoint.get("state_dict", trained)):
            raise UserError(
                f"the checkpoint belongs to another configuration: {len(missing)} trained weights differ, e.g. "
                f"'{min(missing)}'. Start from the same policy, critic and algorithm as the run that wrote it."
            )
        try:
            self._take_up(checkpoint, state)
        except KeyError as error:
            writer = f"lit_rlhf {state['version']}" if "version" in state else "an older version of lit_rlhf"
            raise UserError(
                f"the checkpoint was written by {writer} and holds no {error}, which version {__version__} needs. "
                "Continue the run with the version that wrote it"
            ) from error

    def _take_up(self, checkpoint: dict[str, Any], state: dict[str, Any]) -> None:
        self.means.load_state(state["means"])
        # What came after version 0.1.0 began has a default, so that runs go on over an upgrade.
        self.step_means.load_state(state.get("step_means", []))
        self.guard.load_state_dict(state.get("guard", StepGuard(1).state_dict()))
        self.halving.load_state(state.get("halving", []))
        self.lr_scale = state.get("lr_scale", 1.0) * _lr_change(checkpoint.get("config"), self.config)
        self.last_logged = state["last_logged"]
        parts = state["gradients"]  # of every process; a step takes their mean
        if len(parts) not in (0, world_size()):
            parts = [{n: sum(part[n] for part in parts) / len(parts) for n in parts[0]}] * world_size()
        self._gradients = parts[rank()] if parts else {}
        self._generators = state["generators"][rank() % len(state["generators"])]
        self.load_state(state)

    def state(self) -> dict[str, Any]:
        """What a subclass adds to the checkpoint: plain numbers, strings and tensors."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def autocast(self) -> Any:
        """The precision of the training step, for forward passes outside it."""
        return self.trainer.precision_plugin.forward_context()

    @contextmanager
    def autocast_for_many(self) -> Iterator[None]:
        """``autocast`` for many forward passes without gradients: weights that train are cast once for all of them."""
        with torch.no_grad(), self.autocast():
            before = torch.is_autocast_cache_enabled()  # Lightning switches it off
            torch.set_autocast_cache_enabled(True)
            try:
                yield
            finally:
                torch.clear_autocast_cache()  # before anything is cast for a gradient
                torch.set_autocast_cache_enabled(before)
