"""A run's models and forward passes as shapes alone: what would be computed and held, without computing or holding it.

Inside ``shapes_only()`` tensors are PyTorch's fake tensors, which have shapes, types and storages but no memory, and
pretrained models are made from their config files without their weights. ``Trace`` lists the operations that code runs
there, forward and backward, and follows how much memory their results would hold. So what is counted is the library's
own code at work, for every model that transformers has.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights
from transformers.integrations import moe

from lit_rlhf.models import attention, packed, reference

_aten = torch.ops.aten
#: What PyTorch's flop counter leaves out.
_FLOPS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, k.shape, v.shape
    ),
}
#: Products of rows with the weights of the experts that they are sent to, forward and backward.
_EXPERTS = {"transformers::grouped_mm_fallback": 1, "transformers::grouped_mm_fallback_backward": 2}
#: These read as many entries of their first tensor as they return.
_GATHERS = (_aten.embedding, _aten.index, _aten.gather, _aten.index_select)


@dataclass(frozen=True)
class Shape:
    """A tensor without its content."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Operation(NamedTuple):
    """One operation of PyTorch on tensors of given shapes.

    Attributes:
        func, args, kwargs: the operation, a ``Shape`` standing for every tensor.
        flops: of matrix products and attention; 0 for all others.
        dtype: of its first tensor.
        moved: bytes read and written.
        held: bytes read of tensors that were there before the trace, such as weights: in memory, not in a cache.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    flops: int
    dtype: torch.dtype
    moved: int
    held: int


class Trace(TorchDispatchMode):
    """Lists the operations run inside it, and the memory that is held at its worst moment.

    Args:
        vocabulary: tensors whose last dimension has this size count as logits.

    Attributes:
        operations: (operation, how often).
        calls: how many operations there were in all, those included that only look at a tensor anew.
        activations, logits: bytes of tensors made inside, at the moment when there are most.
    """

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.calls = self.activations = self.logits = 0
        self._counted: dict[str, list[Any]] = {}
        self._live = {"activations": 0, "logits": 0}
        self._made: set[int] = set()  # the ids of storages that were made inside and are still there

    @property
    def operations(self) -> list[tuple[Operation, int]]:
        return [(operation, count) for operation, count in self._counted.values()]

    @property
    def flops(self) -> int:
        return sum(operation.flops * count for operation, count in self.operations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            return _stand_in(args[0].dtype)
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        self.calls += 1
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not _looks_only(func, inputs, outputs):
            self._count(func, args, kwargs, inputs, out, outputs)
        self._hold(inputs, outputs)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], out: Any, outputs: list[Tensor]) -> None:
        flops, times, packet = 0, 1, func.overloadpacket
        if func.name() in _EXPERTS:  # the same rows for every expert that has any; backward, two products of that size
            times, packet, func = _EXPERTS[func.name()], _aten.bmm, _aten.bmm.default
            rows, weight = args[:2]
            busy = min(len(rows), len(weight))
            args = (rows.new_empty(busy, -(-len(rows) // busy), rows.shape[1]), weight[:busy])
            inputs, outputs = list(args), [out := torch.bmm(*args)]
        if packet in _FLOPS:
            flops = _FLOPS[packet](*args, **kwargs)
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
        read = inputs[1:] + outputs if packet in _GATHERS else inputs
        held = sum(_bytes(x) for x in read if id(x.untyped_storage()) not in self._made)
        if func is _aten.bmm.default and args[1].stride(0) == 0:
            # One product, not a batch of them: fake tensors hide that by their strides of dimensions of size 1.
            func, args = _aten.mm.default, (args[0].reshape(-1, args[0].shape[-1]), args[1][0])
        shapes = tree_map(lambda x: _shape(x) if isinstance(x, Tensor) else x, (args, kwargs))
        key = f"{func}{shapes}{held}"
        if key not in self._counted:
            dtype = (inputs or outputs)[0].dtype
            self._counted[key] = [Operation(func, *shapes, flops, dtype, sum(map(_bytes, [*read, *outputs])), held), 0]
        self._counted[key][1] += times

    def _hold(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        there = {id(x.untyped_storage()) for x in inputs} | self._made
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if id(storage) in there:
                continue
            kind = "logits" if tensor.ndim and tensor.shape[-1] == self.vocabulary else "activations"
            there.add(id(storage))
            self._made.add(id(storage))
            self._live[kind] += storage.nbytes()
            weakref.finalize(storage, self._release, id(storage), kind, storage.nbytes())
        if sum(self._live.values()) > self.activations + self.logits:
            self.activations, self.logits = self._live["activations"], self._live["logits"]

    def _release(self, number: int, kind: str, size: int) -> None:
        self._made.discard(number)
        self._live[kind] -= size


@contextmanager
def shapes_only(*, cpu: bool) -> Iterator[None]:
    """Everything made inside has shapes alone; pretrained models come from their config files without their weights.

    Tensors without memory say that they are on a CPU, whichever device they stand for: ``cpu`` is whether they are.
    """
    replacements = [
        *([] if cpu else [(attention, "products_are_faster", lambda *_: False)]),
        (PreTrainedModel, "from_pretrained", classmethod(_from_config_file)),
        (nn.Module, "_apply", _apply),
        (masking_utils, "is_tracing", lambda *_: False),  # which would make masks where the real code finds no padding
        (reference, "_hash", lambda *_: ""),  # of weights that are not there
        (moe, "_can_use_grouped_mm", lambda *_: False),  # whose shapes PyTorch knows in bfloat16 alone
        (packed, "can_pack", lambda _: False),  # the same products of the same size, in an operation without shapes
    ]
    plain = [vars(owner)[name] for owner, name, _ in replacements]
    for owner, name, own in replacements:
        setattr(owner, name, own)
    try:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        with fakes, no_init_weights(), _Copies(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for (owner, name, _), before in zip(replacements, plain, strict=True):
            setattr(owner, name, before)


class _Copies(TorchFunctionMode):
    """Lets tensors without memory be deep-copied: PyTorch itself would read from where their memory should be."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))
        return func(*args, **(kwargs or {}))


def _from_config_file(cls: type[PreTrainedModel], path: str, *_args: Any, config: Any = None, **settings: Any) -> Any:
    config = cls.config_class.from_pretrained(path) if config is None else config
    if settings.get("attn_implementation") is not None:
        config._attn_implementation = settings["attn_implementation"]
    model = cls(config).eval()
    return (model, {"missing_keys": []}) if settings.get("output_loading_info") else model


def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:  # noqa: ARG001
    """``Module.to`` and its like: PyTorch's own exchanges tensors in place, which fake ones do not allow."""
    converted: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in converted:
                    new = convert(old)
                    own = isinstance(old, nn.Parameter) and new is not old
                    converted[id(old)] = nn.Parameter(new.detach(), old.requires_grad) if own else new
                if old is not None:
                    tensors[name] = converted[id(old)]
    return module


def size_of(thing: nn.Module | Tensor) -> int:
    """Bytes of a tensor, or of a network's parameters and buffers, tied ones once.

    >>> size_of(nn.Linear(3, 2))
    32
    """
    if isinstance(thing, nn.Module):
        return sum(map(size_of, [*thing.parameters(), *thing.buffers()]))
    return thing.numel() * thing.element_size()


def _looks_only(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether an operation computes nothing: its result is one of its inputs, seen in another way."""
    if func.is_view or not outputs:
        return True
    there = {id(x.untyped_storage()) for x in inputs}
    return not func._schema.is_mutable and all(id(x.untyped_storage()) in there for x in outputs)


def _stand_in(dtype: torch.dtype) -> bool | int | float:
    """For a number that code reads from a tensor: a condition holds, and an integer is a length beyond all others."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 2**31 - 1


def _shape(x: Tensor) -> Shape:
    return Shape(tuple(x.shape), tuple(x.stride()), x.dtype)


def _bytes(x: Tensor) -> int:
    """What is read of a tensor: one that was expanded is as small as before."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
