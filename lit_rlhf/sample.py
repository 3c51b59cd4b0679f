"""Completions of policies side by side, on the same prompts and random numbers: ``lit-rlhf sample``."""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_rlhf.config import command, instantiate, refuse_unknown
from lit_rlhf.data.tokenize import tokenize_prompts
from lit_rlhf.errors import UserError, printable
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.sampler import Sampler


def complete(policy: Policy, prompts: Sequence[str], sampler: Sampler, seed: int) -> list[str]:
    """One completion per prompt. Prompt i is episode i of ``seed``, for every policy alike."""
    policy.eval()
    batch = tokenize_prompts(
        [{"prompt": prompt} for prompt in prompts],
        policy.tokenizer,
        episodes=torch.arange(len(prompts)),
        max_new_tokens=sampler.max_new_tokens,
        context_length=policy.context_length,
    )
    rollout = sampler.generate(
        policy.decoder(), batch, seed=seed, stop_ids=policy.stop_ids, pad_id=policy.tokenizer.pad_token_id
    )
    kept = [ids[mask] for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    return policy.tokenizer.batch_decode(kept, skip_special_tokens=True)


@command("sample")
def main(config: DictConfig) -> None:
    refuse_unknown(config, {"task_name", "seed", "policies", "prompts", "sampler", "paths"})
    for key in ("policies", "prompts"):
        if not isinstance(config[key], ListConfig) or not config[key]:
            raise UserError(f"{key}={config[key]} must be a list of at least one, such as {key}='[one, two]'")
    names, prompts = list(map(str, config.policies)), list(map(str, config.prompts))
    sampler = instantiate(config.sampler, "sampler")
    columns = [complete(Policy.from_pretrained(path=name), prompts, sampler, config.seed) for name in names]
    table = Table("prompt", *names, show_lines=True)
    for row in zip(prompts, *columns, strict=True):
        table.add_row(*(Text(printable(text)) for text in row))  # Text: completions may hold rich's markup
    Console().print(table)


if __name__ == "__main__":
    main()
