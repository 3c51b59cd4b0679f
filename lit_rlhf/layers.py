"""The layers of a transformers model: what is sharded, compiled and counted one by one, and how wide its states are."""

import torch
from torch import nn
from transformers import PreTrainedConfig

from lit_rlhf.errors import UserError


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that the model's class names as not to be split: its layers."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]


def state_size(config: PreTrainedConfig) -> int:
    """The width of a model's last hidden states: some of OPT's project them back to that of their embeddings."""
    text = config.get_text_config()
    return getattr(text, "word_embed_proj_dim", text.hidden_size)


def compile_layers(model: nn.Module) -> None:
    """Compiles every layer of a model; they share their code, for any number of rows and tokens.

    A version is made with and without each of: gradients, padding, the adapter, Lightning's validation.

    Raises:
        UserError: there is no compiler for CPUs, or the model's class names no layers.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # here: few need them
    from torch._inductor.exc import InvalidCxxCompiler

    if not torch.cuda.is_available():
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise UserError("policy.compile=true needs a C++ compiler, such as g++ or what CXX names") from error
    if not (layers := layers_of(model)):
        raise UserError(f"policy.compile=true: {type(model).__name__} does not say what its layers are")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)  # 8, then nothing is compiled
    for layer in layers:
        layer.compile(dynamic=True)
