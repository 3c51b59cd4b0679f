"""Mistakes of a user, through the real entry point: one readable message, no traceback, nothing lost."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command_line import TINY, Result, run_here, write_module
from hydra import compose, initialize_config_dir
from wandb_file import runs

from lit_rlhf.config import CONFIG_DIR
from lit_rlhf.errors import UserError
from lit_rlhf.train import build, train

MODULE = '''
import asyncio, math
import functools
import lightning as L
from torch.utils.data import DataLoader

def one_too_few(prompts, completions, **columns):
    return [0.0] * (len(completions) - 1)

async def one_too_few_later(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [0.0] * (len(completions) - 1)

def not_a_number(prompts, completions, **columns):
    return [0.0, math.nan] + [0.0] * (len(completions) - 2)

async def infinite_later(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [math.inf] * len(completions)

def raises(prompts, completions, **columns):
    return [1 / len(prompts[0][:0])]

def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

async def length_later(prompts, completions, **columns):
    await asyncio.sleep(0)
    return length(prompts, completions)

class Counts:
    def __init__(self, letter):
        self.letter = letter

    def __call__(self, prompts, completions, **columns):
        return [float(text.count(self.letter)) for text in completions]

    @classmethod
    def of_a(cls, letter):
        return cls(letter)

    @staticmethod
    def static(prompts, completions):
        return [1.0] * len(completions)

bound = functools.partial(length)
cached = functools.wraps(length)(lambda **given: length(**given))
instance = Counts("e")
calls = 0

def fails_in_the_second_iteration(prompts, completions, **columns):
    global calls
    calls += 1
    return [float("nan") if calls == 2 else 1.0] * len(completions)

class Questions(L.LightningDataModule):
    """Yields neither prompt nor input_ids."""
    def train_dataloader(self):
        return DataLoader([{"question": "why"}] * 4, batch_size=2)

def make_prompts():
    module = L.LightningDataModule()
    module.train_dataloader = lambda: DataLoader([{"prompt": "A film"}] * 4, batch_size=2)
    return module

class Texts(L.LightningDataModule):
    """Twelve texts, of which the one that `fails_at` names cannot be read once."""
    fails_at = None

    def train_dataloader(self):
        return DataLoader(self, batch_size=2, shuffle=True)

    def __len__(self):
        return 12

    def __getitem__(self, i):
        if Texts.fails_at is not None:
            Texts.fails_at -= 1
            if Texts.fails_at < 0:
                raise OSError("the disk is gone")
        return {"text": f"text number {i}"}

class SingleRows(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"prompt": "A film"}] * 4, batch_size=None)

class NoValidation(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"prompt": "A film"}] * 4, batch_size=2)

    def val_dataloader(self):
        return None

class NoDataModule:
    def train_dataloader(self):
        return DataLoader([{"prompt": "A film"}] * 4, batch_size=2)

class NoLoader(L.LightningDataModule):
    def train_dataloader(self):
        return None

class Nothing(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([], batch_size=2)
'''


@pytest.fixture
def user_module(folder, monkeypatch) -> str:
    """A module of the user's own, on the path."""
    write_module(folder / "own", "user_things", MODULE)
    monkeypatch.syspath_prepend(folder / "own")
    sys.modules.pop("user_things", None)
    yield "user_things"
    sys.modules.pop("user_things", None)


def refused(result: Result, *parts: str) -> None:
    assert result.code == 1
    for part in parts:
        assert part in result.err, result.err
    assert "Traceback" not in result.err


def start(*overrides: str) -> Result:
    return run_here("train", *TINY, "paths.output_dir=run", *overrides)


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sed=3", ["'sed'"]),
        ("kl.coeff=0.1", ["'coeff'", "kl"]),
        ("+sed=3", ["nobody reads", "sed", "seed"]),
        ("+paths.data_dir=here", ["nobody reads", "paths.data_dir", "output_dir"]),
        ("+kl.coeff=0.1", ["'kl'", "coeff"]),
        ("+algorithm.epoch=3", ["'algorithm'", "epoch"]),
        ("+algorithm.scores.factor=2", ["'algorithm'", "factor"]),
        ("+trainer.max_epoch=3", ["'trainer'", "max_epoch"]),
        ("+optimizer.momentum=0.9", ["'optimizer'", "AdamW", "momentum"]),
        ("+scheduler.warmup=3", ["'scheduler'", "warmup"]),
        ("+critic.depth=3", ["'critic'", "ValueHead", "depth"]),
        ("+logger.csv.folder=x", ["'logger.csv'", "folder"]),
        ("+callbacks.samples.every=3", ["'callbacks.samples'", "every"]),
        ("+data.number=3", ["'data'", "number"]),
        ("kl=fixd", ["kl/fixd", "adaptive", "fixed", "none"]),
        ("algorithm=dop", ["algorithm/dop", "ppo"]),
        ("klx=fixed", ["klx"]),
        ("experiment=none_such", ["experiment/none_such"]),
        ("kl.coef=[", ["'['"]),
        ("kl._target_=lit_rlhf.kl.Fixed", ["kl._target_=lit_rlhf.kl.Fixed", "no 'Fixed'"]),
        ("kl.coef=-1", ["kl.coef", "-1"]),
        ("kl.coef=much", ["kl.coef", "much"]),
        ("trainer.devices=0", ["'trainer'", "devices=0"]),
        ("trainer.precision=half", ["trainer.precision must be", "half"]),
        ("optimizer.lr=-1", ["optimizer.lr must be at least 0, got -1"]),
        ("trainer.max_epochs=word", ["trainer.max_epochs must be a whole number or null", "word"]),
        ("trainer.max_epochs=1.5", ["trainer.max_epochs", "1.5"]),
        ("trainer.gradient_clip_val=nan", ["trainer.gradient_clip_val", "nan"]),
        ("sampler.temperature=hot", ["sampler.temperature must be a number", "hot"]),
        ("sampler.stop_tokens=[5,999999]", ["sampler.stop_tokens=[5, 999999]", "259 tokens"]),
        ("policy.num_hidden_layers=-1", ["policy.num_hidden_layers", "at least 1", "-1"]),
        ("paths.output_dir=null", ["paths.output_dir", "None"]),
        ("data._target_=builtins.dict", ["'data'", "dict", "train_dataloader"]),
        ("sampler.stop_tokens=5", ["sampler.stop_tokens must be a list", "5"]),
        ("data.shuffle=maybe", ["data.shuffle must be true or false", "maybe"]),
        ("optimizer.lr=null", ["optimizer.lr must be a number, got", "None"]),
        ("optimizer.betas=0.9", ["optimizer.betas must be a list", "0.9"]),
        ("scheduler.num_warmup_steps=word", ["scheduler.num_warmup_steps must be a whole number or null", "word"]),
        ("trainer.gradient_clip_val=-1", ["trainer.gradient_clip_val must be at least 0, got -1"]),
        ("trainer.check_val_every_n_epoch=0", ["trainer.check_val_every_n_epoch must be at least 1, got 0"]),
        ("data.columns=3", ["data.columns must be a mapping", "3"]),
        ("data.prompts=null", ["data.prompts", "None"]),
        ("reward=null", ["reward=null", "vader"]),
        ("kl=0.1", ["kl=0.1", "adaptive, fixed"]),
        ("~kl", ["~kl", "a run needs its kl", "adaptive, fixed"]),
        ("~reward@gold", ["a run needs its gold", "none"]),
        ("reward=ensemble", ["\nreward.paths has no value"]),
        ("reward@gold=function", ["\ngold.function has no value"]),
        ("reward._target_=math.nope", ["reward._target_=math.nope: the module 'math'", "no 'nope'"]),
        ("reward._target_=no_such.thing", ["reward._target_=no_such.thing: there is no module 'no_such'"]),
        ("ckpt_path=true", ["ckpt_path must be a text", "True"]),
        ("paths.output_dir=/proc/run", ["paths.output_dir=/proc/run cannot be made"]),
        ("seed=true", ["seed must be a whole number", "True"]),
        ("tags=abc", ["tags must be a list", "abc"]),
        ("task_name=null", ["task_name must be a text", "None"]),
        ("optimized_metric=3", ["optimized_metric must be a text", "3"]),
        ("optimizer=null", ["optimizer=null", "adamw"]),
    ],
)  # fmt: skip
def test_a_key_or_member_that_nobody_reads_is_refused(override, parts, folder):
    refused(start(override), *parts)
    assert not (folder / "run" / "config.yaml").exists()


def test_a_part_that_the_algorithm_does_not_read_is_refused(folder, tiny_models):
    sft = ["algorithm=sft", f"policy.path={tiny_models['policy']}", "paths.output_dir=run"]
    refused(run_here("train", *sft, "+kl=fixed"), "'algorithm'", "SFT", "kl")


def test_a_key_that_another_key_refers_to_is_read(folder):
    config = composed("+kl_strength=0.3", "kl.coef=${kl_strength}")
    assert build(config).algorithm.kl.coef == 0.3


def test_a_users_own_class_gets_no_keys_that_an_experiment_gives_to_a_member(user_module, folder):
    own = [f"reward._target_={user_module}.Counts", "reward.letter=e", f"data._target_={user_module}.make_prompts"]
    small = [override for override in TINY if not override.startswith("data")]
    result = run_here("train", "experiment=tiny", *small, *own, "paths.output_dir=run")  # it sets reward.pattern
    assert result.code == 0, result.err
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["reward"] == {"_target_": f"{user_module}.Counts", "letter": "e"}
    assert config["data"] == {"_target_": f"{user_module}.make_prompts"}


def test_a_group_that_needs_no_member_may_be_without_one(folder):
    refused(start("experiment=null", "debug=null", "hparams_search=null", "kl.coef=-1"), "kl.coef")


def test_a_missing_value_names_its_key(folder):
    refused(run_here("train", "policy=tiny", "data=list", "paths.output_dir=run"), "data.prompts")


@pytest.mark.parametrize(
    "override", ["optimizer.lr=fast", "optimizer.betas=[0.9]", "scheduler.name=steep"]
)
def test_a_value_that_the_optimizer_or_the_scheduler_refuses_is_named(override, folder):
    group, *_ = override.replace(".", "=").split("=")
    refused(start(override, "trainer.limit_val_batches=0"), group)


# ---- sizes, prompts, data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["algorithm.minibatch_size=3"], ["rollout_batch_size=4", "minibatch_size=3"]),
        (["trainer.accumulate_grad_batches=4"], ["minibatch_size=2", "accumulate_grad_batches=4"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_any_rollout(overrides, parts, folder):
    refused(start(*overrides), *parts, "not divisible")
    assert not (folder / "run" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("prompts", "parts"),
    [
        ("[]", ["data.prompts", "at least one", "[]"]),
        ("[fine,'']", ["data.prompts[1] is empty"]),
        ("[fine,' ']", ["data.prompts[1] is empty"]),
        ("text", ["data.prompts", "list", "'text'"]),
        (f"[{'x' * 61}]", ["61 tokens", "max_new_tokens=4", "context of 64"]),
    ],
)
def test_a_bad_prompt_is_named(prompts, parts, folder):
    refused(start(f"data.prompts={prompts}"), *parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Questions", ["question", "neither 'prompt' nor 'input_ids'"]),
        ("SingleRows", ["single rows", "batch_size"]),
        ("NoValidation", ["'data'", "val_dataloader", "None"]),
        ("NoDataModule", ["NoDataModule", "not a LightningDataModule"]),
        ("NoLoader", ["NoLoader.train_dataloader() returns None"]),
        ("Nothing", ["yields no batches", "empty"]),
    ],
)
def test_a_datamodule_without_prompts_is_refused(name, parts, user_module, folder):
    plain = [o for o in TINY if not o.startswith("data.")]
    own = f"data={{_target_:{user_module}.{name}}}"
    result = run_here("train", *plain, "~data", f"+{own}", "paths.output_dir=run")
    refused(result, *parts)


# ---- rewards --------------------------------------------------------------------------------------------------------


def reward_of(name: str, module: str) -> list[str]:
    return ["~reward", f"+reward._target_={module}.{name}"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("one_too_few", ["one_too_few", "3 scores", "4 completions"]),
        ("one_too_few_later", ["one_too_few_later", "3 scores", "4 completions"]),
        ("not_a_number", ["not_a_number", "nan", "sample 1"]),
        ("infinite_later", ["infinite_later", "inf", "sample 0"]),
    ],
)
@pytest.mark.parametrize("by", ["_target_", "function"])
def test_a_reward_that_returns_nonsense_is_named(name, parts, by, user_module, folder):
    own = reward_of(name, user_module)
    own = own if by == "_target_" else ["reward=function", f"reward.function={user_module}.{name}"]
    refused(start(*own, "trainer.limit_val_batches=0"), *parts)
    assert json.loads((folder / "run" / "summary.json").read_text())["status"] == "failed"
    assert not (folder / "run" / "model").exists()


@pytest.mark.parametrize("name", ["bound", "cached", "Counts.of_a", "Counts.static", "instance"])
def test_whatever_can_be_called_as_a_reward_is_one(name, user_module, folder):
    letter = ["reward.letter=a"] if name == "Counts.of_a" else []
    result = start(f"reward._target_={user_module}.{name}", *letter, "trainer.limit_val_batches=0")
    assert result.code == 0, result.err


def test_a_key_that_a_function_has_no_argument_for_is_refused_though_it_takes_every_column(user_module, folder):
    refused(start(f"reward._target_={user_module}.length", "reward.modus=1"), "reward.modus", "no argument")


def test_an_async_function_is_a_reward_and_the_longest_prompt_fits(user_module, folder):
    longest = f"data.prompts=[{'x' * 60}]"
    assert start(*reward_of("length_later", user_module), longest, "callbacks=samples").code == 0
    sample = json.loads((folder / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["components"] == {"length_later": float(len(sample["completion"]))}


def test_a_reward_that_raises_shows_its_own_traceback(user_module, folder):
    result = start(*reward_of("raises", user_module), "trainer.limit_val_batches=0")
    assert result.code == 1
    assert "ZeroDivisionError" in result.err
    assert "in raises" in result.err
    assert "'raises' raised this for one of 4 samples, of which the first is sample 0 (prompt '" in result.err
    assert "step=00000000-epoch=0000.ckpt is of this moment" in result.err
    assert json.loads((folder / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_failed_run_keeps_what_it_did_and_is_failed_in_wandb(user_module, folder):
    result = start(
        *reward_of("fails_in_the_second_iteration", user_module), "trainer.max_epochs=3", "logger=csv_wandb",
        "trainer.limit_val_batches=0", "algorithm.max_skipped_steps=1",
    )  # fmt: skip
    refused(result, "fails_in_the_second_iteration", "nan")
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["status"], summary["iteration"]) == ("failed", 1)
    assert len((folder / "run" / "metrics.csv").read_text().splitlines()) == 2
    saved = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["lit_rlhf"]["iteration"] == 1
    (run,) = runs(folder / "run")
    assert run.exit_code not in (0, None)


def test_the_whole_traceback_is_there_for_the_asking(folder, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="rollout_batch_size=4 is not divisible") as caught:
        start("algorithm.minibatch_size=3")
    assert any(entry.name == "exact_div" for entry in caught.traceback)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["reward=composite", "reward.rewards.length.target=-1"], "reward.rewards.length.target"),
        (["reward=constrained", "reward.constraint.n=0"], "reward.constraint.n"),
        (["reward=prefix", "reward.reward.on=both"], "reward.reward.on"),
        (["reward@gold=length", "gold.target=nan"], "gold.target"),
        (["reward@gold=composite", "gold.weights.vader=nan"], "gold.weights.vader"),
        (["reward=constrained", "reward.objective=null"], "reward.objective"),
        (["reward=constrained", "reward.init_multiplier=200"], "reward.init_multiplier"),
        (["reward=ensemble", "reward.paths=word"], "reward.paths"),
        (["reward=ensemble", "reward.paths=[a,b]", "reward.combine=max"], "reward.combine"),
        (["reward=model", "reward.path=null"], "reward.path"),
        (["reward=model", "reward.path=gone"], "reward.path"),
        (["reward=regex", "reward.pattern=3"], "reward.pattern"),
        (["reward=json", "reward.partial=perhaps"], "reward.partial"),
        (["reward=keyword", "reward.keywords=3"], "reward.keywords"),
        (["reward=verifier", "reward.column=null"], "reward.column"),
        (["reward=function", "reward.function=3"], "reward.function"),
        (["reward=composite", "reward.rewards.vader=null"], "reward.rewards.vader"),
        (["reward=composite", "reward.weights.typo=1"], "reward.weights.typo"),
    ],
)  # fmt: skip
def test_a_bad_value_inside_a_reward_or_a_gold_judge_is_named_with_its_full_key(overrides, key, folder):
    config = composed(*(f"+{o}" if "typo" in o else o for o in overrides))
    with pytest.raises(UserError, match=rf"(^|\b){re.escape(key)}\b"):
        build(config)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there_is_named(folder):
    refused(start("ckpt_path=gone.ckpt"), "ckpt_path=gone.ckpt", "no such file")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_no_checkpoint_is_named(content, folder):
    (folder / "bad.ckpt").write_bytes(content)
    refused(start("ckpt_path=bad.ckpt"), "bad.ckpt", "cannot be read as a checkpoint")


def test_a_checkpoint_of_something_else_is_refused(folder):
    torch.save({"weights": torch.zeros(3)}, folder / "other.ckpt")
    refused(start("ckpt_path=other.ckpt"), "other.ckpt", "not written by")


def test_a_checkpoint_that_lacks_what_a_run_needs_to_go_on_is_refused(folder):
    assert start().code == 0
    stored = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    for key in ("optimizer_states", "loops", "config"):
        torch.save({k: v for k, v in stored.items() if k != key}, folder / "part.ckpt")
        refused(start("ckpt_path=part.ckpt", "paths.output_dir=other"), "part.ckpt", f"holds no {key}")


def test_a_checkpoint_of_another_configuration_names_the_keys(folder):
    assert start().code == 0
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()}
    result = start("ckpt_path=auto", "kl.estimator=k2", "algorithm.gamma=0.9", "trainer.max_epochs=2")
    refused(result, "another configuration", "kl.estimator: k1 -> k2", "algorithm.gamma: 1.0 -> 0.9")
    assert "max_epochs:" not in result.err  # more iterations are no other configuration
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()} == before


def test_a_new_run_does_not_overwrite_what_another_one_learned(folder):
    assert start().code == 0
    before = {file: file.read_bytes() for file in Path("run").rglob("*") if file.is_file()}
    refused(start("seed=1"), "holds another run's checkpoints/last.ckpt", "ckpt_path=auto", "paths.output_dir=")
    last = Path("run/checkpoints/last.ckpt")
    link = last.readlink()
    last.unlink()  # as a kill between the two leaves it
    refused(start("seed=1"), "holds another run's checkpoints/step=")
    last.symlink_to(link)
    assert {file: file.read_bytes() for file in before} == before


def test_a_finished_run_continues_to_more_iterations_and_adds_up_its_time(folder):
    assert start().code == 0
    first = json.loads(Path("run/summary.json").read_text())
    assert start("ckpt_path=auto", "trainer.max_epochs=2").code == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["iteration"] == 2
    assert summary["wall_seconds"] > first["wall_seconds"]


def test_continuing_into_a_folder_that_holds_another_run_is_refused(folder):
    assert start().code == 0
    assert start("seed=1", "paths.output_dir=other").code == 0
    before = {file: file.read_bytes() for file in Path("other").rglob("*") if file.is_file()}
    more = ["trainer.max_epochs=2", "ckpt_path=run/checkpoints/last.ckpt"]
    refused(start(*more, "paths.output_dir=other"), "other holds another run's checkpoints/last.ckpt")
    assert {file: file.read_bytes() for file in before} == before
    assert start(*more, "paths.output_dir=new").code == 0


def test_a_run_that_continues_in_another_folder_warns_of_nothing(folder, recwarn):
    assert start("trainer.max_epochs=1").code == 0
    recwarn.clear()
    assert start("trainer.max_epochs=2", "ckpt_path=run/checkpoints/last.ckpt", "paths.output_dir=new").code == 0
    assert [str(warning.message) for warning in recwarn if warning.category is UserWarning] == []


@pytest.mark.parametrize("override", ["logger=none", "debug=fast", "logger=wandb"])
def test_every_run_leaves_its_metrics_and_report_whatever_logs_it(override, folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert start(override).code == 0
    assert Path("run/metrics.csv").is_file()
    assert Path("run/report.html").is_file()


@pytest.mark.parametrize(
    "override", ["+algorithm.seed=5", "+algorithm.kl.coef=5", "+trainer.logger=false", "+trainer.default_root_dir=/x"]
)
def test_a_key_that_another_one_overrides_is_not_read(override, folder):
    refused(start(override), f"nobody reads the config key {'.'.join(override[1:].split('=')[0].split('.')[:2])}")


def test_a_plain_function_is_a_member_of_a_composite_and_a_factory_of_data(user_module, folder):
    result = run_here(
        "train", *(o for o in TINY if not o.startswith("data")), "~data", f"+data._target_={user_module}.make_prompts",
        "reward=composite", f"+reward.rewards.mine._target_={user_module}.length", "+reward.weights.mine=1",
        "paths.output_dir=run",
    )  # fmt: skip
    assert result.code == 0, result.err
    (row, *_) = [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]
    assert row["components"]["mine"] == len(row["completion"])


@pytest.mark.parametrize(
    ("content", "part"),
    [("a: [", "cannot be read"), ("seed: 0", "is not the config of a run: it has no 'algorithm'")],
)
def test_eval_of_a_broken_run_folder_names_the_file(content, part, folder):
    Path("run").mkdir()
    Path("run/config.yaml").write_text(content)
    refused(run_here("eval", "run=run"), str(Path("run/config.yaml")), part)


def test_eval_of_a_broken_checkpoint_names_it(folder):
    assert start().code == 0
    Path("run/checkpoints/last.ckpt").write_text("junk")
    refused(run_here("eval", "run=run", "paths.output_dir=out"), "last.ckpt cannot be read as a checkpoint")


def test_sample_wants_a_list_of_policies_and_prompts_or_a_file_of_them(folder):
    refused(run_here("sample", "policies=z", "prompts=[y]"), "policies=z must be a list")
    refused(run_here("sample", "policies=[x]", "prompts=z"), "prompts: z cannot be read: No such file")


def test_a_run_that_failed_within_an_epoch_of_sft_continues_there(user_module, folder, tiny_models):
    sft = [
        "train", "algorithm=sft", f"policy.path={tiny_models['policy']}", "~data",
        f"+data._target_={user_module}.Texts", "algorithm.log_every_n_steps=1",
        "callbacks.checkpoint.every_n_steps=2", "logger=csv",
        "trainer.precision=32-true", "optimized_metric=null", "ckpt_path=auto",
    ]  # fmt: skip
    texts = importlib.import_module(user_module).Texts
    texts.fails_at = 10  # in the sixth batch
    result = run_here(*sft, "paths.output_dir=cut")
    assert result.code == 1
    assert "the disk is gone" in result.err
    assert torch.load("cut/checkpoints/last.ckpt")["global_step"] == 4
    texts.fails_at = None
    continued, whole = (run_here(*sft, f"paths.output_dir={run}") for run in ("cut", "whole"))
    assert (continued.code, whole.code) == (0, 0)
    assert "step 5/6" in continued.out
    assert "step 4/6" not in continued.out
    assert "step 4/6" in whole.out
    assert Path("cut/metrics.csv").read_text() == Path("whole/metrics.csv").read_text()
    assert Path("cut/model/model.safetensors").read_bytes() == Path("whole/model/model.safetensors").read_bytes()


# ---- what train returns ---------------------------------------------------------------------------------------------


def composed(*overrides: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return compose("train", overrides=[*TINY, "paths.output_dir=run", "callbacks=samples", *overrides])


def test_train_returns_the_optimized_metric(folder):
    value = train(composed("reward=length", "reward.target=1", "optimized_metric=objective/scores"))
    assert value == json.loads(Path("run/summary.json").read_text())["objective/scores"]
    assert value != 0


def test_train_returns_nothing_where_nothing_is_optimized(folder):
    assert train(composed("optimized_metric=null")) is None


def test_an_optimized_metric_that_does_not_exist_is_named_and_the_run_is_kept(folder):
    result = start("optimized_metric=objective/skores")
    assert result.code == 0
    assert "optimized_metric=objective/skores was not logged" in result.out
    assert "objective/scores" in result.out
    assert json.loads(Path("run/summary.json").read_text())["status"] == "completed"
    assert Path("run/model/config.json").is_file()


def test_a_size_of_zero_is_refused_by_name():
    result = run_here("train", *TINY, "algorithm.minibatch_size=0")
    assert result.code == 1
    assert "algorithm.minibatch_size must be a whole number of at least 1, got 0" in result.err
