"""``lit-rlhf eval``: of runs and of models, at several temperatures, against others."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from command_line import TINY, run_here, write_module
from markupsafe import escape
from tiny import tiny_policy

from lit_rlhf.errors import UserError
from lit_rlhf.evaluate import write
from lit_rlhf.evaluation.policies import load_weights
from lit_rlhf.evaluation.summary import verified, win_rates
from lit_rlhf.report import build_report
from lit_rlhf.report_text import number
from lit_rlhf.rewards import CompositeReward, KeywordReward, VerifierReward
from lit_rlhf.train import read_checkpoint

MODULE = """
import itertools, zlib
import lightning as L
from torch.utils.data import DataLoader

class Shuffled(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([{"prompt": text} for text in ("A film", "The plot", "I", "It", "So", "She")], shuffle=True)

    val_dataloader = train_dataloader

class Fresh(Shuffled):
    counter = itertools.count()

    def val_dataloader(self):
        return DataLoader([{"prompt": f"film {next(self.counter)}"}])

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


def test_a_shuffled_loader_gives_all_policies_the_same_prompts_in_every_pass(here, monkeypatch):
    write_module(here, "shuffled", MODULE)
    monkeypatch.syspath_prepend(here)
    evaluation("run=one", "data._target_=shuffled.Shuffled", "samples_per_prompt=2", "temperatures=[0.5,1]")
    rows = [row["prompt"] for row in samples()]
    assert len(set(rows[:6])) == 6
    assert rows == rows[:6] * 8  # two policies, temperatures and samples


def test_data_that_gives_other_prompts_each_time_is_refused(here, monkeypatch):
    write_module(here, "shuffled", MODULE)
    monkeypatch.syspath_prepend(here)
    result = run_here("eval", "run=one", "data._target_=shuffled.Fresh", "paths.output_dir=fresh")
    assert result.code == 1
    assert "the held-out prompts are not the same each time" in result.err


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


def test_the_page_shows_each_prompt_once_with_its_first_completion(here):
    evaluation("run=one", "against=[two]", "samples_per_prompt=3")
    page = Path("out/report.html").read_text()
    table = page[page.index("The same prompts, side by side") :].partition("</table>")[0]
    first = [row["completion"] for row in samples() if row["policy"] == "two"][:2]
    assert table.count("<tr>") == 1 + 2  # a head, and two prompts
    assert all(escape(text.removeprefix(" ")) in table for text in first)


def test_a_single_prompt_has_values_and_no_intervals(here):
    found, out = evaluation("run=one", "against=[two]", "+overrides.data.prompts=[A film that]")
    assert found["prompts"] == 1
    [row, *_] = samples()
    assert found["policies"]["policy"]["1"]["objective/scores"] == {"value": row["score"], "low": None, "high": None}
    assert found["win_rates"]["two"]["1"]["score"]["plain"]["low"] is None
    scores = next(line for line in out.splitlines() if "objective/scores" in line)
    assert f"{row['score']:.3f}" in scores
    assert "±" not in scores
    assert " % (" not in Path("out/report.html").read_text()  # beside a win rate


@pytest.fixture(scope="module")
def classifier(runs):
    """The folder of a run of a reward model, which is made of a causal language model."""
    rows = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]
    (runs / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["data=jsonl", "data.path=pairs.jsonl", "data.prompt_column=null", "trainer.max_epochs=1", "logger=csv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runs)
        model = ["algorithm=reward_model", "algorithm.model_path=one/model", "algorithm.max_length=32"]
        result = run_here("train", *model, *settings, "paths.output_dir=scorer")
    assert result.code == 0, result.err


@pytest.mark.usefixtures("classifier")
@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("sample", ["policies=[scorer]", "prompts=[a]"], "scorer/model is a LlamaForSequenceClassification"),
        ("eval", ["run=one", "against=[scorer]"], "scorer is a LlamaForSequenceClassification"),
        ("eval", ["policy=scorer/model", "data=list", "data.prompts=[a]", "reward=length", "sampler=default"],
         "scorer/model is a LlamaForSequenceClassification, such as a reward model, and writes nothing"),
        ("eval", ["policy=scorer", "data=list", "data.prompts=[a]", "reward=length"],
         "run=scorer is of a reward model"),
    ],
)  # fmt: skip
def test_a_reward_model_is_no_policy(command, arguments, message, here):
    """Transformers would load its trunk with a random head."""
    result = run_here(command, *arguments, "paths.output_dir=refused")
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policy=tiny", "reward=vader"], "there is no data"),
        ([], "there is no policy"),
        (["run=one", "samples_per_prompt=0"], "samples_per_prompt"),
        (["run=one", "temperatures=[-1]"], "temperatures"),
        (["run=one", "temperatures=1"], "temperatures=1 must be a list"),
        (["run=one", "against=[reference]"], "names reference twice"),
        (["run=one", "against=[nowhere]"], "against=nowhere"),
        (["run=one", "against=[nowhere.ckpt]"], "against=nowhere.ckpt: there is no such checkpoint"),
        (["run=one", "checkpoint=other"], "other.ckpt does not exist"),
        (["run=one", "reference=nowhere"], "reference=nowhere"),
        (["run=one", "checkpoint=null", "reward@judge=vader"], "there are no two policies"),
        (["run=one", "kl.coef=1"], "kl"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(arguments, message, here):
    result = run_here("eval", *arguments, "paths.output_dir=refused")
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_policy_that_is_not_there_is_missed_before_anything_is_measured(here, monkeypatch):
    monkeypatch.setattr("lit_rlhf.evaluation.bench.Bench.measure", None)
    result = run_here("eval", "run=one", "against=[two,nowhere]", "paths.output_dir=refused")
    assert "nowhere" in result.err
    assert "Traceback" not in result.err


def test_a_policy_that_reads_no_chats_is_named(here):
    policy = tiny_policy(max_position_embeddings=512)
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    policy.save(here / "chatty")
    settings = ["data=chats", "reward=length", "sampler=default", "sampler.max_new_tokens=4", "paths.output_dir=no"]
    result = run_here("eval", "policy=./chatty", *settings, "against=[two]")
    assert result.code == 1
    assert "two: the prompts of data are chats, but the tokenizer of policy has no chat template" in result.err


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


# ---- what makes policies comparable ---------------------------------------------------------------------------------

COUNTED = """
class Counted:
    made = 0

    def __init__(self):
        Counted.made += 1
        self.level = 0.0

    def __call__(self, prompts, completions, **columns):
        return [len(text) + self.level for text in completions]

    def learn_from(self, scores):
        self.level += 10.0

    def state_dict(self):
        return {"level": self.level}

    def load_state_dict(self, state):
        self.level = state["level"]

class Other(Counted):
    pass
"""


def test_all_are_scored_by_the_reward_as_the_run_left_it_which_is_made_once(here, monkeypatch):
    write_module(here, "counted", COUNTED)
    monkeypatch.syspath_prepend(here)
    assert run_here("train", *TINY, "reward._target_=counted.Counted", "paths.output_dir=learned").code == 0
    import counted

    counted.Counted.made = 0
    evaluation("run=learned", "against=[two]")
    assert counted.Counted.made == 1
    for row in samples():
        assert row["score"] == pytest.approx(len(row["completion"]) + 10)  # an iteration was learned from
    evaluation("run=learned", "checkpoint=null")
    assert {row["score"] - len(row["completion"]) for row in samples()} == {0}
    evaluation("run=learned", "+overrides.reward={_target_: counted.Other}")  # is not given what that one had learned
    assert {row["score"] - len(row["completion"]) for row in samples()} == {0}
    assert not Path("out/metrics.csv").exists()


def test_intervals_of_win_rates_are_over_prompts_not_completions():
    """Of 20 prompts half are always won: 8 completions of each say no more than one."""
    rows = [[{"prompt": str(p), "completion": "", "score": s * (p % 2), "components": {}, "gold": {}, "length": 1}
             for _ in range(8) for p in range(20)] for s in (1.0, -1.0)]  # fmt: skip
    for row in rows[0]:
        row["score"] = 1.0 if int(row["prompt"]) % 2 else -2.0
    many = win_rates(*rows, samples=8)["score"]["plain"]
    one = win_rates(rows[0][:20], rows[1][:20], samples=1)["score"]["plain"]
    assert many == pytest.approx(one)
    assert many["high"] - many["low"] > 0.3
    assert win_rates(*rows, samples=8)["score"]["length_controlled"]["high"] > 0.65


def test_only_what_verifies_has_a_pass_at_k(here):
    found, _ = evaluation(
        "policy=pretrained", "policy.path=one/model", "data=list", "data.prompts=[d,e]",
        "data.columns={answer: [1, 2]}", "samples_per_prompt=3", "reward=verifier", "reward@gold=keyword",
        "gold.keywords=[zzz]", "sampler=default", "sampler.max_new_tokens=4",
    )  # fmt: skip
    numbers = found["policies"]["policy"]["1"]
    assert numbers["gold/keyword"]["value"] == 0
    assert [name for name in numbers if "pass@" in name] == [f"reward/verifier/pass@{k}" for k in (1, 2, 3)]
    result = run_here("eval", "run=one", "verifiers=[reward/other]", "paths.output_dir=refused")
    assert "there is no component reward/other; they are reward/length" in result.err


def test_verifiers_are_found_within_groups():
    verifier, length = VerifierReward(), KeywordReward(keywords=["a"])
    inner = CompositeReward(rewards={"exact": verifier, "word": length}, weights={"exact": 1, "word": 1})
    outer = CompositeReward(rewards={"inner": inner, "sum": verifier}, weights={"inner": 1, "sum": 1})
    names = verified(outer, "gold")
    assert names == ["gold/inner/exact", "gold/sum"]
    components = outer(["p"], ["1"], answer=[1])
    assert {name.removeprefix("gold/") for name in names} <= set(components)


# ---- what can be named ----------------------------------------------------------------------------------------------


def test_a_policy_is_named_by_a_run_a_checkpoint_or_a_model(here):
    checkpoint = next(Path("one/checkpoints").glob("step=*.ckpt"))
    shutil.copy(checkpoint, "moved.ckpt")
    chosen = ["data=list", "data.prompts=[A film that,The plot]", "reward=length", "sampler=default"]
    chosen.append("sampler.max_new_tokens=4")
    by_run, _ = evaluation("policy=one")
    completions = [row["completion"] for row in samples()]
    assert evaluation(f"policy={checkpoint}")[0]["policies"] == by_run["policies"]
    lone, _ = evaluation("policy=moved.ckpt", *chosen, "reward.target=4", "+overrides.trainer.precision=32-true")
    assert lone["policies"]["policy"]["1"] == by_run["policies"]["policy"]["1"]
    assert evaluation("run=one", "checkpoint=moved.ckpt")[0]["policies"] == by_run["policies"]
    model, _ = evaluation("policy=one/model", *chosen, "against=[moved.ckpt]")
    rows = samples()
    assert [row["completion"] for row in rows if row["policy"] == "policy"] == completions[:2]
    assert [row["completion"] for row in rows if row["policy"] == "moved.ckpt"] == completions[:2]
    assert "objective/kl" not in model["policies"]["policy"]["1"]


def test_the_kl_is_measured_to_the_reference_that_is_named(here):
    to_run, _ = evaluation("run=one", "reference=two")
    to_model, _ = evaluation("run=one", "reference=two/model")
    assert to_run["policies"] == to_model["policies"]
    assert to_run["policies"]["policy"]["1"]["objective/kl"]["value"] != 0
    itself, _ = evaluation("run=one", "reference=one")
    assert itself["policies"]["policy"]["1"]["objective/kl"]["value"] == pytest.approx(0, abs=1e-6)


LONGER = """
def longer(prompts, completions, reference, **columns):
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(completions, reference)]

def letters(prompts, completions, **columns):
    return [len(text) for text in completions]
"""


def test_texts_pairs_and_a_judge_are_measured_in_one_go(here):
    Path("held.txt").write_text("hello there\n\na film\n")
    Path("pairs.jsonl").write_text('{"chosen": "aaaa", "rejected": "a"}\n{"chosen": "b", "rejected": "bbbb"}\n'
                                   '{"chosen": "cc", "rejected": "c"}\n')  # fmt: skip
    write_module(here, "longer", LONGER)
    sys.path.insert(0, str(here))
    try:
        found, out = evaluation(
            "run=one", "text=held.txt", "data@pairs=jsonl", "pairs.path=pairs.jsonl", "pairs.prompt_column=null",
            "reward@judge=function", "judge.function=longer.longer", "reward@gold=function",
            "gold.function=longer.letters",
        )  # fmt: skip
    finally:
        sys.path.remove(str(here))
    assert found["pairs"]["gold/letters"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["pairs"]["gold/letters"]["pairs"] == 3
    texts = found["perplexity"]
    assert list(texts) == ["policy", "reference"]
    assert texts["policy"]["documents"] == 2
    assert texts["policy"]["tokens"] == len("hello there") + len("a film")  # bytes without the first, with the end
    assert texts["policy"]["perplexity"]["value"] != texts["reference"]["perplexity"]["value"]
    rows = samples()
    pairs = list(zip(rows[:2], rows[2:], strict=True))
    lengths = [(len(a["completion"]), len(b["completion"])) for a, b in pairs]
    wins = sum((a > b) + 0.5 * (a == b) for a, b in lengths) / 2
    assert found["win_rates"]["reference"]["1"]["judge"]["plain"]["value"] == wins
    assert "perplexity" in out
    assert "calibration error" in out
    page = Path("out/report.html").read_text()
    assert "Held-out texts" in page
    assert "Rewards on held-out pairs" in page


def test_runs_of_other_stages_are_measured_by_what_they_learned_from(here, tiny_models):
    Path("texts.jsonl").write_text('{"text": "hello there"}\n{"text": "a film"}\n')
    pairs = [{"chosen": "fine thing", "rejected": "dull"}, {"chosen": "fine", "rejected": "dull snippet"}]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    small = ["logger=csv", "trainer.max_epochs=1", "data.val_fraction=0.5", "data.prompt_column=null"]
    tiny = [override for override in TINY if override.startswith("policy")]
    sft = ["train", "algorithm=sft", *tiny, "data=jsonl", "data.path=texts.jsonl", *small, "paths.output_dir=sft"]
    assert run_here(*sft).code == 0
    found, _ = evaluation("run=sft")
    last = json.loads(Path("sft/summary.json").read_text())["val/sft/perplexity"]
    perplexity = found["perplexity"]["policy"]["perplexity"]
    assert perplexity["value"] == pytest.approx(last, rel=0.02)  # in bf16
    assert "policies" not in found
    model = ["train", "algorithm=reward_model", f"algorithm.model_path={tiny_models['encoder']}", "data=jsonl"]
    trained = run_here(*model, "algorithm.max_length=16", "data.path=pairs.jsonl", *small, "paths.output_dir=rm")
    assert trained.code == 0, trained.err
    found, _ = evaluation("run=rm")
    last = json.loads(Path("rm/summary.json").read_text())
    assert found["pairs"]["objective/scores"]["accuracy"]["value"] == last["val/reward_model/accuracy"]
    assert found["pairs"]["objective/scores"]["loss"] == pytest.approx(last["val/reward_model/loss"], rel=0.02)


def test_a_checkpoint_of_another_policy_is_refused(here):
    result = run_here("eval", "run=one", "overrides={seed: 5}", "paths.output_dir=refused")
    assert result.code == 1
    assert "was trained against another reference" in result.err
    checkpoint = Path("one/checkpoints/last.ckpt")
    with pytest.raises(UserError, match="belongs to another policy: 21 trained weights differ"):
        load_weights(tiny_policy(), checkpoint, read_checkpoint(checkpoint))


def test_a_checkpoint_from_elsewhere_runs_no_code(here):
    stored = torch.load("one/checkpoints/last.ckpt", weights_only=True)
    parts = ["data=list", "data.prompts=[a]", "reward=length"]
    copied = {"src": "hostile.ckpt", "dst": "escaped"}  # which Hydra itself would do
    for policy in ({"_target_": "os.mkdir", "path": "escaped"},
                   {**stored["config"]["policy"], "lora": {"_target_": "os.mkdir", "path": "escaped"}},
                   {**stored["config"]["policy"], "lora": {"r": {"_target_": "shutil.copy", **copied}}},
                   {**stored["config"]["policy"], "_args_": [[{"_target_": "shutil.copy", **copied}]]},
                   {"_target_": "lit_rlhf.models.Policy.from_pretrained", "path": "${oc.env:HOME}"},
                   {"_target_": "lit_rlhf.models.Policy.from_pretrained", "path": ".", "trust_remote_code": True},
                   {**stored["config"]["policy"], "trust_remote_code": "${oc.env:HOME}"}):  # fmt: skip
        stored["config"]["policy"] = policy
        torch.save(stored, "hostile.ckpt")
        for command in (["eval", "policy=hostile.ckpt", *parts], ["eval", "run=one", "against=[hostile.ckpt]"],
                        ["sample", "policies=[hostile.ckpt]", "prompts=[a]"]):  # fmt: skip
            result = run_here(*command, "paths.output_dir=refused")
            assert result.code == 1
            assert "which could run anything" in result.err
    assert not Path("escaped").exists()


# ---- its page -------------------------------------------------------------------------------------------------------


def test_the_page_shows_every_policy_and_escapes_what_they_wrote(here):
    found, _ = evaluation("run=one", "against=[two]", "temperatures=[0.5,1]")
    lines = samples()
    lines[0]["completion"] = "<script>alert(1)</script>\u202e"
    Path("out/samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = Path("out/report.html").read_text()
    assert run_here("report", "out").code == 0
    page = Path("out/report.html").read_text()
    assert page != written
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<svg") == 2  # against the start and against the other run
    assert "src=" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    interval = found["policies"]["policy"]["0.5"]["objective/kl"]
    assert f"{number(interval['low'])} to {number(interval['high'])}" in page
    assert "How often the policy is preferred to two" in page


def test_a_damaged_evaluation_is_named(tmp_path):
    (tmp_path / "evaluation.json").write_text("[1]")
    with pytest.raises(UserError, match=r"evaluation\.json is not a JSON object"):
        build_report(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    (tmp_path / "samples.jsonl").write_text('{"policy": "other"}\n')
    with pytest.raises(UserError, match=r"samples\.jsonl, line 1 is not a completion"):
        build_report(tmp_path)


def test_what_was_measured_stays_when_the_judge_fails(here):
    shutil.rmtree("judged", ignore_errors=True)
    judge = ["reward@judge=judge_comparison", "judge.base_url=http://127.0.0.1:9", "judge.model=m", "judge.retries=0"]
    result = run_here("eval", "run=one", *judge, "paths.output_dir=judged")
    assert result.code == 1
    assert "127.0.0.1:9" in result.err
    assert "score" in json.loads(Path("judged/evaluation.json").read_text())["win_rates"]["reference"]["1"]


def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(UserError, match="/proc/evaluated cannot be written: No such file or directory"):
        write(Path("/proc/evaluated"), {}, measured=None)
