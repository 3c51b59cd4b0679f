"""Linear layers that decode on a CPU in bfloat16: their weights come to lie in memory as oneDNN multiplies them.

A plain weight is laid out anew for every product. For the few rows of a decode step that takes half as long as the
product itself: with 1 to 32 rows, layers of SmolLM2 are 1.4 to 1.9 times as fast when it is done beforehand, with the
same result to the bit. Doing it takes as long as is gained in about 30 steps. With hundreds of rows nothing is gained,
and the last bits can differ: those are multiplied by plain weights.
"""

from collections import Counter

import torch
from torch import Tensor, nn

#: Rows that the layout is made for, and the largest number that is multiplied by it.
ROWS, FEW = 16, 64
#: Products with few rows after which a weight is packed: what it costs has then been lost already.
AFTER = 32


class DecodingLinear(nn.Linear):
    """Packs its weight once it has been used often, and then keeps no plain one unless another module needs that."""

    packed: Tensor | None = None
    tied = False
    used = 0

    def renew(self) -> None:
        """To be called when ``weight`` has changed."""
        self.packed, self.used = None, 0

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # Under autocast rows may have another type, which only a plain layer takes.
        few = rows.numel() <= FEW * self.in_features and rows.dtype == self.weight.dtype
        self.used += few
        if few and self.used > AFTER:
            if self.packed is None:
                self._pack()
            return torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        if self.packed is not None:
            self._unpack()
        return super().forward(rows)

    @torch.inference_mode(False)  # what decodes is renewed outside of it
    @torch.no_grad()
    def _pack(self) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), ROWS)
        if not self.tied:
            self.weight.data = self.weight.data.new_empty(0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _unpack(self) -> None:
        """For the prompts of the next completions."""
        if not self.tied:
            self.weight.data = self.packed.to_dense()
        self.renew()


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies ``weight`` here, and PyTorch has the two operations, which are not public."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def use_decoding_layers(model: nn.Module) -> None:
    """For a model that only decodes from now on, in the same place and precision."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for layer in [module for module in model.modules() if type(module) is nn.Linear and can_pack(module.weight)]:
        layer.__class__ = DecodingLinear
        layer.tied = owners[id(layer.weight)] > 1


def decoding_layers(model: nn.Module) -> dict[int, list[DecodingLinear]]:
    """The layers of ``use_decoding_layers`` by the ``id`` of their weights."""
    found: dict[int, list[DecodingLinear]] = {}
    for module in model.modules():
        if isinstance(module, DecodingLinear):
            found.setdefault(id(module.weight), []).append(module)
    return found
