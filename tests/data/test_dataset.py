"""Prompts from files and from Hugging Face datasets, offline."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from command_line import TINY, run_here
from datasets import Dataset, DatasetDict
from tiny import tiny_policy

from lit_rlhf.data import DatasetPrompts
from lit_rlhf.errors import UserError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


pytestmark = pytest.mark.usefixtures("work")


def write(name: str, *rows) -> str:
    """A JSON Lines file; a row that is a text is written as it is."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def ready(format: str = "jsonl", **arguments) -> DatasetPrompts:
    data = DatasetPrompts(format=format, **{"path": "a.jsonl", "shuffle": False, **arguments})
    data.setup()
    return data


def prompts(loader) -> list:
    return [prompt for batch in loader for prompt in batch["prompt"]]


# ---- formats --------------------------------------------------------------------------------------------------------

TABLE = {"prompt": ["2 + 2 =", "3 + 4 ="], "answer": [4, 7]}


def save(format: str) -> str:
    dataset = Dataset.from_dict(TABLE)
    if format == "hf":
        dataset.save_to_disk("table")
        return "table"
    return write("table.jsonl", *dataset) if format == "jsonl" else _export(dataset, format)


def _export(dataset: Dataset, format: str) -> str:
    {"csv": dataset.to_csv, "parquet": dataset.to_parquet}[format](f"table.{format}")
    return f"table.{format}"


FORMATS = ["jsonl", "csv", "parquet", "hf"]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_batch(format, work):
    path = save(format)
    there = sorted(work.rglob("*"))
    data = ready(format, path=path, split="train" if format == "hf" else None)
    assert list(data.train_dataloader()) == [TABLE]
    assert data.val_dataloader() == data.test_dataloader() == []
    assert sorted(work.rglob("*")) == there  # no cache in the working folder


@pytest.mark.parametrize("format", FORMATS)
def test_reading_prints_nothing_and_leaves_the_librarys_settings(format, capfd):
    path = save(format)
    capfd.readouterr()
    settings = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    ready(format, path=path, split="train" if format == "hf" else None)
    assert capfd.readouterr() == ("", "")
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == settings


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_chats_and_ragged_columns_arrive_as_they_are(format):
    rows = [{"prompt": CHAT, "tags": []}, {"prompt": CHAT[1:], "tags": ["short", "hello"]}]
    path = write("a.jsonl", *rows) if format == "jsonl" else _export(Dataset.from_list(rows[::-1]), format)
    (batch,) = ready(format, path=path).train_dataloader()
    expected = {"prompt": [CHAT, CHAT[1:]], "tags": [[], ["short", "hello"]]}
    order = 1 if format == "jsonl" else -1  # the first row written must show the type of the tags
    assert batch == {name: column[::order] for name, column in expected.items()}


def test_values_of_json_lines_keep_their_types_and_missing_ones_are_none():
    values = ["2024-01-01", 1.5, 2**70, {"a": 1}, {"b": None}, [1, "x"], True]
    write("a.jsonl", *({"prompt": "p", "value": value} for value in values), "", {"prompt": "p"})
    (batch,) = ready(batch_size=20).train_dataloader()
    assert batch["value"] == [*values, None]


def test_patterns_and_lists_name_several_files_each_once():
    for name in ("in/b.jsonl", "in/a.jsonl", "in/deep/c.jsonl", "odd[1].jsonl"):
        write(name, {"prompt": name})
    assert prompts(ready(path="in/*.jsonl").train_dataloader()) == ["in/a.jsonl", "in/b.jsonl"]
    chosen = ["odd[1].jsonl", "in/**/*.jsonl", "in/a.jsonl"]
    assert prompts(ready(path=chosen).train_dataloader()) == [
        "odd[1].jsonl", "in/a.jsonl", "in/b.jsonl", "in/deep/c.jsonl"
    ]  # fmt: skip


def test_a_csv_file_may_have_brackets_in_its_name():
    Path("odd[1].csv").write_text("prompt\nhello\n")
    assert prompts(ready("csv", path="odd[1].csv").train_dataloader()) == ["hello"]


def test_a_changed_file_is_read_again():
    for text in ("before", "after!"):
        Path("a.csv").write_text(f"prompt\n{text}\n")
        assert prompts(ready("csv", path="a.csv").train_dataloader()) == [text]


def hub_folder() -> str:
    """A copy of a hub repository with two configurations, of which one has two splits."""
    write("repo/train.jsonl", {"prompt": "train"})
    write("repo/test.jsonl", {"prompt": "test"})
    splits = "\n".join(f"  - {{split: {name}, path: {name}.jsonl}}" for name in ("train", "test"))
    Path("repo/README.md").write_text(
        f"---\nconfigs:\n- config_name: easy\n  data_files:\n{splits}\n"
        "- config_name: hard\n  data_files: test.jsonl\n---\n"
    )
    return "repo"


def test_a_dataset_of_the_hub_has_subsets_and_splits():
    data = ready("hf", path=hub_folder(), subset="easy", split="train", val_split="test")
    assert (prompts(data.train_dataloader()), prompts(data.val_dataloader())) == (["train"], ["test"])
    assert prompts(ready("hf", path="repo", subset="hard", split="train").train_dataloader()) == ["test"]


def test_a_saved_dataset_has_splits():
    DatasetDict(one=Dataset.from_dict({"prompt": ["x"]}), two=Dataset.from_dict({"prompt": ["y"]})).save_to_disk("d")
    data = ready("hf", path="d", split="one", val_split="two")
    assert (prompts(data.train_dataloader()), prompts(data.val_dataloader())) == (["x"], ["y"])


# ---- columns, order, limits -----------------------------------------------------------------------------------------


def test_the_prompt_column_is_called_prompt_and_the_others_can_be_chosen():
    write("a.jsonl", {"prompt": "unused", "question": "q", "answer": 1, "source": "s"})
    (every,) = ready(prompt_column="question").train_dataloader()
    assert every == {"prompt": ["q"], "answer": [1], "source": ["s"]}
    (chosen,) = ready(prompt_column="question", columns=["source"]).train_dataloader()
    assert chosen == {"prompt": ["q"], "source": ["s"]}
    (none,) = ready(columns=[]).train_dataloader()
    assert none == {"prompt": ["unused"]}


def test_only_training_is_shuffled():
    names = [str(number) for number in range(20)]
    write("a.jsonl", *({"prompt": name} for name in names))
    data = ready(shuffle=True, val_path="a.jsonl", batch_size=6)
    torch.manual_seed(0)
    drawn = prompts(data.train_dataloader())
    assert drawn != names
    assert sorted(drawn) == sorted(names)
    assert prompts(data.val_dataloader()) == prompts(data.test_dataloader()) == names
    assert [len(batch["prompt"]) for batch in data.val_dataloader()] == [6, 6, 6, 2]


def test_the_limit_counts_rows_across_files_and_for_both_sides():
    write("a.jsonl", {"prompt": "a0"}, {"prompt": "a1"})
    write("b.jsonl", {"prompt": "b0"}, {"prompt": " "})  # never reached
    data = ready(path=["a.jsonl", "b.jsonl"], limit=3)
    assert prompts(data.train_dataloader()) == ["a0", "a1", "b0"]
    data = ready(path="a.jsonl", val_path="b.jsonl", limit=1)
    assert (prompts(data.train_dataloader()), prompts(data.val_dataloader())) == (["a0"], ["b0"])


def test_a_held_out_fraction_is_a_function_of_the_seed():
    names = [f"{number:02}" for number in range(40)]
    write("a.jsonl", *({"prompt": name} for name in names))

    def held_out(seed: int) -> list[str]:
        data = ready(val_fraction=0.25, seed=seed)
        train, val = prompts(data.train_dataloader()), prompts(data.val_dataloader())
        assert len(val) == 10
        assert (train, val) == ([n for n in names if n not in val], sorted(val))  # in the file's order
        return val

    torch.manual_seed(0)
    first = held_out(1)
    torch.manual_seed(1)
    assert held_out(1) == first != held_out(2)


def test_a_small_fraction_holds_out_one_row():
    write("a.jsonl", {"prompt": "x"}, {"prompt": "y"})
    data = ready(val_fraction=0.01)
    assert {*prompts(data.train_dataloader()), *prompts(data.val_dataloader())} == {"x", "y"}


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "json"}, "data.format='json': there is no such format; choose from jsonl, csv, parquet, hf"),
        ({"split": "train"}, "data.split='train' is not read with data.format=jsonl; leave it null"),
        ({"val_split": "test"}, "data.val_split='test' is not read"),
        ({"format": "hf", "val_path": "b"}, "data.val_path='b' is not read with data.format=hf"),
        ({"format": "hf", "path": ["a", "b"]}, "must be the name or the folder of one dataset"),
        ({"val_path": "b", "val_fraction": 0.1}, "data.val_path and data.val_fraction both say what is held out"),
        ({"val_fraction": 1}, "data.val_fraction must be a finite number above 0 and below 1, got 1"),
        ({"columns": "answer"}, "data.columns='answer': must be null or a list of names"),
        ({"columns": ["prompt"]}, "without 'prompt'"),
        ({"limit": 0}, "data.limit must be"),
        ({"seed": -1}, "data.seed must be"),
        ({"batch_size": 0}, "data.batch_size must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(UserError, match=message):
        DatasetPrompts(**{"format": "jsonl", "path": "a", **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "nowhere.jsonl"}, r"data.path=nowhere.jsonl: there is no such file"),
        ({"path": ["good.jsonl", "no*.jsonl"]}, r"data.path=no\*.jsonl: there is no such file"),
        ({"val_path": "nowhere"}, "data.val_path=nowhere: there is no such file"),
        ({"path": "."}, r"data.path=. is a folder; name its files, for example \*"),
        ({"path": 5}, "data.path=5: must be a path or a list of paths"),
        ({"path": []}, r"data.path=\[\]: must be a path or a list of paths"),
        ({"prompt_column": "text"}, r"good.jsonl, line 1: no column 'text' .*; it has prompt, answer\."),
        ({"columns": ["answr"]}, "data.columns: good.jsonl has no column 'answr'; it has prompt, answer"),
        ({"path": "*o*.jsonl"}, r"data.columns: good.jsonl has no column 'extra'; .* \(data.columns=null"),
        ({"val_path": "other.jsonl", "columns": ["answer"]}, "other.jsonl has no column 'answer'"),
        ({"val_path": "empty.jsonl"}, "data.val_path: empty.jsonl is empty"),
        ({"limit": 1, "val_fraction": 0.5}, "data.val_fraction=0.5 of 1 rows leaves none to train on"),
        ({"path": "blank.jsonl"}, "data.path: blank.jsonl has no rows"),
        ({"format": "csv", "path": "header.csv"}, "data.path: header.csv has no rows"),
        ({"format": "csv", "path": "bad.csv"}, "data.path: bad.csv, line 3: 3 fields, and 2 in the header"),
        ({"format": "csv", "path": "comma.csv"}, "comma.csv, line 2: 3 fields, and 2 in the header; .* needs quotes"),
        ({"format": "parquet", "path": "bad.csv"}, "data.path: bad.csv cannot be loaded: .*Parquet"),
    ],
)
def test_files_that_cannot_be_used_are_named_with_their_key(arguments, message, capfd):
    write("good.jsonl", {"prompt": "x", "answer": 1}, {"prompt": "y", "answer": 2})
    write("other.jsonl", {"prompt": "x", "extra": 1})
    write("empty.jsonl")
    write("blank.jsonl", "", "")
    Path("header.csv").write_text("prompt,answer\n")
    Path("comma.csv").write_text("prompt,answer\nHello, world,3\nWell, now,4\n")
    Path("bad.csv").write_text("prompt,answer\nx,1\ny,2,3\n")
    with pytest.raises(UserError, match=message):
        ready(**{"path": "good.jsonl", **arguments})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": oops}', "data.path: b.jsonl, line 3: not JSON: Expecting value"),
        ('["a"]', r"data.path: b.jsonl, line 3: not a JSON object: \['a'\]"),
        ({"prompt": " "}, "data.path: b.jsonl, line 3: column 'prompt' is empty. Mend it, or .* data.strict=false"),
        ({"prompt": 5}, "line 3: column 'prompt' is neither a text nor a list of messages: 5"),
        ({"answer": 5}, "b.jsonl, line 3: no column 'prompt'.*it has answer"),
        ({"prompt": []}, "b.jsonl, line 3: column 'prompt' is neither a text nor a list of messages"),
        ({"prompt": [{"role": "user", "content": ""}]}, "b.jsonl, line 3: column 'prompt' is empty"),
        ({"prompt": [{"role": "user"}]}, "b.jsonl, line 3: column 'prompt' has a message without role and content"),
    ],
)
def test_a_bad_row_is_named_with_its_file(row, message):
    write("a.jsonl", {"prompt": "x"})
    write("b.jsonl", {"prompt": "y"}, "", row)
    with pytest.raises(UserError, match=message):
        ready(path="*.jsonl", columns=[])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "data.split=valid: repo has no such split; choose from train, test"),
        ({"split": None}, "data.split=None: repo has no such split"),
        ({"val_split": "valid"}, "data.val_split=valid: repo has no such split"),
        ({"subset": "medium"}, r"data.path=repo, data.subset=medium cannot be loaded: .*\['easy', 'hard'\]"),
        ({"subset": None}, r"data.path=repo cannot be loaded: .*\['easy', 'hard'\]"),
        ({"path": "saved", "split": "train"}, "data.subset=easy: the folder saved was written by save_to_disk"),
        ({"path": "nobody/nothing", "subset": None}, "data.path=nobody/nothing cannot be loaded: .*nobody/nothing"),
        ({"prompt_column": "text"}, "data.prompt_column=text: repo, split train has no such column; it has prompt"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_named_with_its_key(arguments, message):
    hub_folder()
    Dataset.from_dict(TABLE).save_to_disk("saved")
    with pytest.raises(UserError, match=message):
        ready("hf", **{"path": "repo", "subset": "easy", "split": "train", **arguments})


def test_without_the_library_the_extra_to_install_is_named(monkeypatch):
    save("parquet")
    write("a.jsonl", {"prompt": "x"})
    Path("a.csv").write_text("prompt\nx\n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"data.path: table.parquet needs .*pip install 'lit-rlhf\[data\]'"):
        ready("parquet", path="table.parquet")
    for format in ("jsonl", "csv"):  # they need nothing
        assert prompts(ready(format, path=f"a.{format}").train_dataloader()) == ["x"]


# ---- through the command line ---------------------------------------------------------------------------------------

RUN = [option for option in TINY if not option.startswith("data")]


def samples(*options: str) -> list[dict]:
    result = run_here("train", *RUN, *options, "paths.output_dir=run")
    assert result.code == 0, result.err
    assert "Generating" not in result.err
    return [json.loads(line) for line in Path("run/samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_completes_the_prompts_of_a_file_and_rewards_read_its_columns(format):
    seen = samples(f"data={format}", f"data.path={save(format)}", "data.val_fraction=0.5", "reward=verifier")
    by_split = {split: {s["prompt"] for s in seen if s["split"] == split} for split in ("train", "validation")}
    assert len(by_split["train"]) == len(by_split["validation"]) == 1
    assert by_split["train"] | by_split["validation"] == set(TABLE["prompt"])


def test_a_run_without_held_out_prompts_trains_alone():
    write("a.jsonl", {"prompt": "A film that"})
    assert {(s["split"], s["prompt"]) for s in samples("data=jsonl", "data.path=a.jsonl")} == {("train", "A film that")}


def test_a_run_completes_chats(monkeypatch):
    policy = tiny_policy(max_position_embeddings=512)
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    policy.save("policy")
    monkeypatch.setattr(f"{__name__}.RUN", [option for option in RUN if not option.startswith("policy")])
    seen = samples("policy=pretrained", "policy.path=policy", "data=chats", "data.shuffle=false")
    assert str(seen[0]["prompt"]).count("Tell me about a film that you would see again.") == 1


def test_a_mistake_in_a_file_ends_a_run_with_one_message():
    write("a.jsonl", {"prompt": "x"}, "oops")
    result = run_here("train", *RUN, "data=jsonl", "data.path=a.jsonl", "paths.output_dir=run")
    assert result.code == 1
    assert "a.jsonl, line 2: not JSON" in result.err
    assert "Traceback" not in result.err
