"""``lit-rlhf eval``: of runs and of models, at several temperatures, against others."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import TINY, run_here, write_module

MODULE = """
import zlib

def ends_in_a_vowel(prompts, completions, **columns):
    return [float(bool(text) and text[-1] in "aeiou") for text in completions]

def even(prompts, completions, **columns):
    return [float(zlib.crc32(text.encode()) % 2 == 0) for text in completions]
"""


def evaluation(*arguments):
    result = run_here("eval", *arguments, "paths.output_dir=out")
    assert result.code == 0, result.err
    return json.loads(Path("out/evaluation.json").read_text()), result.out


def samples():
    return [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two tiny runs of different seeds, ``one`` and ``two``."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, seed in (("one", 0), ("two", 1)):
            settings = ["reward=length", "reward.target=4", "optimizer.lr=0.01", f"seed={seed}"]
            assert run_here("train", *TINY, *settings, f"paths.output_dir={name}").code == 0
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


def test_a_run_is_compared_with_its_start_and_with_another_run_on_the_same_prompts(here):
    found, out = evaluation("run=one", "against=[two]", "temperatures=[0.5,1]")
    assert list(found["policies"]) == ["policy", "reference", "two"]
    assert all(list(by_key) == ["0.5", "1"] for by_key in found["policies"].values())
    rows = samples()
    prompts = [row["prompt"] for row in rows if (row["policy"], row["temperature"]) == ("two", 0.5)]
    assert prompts == ["A film that", "The plot"] == [r["prompt"] for r in rows[:2]]
    for name, by_key in found["policies"].items():
        for key, numbers in by_key.items():
            own = [row for row in rows if row["policy"] == name and f"{row['temperature']:g}" == key]
            mean = sum(row["score"] for row in own) / len(own)
            assert numbers["objective/scores"]["value"] == pytest.approx(mean)
            assert ("objective/kl" in numbers) == (name != "reference")  # to which it is measured
    sides = [[r["score"] for r in rows if (r["policy"], r["temperature"]) == (name, 1)] for name in ("policy", "two")]
    pairs = list(zip(*sides, strict=True))
    wins = sum((one > two) + 0.5 * (one == two) for one, two in pairs) / len(pairs)
    assert found["win_rates"]["two"]["1"]["score"]["plain"]["value"] == pytest.approx(wins)
    assert out.count("policy wins by score") == 4  # at each temperature, and at equal length


def test_an_untrained_policy_wins_half_of_the_time_against_itself(here):
    found, _ = evaluation("run=one", "checkpoint=null", "against=[one/model]")
    assert list(found["policies"]) == ["policy", "one/model"]
    assert found["policies"]["policy"]["1"]["objective/kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    found, _ = evaluation("run=one", "against=[one]")
    assert found["win_rates"]["one"]["1"]["score"]["plain"] == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_any_model_is_evaluated_on_chosen_data_and_rewards(here, monkeypatch):
    module = "rewards_of_evaluation"
    write_module(here, module, MODULE)
    monkeypatch.syspath_prepend(here)
    found, _ = evaluation(
        "policy=pretrained", "policy.path=one/model", "data=list", "data.prompts=[d,e,f]",
        "reward=function", f"reward.function={module}.ends_in_a_vowel", "reward@gold=function",
        f"gold.function={module}.even", "sampler=default", "sampler.max_new_tokens=6", "reference=two/model",
        "samples_per_prompt=4", "verifiers=[reward/ends_in_a_vowel]",
    )  # fmt: skip
    assert (found["prompts"], found["samples_per_prompt"]) == (3, 4)
    numbers = found["policies"]["policy"]["1"]
    rows = [row for row in samples() if row["policy"] == "policy"]
    assert [row["prompt"] for row in rows] == ["d", "e", "f"] * 4
    assert len({row["completion"] for row in rows}) > 4  # each time another completion
    right = [[rows[3 * again + prompt]["score"] for again in range(4)] for prompt in range(3)]
    assert numbers["reward/ends_in_a_vowel/pass@1"]["value"] == pytest.approx(sum(map(sum, right)) / 12)
    assert numbers["reward/ends_in_a_vowel/pass@4"]["value"] == pytest.approx(sum(map(max, right)) / 3)
    assert numbers["objective/kl"]["value"] != 0
    assert set(found["win_rates"]["reference"]["1"]) == {"score", "gold/even"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policy=tiny", "reward=vader"], "there is no data"),
        ([], "there is no policy"),
        (["run=one", "samples_per_prompt=0"], "samples_per_prompt"),
        (["run=one", "temperatures=[-1]"], "temperatures"),
        (["run=one", "temperatures=1"], "temperatures=1 must be a list"),
        (["run=one", "against=[reference]"], "names reference twice"),
        (["run=one", "against=[nowhere]"], "nowhere"),
        (["run=one", "checkpoint=other"], "other.ckpt does not exist"),
        (["run=one", "reference=nowhere"], "nowhere"),
        (["run=one", "kl.coef=1"], "kl"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(arguments, message, here):
    result = run_here("eval", *arguments, "paths.output_dir=refused")
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_run_s_own_folder_is_left_alone(here):
    before = Path("one/samples.jsonl").read_bytes(), Path("one/metrics.csv").read_bytes()
    result = run_here("eval", "run=one", "paths.output_dir=one")
    assert result.code == 1
    assert "holds a run" in result.err
    assert (Path("one/samples.jsonl").read_bytes(), Path("one/metrics.csv").read_bytes()) == before


def test_another_policy_is_not_measured_to_itself_and_limits_of_the_run_do_not_count(here):
    shutil.copytree("one", "limited", symlinks=True, dirs_exist_ok=True)
    config = Path("limited/config.yaml")
    config.write_text(config.read_text().replace("limit_val_batches: 1.0", "limit_val_batches: 0"))
    found, _ = evaluation("run=limited", "policy=pretrained", "policy.path=two/model")
    assert "objective/kl" not in found["policies"]["policy"]["1"]
