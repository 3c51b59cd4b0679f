"""What the README shows works: its Python, its example package, and every command composes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run_here
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from lit_rlhf.config import CONFIG_DIR

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def commands():
    lines = [line.split("  #")[0].strip() for text in blocks("bash") for line in text.splitlines()]
    return [line for line in lines if line.startswith("lit-rlhf ") and not line.endswith("--help")]


def run(arguments, folder):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_python_of_the_tour_runs(tmp_path):
    tour = next(text for text in blocks("python") if "PPO(" in text)
    (tmp_path / "tour.py").write_text(tour)
    run(["tour.py"], tmp_path)


PLUGGED = [command for command in commands() if "my_pkg" in command or "my_conf" in command]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The example package, built and installed on its own, and its configs, in an empty folder."""
    folder, source = tmp_path_factory.mktemp("user"), tmp_path_factory.mktemp("source")
    (source / "my_pkg.py").write_text(next(text for text in blocks("python") if "MyPrompts" in text))
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "my-pkg"\nversion = "1"\n'
        '[tool.hatch.build.targets.wheel]\ninclude = ["my_pkg.py"]\n'
    )
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder), str(source)]
    subprocess.run([sys.executable, *pip], check=True)
    left, right = zip(*(re.split(r" {2,}(?=# )", line) if "  # " in line else (line, "") for line in
                        next(t for t in blocks("yaml") if "my_pkg" in t).splitlines()), strict=True)  # fmt: skip
    for kind, lines in (("data", left), ("reward", [line.removeprefix("# ") for line in right])):
        (folder / "my_conf" / kind).mkdir(parents=True)
        text = "\n".join(line for line in lines if not line.startswith(("# my_conf", "my_conf")))
        (folder / "my_conf" / kind / "mine.yaml").write_text(text)
    (folder / "my_conf" / "experiment").mkdir()
    experiment = next(text for text in blocks("yaml") if "my_conf/experiment" in text)
    (folder / "my_conf" / "experiment" / "mine.yaml").write_text(experiment)
    return folder


@pytest.mark.parametrize("command", PLUGGED)
def test_the_example_package_plugs_in_from_outside(command, installed, monkeypatch):
    settings = ["sampler.max_new_tokens=4", "logger=csv", "trainer.max_epochs=1", "paths.output_dir=run"]
    arguments = [*shlex.split(command)[1:], *settings]
    if command == PLUGGED[0]:
        run(["-m", "lit_rlhf", *arguments], installed)
    else:  # in this process, which saves seconds
        monkeypatch.syspath_prepend(installed)
        monkeypatch.chdir(installed)
        result = run_here(*arguments)
        assert result.code == 0, result.err
    prompts = {json.loads(line)["prompt"] for line in (installed / "run/samples.jsonl").read_text().splitlines()}
    assert all(prompt.startswith("Once " if "data.opening=Once" in command else "The film ") for prompt in prompts)
    shutil.rmtree(installed / "run")


COMPOSED = [c for c in commands() if c.split()[1] in ("train", "pipeline", "eval", "sample", "estimate")]


def first_value(argument):
    """Of a sweep."""
    override = OverridesParser.create().parse_override(argument)
    values = override.sweep_string_iterator() if override.is_sweep_override() else None
    return f"{argument.partition('=')[0]}={next(values)}" if values else argument


# Those with the example package are run above.
@pytest.mark.parametrize("command", [c for c in COMPOSED if c not in PLUGGED])
def test_every_command_composes(command):
    _, name, *arguments = shlex.split(command)
    overrides = [a for a in arguments if a != "-m"]
    if name == "pipeline":
        nested = r"(?!data\.|paths\.|hydra\.)\w+\.[\w.]+="
        overrides = [f"++{a}" if re.match(nested, a) else a for a in overrides]
    if "-m" in arguments:
        overrides = [first_value(a) for a in overrides]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        compose(name, overrides=overrides)


def test_every_config_group_and_member_is_in_the_table():
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", README.split("## Config groups")[1], flags=re.M)
    named = {}
    for groups, members in rows:
        for group in re.findall(r"`([\w@]+)`", groups):
            named.setdefault(group.split("@")[0], set()).update(re.findall(r"`([\w/]+)`", members))
    for group in sorted(p for p in CONFIG_DIR.iterdir() if p.is_dir()):
        members = {str(f.relative_to(group).with_suffix("")) for f in group.rglob("*.yaml")}
        if members:
            assert named.get(group.name) == members, group.name
