"""The layers of a transformers model: what is sharded, compiled and counted one by one."""

from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that the model's class names as not to be split: its layers."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]
