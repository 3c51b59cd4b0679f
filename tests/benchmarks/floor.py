"""The arithmetic floor of an iteration: what its matrix products alone would take on this machine.

The products are those of the model's own linear layers with its own weights, one after the other as in a forward or
backward pass, so that weights come from memory where they would. Attention, softmax, norms, the optimiser, sampling and
everything else are left out, so no implementation that does these products reaches the floor. What some of that takes
by itself on this machine, most of it bound by memory, is measured ``besides``.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.functional import entropy_from_logits, selective_logprobs
from lit_rlhf.models.attention import attention_forward
from tests.benchmarks.settings import Settings

REPETITIONS = 3


@dataclass(frozen=True, kw_only=True)
class Pass:
    """``times`` passes through the layers of ``part`` with ``rows`` tokens, in ``dtype``."""

    stage: str
    part: str
    rows: int
    dtype: torch.dtype
    times: int = 1
    backward: bool = False


def passes(settings: Settings, low: torch.dtype, *, critic: bool, reward: bool) -> list[Pass]:
    """What an iteration needs. The prompt is computed once for its group, the head at response positions only."""
    s, both = settings, settings.prompt_length + settings.response_length
    batches = s.completions // s.minibatch
    found = [
        Pass(stage="rollout", part="trunk", rows=s.completions // s.group * s.prompt_length, dtype=low),
        Pass(stage="rollout", part="head", rows=s.completions // s.group, dtype=low),
        Pass(stage="rollout", part="trunk", rows=s.completions, dtype=low, times=s.response_length - 1),
        Pass(stage="rollout", part="head", rows=s.completions, dtype=low, times=s.response_length - 1),
    ]
    if reward:
        found.append(Pass(stage="score", part="reward", rows=s.completions * both, dtype=low))
    shared = {"rows": s.minibatch * both, "dtype": low}
    head = {"part": "head", "rows": s.minibatch * s.response_length, "dtype": low}
    for stage, part in (("anchor", "policy"), ("anchor", "trunk")):
        found += [Pass(stage=stage, part=part, times=batches, **shared), Pass(stage=stage, times=batches, **head)]
    steps = {"stage": "update", "times": s.epochs * batches}
    for backward in (False, True):
        found += [Pass(part="policy", backward=backward, **shared, **steps), Pass(backward=backward, **head, **steps)]
        if critic:
            found.append(Pass(part="critic", backward=backward, **shared, **steps))
    return found + ([Pass(stage="anchor", part="critic", times=batches, **shared)] if critic else [])


def measure_floor(algorithm: OnlineAlgorithm, settings: Settings) -> dict[str, Any]:
    """Seconds and floating-point operations of an iteration's matrix products, by stage."""
    low = algorithm.decode_dtype
    scorer = getattr(algorithm.reward, "scorer", None)
    backbone = getattr(algorithm.critic, "backbone", None)
    base = algorithm.policy.base
    head = base.get_output_embeddings()
    layers = {
        "policy": _weights(base, leave_out=[head]),  # with its adapters
        "trunk": _weights(base, leave_out=[head, *_adapters(base)]),
        "head": [(head.weight.detach(), head.weight.requires_grad)],
        "critic": _weights(backbone) if backbone is not None else [],
        "reward": _weights(scorer.model.base_model) if scorer is not None else [],
    }
    needed = passes(settings, low, critic=backbone is not None, reward=scorer is not None)

    @cache
    def seconds(part: str, rows: int, dtype: torch.dtype, backward: bool) -> float:
        return _time(_products(layers[part], rows, dtype, backward=backward))

    stages: dict[str, dict[str, float]] = {}
    for item in needed:
        stage = stages.setdefault(item.stage, {"seconds": 0.0, "gflop": 0.0})
        stage["seconds"] += item.times * seconds(item.part, item.rows, item.dtype, item.backward)
        stage["gflop"] += item.times * _flop(layers[item.part], item.rows, backward=item.backward) / 1e9
    return {
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "gflop": sum(stage["gflop"] for stage in stages.values()),
        "dtype": str(low).removeprefix("torch."),
        "stages": stages,
        "besides": besides(algorithm, settings, low, layers["policy"] + layers["head"]),
    }


def besides(
    algorithm: OnlineAlgorithm, settings: Settings, low: torch.dtype, weights: list[tuple[Tensor, bool]]
) -> dict[str, float]:
    """Seconds of an iteration by what the update and the anchors do besides products, each measured alone."""
    steps = settings.epochs * settings.completions // (settings.minibatch * settings.accumulate)
    updates, anchors = (n * settings.completions // settings.minibatch for n in (settings.epochs, 1))
    found = _of_a_step(algorithm, steps)
    if low != torch.float32:
        found["weights to bf16"] = (updates + 1) * _time(lambda: [w.to(low) for w, _ in weights])
        gradients = [torch.zeros_like(w, dtype=low) for w, trains in weights if trains]
        found["gradients to fp32"] = updates * _time(lambda: [gradient.float() for gradient in gradients])
    config = algorithm.policy.base.config
    device = weights[0][0].device
    logits = torch.randn(settings.minibatch * settings.response_length, config.vocab_size, device=device).to(low)
    chosen = torch.zeros(len(logits), dtype=torch.long, device=device)
    with torch.no_grad():
        found["log-probabilities"] = (2 * anchors + updates) * _time(lambda: selective_logprobs(logits, chosen))
        found["entropies"] = updates * _time(lambda: entropy_from_logits(logits))
    loss = selective_logprobs(logits.requires_grad_(), chosen).sum()
    found["log-probabilities, backward"] = updates * _time(lambda: torch.autograd.grad(loss, logits, retain_graph=True))
    layers, both = config.num_hidden_layers, settings.prompt_length + settings.response_length
    size = config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads, config.num_key_value_heads)
    query, key = (torch.randn(settings.minibatch, n, both, size, device=device).to(low).requires_grad_() for n in heads)
    module = SimpleNamespace(num_key_value_groups=heads[0] // heads[1])

    def attend() -> Tensor:
        return attention_forward(module, query, key, key, None, is_causal=True)[0]

    def learn() -> None:
        with torch.enable_grad():
            attend().sum().backward()

    found["attention"] = 2 * anchors * layers * _time(attend)
    found["attention, backward too"] = updates * layers * _time(learn)
    return found


def _of_a_step(algorithm: OnlineAlgorithm, steps: int) -> dict[str, float]:
    """Of the optimiser's steps; afterwards there are no gradients, and the weights are almost what they were."""
    (optimizer,) = algorithm.trainer.optimizers
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters]
    found = {
        "optimiser": steps * _time(optimizer.step),
        "norm of gradients": steps * _time(lambda: torch.nn.utils.get_total_norm(gradients)),
        "clipping": steps * _time(lambda: [gradient.mul_(0.5) for gradient in gradients]),
    }
    optimizer.zero_grad()
    return found


def _adapters(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if "lora_" in name]


def _weights(model: nn.Module, leave_out: Iterable[nn.Module] = ()) -> list[tuple[Tensor, bool]]:
    """The weight of every linear layer, and whether it trains."""
    left_out = {id(module) for module in leave_out}
    linear = [m for m in model.modules() if type(m) is nn.Linear and id(m) not in left_out]
    return [(module.weight.detach(), module.weight.requires_grad) for module in linear]


def _flop(weights: list[tuple[Tensor, bool]], rows: int, *, backward: bool) -> float:
    """Of products alone: a forward pass has one per layer, a backward pass one, and another where the layer trains."""
    return sum(2.0 * rows * w.numel() * (1 + trains if backward else 1) for w, trains in weights)


def _products(
    weights: list[tuple[Tensor, bool]], rows: int, dtype: torch.dtype, *, backward: bool
) -> Callable[[], None]:
    copies = [(weight.to(dtype), trains) for weight, trains in weights]
    device = weights[0][0].device
    sizes = {size for weight, _ in weights for size in weight.shape}
    inputs = {size: torch.randn(rows, size, device=device).to(dtype) for size in sizes}

    def run() -> None:
        for weight, trains in copies:
            out, into = weight.shape
            if not backward:
                torch.nn.functional.linear(inputs[into], weight)
                continue
            inputs[out] @ weight
            if trains:
                inputs[out].T @ inputs[into]

    return run


@torch.no_grad()
def _time(run: Callable[[], None]) -> float:
    """The shortest of some repetitions, after one that does not count."""
    seconds = []
    for _ in range(1 + REPETITIONS):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
