"""What the runs of a comparison vary, and which of them are seeds of the same setting."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_rlhf.config import flatten
from lit_rlhf.report_comparison_charts import Look
from lit_rlhf.report_section import Run

#: Parts of a configuration that change nothing in what is learnt.
_IGNORED = {"task_name", "tags", "seed", "ckpt_path", "optimized_metric", "paths", "logger", "callbacks", "hydra"}
_LONG = 48


@dataclass(frozen=True)
class Member:
    """A run that is compared, or a job of a multirun that left none. `overrides` is None outside multiruns."""

    folder: Path
    run: Run | None
    overrides: dict[str, str] | None = None
    status: str = ""
    error: str = ""

    @property
    def state(self) -> str:
        """How it ended; what the job of a multirun noted counts before what its run did."""
        if self.run is None or self.status == "failed":
            return self.status
        stopped_by = self.run.summary.get("stopped_by")
        if stopped_by:
            return f"stopped by {stopped_by}"
        return str(self.run.summary.get("status", self.status or "in progress"))


@dataclass
class Setting:
    """Runs that differ in nothing but their seed."""

    number: int
    values: dict[str, str]
    label: str
    members: list[Member] = field(default_factory=list)
    look: Look = field(default_factory=lambda: Look(colour="#7d8894"))

    @property
    def brief(self) -> str:
        """The label without its keys."""
        return " · ".join(self.values.values()) or self.label

    @property
    def runs(self) -> list[Run]:
        return [member.run for member in self.members if member.run is not None]


def group(members: Sequence[Member]) -> tuple[list[str], list[Setting]]:
    """The keys that the runs vary, and their settings in the order of the runs, each with its seeds in order.

    The keys are those of the configurations. Where the runs are jobs of multiruns and their overrides tell them apart
    just as well, the overrides as the user wrote them stand in their place.
    """
    known = [member for member in members if member.run is not None and member.run.config]
    plain = [_plain(member) for member in known]
    values = _chosen(known, plain)
    written: dict[int, dict[str, str]] = {}
    if all(member.overrides is not None for member in members):
        chosen = [_without_seed(member.overrides) for member in members]
        written = _chosen(members, chosen)
        if _partition(known, values) == _partition(known, written):
            values = written
    settings: dict[Any, Setting] = {}
    for member in members:
        found = values.get(id(member))
        if found is None:  # nothing is known of its configuration
            found = written.get(id(member), _without_seed(member.overrides or {})) or {"folder": member.folder.name}
        place = tuple(sorted(found.items()))
        label = "  ".join(f"{_name(key)}={short(value)}" for key, value in found.items())
        setting = Setting(len(settings) + 1, {_name(k): short(v) for k, v in found.items()}, label or "one setting")
        settings.setdefault(place, setting).members.append(member)
    for setting in settings.values():
        setting.members.sort(key=_seed)
    return list(dict.fromkeys(key for one in settings.values() for key in one.values)), list(settings.values())


def _chosen(members: Sequence[Member], configs: Sequence[dict[str, str]]) -> dict[int, dict[str, str]]:
    """Of every member's configuration what names its setting, by the member's id."""
    keys = varied(configs)
    return {id(one): {k: config[k] for k in keys if k in config} for one, config in zip(members, configs, strict=True)}


def varied(configs: Sequence[dict[str, str]]) -> list[str]:
    """The keys in which these differ, classes first.

    Of keys that some of them lack, only those that tell apart what the others do not: where `clip` is of two classes,
    the arguments of each class are not named as well.

    >>> one = {"kl": "0.1", "clip._target_": "Narrow", "clip.range": "0.2"}
    >>> varied([one, one | {"kl": "0.2"}, {"kl": "0.1", "clip._target_": "Wide", "clip.low": "0.2"}])
    ['clip._target_', 'kl']
    """
    keys = list(dict.fromkeys(key for config in configs for key in config))
    keys = [key for key in keys if len({config.get(key) for config in configs}) > 1]
    lacked = {key: any(key not in config for config in configs) for key in keys}
    kept: list[str] = []
    for key in sorted(keys, key=lambda key: (lacked[key], not key.endswith("_target_"))):
        if not lacked[key] or _count(configs, [*kept, key]) > _count(configs, kept):
            kept.append(key)
    return kept


def _count(configs: Sequence[dict[str, str]], keys: list[str]) -> int:
    return len({tuple(config.get(key) for key in keys) for config in configs})


def _partition(members: list[Member], values: dict[int, dict[str, str]]) -> set[frozenset[int]]:
    groups: dict[Any, set[int]] = {}
    for member in members:
        groups.setdefault(tuple(sorted(values[id(member)].items())), set()).add(id(member))
    return {frozenset(one) for one in groups.values()}


def _plain(member: Member) -> dict[str, str]:
    """A configuration as text, without seeds, names and places."""
    config = member.run.config
    paths = config.get("paths")
    here = str((paths if isinstance(paths, dict) else {}).get("output_dir") or "")
    roots = [here, str(member.run.path.absolute()), str(member.folder.absolute())]
    if here and member.run.path != member.folder:
        roots.append(str(Path(here).parent))  # of a pipeline
    clean = _remover([root for root in roots if len(root) > 1])
    flat = flatten({key: value for key, value in config.items() if key not in _IGNORED})
    return _without_seed({key: clean(str(value)) for key, value in flat.items() if value != {}})


def _remover(roots: list[str]) -> Callable[[str], str]:
    def clean(text: str) -> str:
        for root in sorted(roots, key=len, reverse=True):
            text = text.replace(root, "")
        return text

    return clean


def _without_seed(values: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in values.items() if key not in _IGNORED and key.rpartition(".")[2] != "seed"}


def _name(key: str) -> str:
    return key.removesuffix("._target_")


def _seed(member: Member) -> tuple[bool, float]:
    seed = member.run.config.get("seed") if member.run is not None else None
    return (not isinstance(seed, int | float), seed if isinstance(seed, int | float) else 0)


def short(value: str) -> str:
    """A value for a label: the name of a class, four digits of a number, the beginning of what is long.

    >>> short("lit_rlhf.clip.SymmetricClip"), short("0.00012345678"), short("3e-4"), short("10")
    ('SymmetricClip', '0.0001235', '3e-4', '10')
    """
    if value.startswith("lit_rlhf."):
        *_, owner, name = value.split(".")
        value = f"{owner}.{name}" if owner[:1].isupper() else name
    try:
        value = f"{float(value):.4g}" if len(value) > 7 else value
    except ValueError:
        pass
    return value if len(value) <= _LONG else value[:_LONG] + "…"
