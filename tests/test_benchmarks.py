"""The benchmark harness on tiny sizes, our side alone: the peers' packages are not part of the project."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.models.download import cache_dir
from tests.benchmarks import __main__ as harness
from tests.benchmarks import floor, host, ours
from tests.benchmarks.contender import Done, Gate
from tests.benchmarks.countdown import countdown_prompts, stop_lengths
from tests.benchmarks.materials import prepare
from tests.benchmarks.settings import Settings
from tests.benchmarks.table import markdown, spread
from tests.benchmarks.works import TRAINING, Plan, Row, Target

TOY = Plan(toy=True, threads=1)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where the tiny model, its reward model and prompts are made, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_RLHF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def replies_of(settings, requests, folder, monkeypatch):
    """What our side replies to ``requests``, in this process."""
    monkeypatch.chdir(folder)
    replies = []
    gate = Gate([{"do": what} for what in requests], replies.append)
    with pytest.raises(Done):
        getattr(ours, settings.work)(settings, prepare(settings), gate)
    assert replies.pop(0) == {"ready": True}
    return replies


def test_our_ppo_does_one_whole_iteration_for_each_request(tmp_path, monkeypatch):
    settings = TOY.sized(replace(TRAINING["W2"], update_memory=True))
    first, second, limit, profiled = replies_of(
        settings, ["iterate", "iterate", "floor", "profile"], tmp_path, monkeypatch
    )
    for reply in (first, second, profiled):
        assert reply["tokens"] == settings.tokens == 4 * 6  # none ended before its full length
        assert 0 < reply["stages"]["time/rollout"] < reply["stages"]["time/iteration"] <= reply["seconds"]
    assert 0 < first["update_peak_gb"] < 16
    assert first["reward_tokens"] > 4 * 8
    assert set(limit["stages"]) == {"rollout", "score", "anchor", "update"}
    assert 0 < limit["seconds"] < second["seconds"]
    assert "aten::mm" in [operator["name"] for operator in profiled["operators"]]


@pytest.mark.parametrize("name", ["W1", "W3", "W5"])
def test_every_other_iteration_of_ours_generates_what_is_asked_for(name, tmp_path, monkeypatch):
    settings = TOY.sized(TRAINING[name])
    reply, limit = replies_of(settings, ["iterate", "floor"], tmp_path, monkeypatch)
    assert reply["tokens"] == settings.tokens
    assert limit["dtype"] == "float32" if name == "W1" else limit["dtype"] in ("float32", "bfloat16")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_rollout_stops_every_completion_at_the_step_its_prompt_says(precision, tmp_path, monkeypatch):
    settings = Settings(
        work="rollout", model="tiny", completions=6, prompt_length=12, response_length=40, precision=precision
    )
    (reply,) = replies_of(settings, ["iterate"], tmp_path, monkeypatch)
    assert reply["exact"]
    assert reply["tokens"] == settings.tokens == sum(stop_lengths(6, 40))


def test_generate_stops_where_our_rollout_does():
    settings = Settings(work="rollout", model="tiny", completions=5, prompt_length=12, response_length=20)
    model = AutoModelForCausalLM.from_pretrained(prepare(settings).model)
    lengths = stop_lengths(5, 20)
    for prompt, length in zip(countdown_prompts(lengths, longest=12, eos=2, vocabulary=4096), lengths, strict=True):
        said = model.generate(input_ids=torch.tensor([prompt]), do_sample=True, top_k=0, max_new_tokens=20)
        assert said[0, len(prompt) :].tolist() == list(range(prompt[-1] - 1, 1, -1))
        assert said.shape[1] - len(prompt) == length


def test_prompts_keep_their_number_of_tokens_as_text():
    settings = TOY.sized(Settings())
    with open(prepare(settings).prompts) as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 64
    assert {len(row["ids"]) for row in rows} == {8}
    assert rows[0]["prompt"].split() == [f"t{i}" for i in rows[0]["ids"]]


def test_the_floor_counts_the_products_of_an_iteration():
    # 2 prompts of 3 tokens, 2 new ones, minibatches of 1, 1 epoch; a layer of 10 weights that trains, a head of 5
    settings = Settings(completions=2, minibatch=1, prompt_length=3, response_length=2, epochs=1)
    weights = {"policy": 10, "trunk": 10, "head": 5, "reward": 10}
    counted = dict.fromkeys(("rollout", "score", "anchor", "update"), 0.0)
    for item in floor.passes(settings, torch.float32, critic=False, reward=True):
        layer = [(torch.zeros(1, weights[item.part]), True)]
        counted[item.stage] += item.times * floor._flop(layer, item.rows, backward=item.backward)
    assert counted == {
        "rollout": 2 * (2 * 3 * 10 + 2 * 5 + 2 * 10 + 2 * 5),
        "score": 2 * 2 * 5 * 10,
        "anchor": 2 * 2 * (2 * 5 * 10 + 2 * 2 * 5),
        "update": 2 * 3 * (2 * 5 * 10 + 2 * 2 * 5),
    }


def test_frozen_weights_cost_one_product_on_the_way_back():
    layer = [(torch.zeros(3, 5), False)]
    assert floor._flop(layer, 7, backward=True) == floor._flop(layer, 7, backward=False) == 2 * 7 * 15


def test_the_gate_times_what_lies_between_two_waits():
    replies = []
    gate = Gate([{"do": "iterate"}, {"do": "limit"}, {"do": "iterate"}], replies.append)
    gate.answers["limit"] = lambda: {"limit": 1}
    gate.wait()
    time.sleep(0.05)
    gate.facts["tokens"] = 3
    gate.wait()
    with pytest.raises(Done):
        gate.wait()
    ready, first, limit, second = replies
    assert (ready, limit) == ({"ready": True}, {"limit": 1})
    assert first["tokens"] == 3
    assert "tokens" not in second
    assert 0.05 <= first["seconds"]
    assert second["seconds"] < first["seconds"]


def test_the_command_writes_table_and_json(tmp_path, capsys):
    harness.main(["W4", "--toy", "--ours-only", "--rounds", "2", "--threads", "1", "--json", str(tmp_path / "b.json")])
    written = json.loads((tmp_path / "b.json").read_text())
    (result,) = written["results"]
    assert len(result["ours"]) == 2
    assert result["memory"][0] > 0.1
    assert written["machine"]["versions"]["torch"] == torch.__version__
    assert f"| {result['work']} " in capsys.readouterr().out
    assert (cache_dir() / "benchmarks" / "tiny_countdown").is_dir()


@pytest.mark.parametrize("reply", [{"tokens": 23}, {"tokens": 24, "exact": False}])
def test_a_side_that_did_other_work_is_refused(reply):
    side = host.Side(program="trl.ppo", settings=TOY.sized(Settings()))
    host.require_same_work(side, {"tokens": 24})
    with pytest.raises(RuntimeError, match=rf"trl\.ppo generated {reply['tokens']} tokens and not 24"):
        host.require_same_work(side, reply)


def test_the_table_shows_medians_quartiles_and_whether_targets_are_met():
    row = Row(work="W", ours=[1.0, 2.0, 3.0], peer=[4.0, 6.0, 5.0], limit=0.5, memory=[1.0, 4.0])
    row.targets = [Target(name="ratio", value=row.ratio, bound=3.0),
                   Target(name="memory", value=0.25, bound=0.45, at_least=False)]  # fmt: skip
    assert row.ratio == 2.5
    assert row.ratios == [4.0, 3.0, pytest.approx(5 / 3)]
    cells = [cell.strip() for cell in markdown([row]).splitlines()[2].strip("|").split("|")]
    assert cells[:6] == ["W", "2.00 s (1.50-2.50)", "5.00 s (4.50-5.50)", "2.50 (2.33-3.50)", "50%", "1.00 / 4.00"]
    assert cells[6] == "ratio 2.50 >= 3: NO; memory 0.25 <= 0.45: yes"
    assert spread([2.0]) == "2.00"


def test_most_completions_are_short_and_some_reach_the_limit():
    lengths = stop_lengths(64)
    assert lengths.count(256) in (3, 4)
    assert sorted(lengths)[32] <= 21
    assert math.isclose(sum(lengths) / 64, 49, abs_tol=6)
