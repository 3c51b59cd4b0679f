"""Every config composes, names constructors that exist, and lists their parameters."""

import inspect
import re
import shlex
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lit_rlhf.config import CONFIG_DIR, flatten
from lit_rlhf.config_types import check_types
from lit_rlhf.overrides import drop_keys_of_others, give_way, replace_parts
from lit_rlhf.train import _OWN, _PLAIN, PARTS

GROUP_FILES = sorted(p.relative_to(CONFIG_DIR) for p in CONFIG_DIR.glob("*/**/*.yaml"))
EXPERIMENTS = [path for path in GROUP_FILES if path.parts[0] == "experiment"]
WITH_COMMAND = [path for path in GROUP_FILES if path.parts[0] in ("experiment", "hparams_search")]
PIPELINE_ONLY = {
    "experiment/human_ratings", "experiment/tweets", "experiment/constitutional", "experiment/overoptimisation",
    "experiment/overoptimisation_sweep", "hydra/pipeline", "paths/pipeline",
}  # fmt: skip
MEMBERS = [str(path.with_suffix("")) for path in GROUP_FILES]
#: What train.py hands to an algorithm besides its YAML.
PASSED = {*PARTS, "seed"}
#: The algorithm that reads a group which the default one, PPO, does not.
READ_BY = {"baseline": "reinforce"}
#: Parameters that the trainer's YAML leaves to train.py.
TRAINER_PASSED = {"logger", "callbacks", "default_root_dir"}


@cache
def composed(*overrides: str, command: str = "train", fill: bool = True) -> dict[str, Any]:
    """A command's config, resolved; with ``fill``, some value for every key that has none (`???`)."""
    if any(override.startswith("machine=") for override in overrides):
        command = "estimate"  # which alone has machines
    reader = [f"algorithm={READ_BY[group]}" for group in READ_BY if any(o.startswith(f"{group}=") for o in overrides)]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose(command, overrides=[*reader, *overrides, "paths.output_dir=run"])
    for key in OmegaConf.missing_keys(config) if fill else ():
        OmegaConf.update(config, key, [] if key.endswith(("prompts", "keywords")) else "some/path")
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def test_every_group_file_is_listed():
    groups = {path.parts[0] for path in GROUP_FILES}
    assert groups == {
        "algorithm", "baseline", "callbacks", "clip", "critic", "data", "debug", "entropy", "experiment",
        "hparams_search", "hydra", "kl", "logger", "machine", "optimizer", "paths", "policy", "reward", "sampler",
        "scheduler", "trainer",
    }  # fmt: skip


@pytest.mark.parametrize("member", [m for m in MEMBERS if m not in PIPELINE_ONLY and not m.startswith("machine/")])
def test_every_member_composes_into_a_training_run(member):
    group, _, choice = member.partition("/")
    plain = composed(f"{group}={choice}")
    assert set(plain) <= {*PARTS, *_OWN, *_PLAIN}  # no top-level key that train.py does not read
    if group in PARTS or group in _OWN:
        wanted = yaml.safe_load((CONFIG_DIR / f"{member}.yaml").read_text()) or {}
        target = wanted.get("_target_")
        assert target is None or plain[group]["_target_"] == target


def test_no_config_sets_hydras_mode():
    """So that ``run_here`` needs not ask for it."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        for command in ("train", "pipeline", "eval", "sample", "estimate"):
            assert compose(command, return_hydra_config=True).hydra.mode is None
    for path in CONFIG_DIR.glob("**/*.yaml"):
        assert not re.search(r"\bmode: *(RUN|MULTIRUN)", path.read_text()), path


@pytest.mark.parametrize("member", [m for m in MEMBERS if m.startswith("reward/")])
def test_every_reward_can_be_the_gold_judge(member):
    target = (yaml.safe_load((CONFIG_DIR / f"{member}.yaml").read_text()) or {}).get("_target_")
    assert composed(f"reward@gold={member.removeprefix('reward/')}")["gold"].get("_target_") == target


def test_keys_listed_at_the_top_are_the_ones_that_are_read():
    listed = set(yaml.safe_load((CONFIG_DIR / "train.yaml").read_text())) - {"defaults"}
    assert listed == set(_PLAIN)
    assert set(composed()) == {*PARTS, *_OWN, *_PLAIN} - set(READ_BY)


def parameters(target: Any) -> dict[str, inspect.Parameter]:
    """A callable's parameters; where a constructor takes **more, those of the classes it passes them to."""
    if not inspect.isclass(target):
        return dict(inspect.signature(target).parameters)
    found: dict[str, inspect.Parameter] = {}
    for cls in target.__mro__:
        if "__init__" not in vars(cls):
            continue
        own = dict(inspect.signature(cls.__init__).parameters)
        found = {**{name: p for name, p in own.items() if name != "self"}, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return {name: p for name, p in found.items() if p.kind is not p.VAR_KEYWORD}


def nodes(plain: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a _target_, nested ones too."""
    if isinstance(plain, dict):
        if "_target_" in plain:
            yield key, plain
        for name, value in plain.items():
            yield from nodes(value, f"{key}.{name}" if key else name)


def targets(member: str) -> dict[str, dict[str, Any]]:
    """Every node of a group file, as it is once composed."""
    group, _, choice = member.partition("/")
    found = nodes(composed(f"{group}={choice}"))
    return {key: node for key, node in found if key.split(".")[0] == group}


#: The members that a target reads; composed by the tests, not when they are collected.
READ = [m for m in MEMBERS if m.split("/")[0] not in ("experiment", "hparams_search", "debug", "hydra", "paths")]
READ = [m for m in READ if any(word in (CONFIG_DIR / f"{m}.yaml").read_text() for word in ("_target_", "defaults"))]
#: Those of a package that not everybody has are read by `make test-real`, which installs it.
READ = [
    pytest.param(m, marks=pytest.mark.real) if "bitsandbytes." in (CONFIG_DIR / f"{m}.yaml").read_text() else m
    for m in READ
]


@pytest.mark.parametrize("member", READ)
def test_a_configs_keys_are_its_targets_parameters(member):
    found = targets(member)
    assert found
    for node in found.values():
        target = hydra.utils.get_object(node["_target_"])
        takes = parameters(target)
        keys = {str(key) for key in node if key not in ("_target_", "_partial_")}
        assert all(isinstance(key, str) for key in node), "YAML reads on, off, yes and no as truth values: quote them"
        open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values())
        if not (open_ended and not inspect.isclass(target)):  # Policy.from_config passes more on to transformers
            assert keys <= set(takes)
        required = {name for name, p in takes.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
        if not node.get("_partial_"):
            assert required <= keys | PASSED


def expected_keys(target: Any) -> set[str]:
    """What an algorithm's YAML has to list."""
    takes = set(parameters(target)) - PASSED
    # The online base's `epochs` may go by the algorithm's own name, ppo_epochs, or not be open to choice.
    own = set(inspect.signature(target.__init__).parameters)
    return takes if "epochs" in own else takes - {"epochs"}


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIG_DIR / "algorithm").glob("*.yaml")))
def test_an_algorithms_yaml_is_its_constructor(name):
    node = composed(f"algorithm={name}")["algorithm"]
    assert set(node) - {"_target_"} == expected_keys(hydra.utils.get_object(node["_target_"]))


@pytest.mark.parametrize("member", READ)
def test_the_yaml_of_our_own_classes_lists_every_parameter(member):
    """So that a reader of conf/ sees all there is to set; the parts of a composite reward are examples."""
    for key, node in targets(member).items():
        if not node["_target_"].startswith("lit_rlhf.") or ".rewards." in key:
            continue
        takes = parameters(hydra.utils.get_object(node["_target_"]))
        not_in_yaml = {name for name, p in takes.items() if p.kind is p.KEYWORD_ONLY} - set(node) - PASSED - {"epochs"}
        if member.startswith("callbacks/"):
            not_in_yaml -= {"console"}
        assert not not_in_yaml


@pytest.mark.parametrize("member", READ)
def test_the_values_of_a_member_are_of_the_types_that_its_constructors_name(member):
    for key, node in targets(member).items():
        given = {name: value for name, value in node.items() if value != "some/path"}  # stands for `???`
        if given.get("precision") == "auto":
            del given["precision"]  # train.py puts another in its place
        check_types(given, key)


def test_the_trainers_yaml_leaves_to_train_py_what_that_sets():
    assert not TRAINER_PASSED & set(composed()["trainer"])


def commands_of(experiment: Path) -> list[str]:
    """The command in the comment that opens an experiment, with a value for every <placeholder>."""
    lines = (CONFIG_DIR / experiment).read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# lit-rlhf "), f"{experiment} does not open with its command"
    return shlex.split(re.sub(r"<[^>]*>", "some", lines[1].removeprefix("# lit-rlhf ")))


@pytest.mark.parametrize("file", WITH_COMMAND, ids=str)
def test_an_experiment_or_search_opens_with_the_command_that_runs_it(file):
    command, *overrides = commands_of(file)
    overrides = [override for override in overrides if override != "-m"]
    assert f"{file.parts[0]}={file.relative_to(file.parts[0]).with_suffix('')}" in overrides
    assert composed(*overrides, command=command, fill=False)["task_name"]  # no value is left to give


@pytest.mark.parametrize("experiment", [e for e in EXPERIMENTS if len(e.parts) > 2], ids=str)
def test_an_experiment_holds_overrides_only(experiment):
    """Its keys exist without it, so Hydra finds a misspelt one; only defaults choose members."""
    body = yaml.safe_load((CONFIG_DIR / experiment).read_text())
    chosen = [f"{k.split()[-1].lstrip('/')}={v}" for d in body.pop("defaults", []) for k, v in d.items()]
    assert set(flatten(body)) <= set(flatten(composed(*chosen)))


# ---- members chosen in place of an experiment's ----------------------------------------------------------------------


def settled(*given: str, preset: tuple[str, ...]) -> dict[str, Any]:
    """What a run gets for overrides that follow preset ones."""
    given = replace_parts(list(given))
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        config = compose("train", [*give_way(list(preset), given), *given], return_hydra_config=True)
        again = partial(compose, "train")
        drop_keys_of_others(config, again, config.hydra.runtime.choices, [], list(preset), given)
    return {key: OmegaConf.to_container(config[key]) for key in config if key in {*PARTS, *_OWN}}


def test_another_reward_has_nothing_of_the_experiments():
    tiny = ("experiment=tiny",)  # reward=regex, reward.pattern=[aeiou]
    assert settled("reward=regex", "reward.whole=true", preset=tiny)["reward"]["pattern"] == "[aeiou]"
    assert settled("reward=vader", preset=tiny)["reward"] == composed("reward=vader")["reward"]
    verifier = settled("reward=verifier", "reward.column=sum", preset=tiny)["reward"]
    assert verifier == {**composed("reward=verifier")["reward"], "column": "sum"}
    parts = ("reward=constrained", "reward@reward.constraint=length", "reward.constraint.target=3")
    assert settled(*parts, preset=tiny)["reward"] == composed(*parts)["reward"]
    own = settled("reward._target_=my_pkg.my_reward", "reward.word=fun", preset=tiny)["reward"]
    assert own == {"_target_": "my_pkg.my_reward", "word": "fun"}


def test_another_member_keeps_what_it_has_too_and_drops_the_rest():
    ppo2 = ("experiment=ppo2",)  # clip.range, clip.value_range, entropy.coef, optimizer.lr, optimizer.eps
    node = settled("clip=asymmetric", "clip.low=0.1", "entropy=none", "optimizer=sgd", preset=ppo2)
    assert node["clip"] == {**composed("clip=asymmetric")["clip"], "low": 0.1, "value_range": 0.2}
    assert node["entropy"] == composed("entropy=none")["entropy"]
    assert node["optimizer"] == {**composed("optimizer=sgd")["optimizer"], "lr": 2.5e-4}
    stage = ("experiment=human_ratings/ppo", "data.domain=tweets", "policy.path=sft", "reward.path=model")
    assert settled("policy=smollm2", preset=stage)["policy"] == {**composed("policy=smollm2")["policy"], "path": "sft"}
    assert settled("data=list", "data.prompts=[a]", preset=stage)["data"]["prompts"] == ["a"]
    assert settled("reward=model", preset=stage)["reward"]["path"] == "model"
    assert settled("reward@gold=length", preset=stage)["gold"] == composed("reward=length")["reward"]


def test_another_algorithm_drops_what_it_does_not_read():
    preset = ("experiment=human_ratings/ppo", "algorithm.ppo_epochs=3", "kl.coef=0.3")
    node = settled("algorithm=grpo", "algorithm.group_size=4", preset=preset)
    expected = composed("algorithm=grpo")["algorithm"]
    expected = {**expected, "group_size": 4, "scores": {**expected["scores"], "missing_eos_penalty": 1.0}}
    assert node["algorithm"] == expected
    assert node["kl"] == {**composed("kl=loss_k3")["kl"], "coef": 0.3}
    dapo = settled("algorithm=dapo", preset=preset)
    assert dapo["kl"] == composed("algorithm=dapo")["kl"]  # none, which has no kl.coef
    assert dapo["algorithm"]["scores"]["missing_eos_penalty"] == 1.0
    values = settled("algorithm=reinforce", "baseline=value", preset=("experiment=human_ratings/ppo", "critic.gain=1"))
    assert "critic" not in values
