"""Stages in a row: what is skipped, what continues, what is refused, what is passed on."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_line import Result, environment, run_here, write_module, write_ratings
from hydra.core.override_parser.overrides_parser import OverridesParser
from wandb_file import runs

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.overoptimisation import read_best_of_n, read_sweep
from lit_rlhf.pipeline import configure, to_overrides
from lit_rlhf.train import check

REWARD = '''
import os, signal
import lightning as L
from torch.utils.data import DataLoader
calls = 0

def letters(prompts, completions, **columns):
    """Kills its process, as a power cut would, in the call that KILL_AT names."""
    global calls
    calls += 1
    if calls == int(os.environ.get("KILL_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(ord(c) % 7 for c in text) / 10 for text in completions]

class Counts:
    def __init__(self, letter):
        self.letter = letter

    def __call__(self, prompts, completions, **columns):
        return [float(text.count(self.letter)) for text in completions]

class Openings(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"prompt": "Once"}] * 4, batch_size=2)
'''

#: A pipeline of the user's own: its configs lie in a folder of theirs.
OWN = {
    "experiment/own": """
# @package _global_
# lit-rlhf pipeline --config-dir=conf experiment=own
task_name: own
data:
  limit: 40
  domain: nyt
stages:
  warm:
    - experiment=own/warm
    - data.limit=${data.limit}
    - data.domain=${data.domain}
  tune:
    - experiment=own/tune
    - policy.path=${paths.output_dir}/warm/model
""",
    "experiment/own/warm": """
# @package _global_
defaults:
  - override /algorithm: sft
  - override /policy: tiny
  - override /trainer: brief
policy:
  hidden_size: 16
  intermediate_size: 16
data:
  batch_size: 8
""",
    "experiment/own/tune": """
# @package _global_
defaults:
  - override /policy: pretrained
  - override /data: list
  - override /reward: function
  - override /trainer: brief
reward:
  function: own_rewards.letters
data:
  prompts: [A film that, The plot, One more]
  batch_size: 2
sampler:
  max_new_tokens: 4
algorithm:
  rollout_batch_size: 4
  minibatch_size: 2
optimizer:
  lr: 1.0e-2
trainer:
  max_steps: -1
  max_epochs: 4
""",
    "experiment/one": """
# @package _global_
task_name: one
stages:
  ppo:
    - experiment=own/tune
    - policy=tiny
    - policy.hidden_size=16
    - policy.intermediate_size=16
    - trainer.max_epochs=1
""",
    "trainer/brief": """
defaults:
  - default
precision: 32-true
accelerator: cpu
max_steps: 2
limit_val_batches: 0
""",
}


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """The working directory of a user with configs and a reward of their own."""
    for name, text in OWN.items():
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    write_module(tmp_path, "own_rewards", REWARD)
    write_ratings(tmp_path / "cache")
    monkeypatch.setenv("LIT_RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("own_rewards", None)
    return tmp_path


def pipeline(*overrides: str, flags: tuple[str, ...] = ()) -> Result:
    return run_here("pipeline", "--config-dir=conf", *flags, *overrides)


def table(run: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that tell the time."""
    with open(run / "metrics.csv", newline="") as file:
        timed = ("time/", "rollout/tokens_per_second")
        return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in csv.DictReader(file)]


def config(run: Path) -> dict:
    return yaml.safe_load((run / "config.yaml").read_text())


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# ---- the main job, tiny ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def human_ratings(tmp_path_factory, tiny_models):
    """`experiment=tweets`, human_ratings on tweets, with random models: the folder, and how to run it again."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_ratings(folder / "cache", 300)
    stages = ("sft", "reward_model", "ppo")
    overrides = [
        f"paths.output_dir={folder / 'run'}", "seed=5", "tags=[a b,c]",
        f"sft.policy.path={tiny_models['policy']}", "sft.trainer.max_steps=2", "sft.data.batch_size=4",
        "sft.algorithm.log_every_n_steps=1", f"reward_model.algorithm.model_path={tiny_models['encoder']}",
        "reward_model.algorithm.max_length=48", "reward_model.data.pairs_per_epoch=16",
        "reward_model.data.eval_pairs=8",
        "ppo.trainer.max_epochs=2", "ppo.algorithm.rollout_batch_size=4", "ppo.algorithm.minibatch_size=2",
        "ppo.data.eval_prompts=4", "ppo.sampler.max_new_tokens=6", "ppo.kl.coef=0.125",
        "ppo.sampler.stop_tokens=[250,251]", *(f"{stage}.trainer.precision=32-true" for stage in stages),
        *(f"{stage}.trainer.accelerator=cpu" for stage in stages), *(f"{stage}.logger=csv" for stage in stages),
    ]  # fmt: skip

    def run(*more: str) -> Result:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LIT_RLHF_CACHE", str(folder / "cache"))
            patch.chdir(folder)
            return run_here("pipeline", "experiment=tweets", *overrides, *more)

    result = run()
    assert result.code == 0, result.err
    return folder / "run", run, result


def test_every_stage_is_a_run_and_one_report_is_over_all(human_ratings):
    folder, _, result = human_ratings
    for name in ("sft", "reward_model", "ppo"):
        assert json.loads((folder / name / "summary.json").read_text())["status"] == "completed"
        assert (folder / name / "checkpoints" / "last.ckpt").is_file()
        assert (folder / name / "model" / "config.json").is_file()
    page = (folder / "report.html").read_text()
    assert page.count("<h2") >= 3
    assert "[3/3] ppo" in result.out


def test_the_seed_the_domain_and_the_tags_reach_every_stage(human_ratings):
    folder, _, _ = human_ratings
    for name in ("sft", "reward_model", "ppo"):
        assert config(folder / name)["seed"] == 5
        assert config(folder / name)["data"]["domain"] == "tweets"
        assert config(folder / name)["tags"] == ["a b", "c"]


def test_a_stages_own_overrides_reach_it_alone(human_ratings):
    folder, _, _ = human_ratings
    assert config(folder / "ppo")["kl"]["coef"] == 0.125
    assert config(folder / "ppo")["sampler"]["stop_tokens"] == [250, 251]
    assert config(folder / "ppo")["trainer"]["max_epochs"] == 2
    assert config(folder / "reward_model")["trainer"]["max_epochs"] == 1


def test_a_later_stage_takes_the_models_of_the_ones_before(human_ratings):
    folder, _, _ = human_ratings
    assert config(folder / "ppo")["policy"]["path"] == str(folder / "sft" / "model")
    assert config(folder / "ppo")["reward"]["path"] == str(folder / "reward_model" / "model")


def test_an_over_optimisation_sweep_gives_a_curve_for_every_proxy(human_ratings, tiny_models, tmp_path, monkeypatch):
    folder, _, _ = human_ratings
    monkeypatch.setenv("LIT_RLHF_CACHE", str(folder.parent / "cache"))
    stages = [f"{stage}.{o}" for stage in ("proxy", "ppo") for o in ("trainer.accelerator=cpu", "logger=csv")]
    result = run_here(
        "pipeline", "-m", "experiment=overoptimisation_sweep", f"hydra.sweep.dir={tmp_path}", f"data.shared={folder}",
        f"ppo.gold.path={folder}/reward_model/model", "data.comparisons=4,8", *stages,
        f"proxy.algorithm.model_path={tiny_models['encoder']}", "proxy.data.batch_size=2",
        "proxy.algorithm.max_length=48", "ppo.trainer.max_epochs=3", "ppo.algorithm.rollout_batch_size=4",
        "ppo.algorithm.minibatch_size=2",
        "ppo.data.eval_prompts=2", "ppo.sampler.max_new_tokens=4", "ppo.trainer.precision=32-true",
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = read_sweep(tmp_path)
    assert [(row["comparisons"], row["iteration"]) for row in rows] == [(n, i) for n in (4, 8) for i in (1, 2, 3)]
    assert {(row["kl_coef"], row["seed"]) for row in rows} == {(0.0, 0)}
    assert all(abs(row["kl"]) < 1e-3 for row in rows if row["iteration"] == 1)  # the policy is still the first one
    assert all(row["proxy"] != row["gold"] for row in rows)
    for job in ("0", "1"):
        where = [f"run={tmp_path / job / 'ppo'}", f"paths.output_dir={tmp_path / job / 'best_of_n'}"]
        result = run_here("eval", *where, "checkpoint=null", "samples_per_prompt=3")
        assert result.code == 0, result.err
    best = read_best_of_n(tmp_path)  # two prompts, each a part of its own
    assert [(r["comparisons"], r["n"], r["part"]) for r in best] == list(itertools.product((4, 8), (1, 2, 3), (0, 1)))
    for proxy in (4, 8):
        scores = [row["proxy"] for row in best if row["comparisons"] == proxy and row["part"] == 0]
        assert scores == sorted(scores)


def test_complete_stages_are_skipped(human_ratings):
    folder, run, _ = human_ratings
    before = {name: times(folder / name) for name in ("sft", "reward_model", "ppo")}
    result = run()
    assert result.code == 0, result.err
    assert result.out.count("is complete") == 3
    assert {name: times(folder / name) for name in before} == before


def test_a_complete_stage_of_another_configuration_is_refused_and_kept(human_ratings):
    folder, run, _ = human_ratings
    before = times(folder)
    result = run("ppo.kl.coef=0.5", "sft.optimizer.lr=0.5")
    assert result.code == 1
    assert "optimizer.lr: 0.0005 -> 0.5" in result.err
    assert "Remove that folder" in result.err
    assert "Traceback" not in result.err
    assert times(folder) == before
    result = run("ppo.kl.coef=0.5")
    assert "kl.coef: 0.125 -> 0.5" in result.err
    assert times(folder) == before


def test_a_stage_under_which_another_model_was_put_is_refused(human_ratings):
    folder, run, _ = human_ratings
    weights = folder / "reward_model" / "model" / "model.safetensors"
    before = weights.read_bytes()
    assert run().code == 0
    try:
        weights.write_bytes(before + b" ")
        result = run()
        assert result.code == 1
        assert "was made from another 'reward_model'" in result.err
    finally:
        weights.write_bytes(before)


# ---- an interruption ------------------------------------------------------------------------------------------------


def test_a_killed_pipeline_continues_as_if_nothing_had_happened(own):
    command = ["pipeline", "--config-dir=conf", "experiment=own", "warm.logger=csv", "tune.logger=csv"]
    killed = subprocess.run(
        [sys.executable, "-m", "lit_rlhf", *command, "paths.output_dir=cut"],
        env={**environment(KILL_AT=3), "PYTHONPATH": os.pathsep.join([environment()["PYTHONPATH"], str(own)])},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [row["iteration"] for row in table(own / "cut" / "tune")] == ["1", "2"]
    assert json.loads((own / "cut" / "tune" / "summary.json").read_text())["status"] == "running"
    assert torch.load(own / "cut" / "tune" / "checkpoints" / "last.ckpt")["lit_rlhf"]["iteration"] == 2
    warm = times(own / "cut" / "warm")

    result = run_here(*command, "paths.output_dir=cut")
    assert result.code == 0, result.err
    assert sys.modules["own_rewards"].calls == 2  # iterations 3 and 4 alone
    assert times(own / "cut" / "warm") == warm
    assert run_here(*command, "paths.output_dir=whole").code == 0
    for stage in ("warm", "tune"):
        assert table(own / "cut" / stage) == table(own / "whole" / stage)
    assert [row["iteration"] for row in table(own / "whole" / "tune")] == ["1", "2", "3", "4"]
    assert len({row["objective/scores"] for row in table(own / "whole" / "tune")}) == 4  # it does learn something
    samples = [(own / name / "tune" / "samples.jsonl").read_text() for name in ("cut", "whole")]
    assert samples[0] == samples[1]
    weights = [(own / name / "tune" / "model" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


# ---- multirun -------------------------------------------------------------------------------------------------------


def test_a_multirun_gives_every_job_its_folder_and_its_wandb_run(own):
    (own / "sweep").mkdir()
    (own / "sweep" / "wandb").write_text("in the way of the report's run, which must not matter")
    with pytest.warns(UserWarning, match="W&B failed to start"):
        result = pipeline("experiment=one", "ppo.kl.coef=0.01,0.1", "hydra.sweep.dir=sweep", flags=("-m",))
    assert result.code == 0, result.err
    assert (own / "sweep" / "report.html").is_file()
    assert [config(own / "sweep" / job / "ppo")["kl"]["coef"] for job in "01"] == [0.01, 0.1]
    ids = []
    for job, coef in (("0", 0.01), ("1", 0.1)):
        (run,) = runs(own / "sweep" / job / "ppo")
        assert run.config["kl"]["coef"] == coef
        assert run.exit_code == 0
        assert run.run.run_group == "sweep"
        assert run.run.display_name == f"{job} ppo.kl.coef={coef} ppo"
        ids.append(run.run.run_id)
    assert len(set(ids)) == 2


def test_a_single_pipeline_is_one_wandb_group_unless_it_is_told_another(own):
    for override, group in (("task_name=mine", "mine"), ("ppo.logger.wandb.group=theirs", "theirs")):
        assert pipeline("experiment=one", override, f"paths.output_dir={group}").code == 0
        (run,) = runs(own / group / "ppo")
        task = "mine" if group == "mine" else "one"
        assert (run.run.run_group, run.run.display_name) == (group, f"{task}/ppo")


# ---- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        1, 0, -3, 0.1, 1e-5, 3e20, True, False, None, "word", "a b", "it's", 'say "no"', "a,b", "a=b", "1", "1e3",
        "true", "null", "", " ", "[x]", "{a: b}", "C:\\folder\\", "back\\slash 'quoted\\'", "/path/to.file-1", "été",
        "tab\there", [], ["a b", "c,d", "it's"], [1, 2.5, None, "3"], [["nested"], []], {},
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_goes_through_hydras_grammar_unchanged(value):
    (override,) = to_overrides({"some": {"key": value}})
    parsed = OverridesParser.create().parse_override(override)
    assert parsed.key_or_group == "some.key"
    assert parsed.value() == value
    assert type(parsed.value()) is type(value)


def test_strings_with_blanks_commas_and_quotes_reach_the_stage(own):
    prompts = ["it's a film, that", "The 'plot'"]
    quoted = "[\"it's a film, that\",\"The 'plot'\"]"
    result = pipeline(
        "experiment=one", f"ppo.data.prompts={quoted}", "ppo.tags=[a b,'1']", "ppo.critic=separate",
        "ppo.logger=csv", "ppo.seed=7", "paths.output_dir=run",
    )  # fmt: skip
    assert result.code == 0, result.err
    stage = config(own / "run" / "ppo")
    assert stage["data"]["prompts"] == prompts
    assert stage["tags"] == ["a b", "1"]
    assert stage["critic"]["_target_"] == "lit_rlhf.models.SeparateCritic"
    assert stage["seed"] == 7


def test_a_users_own_class_in_a_stage_gets_the_keys_that_they_give_it_alone(own):
    result = pipeline(
        "experiment=own", "tune.reward._target_=own_rewards.Counts", "tune.reward.letter=e",
        "tune.data._target_=own_rewards.Openings", "tune.logger=csv", "warm.logger=csv", "paths.output_dir=run",
        "stages.tune=['experiment=own/tune','policy.path=${paths.output_dir}/warm/model','reward.function=x','data=csv']",
    )  # fmt: skip
    assert result.code == 0, result.err
    stage = config(own / "run" / "tune")
    assert stage["reward"] == {"_target_": "own_rewards.Counts", "letter": "e"}
    assert stage["data"] == {"_target_": "own_rewards.Openings"}
    last = json.loads((own / "run" / "tune" / "samples.jsonl").read_text().splitlines()[-1])
    assert (last["prompt"], last["score"]) == ("Once", last["completion"].count("e"))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("ppo.kl.coeff=0.1", ["coeff"]),
        ("ppo.kl=fixd", ["kl/fixd", "adaptive"]),
        ("pppo.kl.coef=0.1", ["nobody reads", "pppo"]),
        ("data.domian=nyt", ["domian"]),
        ("+data.domian=nyt", ["nobody reads", "data.domian"]),
        ("+paths.where=x", ["nobody reads", "paths.where"]),
        ("sed=1", ["sed"]),
        ("ppo.ckpt_path=x.ckpt", ["ppo.ckpt_path=x.ckpt", "sets this key itself"]),
        ("ppo.paths.output_dir=x", ["ppo.paths.output_dir=x", "sets this key itself"]),
        ("experiment=nothing", ["experiment/nothing"]),
    ],
)
def test_a_key_that_no_stage_reads_is_refused(override, parts, own):
    result = pipeline("experiment=one", override, "paths.output_dir=run")
    assert result.code == 1
    for part in parts:
        assert part in result.err, result.err
    assert "Traceback" not in result.err
    assert not (own / "run" / "ppo").exists()


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("tune.kl.cof=1", "cof"),
        ("tune.kl.coef=-1", "stage tune: kl.coef must be"),
        ("tune.algorithm.minibatch_size=half", "stage tune: algorithm.minibatch_size must be"),
        ("tune.optimizer.betas=[0.9,2]", "stage tune: config key 'optimizer'"),
        ("tune.optimizer.lr=-1", "stage tune: optimizer.lr must be"),
        ("tune.data.prompts=[]", "stage tune: data.prompts must be"),
        ("tune.reward._target_=own_rewards.nothing", "stage tune: reward._target_=own_rewards.nothing: the module"),
        ("+tune.sed=1", "sed"),
    ],
)
def test_a_mistake_in_a_later_stage_is_found_before_the_first_one_trains(override, part, own):
    result = pipeline("experiment=own", override, "paths.output_dir=run")
    assert result.code == 1
    assert part in result.err
    assert not (own / "run" / "warm").exists()


def test_stages_with_default_settings_pass_the_check(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    stages = {"tune": ["policy.path=out/warm/model", "reward=model", "reward.path=out/warm/model"]}
    plain = {"seed": 0, "tags": [], "task_name": "x", "stages": stages, "tune": {"logger": "none"}}
    stage = configure("tune", plain, Path("out").absolute())
    assert stage.trainer.precision == "auto"
    check(stage, unless_from=Path("out").absolute())
    with pytest.raises(UserError, match=r"'reward': there is no model 'out/warm/model'"):
        check(stage, unless_from=Path("elsewhere").absolute())


def test_another_member_takes_the_place_of_what_a_stage_sets_for_its_own(own):
    changed = ["tune.reward=length", "tune.data=list", "tune.data.prompts=[Once]", "tune.kl=linear"]
    result = pipeline("experiment=own", *changed, "tune.logger=csv", "warm.logger=csv", "paths.output_dir=run")
    assert result.code == 0, result.err
    stage = config(own / "run" / "tune")
    assert stage["reward"]["_target_"] == "lit_rlhf.rewards.LengthReward"
    assert stage["kl"]["_target_"] == "lit_rlhf.kl.LinearKL"
    assert stage["policy"]["path"] == "run/warm/model"


def test_a_group_and_a_key_of_it_can_both_be_chosen_for_a_stage(human_ratings, tmp_path):
    _, run, _ = human_ratings
    result = run("ppo.clip=asymmetric", "ppo.clip.low=0", f"paths.output_dir={tmp_path}")
    assert result.code == 1
    assert "clip.low must be a finite number above 0 and below 1, got 0" in result.err
