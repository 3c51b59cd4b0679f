"""What an algorithm runs in one iteration, stage by stage, traced on shapes: for ``lit-rlhf estimate``.

The forward passes are the library's own; only what needs data or a trainer around them is written out here. All
completions are taken to be of the same length, so that none leaves the batch early and nothing is padding.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from lit_rlhf.algorithms import DQN, ILQL, KTO, SFT, TRPO, RewardModel
from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.algorithms.kto import LabelledBatch
from lit_rlhf.algorithms.offline import OfflineAlgorithm
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.algorithms.pairs import PairBatch
from lit_rlhf.algorithms.reward_model import _ROWS as TEXTS
from lit_rlhf.algorithms.rewarded import RewardedBatch
from lit_rlhf.algorithms.trpo import _Part
from lit_rlhf.batch import CompletionBatch, Experience
from lit_rlhf.errors import UserError
from lit_rlhf.estimation.shapes import Trace, size_of
from lit_rlhf.machine import decode_dtype
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import FrozenCopy
from lit_rlhf.rewards.group import RewardGroup
from lit_rlhf.rewards.model import ModelReward
from lit_rlhf.rollout.loader import PROCESSES, exact_div
from lit_rlhf.rollout.sampler import next_logits, position_ids


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread and in what precision, and how long its texts are, in tokens."""

    strategy: str  # "one device", "DDP" or "FSDP2"
    world: int
    micro_batches: int
    precision: str
    prompt: int
    response: int

    @property
    def half(self) -> torch.dtype | None:
        """Of the forward passes, if they are in mixed precision."""
        return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)

    def autocast(self) -> Any:
        return contextlib.nullcontext() if self.half is None else torch.autocast("cpu", self.half)

    @property
    def sharded(self) -> bool:
        return self.strategy == "FSDP2"

    @property
    def parts(self) -> int:
        """Devices that share weights, gradients and the optimiser's state."""
        return self.world if self.sharded else 1

    @property
    def frees_gradients(self) -> bool:
        """Whether no gradients lie beside the activations of a forward pass."""
        return self.micro_batches == 1

    def share(self, count: int) -> int:
        """Rows of a process."""
        return -(-count // self.world)

    def around(self, size: float) -> float:
        """Bytes that a device sends for an all-gather or a reduce-scatter of ``size`` bytes, in a ring."""
        return size * (self.world - 1) / self.world

    def gathered(self, *networks: nn.Module) -> float:
        """Bytes sent to put sharded weights together once; 0 where they are whole."""
        return self.around(sum(map(size_of, networks))) if self.sharded else 0.0


@dataclass(kw_only=True)
class Stage:
    """A part of an iteration.

    Attributes:
        name: stage, and part of it.
        trace: its operations, run ``count`` times.
        memory: bytes by kind that it holds at its worst moment, besides weights, gradients and optimiser.
        sent: bytes that a device sends to the others each time.
    """

    name: str
    trace: Trace
    count: float = 1.0
    memory: dict[str, float]
    sent: float = 0.0


def _stage(name: str, trace: Trace, count: float = 1.0, sent: float = 0.0, less: float = 0.0, **more: float) -> Stage:
    memory = {"activations": max(0.0, trace.activations - less), "logits": trace.logits, **more}
    return Stage(name=name, trace=trace, count=count, memory=memory, sent=sent)


def _tokens(rows: int, prompt: int, response: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of a policy's forward pass."""
    prompts, responses = (torch.ones(rows, length, dtype=torch.long) for length in (prompt, response))
    return prompts, prompts.bool(), responses, responses.bool()


# ---- online algorithms ----------------------------------------------------------------------------------------------


def online_stages(algorithm: OnlineAlgorithm, layout: Layout, clips: bool) -> Iterator[Stage]:
    """The stages of an iteration, numbered as everywhere; those without a model in them are left out."""
    rows = layout.share(algorithm.rollout_batch_size)
    yield from _rollout(algorithm, layout, rows)
    for judge in (algorithm.reward, algorithm.gold):
        yield from _score(judge, layout, rows, algorithm.policy.vocabulary)
    yield _anchor(algorithm, layout, rows)
    algorithm.policy.train()
    steps = algorithm.epochs * (algorithm.experience_size // algorithm.minibatch_size)
    micro = exact_div(
        algorithm.minibatch_size, layout.micro_batches, "algorithm.minibatch_size", "trainer.accumulate_grad_batches"
    )
    micro = exact_div(micro, layout.world, "algorithm.minibatch_size / trainer.accumulate_grad_batches", PROCESSES)
    if isinstance(algorithm, TRPO):
        yield from _natural_step(algorithm, layout)
    batch = _experience(algorithm, layout, micro)
    yield _backward(algorithm, layout, lambda: _online_loss(algorithm, batch, layout.world == 1), steps)
    yield _optimizer(algorithm, layout, steps, clips)


@torch.no_grad()
def _rollout(algorithm: OnlineAlgorithm, layout: Layout, rows: int) -> Iterator[Stage]:
    policy, sampler = algorithm.policy, algorithm.sampler
    chunk = min(sampler.chunk_size or rows, rows)
    chunks = -(-rows // chunk)
    dtype = decode_dtype(layout.precision)
    if layout.sharded and not policy.sharded:
        object.__setattr__(policy, "_decoder", policy._copy(dtype))  # as ``Policy.shard`` keeps one in any precision
    policy.decoder(dtype)  # the first call makes the copy
    with Trace() as copy:
        model = policy.decoder(dtype)
    freed = 0 if policy._decoder is None or layout.sharded else _freed(policy)
    policy.decoder(dtype)
    yield _stage("1 rollout: copy", copy, sent=layout.gathered(policy), **{"decode copy": freed})
    model.eval()
    whole = layout.prompt + layout.response

    def decode(ids: Tensor, cache: DynamicCache, length: int) -> None:
        mask = torch.ones(len(ids), length, dtype=torch.long)
        logits = next_logits(model, ids, mask, position_ids(mask)[:, -ids.shape[1] :], cache)
        sampler._pick(logits, torch.zeros(len(ids)))

    middle = whole - layout.response // 2
    for name, length, count in (("prefill", layout.prompt, 1), ("decode", middle, layout.response - 1)):
        cache = DynamicCache(config=model.config)
        ids = torch.ones(chunk, length, dtype=torch.long)
        if name == "decode":
            with Trace():
                decode(ids[:, 1:], cache, length - 1)
        with Trace(policy.vocabulary) as trace:
            # A prompt is computed once for its group.
            decode(ids[:: algorithm.group_size] if name == "prefill" else ids[:, -1:], cache, length)
            if name == "prefill" and algorithm.group_size > 1:
                cache.reorder_cache(torch.arange(len(ids)) // algorithm.group_size)
        cached, kept = _cached(cache, length, whole)
        more = {"KV cache": kept, "decode copy": freed}
        yield _stage(f"1 rollout: {name}", trace, chunks * count, less=cached, **more)
    if freed:
        policy.free_decoder()


def _cached(cache: DynamicCache, length: int, whole: int) -> tuple[float, float]:
    """Bytes of a cache of ``length`` tokens a row, and of ``whole``: recurrent states and full windows do not grow."""
    now = later = 0.0
    for layer in cache.layers:
        size = sum(x.nbytes for x in tree_leaves(vars(layer)) if isinstance(x, Tensor))
        grows = isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.shape[-2] == length
        now += size
        later += size * (min(getattr(layer, "sliding_window", whole), whole) / length if grows else 1)
    return now, later


def _freed(policy: Policy) -> int:
    """Bytes of the decode copy that are given up until the next rollout."""
    made = size_of(policy._decoder)
    policy.free_decoder()
    return made - size_of(policy._decoder)


def leaves(reward: Any) -> list[Any]:
    """The rewards in a reward: those of a group, or itself."""
    if not isinstance(reward, RewardGroup):
        return [reward]
    return [leaf for part in reward.rewards.values() for leaf in leaves(part)]


@torch.no_grad()
def _score(judge: Any, layout: Layout, rows: int, vocabulary: int) -> Iterator[Stage]:
    for reward in leaves(judge):
        if not isinstance(reward, ModelReward):
            continue
        batch = min(reward.batch_size, rows)
        length = layout.response + (layout.prompt if reward.on == "text" else 0)
        ids = torch.ones(batch, min(length, reward.scorer.tokenizer.model_max_length), dtype=torch.long)
        with Trace(vocabulary) as trace:
            reward._score(ids, ids.bool())
        yield _stage(f"2 score: {type(reward.scorer.model).__name__}", trace, rows / batch)


@torch.no_grad()
def _anchor(algorithm: OnlineAlgorithm, layout: Layout, rows: int) -> Stage:
    batch = min(algorithm.minibatch_size, rows)
    tokens = _tokens(batch, layout.prompt, layout.response)
    with Trace(algorithm.policy.vocabulary) as trace, layout.autocast():
        output, reference = algorithm.both(*tokens)
        if algorithm.critic is not None:
            algorithm.critic(output, *tokens)
        algorithm.kl_of(output, reference.logprobs, reference.logits, tokens[-1])
    sent = layout.gathered(algorithm.policy, algorithm.policy) + layout.gathered(*_critics(algorithm))
    return _stage("3 anchor", trace, rows / batch, sent)


def _critics(algorithm: Algorithm) -> list[nn.Module]:
    critic = getattr(algorithm, "critic", None)
    return [] if critic is None else [critic]


def _experience(algorithm: OnlineAlgorithm, layout: Layout, rows: int) -> Experience:
    prompt_ids, prompt_mask, response_ids, response_mask = _tokens(rows, layout.prompt, layout.response)
    floats = response_ids.float()
    values = floats if algorithm.critic is not None else None
    return Experience(
        prompt_ids=prompt_ids, prompt_mask=prompt_mask, response_ids=response_ids, response_mask=response_mask,
        logprobs=floats, ref_logprobs=floats, advantages=floats, values=values, returns=values,
    )  # fmt: skip


def _online_loss(algorithm: OnlineAlgorithm, batch: Experience, alone: bool) -> Tensor:
    """Something through which all gradients flow: the arithmetic on (B, T) numbers is too little to count."""
    tokens = (batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.response_mask)
    bonus = algorithm.entropy is not None and algorithm.entropy.at(0.0) != 0
    full = algorithm.kl.in_loss and algorithm.kl.estimator == "full"
    settings = {"temperature": algorithm.temperature, "entropy": True, "entropy_grad": bonus, "keep_logits": full}
    with torch.set_grad_enabled(not isinstance(algorithm, TRPO)):  # it trains the critic alone by this loss
        output = algorithm.policy(*tokens, **settings)
    loss = output.logprobs.sum() + (output.entropy.sum() if bonus else 0)
    if full:
        loss = loss + algorithm.kl_loss(batch, output, tokens)
    if algorithm.critic is None:
        return loss
    if alone and loss.requires_grad and getattr(algorithm.critic, "apart", False):
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        loss = loss.detach()
    return loss + algorithm.critic(output, *tokens)[:, :-1].sum()


def _natural_step(algorithm: TRPO, layout: Layout) -> Iterator[Stage]:
    """TRPO's: a gradient, ``cg_steps + 1`` products with the Fisher matrix, and one try of the line search."""
    parts = -(-algorithm.rollout_batch_size // algorithm.minibatch_size)
    batch = _experience(algorithm, layout, algorithm.minibatch_size)
    parameters = [p for p in algorithm.policy.parameters() if p.requires_grad]
    vector = torch.zeros(sum(p.numel() for p in parameters))
    runs = {
        "gradient": (1, lambda part: algorithm._gradient([part], parameters, algorithm._surrogate)),
        "Fisher": (algorithm.cg_steps + 1, lambda part: algorithm._fisher([part], parameters, vector)),
        "line search": (1, lambda part: (algorithm._surrogate(part), algorithm._kl(part))),
    }
    with sdpa_kernel(SDPBackend.MATH):
        with Trace(), torch.no_grad():
            part = _Part(batch, algorithm._forward(batch), 1.0)
        logits = part.old.logits.nbytes * parts
        for name, (count, run) in runs.items():
            with Trace(algorithm.policy.vocabulary) as trace, torch.set_grad_enabled(name != "line search"):
                run(part)
            yield _stage(f"7 natural step: {name}", trace, count * parts, **{"rollout's logits": logits})


# ---- offline algorithms ---------------------------------------------------------------------------------------------


def offline_stages(algorithm: OfflineAlgorithm, layout: Layout, batch_size: int, clips: bool) -> Iterator[Stage]:
    """The stages of one optimiser step on batches of ``batch_size`` rows."""
    algorithm.train()
    inputs = _inputs(algorithm, layout.share(batch_size), layout)

    def loss() -> Tensor:
        if isinstance(algorithm, SFT):
            # Its own loss picks the target tokens by a mask, whose number is in the data; here all are targets.
            logits = algorithm.policy.model(input_ids=inputs, attention_mask=inputs.bool(), use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), inputs.flatten())
        if isinstance(algorithm, RewardModel):  # its own sorts texts by their length
            return sum(algorithm.scorer(part, part.bool()).sum() for part in inputs.split(TEXTS))
        return algorithm.loss(inputs)[0]

    yield _backward(algorithm, layout, loss, 1)
    yield _optimizer(algorithm, layout, 1, clips)


def _inputs(algorithm: OfflineAlgorithm, rows: int, layout: Layout) -> Any:
    """What the algorithm's ``collate`` makes of ``rows`` rows."""

    def completions(count: int) -> CompletionBatch:
        names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
        return CompletionBatch(**dict(zip(names, _tokens(count, layout.prompt, layout.response), strict=True)))

    numbers = torch.ones(rows)
    match algorithm:
        case SFT() | RewardModel():
            texts = rows * (2 if isinstance(algorithm, RewardModel) else 1)
            return torch.ones(texts, layout.prompt + layout.response, dtype=torch.long)
        case KTO():
            return LabelledBatch(completions(rows), numbers.bool(), completions(rows))
        case ILQL() | DQN():
            return RewardedBatch(completions(rows), numbers)
        case OfflineAlgorithm(reference=None) if not type(algorithm).__module__.startswith("lit_rlhf."):
            name = type(algorithm).__name__
            raise UserError(f"config key 'algorithm': what a {name} reads is not known to an estimate")
        case _:
            places = numbers.long()
            return PairBatch(completions(2 * rows), places, places)


# ---- updates --------------------------------------------------------------------------------------------------------


def _backward(algorithm: Algorithm, layout: Layout, loss: Any, steps: int) -> Stage:
    """A forward and a backward pass of a micro-batch."""
    trained = sum(map(size_of, _trained(algorithm)))
    with Trace(_vocabulary(algorithm)) as trace:
        with layout.autocast():
            value = loss()
        # Gradients take the place of activations as they come.
        memory = {"activations": trace.activations, "logits": trace.logits}
        value.backward()
    after = trace.activations + trace.logits - trained + (trained / layout.parts if layout.frees_gradients else 0)
    if after > sum(memory.values()):
        memory = {"activations": after - trace.logits, "logits": trace.logits}
    networks = list(algorithm.children())
    sent = 2 * layout.gathered(*networks) + (layout.around(trained) if layout.sharded else 0.0)
    count = steps * layout.micro_batches
    return Stage(name="7 forward, backward", trace=trace, count=count, memory=memory, sent=sent)


def _trained(algorithm: Algorithm) -> list[nn.Parameter]:
    return [p for p in algorithm.parameters() if p.requires_grad]


def _vocabulary(algorithm: Algorithm) -> int:
    return algorithm.policy.vocabulary if hasattr(algorithm, "policy") else 0


def _optimizer(algorithm: Algorithm, layout: Layout, steps: int, clips: bool) -> Stage:
    """An optimiser's step with what surrounds it; under FSDP2 each device steps its own part."""
    parameters = algorithm.optimized_parameters()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with Trace():
        optimizer: Optimizer = algorithm.optimizer_factory(parameters)
        optimizer.step()  # makes the state
    with Trace() as trace:
        get_total_norm([p.grad for p in parameters])
        if clips:
            clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    state = sum(size_of(x) for kept in optimizer.state.values() for x in kept.values() if isinstance(x, Tensor))
    sent = 2 * layout.around(sum(map(size_of, parameters))) if layout.strategy == "DDP" else 0.0
    more = {"gradients": sum(map(size_of, parameters))} if layout.frees_gradients else {}
    stage = _stage("8 step", trace, steps / layout.parts, sent * layout.parts, optimiser=state, **more)
    stage.memory = {name: size / layout.parts for name, size in stage.memory.items()}
    return stage


def frozen_reference(algorithm: Algorithm) -> list[nn.Module]:
    """The reference's own weights, if it has any."""
    return [algorithm.reference._policy] if isinstance(algorithm.reference, FrozenCopy) else []
