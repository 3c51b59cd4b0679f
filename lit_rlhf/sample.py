"""Completions of policies side by side, on the same prompts and random numbers: ``lit-rlhf sample``."""

import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_rlhf.algorithms.judged import decode_completions
from lit_rlhf.chat import Chat, require_chat
from lit_rlhf.checks import check_bool, check_int, check_text
from lit_rlhf.config import command, instantiate, refuse_unknown
from lit_rlhf.data.prompts import as_lines, prompt_problem
from lit_rlhf.data.text_files import opened, read_jsonl
from lit_rlhf.data.tokenize import tokenize_prompts
from lit_rlhf.errors import UserError, printable
from lit_rlhf.evaluation.policies import load_policy, named_by, said_of
from lit_rlhf.models.policy import Policy
from lit_rlhf.quiet import quiet
from lit_rlhf.rewards.scoring import Reward, freeze, score
from lit_rlhf.rollout.sampler import Sampler
from lit_rlhf.run_folder import append_rows

Row = dict[str, Any]
_KEYS = [
    "task_name", "seed", "policies", "prompts", "chat", "system", "samples_per_prompt", "output", "sampler", "reward",
    "paths",
]  # fmt: skip
#: What is typed to forget a conversation.
_NEW = "/new"


def complete(
    policy: Policy, prompts: Sequence[Any], sampler: Sampler, seed: int, episodes: Sequence[int] | None = None
) -> list[str]:
    """One completion per prompt, a text or a chat. Prompt i is episode i of ``seed``, for every policy alike."""
    policy.eval()
    batch = tokenize_prompts(
        [{"prompt": prompt} for prompt in prompts],
        policy.tokenizer,
        episodes=torch.arange(len(prompts)) if episodes is None else torch.tensor(episodes),
        max_new_tokens=sampler.max_new_tokens,
        context_length=policy.context_length,
    )
    device = next(policy.parameters()).device
    rollout = sampler.generate(
        policy.decoder(), batch.to(device), seed=seed, stop_ids=policy.stop_ids, pad_id=policy.tokenizer.pad_token_id
    )
    return decode_completions(rollout, policy.tokenizer)


def side_by_side(
    policies: dict[str, Policy],
    prompts: Sequence[str | Chat],
    sampler: Sampler,
    *,
    seed: int = 0,
    first: int = 0,
    samples: int = 1,
    chat: bool = False,
    before: Mapping[str, Chat] | None = None,
    reward: Reward | None = None,
) -> list[Row]:
    """For every prompt and sample a dict: ``prompt``, and by policy ``completions``, with a reward ``scores``, and in a
    conversation the messages ``before``.

    Sample j of prompt i is episode (``first`` + i) * ``samples`` + j, whatever else is asked in the same call. With
    ``chat`` a text is what a user says, after the messages that ``before`` has for the policy.
    """
    rows = [{"prompt": prompt, "completions": {}} for prompt in prompts for _ in range(samples)]
    episodes = [first * samples + number for number in range(len(rows))]
    for name, policy in policies.items():
        opening = before[name] if before else []
        asked = [opening + require_chat(row["prompt"]) if chat and isinstance(row["prompt"], str) else row["prompt"]
                 for row in rows]  # fmt: skip
        with said_of(name):
            texts = complete(policy, asked, sampler, seed, episodes)
        scores = None if reward is None else score(reward, asked, texts, {}).total.tolist()
        for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
            row["completions"][name] = text
            if opening and asked[number] is not row["prompt"]:
                row.setdefault("before", {})[name] = opening
            if scores is not None:
                row.setdefault("scores", {})[name] = scores[number]
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    """A line for every prompt, a column for every policy."""
    table = Table("prompt", show_lines=True)
    for name in rows[0]["completions"]:
        table.add_column(Text(printable(name)), overflow="fold")
    for row in rows:
        cells = [Text(printable(as_lines(row["prompt"])))]  # Text: completions may hold rich's markup
        for name, text in row["completions"].items():
            cell = Text(printable(text))
            if "scores" in row:
                cell.append(f"\n{row['scores'][name]:.3f}", style="dim")
            cells.append(cell)
        table.add_row(*cells)
    console.print(table)


def read_prompts(prompts: Any) -> list[str | Chat]:
    """The prompts that are named: a list, or those of a file, a line each or the key ``prompt`` in JSON Lines.

    Raises:
        UserError: there are none, or one is neither a text nor a chat.
    """
    if isinstance(prompts, ListConfig):
        listed = OmegaConf.to_container(prompts, resolve=True)
        found = [str(prompt) if isinstance(prompt, int | float) else prompt for prompt in listed]
    else:
        path = Path(check_text("prompts", prompts))
        with opened(path, "prompts", "text") as stream:
            if path.suffix == ".jsonl":
                lines = list(read_jsonl(stream))
                if bad := [line for line in lines if line.row is None]:
                    raise UserError(f"prompts: {path}, line {bad[0].number} {bad[0].problem}")
                found = [line.row.get("prompt") for line in lines]
            else:
                try:
                    found = [line for line in stream.read().decode("utf-8").splitlines() if line.strip()]
                except UnicodeDecodeError as error:
                    raise UserError(f"prompts: {path} is not UTF-8: {error}") from None
    if not found:
        raise UserError(f"prompts={prompts} must be a list of at least one, such as prompts='[one, two]', or a file")
    for number, prompt in enumerate(found):
        if problem := prompt_problem(prompt):
            raise UserError(f"prompts: number {number + 1} {problem:.200}")
    return found


def typed() -> Iterator[str]:
    """Prompts from the terminal, or from what is piped in, until an empty line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is a bad prompt, no end
    while True:
        if sys.stdin.isatty():
            print("prompt> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.rstrip("\r\n")


@command("sample")
def main(config: DictConfig) -> None:
    refuse_unknown(config, _KEYS)
    if not isinstance(config.policies, ListConfig) or not config.policies:
        raise UserError(f"policies={config.policies} must be a list of at least one, such as policies='[one, two]'")
    names = list(map(str, config.policies))
    if len(set(names)) < len(names):
        raise UserError(f"policies={names} names one twice")
    settings = {
        "seed": check_int("seed", config.seed, at_least=0),
        "samples": check_int("samples_per_prompt", config.samples_per_prompt, at_least=1),
        "chat": check_bool("chat", config.chat),
    }
    system = None if config.system is None else check_text("system", config.system)
    if system is not None and not settings["chat"]:
        raise UserError("system is a message of a chat: set chat=true, too")
    if settings["chat"] and config.prompts is None and settings["samples"] > 1:
        raise UserError(
            f"samples_per_prompt={settings['samples']}: a conversation goes on from one answer; leave it at 1, or give "
            "prompts"
        )
    quiet()
    asked = None if config.prompts is None else read_prompts(config.prompts)
    if system is not None and (chats := [i for i, prompt in enumerate(asked or []) if not isinstance(prompt, str)]):
        raise UserError(f"system={system!r:.40} stands before texts; prompts: number {chats[0] + 1} is a chat")
    sampler = instantiate(config.sampler, "sampler")
    reward = instantiate(config.get("reward"), "reward")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    freeze(reward, device)
    with named_by("policies"):
        policies = {name: load_policy(name).to(device) for name in names}
    console = Console()
    opening = [] if system is None else [{"role": "system", "content": system}]
    if asked is not None:
        rows = side_by_side(policies, asked, sampler, before=dict.fromkeys(names, opening), reward=reward, **settings)
        show(rows, console)
        save(config.output, rows)
        return
    said = dict.fromkeys(names, opening)
    for number, prompt in enumerate(typed()):
        if settings["chat"] and prompt.strip() == _NEW:
            said = dict.fromkeys(names, opening)
            continue
        try:
            if problem := prompt_problem(prompt):
                raise UserError(f"what was typed {problem}")
            rows = side_by_side(policies, [prompt], sampler, first=number, before=said, reward=reward, **settings)
        except UserError as error:  # of this prompt: it is too long, say
            hint = f"\n{_NEW} begins a new conversation" if settings["chat"] else ""
            console.print(Text(printable(str(error)) + hint, style="red"))
            continue
        if settings["chat"]:
            for name, answer in rows[0]["completions"].items():
                said[name] = [*said[name], *require_chat(prompt), {"role": "assistant", "content": answer}]
        show(rows, console)
        save(config.output, rows)


def save(path: str | None, rows: Sequence[Row]) -> None:
    """Appends rows to a file of JSON Lines, if there is one."""
    if path is None:
        return
    append_rows(Path(path), rows)


if __name__ == "__main__":
    main()
