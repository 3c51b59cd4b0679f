"""``lit-rlhf sample``: several policies on the same prompts and random numbers, from files and from the terminal."""

import io
import json
import sys
from pathlib import Path

import pytest
from command_line import TINY, run_here
from tiny import tiny_policy

from lit_rlhf.evaluation.policies import load_policy
from lit_rlhf.rollout.sampler import Sampler
from lit_rlhf.sample import complete, side_by_side

SHORT = ["sampler.max_new_tokens=6", "sampler.temperature=1"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two policies' folders, and a run with its checkpoint."""
    folder = tmp_path_factory.mktemp("sample")
    for seed, name in enumerate(("a", "b")):
        tiny_policy(seed=seed).save(folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run_here("train", *TINY, "optimizer.lr=0.05", "trainer.limit_val_batches=0", "paths.output_dir=run")
        assert result.code == 0, result.err
    return folder


@pytest.fixture(autouse=True)
def _inside(here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "160")


def sampled(*arguments):
    Path("out.jsonl").unlink(missing_ok=True)
    result = run_here("sample", *SHORT, *arguments, "output=out.jsonl")
    assert result.code == 0, result.err
    return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()], result


def test_a_prompt_is_completed_alike_alone_and_among_others_and_policies_differ():
    rows, result = sampled("policies=[a,b]", "prompts=[one,two,three]", "reward=length", "reward.target=2")
    assert [row["prompt"] for row in rows] == ["one", "two", "three"]
    policies = {name: load_policy(name) for name in ("a", "b")}
    alone = side_by_side(policies, ["three"], Sampler(max_new_tokens=6), first=2)
    assert alone[0]["completions"] == rows[2]["completions"]
    assert all(row["completions"]["a"] != row["completions"]["b"] for row in rows)
    words = len(rows[0]["completions"]["a"].split())
    assert rows[0]["scores"]["a"] == pytest.approx(-0.1 * abs(words - 2))
    assert f"{rows[0]['scores']['a']:.3f}" in result.out


def test_several_completions_of_a_prompt_are_different_episodes():
    rows, _ = sampled("policies=[a]", "prompts=[one,two]", "samples_per_prompt=3")
    assert [row["prompt"] for row in rows] == ["one"] * 3 + ["two"] * 3
    assert len({row["completions"]["a"] for row in rows}) == 6


JSON_LINES = '{"prompt": "one"}\n{"prompt": "two"}\n'


@pytest.mark.parametrize(("file", "text"), [("p.txt", "one\n\ntwo\n"), ("p.jsonl", JSON_LINES)])
def test_prompts_come_from_a_file(file, text):
    listed, _ = sampled("policies=[a]", "prompts=[one,two]")
    Path(file).write_text(text)
    assert sampled("policies=[a]", f"prompts={file}")[0] == listed


def test_what_is_typed_is_answered_until_an_empty_line(monkeypatch):
    listed, _ = sampled("policies=[a,b]", "prompts=[one,two]")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"one\ntwo\n{'long ' * 60}\n\nunread\n"))
    rows, result = sampled("policies=[a,b]")
    assert rows == listed
    assert "does not fit the policy's context" in result.out.replace("\n", " ")  # and the loop goes on
    assert "unread" not in result.out


def test_a_line_that_is_not_utf_8_is_refused_and_the_next_one_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\xfe\nna\xc3\xafve\n"), encoding="utf-8"))
    rows, result = sampled("policies=[a]")
    assert [row["prompt"] for row in rows] == ["one", "naïve"]
    assert "what was typed has half a character" in result.out


def test_runs_and_checkpoints_are_policies_too():
    checkpoint = next(Path("run/checkpoints").glob("step=*.ckpt"))
    rows, _ = sampled(f"policies=[run,run/model,'{checkpoint}']", "prompts=[one]")
    run, model, of_checkpoint = rows[0]["completions"].values()
    assert run == model == of_checkpoint
    Path("run/model").rename("run/moved")  # as while it is still going
    try:
        assert list(sampled("policies=[run]", "prompts=[one]")[0][0]["completions"].values()) == [run]
    finally:
        Path("run/moved").rename("run/model")


def test_a_chat_is_rendered_by_the_policys_template():
    policy = tiny_policy(seed=0)
    policy.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    policy.save("chatty")
    rows, _ = sampled("policies=[chatty]", "prompts=[one]", "chat=true")
    plain, _ = sampled("policies=[chatty]", "prompts=['<user>one']")
    assert rows[0]["completions"] == plain[0]["completions"]


CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
SYSTEM, HELLO = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
TALK = [SYSTEM, HELLO, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Why?"}]


@pytest.fixture
def chatty():
    """The folders of two policies with a chat template."""
    for seed, name in enumerate(("chatty_a", "chatty_b")):
        policy = tiny_policy(seed=seed, max_position_embeddings=256)
        policy.tokenizer.chat_template = CHATML
        policy.save(name)
    return ["policies=[chatty_a,chatty_b]", "sampler=greedy"]


def completed(name, text):
    """What a policy writes greedily after a text."""
    return complete(load_policy(name), [text], Sampler(max_new_tokens=6, temperature=0), 0)[0]


def test_chats_of_a_file_and_of_the_command_line_are_rendered_with_all_their_turns(chatty):
    Path("chats.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in (TALK, [HELLO])))
    rows, result = sampled(*chatty, "sampler.temperature=0", "prompts=chats.jsonl")
    assert [row["prompt"] for row in rows] == [TALK, [HELLO]]
    talk = "<system>Be brief.\n<user>Hello\n<assistant>Yes?\n<user>Why?\n<assistant>"
    assert rows[0]["completions"] == {name: completed(name, talk) for name in ("chatty_a", "chatty_b")}
    assert "assistant: Yes?" in result.out
    listed, _ = sampled(*chatty, "sampler.temperature=0", "prompts=[[{role: user, content: Hello}]]")
    assert listed == rows[1:]


def test_a_conversation_remembers_what_was_said_to_and_by_each_policy(chatty, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nWhy?\n/new\nWhy?\n\n"))
    rows, _ = sampled(*chatty, "sampler.temperature=0", "chat=true", "system=Be brief.")
    assert [row["prompt"] for row in rows] == ["Hello", "Why?", "Why?"]
    for name in ("chatty_a", "chatty_b"):
        said = "<system>Be brief.\n<user>Hello\n<assistant>"
        assert rows[0]["completions"][name] == (answer := completed(name, said))
        assert rows[1]["completions"][name] == completed(name, f"{said}{answer}\n<user>Why?\n<assistant>")
        assert rows[2]["completions"][name] == completed(name, "<system>Be brief.\n<user>Why?\n<assistant>")
        assert rows[0]["before"][name] == rows[2]["before"][name] == [SYSTEM]
        assert rows[1]["before"][name] == [SYSTEM, HELLO, {"role": "assistant", "content": answer}]


def test_a_conversation_that_has_become_too_long_says_how_to_begin_another(chatty, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'long ' * 44}\nagain {'long ' * 10}\n/new\nWhy?\n\n"))
    rows, result = sampled(*chatty, "sampler.temperature=0", "chat=true")
    assert [row["prompt"][:4] for row in rows] == ["long", "Why?"]
    assert "/new begins a new conversation" in result.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policies=[]", "prompts=[a]"], "policies=[] must be a list of at least one"),
        (["policies=[a,a]", "prompts=[a]"], "names one twice"),
        (["policies=[a]", "prompts=[]"], "prompts=[] must be a list of at least one"),
        (["policies=[a]", "prompts=nowhere.txt"], "nowhere.txt"),
        (["policies=[a]", "prompts=[' ']"], "prompts: number 1 is empty"),
        (["policies=[nowhere]", "prompts=[a]"], "policies=nowhere"),
        (["policies=[a]", "prompts=[a]", "samples_per_prompt=0"], "samples_per_prompt"),
        (["policies=[a,b]", "prompts=[a]", "chat=true"], "a: the prompts of data are chats, but"),
        (["policies=[a]", "prompts=[[{role: user}]]"], "prompts: number 1 has a message without role and content"),
        (["policies=[a]", "prompts=[{role: user, content: Hi}]"], "prompts: number 1 is neither a text nor"),
        (["policies=[a]", "prompts=[null]"], "prompts: number 1 is neither a text nor a list of messages: None"),
        (["policies=[a]", "prompts=[a]", "system=x"], "set chat=true"),
        (["policies=[a]", "prompts=[a,[{role: user, content: Hi}]]", "chat=true", "system=x"], "number 2 is a chat"),
        (["policies=[a]", "chat=true", "samples_per_prompt=2"], "samples_per_prompt=2: a conversation"),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments, message):
    result = run_here("sample", *arguments, *SHORT)
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err
