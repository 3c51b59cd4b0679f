"""An optimiser step that runs out of memory: its micro-batches are done again in halves, with the same gradient."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_rlhf.distributed import world_size
from lit_rlhf.halving import free

if TYPE_CHECKING:
    from lit_rlhf.algorithms.base import Algorithm


def step_loss(algorithm: "Algorithm", batch: Any) -> Tensor:
    """The loss of a micro-batch, whose backward pass is left.

    Raises:
        UserError: no memory for its halves either, see ``Halving.halve``.
    """
    if "update" in algorithm.halving.stages:
        return _loss_in_halves(algorithm, batch)
    try:
        return algorithm.batch_loss(batch)
    except (RuntimeError, MemoryError) as error:
        _halve(algorithm, error, batch)
    return _redo_step(algorithm)


def backward(algorithm: "Algorithm", loss: Tensor, run: Callable[[], None]) -> None:
    """The backward pass of ``loss``, which is ``run``, or where that finds no memory, those of its step in halves."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        _halve(algorithm, error, algorithm.step_batches()[-1])
    loss.detach_()  # frees the activations, which Lightning's loss would hold
    add_gradients(algorithm, _redo_step(algorithm))


def _halve(algorithm: "Algorithm", error: Exception, batch: Any) -> None:
    """Lets updates work in halves of micro-batches, because of ``error``, or raises as ``Halving.halve`` does.

    Of several processes none can do a step again by itself.
    """
    allowed = algorithm.splits and world_size() == 1
    algorithm.halving.halve(error, "update", algorithm.rows_of(batch), unit=algorithm.unit, allowed=allowed)


def _redo_step(algorithm: "Algorithm") -> Tensor:
    """Does the micro-batches of the step under way once more, in halves; the last half's backward pass is left."""
    free()
    for parameter in algorithm.parameters():
        parameter.grad = None
    algorithm.forget_step()
    *before, last = algorithm.step_batches()
    for batch in before:
        add_gradients(algorithm, _loss_in_halves(algorithm, batch))
    return _loss_in_halves(algorithm, last)


def _loss_in_halves(algorithm: "Algorithm", batch: Any) -> Tensor:
    """The loss of a micro-batch's second half, after a backward pass for its first one."""
    try:
        (first, share), (second, rest) = algorithm.halves_of(batch)
        add_gradients(algorithm, algorithm.batch_loss(first, share))
        return algorithm.batch_loss(second, rest)
    except (RuntimeError, MemoryError) as error:
        _halve(algorithm, error, batch)  # raises, as these are halves already


def add_gradients(algorithm: "Algorithm", loss: Tensor, *, within_loss: bool = False) -> None:
    """Adds a loss's gradients as Lightning does after a training step.

    Args:
        within_loss: whether more of the micro-batch's loss is to come. A lack of memory is then raised as it is, for
            whoever asked for that loss does its step again.
    """
    trainer = algorithm.trainer
    with torch.autocast(algorithm.device.type, enabled=False):
        loss = loss / trainer.accumulate_grad_batches
        trainer.strategy.backward(loss, trainer.optimizers[0], within_loss=within_loss)
