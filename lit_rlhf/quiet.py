"""Keeps other libraries' chatter off the terminal of a command; warnings that a user can act on stay."""

import logging
import warnings

from transformers.utils import logging as transformers_logging

_NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",  # Lightning 2.6 on torch 2.13
    r".*module\(s\) in eval mode at the start of training.*",  # models load in eval mode; dropout is off on purpose
    r".*does not have many workers.*",
    r".*is_gradient_checkpointing.*",  # peft on transformers 5
    r".*Checkpoint directory .* exists and is not empty.*",  # so it is in every resumed run
    r".*The dirpath has changed from.*",  # a run may continue in another folder than its checkpoint's
    r".*callbacks used to create the checkpoint need to be provided.*",  # eval needs none of them
    r".*defined a `validation_step` but have no `val_dataloader`.*",  # held-out prompts are the user's choice
    r".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing is changed in place here
    r".*Detected an existing checkpoint in .*, overwriting.*",
    r".*Total length of `list` across ranks is zero.*",
)


def quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        for logger in (name, f"{name}.utilities.rank_zero"):  # the latter have levels of their own
            logging.getLogger(logger).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
