"""Weights in half precision (``trainer.precision=bf16-true`` or ``16-true``), and all other numbers as they are."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import Strategy
from torch import nn
from transformers import PreTrainedModel

from lit_rlhf.errors import UserError


class HalfWeights(HalfPrecision):
    """Lightning's plugin, with the rounding where it saves memory: in the weights of transformers' models.

    Lightning's own would also round the batches, of which the old log-probabilities are a part, so that no first ratio
    is 1; the frequencies of rotary positions; heads and adapters, in which small steps would be lost; and every number
    that is made in a step.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            if isinstance(part, PreTrainedModel):
                for name, parameter in part.named_parameters():
                    if "lora_" not in name:
                        parameter.data = parameter.data.to(self._desired_input_dtype)
        return module

    def convert_input(self, data: Any) -> Any:
        return data

    def tensor_init_context(self) -> AbstractContextManager:
        return nullcontext()

    def forward_context(self) -> AbstractContextManager:
        return nullcontext()


def use_half_weights(strategy: Strategy, *, sharded: bool) -> None:
    """Puts :class:`HalfWeights` in the place of Lightning's plugin for half precision, if that is the strategy's.

    Raises:
        UserError: the weights are sharded, and the shards of a layer must have one precision.
    """
    plugin = strategy.precision_plugin
    if isinstance(plugin, HalfPrecision):
        if sharded:
            raise UserError(f"trainer.precision={plugin.precision} cannot be had with trainer=fsdp2; bf16-mixed can")
        strategy._precision_plugin = HalfWeights(plugin.precision)
