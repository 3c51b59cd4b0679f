"""What both sides of a comparison are told: one description of the work, which travels to each as JSON."""

import json
from dataclasses import asdict, dataclass

from tests.benchmarks.countdown import stop_lengths


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One piece of work.

    Attributes:
        work: ``ppo`` or ``grpo``, an iteration of it; ``rollout``, completing prompts alone.
        model: ``smollm2``, or ``tiny``: a random Llama of 4 layers, width 256 and 4,096 tokens.
        completions: of one iteration; there are ``completions / group`` prompts.
        group: completions of each prompt.
        prompt_length, response_length: tokens; every prompt and response has this length; for ``rollout`` they
            are the longest.
        epochs: passes over an iteration's completions.
        minibatch: completions of one forward and backward pass.
        accumulate: such passes of one optimiser step.
        lora: train rank 16 on all linear layers instead of all weights.
        precision: of our side: ``auto`` is the library's default, ``32-true`` is what the peers do.
        separate_critic: a critic of the policy's size instead of a value head.
        dtype: of the weights that ``generate`` decodes with.
        threads: of torch.
        update_memory: measure our update's memory apart, in the first iteration; what was freed before is given back.
    """

    work: str = "ppo"
    model: str = "smollm2"
    completions: int = 16
    group: int = 1
    prompt_length: int = 32
    response_length: int = 32
    epochs: int = 2
    minibatch: int = 8
    accumulate: int = 1
    lora: bool = False
    precision: str = "auto"
    separate_critic: bool = False
    dtype: str = "float32"
    threads: int = 2
    update_memory: bool = False

    @property
    def tokens(self) -> int:
        """Generated in one iteration."""
        if self.work == "rollout":
            return sum(stop_lengths(self.completions, self.response_length))
        return self.completions * self.response_length

    def dumps(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Materials:
    """Where on disk the two sides find the same things.

    Attributes:
        folder: all of them, and the peers' packages, are in it, but for models that the library itself caches.
        model: folder in Hugging Face's format; for ``rollout`` of one that counts down, see ``make_countdown``.
        prompts: JSON Lines with ``prompt``, a text, and ``ids``, its tokens; empty for ``rollout``.
        reward: folder of a sequence classifier of the model's size; empty but for ``ppo``.
    """

    folder: str
    model: str
    prompts: str = ""
    reward: str = ""
