"""Memory and time of a run before it is started, on this machine or another: ``lit-rlhf estimate``."""

import json
import logging
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.checks import check_int
from lit_rlhf.config import command, instantiate, refuse_unknown
from lit_rlhf.errors import UserError
from lit_rlhf.estimation.roofline import Machine, ThisMachine
from lit_rlhf.estimation.shapes import shapes_only, size_of
from lit_rlhf.estimation.stages import Layout, Stage, frozen_reference, leaves, offline_stages, online_stages
from lit_rlhf.layers import layers_of
from lit_rlhf.models.cast import cast_dtype
from lit_rlhf.quiet import quiet
from lit_rlhf.rewards.http import JsonClient
from lit_rlhf.train import check_plain, make_algorithm

_OWN = ("machine", "prompt_length", "response_length", "format")
_ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What ``estimate`` finds. Memory is in 1e9 bytes and per device, times are in seconds.

    Attributes:
        machine, devices, strategy, precision: where and how; ``devices`` are those that the run uses.
        prompt_length, response_length: tokens, as assumed.
        parameters: numbers of them; ``trained`` are those that the optimiser moves.
        held: memory that is taken all the time, by part.
        working: stage -> kind -> memory that it takes besides.
        peak, available: memory of the worst stage with all that is held, and of the device.
        seconds, communication: stage -> time, and how much of it goes by in sending.
        flops: stage -> 1e12 FLOP of matrix products on a device.
        iteration: seconds of an iteration; offline of an optimiser step.
        not_counted: what takes an unknown time or memory.
    """

    machine: str
    devices: int
    strategy: str
    precision: str
    prompt_length: int
    response_length: int
    parameters: dict[str, int]
    held: dict[str, float]
    working: dict[str, dict[str, float]]
    peak: float
    available: float
    seconds: dict[str, float]
    communication: dict[str, float]
    flops: dict[str, float]
    iteration: float
    not_counted: list[str]


def estimate(config: DictConfig) -> Estimate:
    """Traces an iteration of the run that a composed config describes on shapes alone, and times it on the machine.

    Raises:
        UserError: a mistake in the config, or a layout that the machine or the sizes do not allow.
    """
    config = config.copy()
    machine = _machine(config)
    prompt, response = _lengths(config)
    run = OmegaConf.masked_copy(config, [key for key in config if key not in _OWN])
    check_plain(run)
    quiet()
    with shapes_only(cpu=isinstance(machine, ThisMachine)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tensors without memory
        algorithm = make_algorithm(run)
        layout = Layout(
            **_devices(run.trainer, machine, algorithm),
            micro_batches=run.trainer.get("accumulate_grad_batches", 1),
            precision=_precision(run.trainer, machine),
            prompt=prompt,
            response=response,
        )
        clips = bool(run.trainer.get("gradient_clip_val"))
        if algorithm.reference is not None:
            cast = cast_dtype(layout.precision, sharded=layout.sharded)
            algorithm.reference.place(torch.device("cpu"), cast)
        if algorithm.online:
            algorithm.place_rewards(torch.device("cpu"), layout.precision)
            stages = list(online_stages(algorithm, layout, clips))
        else:
            stages = list(offline_stages(algorithm, layout, _batch_size(run.data), clips))
        held = _held(algorithm, layout, stages)
        working = {stage.name: {kind: size / GB for kind, size in stage.memory.items() if size} for stage in stages}
        if hasattr(algorithm, "policy"):
            exported = _count(algorithm.policy) * 4
            working["export"] = {"copy of the policy": exported / GB}
        parameters = {name: _count(module) for name, module in algorithm.named_children()}
        parameters["trained"] = sum(p.numel() for p in algorithm.optimized_parameters())
    held = {"process": machine.reserved, **{part: size / GB for part, size in held.items() if size}}
    sent = {stage.name: stage.count * machine.transfer(stage.sent) for stage in stages}
    seconds = {stage.name: stage.count * machine.seconds(stage.trace) + sent[stage.name] for stage in stages}
    return Estimate(
        machine=machine.name,
        devices=layout.world,
        strategy=layout.strategy,
        precision=layout.precision,
        prompt_length=prompt,
        response_length=response,
        parameters=parameters,
        held=held,
        working=working,
        peak=sum(held.values()) + max(sum(kinds.values()) for kinds in working.values()),
        available=machine.memory,
        seconds=seconds,
        communication={name: time for name, time in sent.items() if time},
        flops={stage.name: stage.count * stage.trace.flops / 1e12 for stage in stages},
        iteration=sum(seconds.values()),
        not_counted=_not_counted(run, algorithm, machine),
    )


def _machine(config: DictConfig) -> Machine:
    known = {field.name for field in fields(Machine)} if "_target_" in config.machine else set()
    refuse_unknown(config, {"_target_", *known}, under="machine")
    machine = instantiate(config.machine, "machine")
    if not isinstance(machine, Machine):
        raise UserError(f"config key 'machine' makes a {type(machine).__name__}, not a lit_rlhf.Machine")
    return machine


def _lengths(config: DictConfig) -> tuple[int, int]:
    prompt = check_int("prompt_length", config.prompt_length, at_least=1)
    response = config.response_length
    if response is None:
        response = config.sampler.max_new_tokens if "sampler" in config else prompt
    check_int("response_length", response, at_least=1)
    if "sampler" in config and response > config.sampler.max_new_tokens:
        raise UserError(
            f"response_length={response} is longer than sampler.max_new_tokens={config.sampler.max_new_tokens}"
        )
    return prompt, response


def _devices(trainer: DictConfig, machine: Machine, algorithm: Algorithm) -> dict[str, Any]:
    """How many devices a run uses of the machine, and under which strategy."""
    nodes, devices = trainer.get("num_nodes", 1), trainer.get("devices", "auto")
    if OmegaConf.is_list(devices):
        devices = len(devices)
    world = machine.devices if str(devices) in ("auto", "-1") else int(devices) * nodes
    if world > machine.devices:
        raise UserError(
            f"trainer.devices={devices} * trainer.num_nodes={nodes} are more than machine.devices={machine.devices}"
        )
    strategy = trainer.get("strategy", "auto")
    name = strategy.get("_target_", "") if OmegaConf.is_dict(strategy) else str(strategy)
    if name.endswith("FSDP2Strategy"):
        if not algorithm.shardable:
            raise UserError(f"{type(algorithm).__name__} cannot be sharded; trainer=ddp trains it in several processes")
        return {"strategy": "FSDP2" if world > 1 else "one device", "world": world}
    if name != "auto" and not name.startswith("ddp"):
        raise UserError(f"trainer.strategy={name}: an estimate knows one device, trainer=ddp and trainer=fsdp2")
    return {"strategy": "DDP" if world > 1 else "one device", "world": world}


def _precision(trainer: DictConfig, machine: Machine) -> str:
    given = str(trainer.get("precision", "32-true"))
    precision = machine.precision if given == "auto" else _ALIASES.get(given, given)
    if precision not in _PRECISIONS:
        raise UserError(f"trainer.precision={given}: an estimate knows auto, {', '.join(_PRECISIONS)}")
    return precision


def _batch_size(data: DictConfig) -> int:
    if "batch_size" not in data:
        raise UserError("the rows of a batch are not known: set data.batch_size (a class of yours: +data.batch_size)")
    return check_int("data.batch_size", data.batch_size, at_least=1)


def _held(algorithm: Algorithm, layout: Layout, stages: list[Stage]) -> dict[str, float]:
    """Bytes that are taken all the time, by part."""
    held: Counter[str] = Counter()
    for name, module in algorithm.named_children():
        held["weights" if name in ("policy", "scorer") else name] += size_of(module) / layout.parts
    held["reference"] = sum(map(size_of, frozen_reference(algorithm))) / layout.parts
    policy = getattr(algorithm, "policy", None)
    if policy is not None and policy._decoder is not None:
        held["decode copy"] = size_of(policy._decoder)
    if algorithm.online:
        held["reward"] = sum(size_of(reward.scorer) for reward in _leaves(algorithm) if hasattr(reward, "scorer"))
    gradients = sum(size_of(p) for p in algorithm.optimized_parameters()) / layout.parts
    held["gradients"] = 0 if layout.frees_gradients else gradients
    held["optimiser"] = sum(stage.memory.pop("optimiser", 0.0) for stage in stages)
    if layout.strategy == "DDP":
        held["DDP's buckets"] = gradients
    if layout.sharded:
        held["layers put together"] = max(map(_together, algorithm.children()))
    return dict(held)


def _together(network: nn.Module) -> int:
    """Bytes of the weights that ``shard`` lets be whole at a time: this layer's, the next one's, and the outermost."""
    layers = [size_of(layer) for layer in layers_of(network)]
    return size_of(network) - sum(layers) + 2 * max(layers, default=0)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _leaves(algorithm: Any) -> list[Any]:
    """The rewards of an online algorithm, those in groups taken out of them."""

    return [leaf for reward in (algorithm.reward, algorithm.gold) if reward is not None for leaf in leaves(reward)]


def _not_counted(config: DictConfig, algorithm: Algorithm, machine: Machine) -> list[str]:
    """What has an unknown cost."""
    found = ["what the processes send each other"] if machine.devices > 1 and not machine.interconnect else []
    for reward in _leaves(algorithm) if algorithm.online else []:
        function = getattr(reward, "function", reward)
        kind = function if hasattr(function, "__qualname__") else type(function)
        kind = getattr(function, "func", kind)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not name.startswith("lit_rlhf."):
            found.append(f"reward {name}")
        elif any(isinstance(value, JsonClient) for value in vars(reward).values()):
            found.append(f"reward {kind.__qualname__}: its server's time")
    target = config.data.get("_target_", "")
    return found if target.startswith("lit_rlhf.") else [*found, f"data {target}"]


def print_estimate(result: Estimate, console: Console | None = None) -> None:
    """Prints an estimate as two tables, memory and time."""
    console = console or Console()
    spread = f"{result.devices} x {result.machine}" if result.devices > 1 else result.machine
    console.print(
        f"{spread}, {result.strategy}, {result.precision}; prompts of {result.prompt_length} tokens, "
        f"completions of {result.response_length}"
    )
    counts = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in result.parameters.items() if count)
    console.print(f"parameters: {counts}")
    memory = Table("memory per device", "GB")
    for part, size in result.held.items():
        memory.add_row(part, f"{size:.3f}")
    worst = max(result.working, key=lambda name: sum(result.working[name].values()))
    for kind, size in result.working[worst].items():
        memory.add_row(f"{kind} ({worst})", f"{size:.3f}")
    memory.add_row("peak", f"{result.peak:.3f}", style="bold")
    memory.add_row("there is", f"{result.available:.3f}")
    stages = Table("stage", "seconds", "of that sending", "TFLOP", "GB besides")
    for name, time in result.seconds.items():
        besides = sum(result.working[name].values())
        sending = f"{result.communication[name]:.3f}" if name in result.communication else ""
        stages.add_row(name, f"{time:.3f}", sending, f"{result.flops[name]:.3f}", f"{besides:.3f}")
    stages.add_row("iteration", f"{result.iteration:.3f}", style="bold")
    for table in (memory, stages):
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)
    for item in result.not_counted:
        console.print(f"not counted: {item}")


def require_fit(result: Estimate) -> None:
    """Raises UserError if the run does not fit into the machine's memory."""
    if result.peak > result.available:
        part, size = max(result.held.items(), key=lambda item: item[1])
        raise UserError(
            f"the run does not fit: it needs {result.peak:.1f} GB per device and {result.machine} has "
            f"{result.available:.1f}; the largest part is {part} with {size:.1f}"
        )


@command("estimate")
def main(config: DictConfig) -> None:
    logging.getLogger("lit_rlhf").setLevel(logging.WARNING)
    if config.format not in ("table", "json"):
        raise UserError(f"format={config.format} must be table or json")
    result = estimate(config)
    if config.format == "json":
        print(json.dumps(asdict(result), indent=2))
    else:
        print_estimate(result)
    require_fit(result)


if __name__ == "__main__":
    main()
