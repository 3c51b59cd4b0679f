"""``lit-rlhf export``: folders that transformers and peft load, with a card that says where they come from."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from command_line import TINY, run_here
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, pipeline

import lit_rlhf.export
from lit_rlhf.export import base_of, model_card
from lit_rlhf.report_text import number

LORA = "policy.lora={r: 2, lora_alpha: 4, target_modules: all-linear}"


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_models):
    """A run of all weights, ``whole``, and one with LoRA, ``lora``."""
    folder = tmp_path_factory.mktemp("export")
    own = [override for override in TINY if not override.startswith("policy")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, more in (("whole", []), ("lora", [LORA])):
            policy = ["policy=pretrained", f"policy.path={tiny_models['policy']}", *more]
            learned = ["optimizer.lr=0.1", "reward=function", "reward.function=tiny.letters"]
            result = run_here("train", *own, *policy, *learned, f"paths.output_dir={name}")
            assert result.code == 0, result.err
    return folder


@pytest.fixture(autouse=True)
def _inside(here, monkeypatch):
    monkeypatch.chdir(here)


def exported(*arguments):
    result = run_here("export", *arguments)
    assert result.code == 0, result.err
    return result.out


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 9, 77, 40]])).logits


def test_a_model_answers_in_a_pipeline_and_its_card_says_how_it_was_made():
    exported("run=whole", "output=model", "license=mit")
    answer = pipeline("text-generation", model="model")("A film", max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"].startswith("A film")
    _, head, text = Path("model/README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == ("mit", "transformers", "text-generation")
    assert "ppo" in head["tags"]
    last = json.loads(Path("whole/summary.json").read_text())
    row = next(line for line in text.splitlines() if line.startswith("| `objective/kl` "))
    assert row.endswith(f"| {number(last['val/objective/kl'])} |")
    assert "**Reward**: `" in text
    assert "**KL to the reference**: `" in text
    assert "**Data**: `" in text
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config["kl"]["coef"] == 0.05
    assert str(Path.cwd()) not in text  # nor any folder of the machine
    assert "paths" not in config


def test_an_adapter_alone_is_the_same_model_in_peft():
    exported("run=lora", "output=adapter", "adapter=true")
    weights = sum(file.stat().st_size for file in Path("adapter").glob("*.safetensors"))
    assert weights < 0.5 * Path("lora/model/model.safetensors").stat().st_size
    found = logits(AutoPeftModelForCausalLM.from_pretrained("adapter"))
    merged = logits(AutoModelForCausalLM.from_pretrained("lora/model"))
    assert torch.allclose(found, merged, atol=1e-5)
    base = yaml.safe_load(Path("lora/config.yaml").read_text())["policy"]["path"]
    start = logits(AutoModelForCausalLM.from_pretrained(base))
    assert not torch.allclose(found, start, atol=1e-3)
    assert "library_name: peft" in Path("adapter/README.md").read_text()


def test_an_adapter_alone_is_sampled_and_evaluated_like_the_whole_model():
    exported("run=lora", "output=alone", "adapter=true")
    prompts = ["data=list", "data.prompts=[a,b,c]", "reward=length", "sampler=default", "sampler.max_new_tokens=4"]
    result = run_here("eval", "policy=alone", "against=[lora/model]", *prompts, "paths.output_dir=adapter_evaluated")
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in Path("adapter_evaluated/samples.jsonl").read_text().splitlines()]
    texts = {name: [row["completion"] for row in rows if row["policy"] == name] for name in ("policy", "lora/model")}
    assert texts["policy"] == texts["lora/model"]
    assert len(texts["policy"]) == 3
    asked = ["prompts=[a]", "sampler.max_new_tokens=4", "output=s.jsonl"]
    result = run_here("sample", "policies=[alone,lora/model]", *asked)
    assert result.code == 0, result.err
    completions = json.loads(Path("s.jsonl").read_text())["completions"]
    assert completions["alone"] == completions["lora/model"]


def test_a_checkpoint_is_exported_merged():
    exported("run=lora", "output=of_checkpoint", "checkpoint=last")
    both = [logits(AutoModelForCausalLM.from_pretrained(name)) for name in ("of_checkpoint", "lora/model")]
    assert torch.allclose(*both, atol=1e-5)


def test_an_evaluations_intervals_go_into_the_card():
    assert run_here("eval", "run=whole", "paths.output_dir=evaluated").code == 0
    exported("run=whole", "output=measured", "evaluation=evaluated")
    text = Path("measured/README.md").read_text()
    assert "| metric | policy, temperature 1 | reference, temperature 1 |" in text
    assert " to " in next(line for line in text.splitlines() if line.startswith("| `objective/scores`"))


def test_what_stands_in_a_config_stays_a_config():
    config = {"algorithm": {"_target_": "x.PPO"}, "policy": {}, "data": {"prompts": ["```\n# Not a heading"]}}
    text = model_card(config, [], name="m", base=None, adapter=False, license=None, evaluation={})
    block = text.split("````yaml\n")[1]
    assert yaml.safe_load(block.removesuffix("````\n"))["data"] == config["data"]
    assert "- **Data**: `prompts [" in text
    assert "It was not measured on held-out data." in text


def test_it_is_uploaded_only_when_asked_and_to_the_repository_that_is_named(monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, **settings):
            calls.append((name, settings))
            return f"https://hub/{name}"

        def upload_folder(self, *, folder_path, repo_id, **_):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(lit_rlhf.export, "HfApi", Hub)
    exported("run=whole", "output=kept")
    assert not calls
    assert "https://hub/me/mine" in exported("run=whole", "output=sent", "push_to_hub=me/mine")
    assert calls[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(calls[1][1])


def test_a_hub_that_cannot_be_reached_is_an_error_of_one_line(monkeypatch):
    class ConnectError(Exception):
        """As httpx has it: no OSError."""

    class Hub:
        def create_repo(self, *_, **__):
            raise ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(lit_rlhf.export, "HfApi", Hub)
    result = run_here("export", "run=whole", "output=unsent", "push_to_hub=me/mine")
    assert result.code == 1
    assert "push_to_hub=me/mine: [Errno 111] Connection refused" in result.err
    assert "Traceback" not in result.err


def test_a_card_does_not_say_in_whose_folder_the_base_model_lies():
    config = {"algorithm": {"_target_": "x.PPO"}, "policy": {"path": "/home/someone/work/models/base"}}
    base = config["policy"]["path"]
    text = model_card(config, [], name="m", base=base, adapter=False, license=None, evaluation={})
    assert "someone" not in text
    assert "from `.../work/models/base`" in text


def test_the_base_is_the_model_that_the_first_run_started_from(tmp_path):
    for name, policy in (("sft", "smollm2"), ("ppo", str(tmp_path / "sft" / "model"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"algorithm": {}, "policy": {"path": policy}}))
    config = yaml.safe_load((tmp_path / "ppo" / "config.yaml").read_text())
    assert base_of(config) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_of({"algorithm": {}, "policy": {"hidden_size": 8}}) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere", "output=x"], "run=nowhere is no run folder"),
        (["run=lora", "output=x", "adapter=true", "push_to_hub=me/x"], "which is on this machine alone; push that"),
        (["run=whole", "output=whole"], "output=whole exists"),
        (["run=whole", "output=x", "adapter=true"], "has no adapter"),
        (["run=whole", "output=x", "checkpoint=other"], "other.ckpt does not exist"),
        (["run=whole", "output=x", "evaluation=nowhere"], "evaluation=nowhere"),
        (["run=whole"], "output"),
    ],
)
def test_what_cannot_be_exported_is_refused(arguments, message):
    result = run_here("export", *arguments)
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err
