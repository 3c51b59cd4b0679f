"""Tiny runs of every command through its real entry point, and what they leave behind."""

import csv
import json
import shutil
import subprocess
import sys
import time
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from command_line import ROOT, TINY, environment, run_here, write_ratings
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lit_rlhf
from lit_rlhf.config import CONFIG_DIR

PPO = [*TINY, "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1"]
FILES = {"config.yaml", "metrics.csv", "summary.json", "samples.jsonl", "report.html", "checkpoints", "model"}


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_time(table: list[dict[str, str]]) -> list[dict[str, str]]:
    timed = ("time/", "rollout/tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in table]


def real(*command: str, cwd: Path, **changes) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=300
    )


# ---- the console script ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands(arguments):
    result = run_here(*arguments)
    assert result.code == 0
    for command in ("train", "pipeline", "eval", "report", "sample", "estimate", "export", "fetch"):
        assert f"\n  {command} " in result.out


def test_help_is_quick_and_imports_nothing_heavy(tmp_path):
    start = time.perf_counter()
    code = "import sys; sys.argv = ['lit-rlhf', '--help']; from lit_rlhf.cli import main; main()"
    done = real("-c", f"{code}; print(sorted({{m.split('.')[0] for m in sys.modules}}))", cwd=tmp_path)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1]
    assert "'lit_rlhf'" in loaded
    for heavy in ("torch", "transformers", "lightning", "hydra", "wandb"):
        assert f"'{heavy}'" not in loaded
    assert seconds < 1


def test_version():
    result = run_here("--version")
    assert (result.code, result.out) == (0, f"{lit_rlhf.__version__}\n")


def test_an_unknown_command_is_named_and_the_known_ones_are_listed():
    result = run_here("trian")
    assert result.code != 0
    assert "there is no command 'trian'" in result.err
    assert "pipeline" in result.err


@pytest.mark.parametrize("command", ["train", "pipeline", "eval", "sample", "estimate"])
def test_help_of_a_command_shows_its_config(command, folder):
    result = run_here(command, "--help")
    assert result.code == 0
    assert "task_name:" in result.out


@pytest.mark.parametrize("command", ["report", "fetch"])
def test_help_of_a_plain_command_shows_its_usage(command):
    result = run_here(command, "--help")
    assert result.code == 0
    assert result.out.startswith(f"usage: lit-rlhf {command}")


# ---- train: PPO -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ppo(tmp_path_factory) -> Path:
    """The folder in which `python -m lit_rlhf train` ran PPO in a process of its own."""
    cwd = tmp_path_factory.mktemp("ppo")
    done = real("-m", "lit_rlhf", "train", *PPO, "logger=csv_wandb", "paths.output_dir=run", cwd=cwd)
    assert done.returncode == 0, done.stderr
    (cwd / "stdout").write_text(done.stdout)
    return cwd


def test_a_run_folder_holds_what_the_design_says(ppo):
    run = ppo / "run"
    assert {*FILES, "wandb"} == {path.name for path in run.iterdir()}
    assert (run / "checkpoints" / "last.ckpt").is_file()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert "${" not in (run / "config.yaml").read_text()
    assert (config["seed"], config["kl"]["coef"]) == (0, 0.05)
    assert config["logger"]["csv"]["save_dir"] == "run"
    table = rows(run)
    assert [row["iteration"] for row in table] == ["0", "1", "2"]
    assert [row["episode"] for row in table] == ["0", "4", "8"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["objective/kl"] == float(table[-1]["objective/kl"])
    assert summary["best/objective/scores"] == max(float(row["objective/scores"]) for row in table[1:])
    assert all(not isinstance(value, dict | list) for value in summary.values())


def test_the_samples_of_a_run_have_the_keys_of_the_design(ppo):
    samples = [json.loads(line) for line in (ppo / "run" / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        assert {"iteration", "prompt", "completion", "score", "components", "kl", "length"} <= set(sample)
    assert {sample["prompt"] for sample in samples} == {"A film that", "The plot"}
    assert {sample["split"] for sample in samples} == {"train", "validation"}


def test_the_model_of_a_run_loads_as_any_hugging_face_model(ppo):
    model = AutoModelForCausalLM.from_pretrained(ppo / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(ppo / "run" / "model")
    assert list((ppo / "run" / "model").glob("*.safetensors"))
    ids = tokenizer("A film", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(input_ids=ids).logits.shape == (1, 6, len(tokenizer))


def test_the_report_of_a_run_is_one_file(ppo):
    page = (ppo / "run" / "report.html").read_text()
    assert "data:image" in page or "<svg" in page
    assert "src=\"http" not in page


def test_a_run_prints_its_config_and_progress(ppo):
    out = (ppo / "stdout").read_text()
    assert "max_new_tokens: 4" in out
    assert "iteration 2/2" in out


def test_the_module_does_what_the_command_does(ppo, monkeypatch):
    monkeypatch.chdir(ppo)
    assert run_here(*PPO, "paths.output_dir=again", module="lit_rlhf.train").code == 0
    assert without_time(rows(ppo / "again")) == without_time(rows(ppo / "run"))


def test_a_run_without_a_named_folder_goes_to_outputs(folder):
    assert run_here("train", *TINY, "callbacks=samples").code == 0
    (run,) = (folder / "outputs" / "ppo").iterdir()
    assert (run / "summary.json").is_file()


# ---- the other commands on that run ---------------------------------------------------------------------------------


def test_eval_measures_a_run_on_its_held_out_prompts(ppo, monkeypatch):
    monkeypatch.chdir(ppo)
    result = run_here("eval", "run=run", "paths.output_dir=evaluation", "+overrides.sampler.max_new_tokens=5")
    assert result.code == 0, result.err
    evaluation = json.loads((ppo / "evaluation" / "evaluation.json").read_text())
    length = evaluation["policies"]["policy"]["1"]["rollout/response_length"]
    assert length == {"value": 5, "low": 5, "high": 5}  # a random model of 259 tokens hardly ever ends by itself
    samples = (ppo / "evaluation" / "samples.jsonl").read_text().splitlines()
    assert [(row["policy"], row["prompt"]) for row in map(json.loads, samples)] == [
        (policy, prompt) for policy in ("policy", "reference") for prompt in ("A film that", "The plot")
    ]


def test_eval_of_a_run_equals_its_last_validation(ppo, monkeypatch):
    monkeypatch.chdir(ppo)
    assert run_here("eval", "run=run", "paths.output_dir=same").code == 0
    found = json.loads((ppo / "same" / "evaluation.json").read_text())["policies"]["policy"]["1"]
    last = rows(ppo / "run")[-1]
    for name in ("objective/scores", "rollout/response_length", "objective/kl"):
        assert found[name]["value"] == pytest.approx(float(last[f"val/{name}"]), abs=1e-6)
    assert found["rollout/eos_rate"] == float(last["val/rollout/eos_rate"])


def test_eval_of_no_run_says_so(folder):
    result = run_here("eval", "run=nowhere")
    assert result.code == 1
    assert "run=nowhere is no run folder" in result.err
    assert "Traceback" not in result.err


def test_report_writes_the_page_again(ppo):
    (ppo / "run" / "report.html").unlink()
    result = run_here("report", ppo / "run")
    assert result.code == 0, result.err
    assert result.out.strip() == str(ppo / "run" / "report.html")
    assert (ppo / "run" / "report.html").is_file()


@pytest.mark.parametrize("arguments", [[], ["nowhere"]])
def test_report_of_nothing_says_so(arguments, folder):
    result = run_here("report", *arguments)
    assert result.code == 1
    assert "lit-rlhf report FOLDER" in result.err or "nowhere" in result.err
    assert "Traceback" not in result.err


def test_sample_shows_policies_side_by_side(ppo, tiny_models, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    policies = f"policies=[{ppo / 'run' / 'model'},{tiny_models['policy']}]"
    result = run_here("sample", policies, "prompts=[A film that]", "sampler.max_new_tokens=4")
    assert result.code == 0, result.err
    assert "A film that" in result.out
    assert result.out.count("┃") >= 4  # three columns
    again = run_here("sample", policies, "prompts=[A film that]", "sampler.max_new_tokens=4")
    assert again.out == result.out


def test_fetch_refuses_what_it_does_not_know():
    for arguments, message in ((["gpt5"], "nothing to fetch is called 'gpt5'"), (["--foce"], "no option --foce")):
        result = run_here("fetch", *arguments)
        assert result.code == 1
        assert message in result.err
        assert "smollm2" in result.err
        assert "Traceback" not in result.err


def test_fetch_without_a_network_says_where_the_file_can_be_put(tmp_path, monkeypatch):
    for name, value in {
        "LIT_RLHF_CACHE": tmp_path, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": tmp_path
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    result = run_here("fetch", "human_ratings")
    assert result.code == 1
    assert str(tmp_path / "downloads" / "vaderSentiment-3.3.2.tar.gz") in result.err
    assert "Traceback" not in result.err


def test_fetch_prints_where_things_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RLHF_CACHE", str(tmp_path))
    write_ratings(tmp_path)
    (tmp_path / "human_ratings" / "source.json").write_text("{}")
    result = run_here("fetch", "human_ratings")
    assert (result.code, result.out) == (0, f"human_ratings: {tmp_path / 'human_ratings'}\n")


# ---- train: the other algorithms ------------------------------------------------------------------------------------


def test_train_sft(folder, tiny_models, monkeypatch):
    monkeypatch.setenv("LIT_RLHF_CACHE", str(folder / "cache"))
    write_ratings(folder / "cache")
    result = run_here(
        "train", "algorithm=sft", f"policy.path={tiny_models['policy']}", "algorithm.log_every_n_steps=1",
        "data.batch_size=8", "trainer.max_steps=3", "trainer.limit_val_batches=1", "trainer.precision=32-true",
        "logger=csv", "paths.output_dir=run",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert FILES - {"samples.jsonl"} == {path.name for path in (folder / "run").iterdir()}
    table = rows(folder / "run")
    assert table[-1]["iteration"] == "3"
    assert float(table[-1]["sft/perplexity"]) > 1
    AutoModelForCausalLM.from_pretrained(folder / "run" / "model")


def test_train_reward_model(folder, tiny_models, monkeypatch):
    monkeypatch.setenv("LIT_RLHF_CACHE", str(folder / "cache"))
    write_ratings(folder / "cache")
    result = run_here(
        "train", "algorithm=reward_model", f"algorithm.model_path={tiny_models['encoder']}", "data.batch_size=8",
        "algorithm.max_length=48", "data.eval_pairs=8", "trainer.precision=32-true", "logger=csv",
        "paths.output_dir=run",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert FILES - {"samples.jsonl"} == {path.name for path in (folder / "run").iterdir()}
    assert 0 <= float(rows(folder / "run")[-1]["val/reward_model/accuracy"]) <= 1
    model = AutoModelForSequenceClassification.from_pretrained(folder / "run" / "model")
    assert model.config.num_labels == 1


# ---- the package ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lit_rlhf.__all__)
def test_every_public_name_resolves(name):
    found = getattr(lit_rlhf, name)
    assert found.__name__ == name
    assert found.__module__.startswith("lit_rlhf.")
    assert name in dir(lit_rlhf)


def test_the_public_list_holds_what_the_configs_of_our_own_name():
    """Whatever a config instantiates, a script can import by one name."""
    named = set()
    for path in CONFIG_DIR.glob("**/*.yaml"):
        for line in path.read_text().splitlines():
            if line.strip().startswith("_target_: lit_rlhf."):
                dotted = line.split("lit_rlhf.")[1].split()[0].split(".")
                named.add(dotted[1])
    assert named <= set(lit_rlhf.__all__)
    for module in ("rewards", "data", "algorithms", "callbacks"):
        exported = set(import_module(f"lit_rlhf.{module}").__all__) - {"HumanRatings", "RatedSnippet"}
        assert exported <= set(lit_rlhf.__all__)


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'GPO'"):
        _ = lit_rlhf.GPO


# ---- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "lit_rlhf", folder / "lit_rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", folder / "conf")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    done = real("-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_carries_the_configs_and_the_template(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"lit_rlhf/conf/{p.relative_to(CONFIG_DIR).as_posix()}" for p in CONFIG_DIR.glob("**/*.yaml")}
    assert len(configs) > 40
    assert configs <= names
    assert "lit_rlhf/report.html.jinja" in names
    assert not [name for name in names if name.startswith(("tests/", "conf/"))]
    entry = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "lit-rlhf = lit_rlhf.cli:main" in entry
    assert f"lit_rlhf-{lit_rlhf.__version__}-" in wheel.name


def test_an_installed_wheel_runs_from_any_folder(wheel, tmp_path):
    """As `pip install` lays it out: its configs are found, and those of a --config-dir of the user's as well."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)  # a pure wheel: installing is unpacking
    (elsewhere / "mine" / "reward").mkdir(parents=True)
    (elsewhere / "mine" / "reward" / "brief.yaml").write_text("_target_: lit_rlhf.rewards.LengthReward\ntarget: 2\n")
    arguments = ["--config-dir=mine", *TINY, "paths.output_dir=run", "reward=brief"]
    done = real("-m", "lit_rlhf", "train", *arguments, cwd=elsewhere, PYTHONPATH=site)
    assert done.returncode == 0, done.stderr
    assert "reward/length" in rows(elsewhere / "run")[-1]
    where = real("-c", "import lit_rlhf; print(lit_rlhf.__file__)", cwd=elsewhere, PYTHONPATH=site)
    assert where.stdout.startswith(str(site))
