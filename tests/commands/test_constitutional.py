"""Constitutional AI: what is asked, in which order, of whom; what is kept; and all stages end to end, tiny."""

import json

import pytest
import torch
import yaml
from command_line import run_here
from tiny import tiny_policy

from lit_rlhf.chat import ChatModel
from lit_rlhf.config import CONFIG_DIR
from lit_rlhf.constitutional import ConstitutionalPreferences, ConstitutionalRevisions
from lit_rlhf.data import ListPrompts
from lit_rlhf.errors import UserError

PRINCIPLES = [{"critique": f"Is it c{n}?", "revision": f"Make it r{n}.", "choice": f"Which is o{n}?"} for n in range(3)]
PROMPTS = ["one", "two", "three", "four"]


class Script:
    """Writes a line that says which call it was, and prefers the answer that is longer."""

    def __init__(self, name="script", answers=None):
        self.name, self.answers, self.asked, self.questions = name, answers, [], []

    def settings(self):
        return {"name": self.name}

    def write(self, chats, *, seed, stream):
        self.asked.append(chats)
        call = len(self.asked)
        if self.answers is not None:
            return [self.answers[call - 1]] * len(chats)
        return [f"{self.name} {call}.{n} {'x' * (n * call)}" for n in range(len(chats))]

    def choose(self, chats, options):
        self.questions += [chat[0]["content"] for chat in chats]
        assert options == ("A", "B")
        chances = []
        for chat in chats:
            first, second = (chat[0]["content"].split(f"<answer_{side} ")[1].split("</")[0] for side in "AB")
            chances.append(0.5 + 0.3 * ((len(first) > len(second)) - (len(first) < len(second))) + 0.1)  # A liked more
        return torch.tensor([[p, 1 - p] for p in chances])


def revisions(tmp_path, writer=None, judge=None, **changes):
    settings = {"constitution": {"principles": PRINCIPLES}, "folder": str(tmp_path), "source": source(), **changes}
    return ConstitutionalRevisions(writer=writer or Script("w"), judge=judge or Script("j"), **settings)


def preferences(tmp_path, writer=None, judge=None, **changes):
    settings = {"constitution": {"principles": PRINCIPLES}, "folder": str(tmp_path), "source": source(), **changes}
    return ConstitutionalPreferences(writer=writer or Script("w"), judge=judge or Script("j"), **settings)


def source():
    return ListPrompts(prompts=PROMPTS, batch_size=3)


def made(data):
    data.prepare_data()
    data.setup("fit")
    return [dict(row) for row in data.train_rows]


def test_an_answer_is_criticised_and_revised_by_one_principle(tmp_path):
    writer, judge = Script("w"), Script("j")
    rows = made(revisions(tmp_path, writer, judge))
    assert [row["prompt"] for row in rows] == sorted(PROMPTS)
    first, revised = writer.asked
    (criticised,) = judge.asked
    for n, row in enumerate(rows):
        assert first[n] == [{"role": "user", "content": row["prompt"]}]
        number = next(i for i, p in enumerate(PRINCIPLES) if p["critique"] == row["principles"][0])
        assert [m["role"] for m in criticised[n]] == ["user", "assistant", "user"]
        assert criticised[n][1]["content"] == row["first"] == f"w 1.{n} {'x' * n}"
        assert f"Is it c{number}?" in criticised[n][2]["content"]
        assert revised[n][:3] == criticised[n]
        assert revised[n][3] == {"role": "assistant", "content": row["critiques"][0]}
        assert f"Make it r{number}." in revised[n][4]["content"]
        assert row["completion"] == f"w 2.{n} {'x' * 2 * n}"


def test_a_second_round_revises_the_revision(tmp_path):
    writer, judge = Script("w"), Script("j")
    rows = made(revisions(tmp_path, writer, judge, rounds=2))
    assert judge.asked[1][0][1]["content"] == "w 2.0 "
    assert len(rows[0]["critiques"]) == len(rows[0]["principles"]) == 2
    assert rows[0]["completion"].startswith("w 3.0")


def test_principles_are_drawn_by_the_seed(tmp_path):
    def drawn(seed):
        prompts = [f"{n}" for n in range(30)]
        data = revisions(tmp_path, source=ListPrompts(prompts=prompts, batch_size=8), seed=seed)
        return [row["principles"][0] for row in made(data)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert set(drawn(0)) == {p["critique"] for p in PRINCIPLES}


def test_the_judge_sees_both_orders_and_its_probability_is_averaged(tmp_path):
    """It says .9 for a longer first answer and .3 for a shorter one: (.9 + 1 - .3) / 2 = .8 for the longer."""
    writer, judge = Script("w"), Script("j")
    rows = made(preferences(tmp_path, writer, judge))
    answers = [[f"w {call}.{n} {'x' * (n * call)}" for n in range(4)] for call in (1, 2)]
    for n, row in enumerate(rows):
        assert {row["chosen"], row["rejected"]} == {answers[0][n], answers[1][n]}
        if n:
            assert row["chosen"] == answers[1][n]
            assert row["agreement"] == pytest.approx(0.8)
    assert rows[0]["agreement"] == pytest.approx(0.5)
    assert len(judge.questions) == 8
    assert all(row["principle"] in question for row, question in zip(rows, judge.questions, strict=False))


def test_equal_and_empty_answers_make_no_pair_and_no_revision(tmp_path):
    with pytest.raises(UserError, match=r"4 prompts of data\.source gave 0 rows"):
        made(preferences(tmp_path, Script(answers=["same", " same "])))
    with pytest.raises(UserError, match="gave 0 rows"):
        made(preferences(tmp_path, Script(answers=["one", " "])))
    with pytest.raises(UserError, match="gave 0 rows"):
        made(revisions(tmp_path, Script(answers=["one", ""])))


def test_the_rows_are_made_once_and_anew_for_another_constitution(tmp_path):
    writer = Script("w")
    first = made(revisions(tmp_path, writer))
    assert made(revisions(tmp_path, writer)) == first
    assert len(writer.asked) == 2
    made(revisions(tmp_path, writer, constitution={"principles": PRINCIPLES[:1]}))
    assert len(writer.asked) == 4
    files = sorted(tmp_path.glob("revisions-*.jsonl"))
    assert len(files) == 2


def test_rows_are_held_out_and_batches_hold_the_columns_of_their_algorithms(tmp_path):
    data = preferences(tmp_path, val_count=1, batch_size=3, shuffle=False)
    made(data)
    (batch,) = data.train_dataloader()
    assert {"prompt", "chosen", "rejected", "agreement"} <= set(batch)
    assert [len(rows["prompt"]) for rows in data.val_dataloader()] == [1]


@pytest.mark.parametrize("constitution", [{}, {"principles": []}, {"principles": None}, None, {"principles": "be"}])
def test_a_constitution_without_principles_is_refused_by_its_key(tmp_path, constitution):
    for make in (revisions, preferences):
        with pytest.raises(UserError, match=r"data\.constitution\.principles must be a list of at least one"):
            make(tmp_path, constitution=constitution)


def test_a_principle_without_a_part_is_refused_by_its_key(tmp_path):
    broken = [PRINCIPLES[0], {**PRINCIPLES[1], "revision": " "}]
    with pytest.raises(UserError, match=r"data\.constitution\.principles\[1\]\.revision must be a text, got ' '"):
        revisions(tmp_path, constitution={"principles": broken})


@pytest.mark.parametrize("principle", [" ", 3, None, ["be kind"]])
def test_a_principle_that_is_none_is_refused_by_its_key(tmp_path, principle):
    with pytest.raises(UserError, match=r"principles\[1\] must be a text or have the texts critique"):
        revisions(tmp_path, constitution={"principles": [PRINCIPLES[0], principle]})


def test_a_principle_of_one_text_is_asked_in_every_step(tmp_path):
    writer, judge = Script("w"), Script("j")
    constitution = {"principles": ["The answer is kind."]}
    made(revisions(tmp_path, writer, judge, constitution=constitution))
    (critiques,), (_, rewrites) = judge.asked, writer.asked
    assert all("does not follow this principle: The answer is kind." in chat[-1]["content"] for chat in critiques)
    assert all("follows this principle: The answer is kind." in chat[-1]["content"] for chat in rewrites)
    made(preferences(tmp_path, judge=judge, constitution=constitution))
    assert judge.questions
    assert all("better? The answer is kind." in question for question in judge.questions)


@pytest.mark.parametrize("name", ["rounds", "limit", "batch_size"])
def test_numbers_out_of_range_are_refused_by_name(tmp_path, name):
    with pytest.raises(UserError, match=rf"data\.{name} must be a whole number of at least 1, got 0"):
        revisions(tmp_path, **{name: 0})


@pytest.fixture(scope="module")
def writer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer")
    tiny_policy(max_position_embeddings=2048).save(folder)
    return folder


def test_a_policy_writes_by_seed_and_stream_and_chooses_by_its_probabilities(writer_folder):
    model = ChatModel(path=str(writer_folder), max_new_tokens=6, temperature=1.0, batch_size=2)
    chats = [[{"role": "user", "content": text}] for text in ("hi", "a longer one", "x")]
    first = model.write(chats, seed=0, stream=0)
    assert first == model.write(chats, seed=0, stream=0)
    assert first != model.write(chats, seed=0, stream=1)
    chances = model.choose(chats, ("A", "B"))
    policy = model.policy
    for chat, found in zip(chats, chances, strict=True):
        ids = policy.tokenizer(f"Human: {chat[0]['content']}\n\nAssistant:", return_tensors="pt")["input_ids"]
        logits = policy.model(ids).logits[0, -1]
        a, b = (policy.tokenizer(letter)["input_ids"][0] for letter in "AB")
        torch.testing.assert_close(found, logits[[a, b]].softmax(-1), rtol=1e-3, atol=1e-5)


def test_all_stages_run_one_after_the_other(folder, tiny_models, writer_folder):
    """With the policy itself as writer and judge, in this process."""
    tiny = ["trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_epochs=1", "logger=csv"]
    keys = (f"path={writer_folder}", "max_new_tokens=6")
    model = [f"data.{who}.{key}" for who in ("writer", "judge") for key in keys]
    few = ["data.source.prompts=[one,two,three,four,five]", "data.limit=4", "trainer.limit_val_batches=0"]
    own = {
        "sft": [*tiny, *model, *few, f"policy.path={writer_folder}", "policy.lora=null"],
        "reward_model": [*tiny, *model[1:], *few, f"algorithm.model_path={tiny_models['encoder']}",
                         "algorithm.max_length=32"],
        "ppo": [*tiny, "sampler.max_new_tokens=4", "algorithm.rollout_batch_size=4", "algorithm.minibatch_size=2",
                "policy.lora=null", "data.prompts=[one,two]", "data.batch_size=2", "trainer.limit_val_batches=0"],
    }  # fmt: skip
    stages = [f"{stage}.{override}" for stage, overrides in own.items() for override in overrides]
    done = run_here("pipeline", "experiment=constitutional", *stages, "paths.output_dir=out")
    assert done.code == 0, done.err
    (sft,) = (folder / "out" / "sft").glob("revisions-*.jsonl")
    (pairs,) = (folder / "out" / "reward_model").glob("preferences-*.jsonl")
    rows = [json.loads(line) for line in sft.read_text().splitlines()]
    constitution = yaml.safe_load((CONFIG_DIR / "data/constitution/harmless.yaml").read_text())
    assert {row["principles"][0] for row in rows} <= {p["critique"] for p in constitution["principles"]}
    assert all(0.5 <= json.loads(line)["agreement"] <= 1 for line in pairs.read_text().splitlines())
    assert (folder / "out" / "ppo" / "model" / "model.safetensors").exists()
    written = sft.stat().st_mtime_ns
    assert run_here("pipeline", "experiment=constitutional", *stages, "paths.output_dir=out").code == 0
    assert sft.stat().st_mtime_ns == written


@pytest.mark.real
def test_all_stages_run_with_smollm2_as_writer_judge_and_policy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    brief = ["trainer.max_epochs=1", "logger=csv"]
    few = ["data.limit=4", *(f"data.{who}.max_new_tokens=12" for who in ("writer", "judge"))]
    own = {
        "sft": [*brief, *few],
        "reward_model": [*brief, few[0], few[2], "data.writer.max_new_tokens=12"],
        "ppo": [*brief, "sampler.max_new_tokens=12", "algorithm.rollout_batch_size=4", "algorithm.minibatch_size=2",
                "trainer.limit_val_batches=0"],
    }  # fmt: skip
    stages = [f"{stage}.{override}" for stage, overrides in own.items() for override in overrides]
    done = run_here("pipeline", "experiment=constitutional", *stages, "paths.output_dir=out")
    assert done.code == 0, done.err
    (revised,) = (tmp_path / "out" / "sft").glob("revisions-*.jsonl")
    rows = [json.loads(line) for line in revised.read_text().splitlines()]
    assert len(rows) == 4
    assert all(row["first"] != row["completion"] for row in rows)
    (pairs,) = (tmp_path / "out" / "reward_model").glob("preferences-*.jsonl")
    assert all(0.5 <= json.loads(line)["agreement"] <= 1 for line in pairs.read_text().splitlines())
    assert json.loads((tmp_path / "out" / "ppo" / "summary.json").read_text())["status"] == "completed"
