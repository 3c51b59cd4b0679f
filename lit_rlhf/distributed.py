"""Several processes: how a run starts in them, how the work is shared out, and how its parts come together again.

Every process sees the same prompts and batches and works on its share of the rows; what was measured on the shares is
gathered, so that every process holds the whole iteration and computes the same whitening, moments and controllers. With
that, nothing depends on the number of processes but the order in which floating-point numbers are added.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from lit_rlhf.checkpoint_io import folder_sums, place, remove, written_to
from lit_rlhf.errors import PrintableFormatter, UserError
from lit_rlhf.layers import layers_of
from lit_rlhf.preemption import PREEMPTED, Preempted, asked_to_stop, listening, passing_on
from lit_rlhf.quiet import quiet
from lit_rlhf.sharded_reader import load_shards

T = TypeVar("T")
_GRACE_SECONDS = 20.0  # for the other processes to end by themselves when one has failed; twice that at most


# ---- shares of the work -------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process among all of the run's."""
    return distributed.get_rank() if _running() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return distributed.get_world_size() if _running() else 1


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def gather(part: T) -> list[T]:
    """What every process holds under this name, in the order of the processes; tensors must be on the CPU."""
    if world_size() == 1:
        return [part]
    parts: list[Any] = [None] * world_size()
    distributed.all_gather_object(parts, part)
    return parts


def share(count: int, rank: int, world: int) -> list[int]:
    """The numbers of this process's rows out of ``count``: as many in every process, the last row again if need be.

    Every process then runs the same number of forward passes, without which sharded weights would wait for ever. All
    shares in a row are the ``count`` rows, followed by repetitions.

    >>> share(5, 0, 2), share(5, 1, 2)
    ([0, 1, 2], [3, 4, 4])
    """
    size = -(-count // world)
    return [min(number, count - 1) for number in range(rank * size, (rank + 1) * size)]


def split_batch(batch: Any, world: int) -> list[Any]:
    """A batch, a mapping of columns, as one batch for each process; None where there are fewer rows than processes.

    What is no mapping of equally long columns is left whole, for its reader to refuse.
    """
    lengths = {len(c) if hasattr(c, "__len__") and not isinstance(c, str) else -1 for c in _columns(batch)}
    if world == 1 or len(lengths) != 1 or lengths == {-1}:
        return [batch] + [None] * (world - 1)
    taken = [range(number, lengths.copy().pop(), world) for number in range(world)]
    return [{k: [c[row] for row in rows] for k, c in batch.items()} if rows else None for rows in taken]


def _columns(batch: Any) -> list[Any]:
    return list(batch.values()) if isinstance(batch, Mapping) else []


# ---- sharded weights ----------------------------------------------------------------------------------------------


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy over all processes, whose checkpoints hold only what trains.

    The algorithm shards its own models in ``configure_model``. A checkpoint is a folder with a file for every process.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(tensor_parallel_size=1, **settings)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model, options=_TRAINED)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        fresh = not optimizer.state
        state = get_optimizer_state_dict(self.model, optimizer, options=_TRAINED)
        if fresh:  # torch has taken a step, of nothing, to have something to return
            optimizer.state.clear()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes the folder beside its place, with checksums, and then renames it.

        Raises:
            UserError: it cannot be written; what was there before stays.
        """
        path = Path(self.broadcast(filepath))
        checkpoint["fresh_optimizers"] = [not optimizer.state for optimizer in self.optimizers]
        with written_to(path) as temporary:
            if self.is_global_zero and temporary.exists():
                shutil.rmtree(temporary)  # what a kill has left
            self.barrier()
            super().save_checkpoint(checkpoint, temporary, storage_options)
            self.barrier()
            if self.is_global_zero:
                place(temporary, path, folder_sums(temporary))

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            remove(Path(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = True) -> dict[str, Any]:
        """Fills the shards of weights and optimiser states from the folder; returns the rest of the checkpoint."""
        path = Path(self.broadcast(checkpoint_path))
        optimizers = self.optimizers if self.lightning_module.trainer.state.fn == "fit" else []
        states = {f"optimizer_{n}": self.optimizer_state(optimizer) for n, optimizer in enumerate(optimizers)}
        states["state_dict"] = self.lightning_module_state_dict()
        load_shards(states, path)
        set_model_state_dict(self.model, states.pop("state_dict"), options=_TRAINED)
        rest = torch.load(path / SHARDED_META, map_location="cpu", weights_only=weights_only is not False)
        fresh = rest.get("fresh_optimizers", [False] * len(optimizers))
        for number, optimizer in enumerate(optimizers):
            set_optimizer_state_dict(self.model, optimizer, states[f"optimizer_{number}"], options=_TRAINED)
            if fresh[number]:
                optimizer.state.clear()
        return rest


_TRAINED = StateDictOptions(ignore_frozen_params=True, cpu_offload=True, strict=False)
SHARDED_META = "meta.pt"  # Lightning's name of the file beside the shards that holds the rest of a checkpoint


def shard(model: nn.Module, mesh: Any) -> None:
    """Shards a module's parameters over ``mesh``, layer by layer, if that was not done before (FSDP2).

    The layers are those that transformers names as not to be split. A layer's weights are whole only while it runs.
    """
    if isinstance(model, FSDPModule):
        return
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    # By default the outermost weights would stay whole after a forward pass, also one that no backward pass follows.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def whole(x: Tensor) -> Tensor:
    """A tensor that may be sharded, put together; every process must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(parameter: Tensor, x: Tensor) -> Tensor:
    """A whole tensor where and as ``parameter`` is: on its device, sharded if it is."""
    x = x.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(x, parameter.device_mesh, parameter.placements)
    return x


@contextmanager
def whole_checkpoint(path: Path | None) -> Iterator[Path | None]:
    """The checkpoint at ``path`` as one file; a sharded one is put together, without optimiser states, for a while."""
    if path is None or not path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        states: dict[str, Any] = {}
        load_shards(states, path, whole=True)
        rest = torch.load(path / SHARDED_META, map_location="cpu", weights_only=True)
        torch.save({**rest, "state_dict": states["state_dict"]}, file)
        yield file


# ---- starting -----------------------------------------------------------------------------------------------------


def processes_to_start(trainer: L.Trainer) -> int:
    """How many processes have to be started on this machine for a run with ``trainer``.

    1 where it is a single one, or where torchrun, SLURM or another launcher has started this process as one of several.

    Raises:
        UserError: several nodes, and no launcher that started a process on each.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or environment.creates_processes_externally:
        return 1
    if trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: start the same command on every node with torchrun or srun, e.g. "
            "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-endpoint=<host>:29500 -m lit_rlhf.train ..."
        )
    return trainer.num_devices


def agree(trainer: L.Trainer, value: T) -> T:
    """The first process's ``value`` in all that a launcher started for ``trainer``, before it connects them itself."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _init_dist_connection(trainer.strategy.cluster_environment, _get_default_process_group_backend_for_device(device))
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def first_decides(trainer: L.Trainer, decide: Callable[[], T]) -> T:
    """What ``decide()`` says in the first process, in all of a trainer's; a UserError of its is raised in all."""
    if trainer.world_size == 1:
        return decide()
    value = mistake = None
    if trainer.is_global_zero:
        try:
            value = decide()
        except UserError as error:
            mistake = str(error)
    value, mistake = agree(trainer, (value, mistake))
    if mistake is not None:
        raise UserError(mistake)
    return value


def require_everywhere(path: str | Path) -> None:
    """Raises UserError, in every process, if one of them does not see the file or folder ``path``."""
    own = None if Path(path).exists() else f"process {rank()} on {socket.gethostname()}"
    if missing := [process for process in gather(own) if process]:
        raise UserError(
            f"the first process continues from the checkpoint {path}, which {', '.join(missing)} cannot see: a run on "
            "several nodes resumes from a disk that all of them share, or from a copy at the same place on each"
        )


def run_in_processes(task: Callable[..., Any], count: int, *args: Any) -> None:
    """Runs ``task(*args)`` in ``count`` new processes of this machine, in which Lightning finds its rank.

    When one fails the others are ended, after a time of grace.

    Args:
        task: a function of a module, with arguments that can be pickled.
        count: the number of processes.

    Raises:
        UserError: what a process raised as a UserError, or which one was killed.
        Preempted: a signal, which is passed on to the processes, asked them to stop.
        RuntimeError: another error, with its traceback.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        threads = max(1, torch.get_num_threads() // count)
        # A server that has imported everything is forked for each process: the import takes longer than a tiny run.
        multiprocessing.set_forkserver_preload(["lit_rlhf.algorithms", "lit_rlhf.rewards", "lit_rlhf.config"])
        given = (task, args, count, port, threads, dict(os.environ), folder)
        context = start_processes(_process, given, nprocs=count, join=False, start_method="forkserver")
        try:
            with passing_on(partial(_send, context.processes)):
                while not context.join(grace_period=_GRACE_SECONDS):
                    pass
        except (ProcessRaisedException, ProcessExitedException) as error:
            if told := sorted(Path(folder).glob("*")):
                raise UserError(told[0].read_text()) from None
            if isinstance(error, ProcessExitedException):
                # A process that was not listening yet ends with a code of its own.
                if error.exit_code == PREEMPTED or asked_to_stop():
                    raise Preempted from None
                raise UserError(f"process {error.error_index} of {count} ended early: {error}") from None
            raise RuntimeError(str(error)) from None


def _send(processes: Iterable[Any], number: int) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, number)


def _process(
    number: int,
    task: Callable[..., Any],
    args: tuple[Any, ...],
    count: int,
    port: int,
    threads: int,
    environment: dict[str, str],
    folder: str,
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the server's is as old as the first run
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": number, "RANK": number, "WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in names.items()})
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    quiet()
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.INFO if number == 0 else logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrintableFormatter("%(message)s"))
    try:
        with listening():
            task(*args)
    except UserError as error:
        (Path(folder) / str(number)).write_text(str(error))
        raise


def _stop_without_parent() -> None:
    """Stops this process, as SIGTERM does, when the one that started it is killed: nobody else would end it."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
