"""Files of every wrong kind: one line that names file, line and column; or, with strict=false, their good rows."""

import gzip
import json
import logging
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from command_line import TINY, run_here

from lit_rlhf.data import DatasetPrompts
from lit_rlhf.data.text_files import LONGEST
from lit_rlhf.errors import UserError

GOOD = {"prompt": "A film", "chosen": " is good", "reward": 1.5, "label": True}
TYPES = {"chosen": "text", "reward": "number", "label": "bool"}


pytestmark = pytest.mark.usefixtures("work")


def read(path: str, **arguments) -> dict[str, list]:
    """All training rows, as columns."""
    data = DatasetPrompts(
        format=Path(path).suffix[1:], path=path, **{"shuffle": False, "batch_size": 100, "types": TYPES, **arguments}
    )
    data.setup()
    (batch,) = data.train_dataloader()
    return batch


def message(path: str, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        read(path, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def line(**changes) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


# ---- rows: the good ones around them are kept with strict=false -----------------------------------------------------

DEEP = b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"
BAD_LINES = {
    b"oops": "not JSON: Expecting value",
    b'{"prompt": "cut': "not JSON: Invalid control character",
    b'{"prompt": "a\x00b"}': "not JSON: Invalid control character",
    b"\x00\x00\x00": "not JSON",
    b'"A film"': "not a JSON object: A film",
    b"[1, 2]": "not a JSON object: [1, 2]",
    b"null": "not a JSON object: None",
    b'{"prompt": "a"} {"prompt": "b"}': "not JSON: Extra data",
    b'{"prompt": "a", "prompt": "b"}': "not JSON: the key 'prompt' occurs twice",
    b'{"prompt": "caf\xe9"}': "not UTF-8: byte 0xe9 at position 16",
    b'{"prompt": ' + b"1" * 5000 + b"}": "not JSON: Exceeds the limit",
    b'{"prompt": "half \\ud83d"}': "column 'prompt' has half a character, '\\ud83d'",
    b'{"prompt": "a", "note": {"\\udc00": 1}}': "column 'note' has half a character",
    DEEP: "nested too deeply",
    b'{"prompt": "' + b"x" * LONGEST + b'"}': "longer than 16 MB",
    b"{}": "no column 'prompt' (data.prompt_column); it has none",
    line(prompt=""): "column 'prompt' is empty",
    line(prompt=7): "column 'prompt' is neither a text nor a list of messages: 7",
    line(prompt=None): "column 'prompt' is neither a text nor a list of messages: None",
    line(prompt=["a", "b"]): "column 'prompt' has a message without role and content: 'a'",
    line(prompt={"role": "user"}): "column 'prompt' is neither a text nor a list",
    line(chosen=None): "column 'chosen' is neither a text nor a list of messages: None",
    line(chosen=" "): "column 'chosen' is empty",
    line(reward="high"): "column 'reward' must be a finite number, got 'high'",
    line(reward=float("nan")): "column 'reward' must be a finite number, got nan",
    line(reward=True): "column 'reward' must be a finite number, got True",
    line(label=1): "column 'label' must be true or false, got 1",
    line(label=None): "column 'label' must be true or false, got None",
}


@pytest.mark.parametrize(("bad", "problem"), BAD_LINES.items(), ids=lambda value: str(value)[:30])
def test_a_bad_line_of_json_is_named_or_left_out(bad, problem, caplog):
    Path("a.jsonl").write_bytes(b"\n".join([line(), b"", bad, line(prompt="B")]) + b"\n")
    said = message("a.jsonl")
    assert said.startswith(f"data.path: a.jsonl, line 3: {problem}")
    assert said.endswith("Mend it, or leave bad rows out with data.strict=false")
    with caplog.at_level(logging.WARNING):
        assert read("a.jsonl", strict=False)["prompt"] == ["A film", "B"]
    (record,) = caplog.records
    assert record.message.startswith("data.strict=false: left out 1 bad rows: data.path: a.jsonl, line 3: ")


BAD_RECORDS = {
    b"A film,x": "2 fields, and 4 in the header",
    b"A film, good,1,true,x": "5 fields, and 4 in the header; a text with commas needs quotes",
    b'A "film" ,x,1,true,"': "a quote that is not closed in the 1 lines after it",
    b'"A film" x,x,1,true': "not CSV: ',' expected after '\"'",
    b"A\x00film,x,1,true": "a NUL byte",
    b"caf\xe9,x,1,true": "not UTF-8: byte 0xe9",
    b",x,1,true": "column 'prompt' is empty",
    b"A film,,1,true": "column 'chosen' is empty",
    b"A film,x,high,true": "column 'reward' must be a finite number, got 'high'",
    b"A film,x,,true": "column 'reward' must be a finite number, got None",
    b"A film,x,inf,true": "column 'reward' must be a finite number, got 'inf'",
    b"A film,x,1,yes": "column 'label' must be true or false, got 'yes'",
    b"A film,x,1,1": "column 'label' must be true or false, got 1",
    b"x" * (LONGEST + 1) + b",x,1,true": "longer than 16 MB",
}


@pytest.mark.parametrize(("bad", "problem"), BAD_RECORDS.items(), ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_a_bad_row_of_csv_is_named_or_left_out(bad, problem, ending, caplog):
    good = b'"A ""film""\nin two lines", is good,1.5,true'
    after = [] if bad.endswith(b'"') else [b"B,b,2,False"]
    Path("a.csv").write_bytes(ending.join([b"prompt,chosen,reward,label", good, b"", bad, *after, b""]))
    problem = problem.replace("the 1 lines", "the 0 lines")
    assert message("a.csv").startswith(f"data.path: a.csv, line 5: {problem}")
    with caplog.at_level(logging.WARNING):
        batch = read("a.csv", strict=False)
    assert batch["prompt"] == ['A "film"\nin two lines', "B"][: 1 + len(after)]
    assert (batch["reward"], batch["label"]) == ([1.5, 2][: 1 + len(after)], [True, False][: 1 + len(after)])
    assert "left out 1 bad rows: data.path: a.csv, line 5: " in caplog.text


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("prompt", ["a", "", "b"], "column 'prompt' is empty"),
        ("prompt", ["a", None, "b"], "column 'prompt' is neither a text nor a list of messages: None"),
        ("prompt", [[{"role": "user", "content": c}] for c in ("a", None, "b")], "column 'prompt' has a message with"),
        ("reward", [0.5, None, 1.0], "column 'reward' must be a finite number, got None"),
        ("reward", [0.5, float("inf"), 1.0], "column 'reward' must be a finite number, got inf"),
        ("label", [True, None, True], "column 'label' must be true or false, got None"),
    ],
)  # fmt: skip
def test_a_bad_row_of_parquet_is_named_or_left_out(column, values, problem, caplog):
    columns = {name: [value] * 3 for name, value in GOOD.items()} | {column: values}
    pyarrow.parquet.write_table(pyarrow.table(columns), "a.parquet")
    assert message("a.parquet").startswith(f"data.path: a.parquet, row 2: {problem}")
    with caplog.at_level(logging.WARNING):
        assert read("a.parquet", strict=False)[column] == [values[0], values[2]]
    assert "left out 1 bad rows: data.path: a.parquet, row 2: " in caplog.text


def test_the_warning_counts_all_rows_of_all_files_and_shows_three(caplog):
    for name in "ab":
        Path(f"{name}.jsonl").write_bytes(b"oops\n" * 3 + line() + b"\n")
    with caplog.at_level(logging.WARNING):
        data = DatasetPrompts(format="jsonl", path="a.jsonl", val_path="b.jsonl", strict=False)
        data.setup()
    assert len(data.train_rows) == len(data.held_out_rows) == 1
    (record,) = caplog.records
    assert record.message.startswith("data.strict=false: left out 6 bad rows: ")
    assert record.message.count("not JSON") == 3
    assert record.message.endswith("; ...")


def test_without_a_bad_row_nothing_is_said(caplog):
    Path("a.jsonl").write_bytes(line())
    with caplog.at_level(logging.WARNING):
        read("a.jsonl", strict=False)
    assert not caplog.records


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_file_of_bad_rows_alone_is_refused(name):
    Path("a.jsonl").write_text("oops\n[]\n")
    Path("a.csv").write_text("prompt,x\na\nb\n")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [" ", ""]}), "a.parquet")
    said = message(name, strict=False, types=None)
    assert said.startswith(f"data.path={name}: no row is good: data.path: {name}, ")


def test_the_limit_counts_good_rows():
    Path("a.jsonl").write_bytes(b"\n".join([b"oops", line(), b"oops", line(prompt="B"), b"oops", line(prompt="C")]))
    assert read("a.jsonl", strict=False, limit=2)["prompt"] == ["A film", "B"]
    Path("a.jsonl").write_bytes(b"\n".join([line(), b"oops"]))
    assert read("a.jsonl", limit=1)["prompt"] == ["A film"]


# ---- whole files ----------------------------------------------------------------------------------------------------


def test_a_file_of_another_kind_is_named():
    table = pyarrow.table({name: [value] for name, value in GOOD.items()})
    pyarrow.parquet.write_table(table, "a.parquet")
    whole = Path("a.parquet").read_bytes()
    cases = {
        "empty.jsonl": (b"", "is empty"), "empty.csv": (b"", "is empty"), "empty.parquet": (b"", "is empty"),
        "blank.jsonl": (b"\n \n", "has no rows"), "blank.csv": (b"\n\n", "has no rows"),
        "header.csv": (b"prompt,chosen,reward,label\n", "has no rows"),
        "gzip.jsonl": (gzip.compress(line()), "is compressed by gzip"), "gzip.csv": (gzip.compress(b"a"), "gzip"),
        "gzip.parquet": (gzip.compress(whole), "gzip"), "zip.csv": (b"PK\x03\x04", "is a zip archive"),
        "wide.jsonl": (line().decode().encode("utf-16"), "is UTF-16; save it as UTF-8"),
        "wide.csv": ("prompt\na".encode("utf-16"), "is UTF-16"), "table.jsonl": (whole, "data=parquet"),
        "table.csv": (whole, "is a Parquet file; read it with data=parquet"),
        "half.parquet": (whole[: len(whole) // 2], "cannot be loaded"), "text.parquet": (line(), "cannot be loaded"),
        "holes.parquet": (whole[:20] + bytes(40) + whole[60:], "cannot be loaded"),
        "twice.csv": (b"prompt,a,prompt\n1,2,3\n", "line 1, the header: two columns are called 'prompt'"),
        "nameless.csv": (b",,\n1,2,3\n", "line 1, the header: no names of columns"),
        "nul.csv": (b"prompt,\0\n1,2\n", "line 1, the header: a NUL byte"),
        "latin.csv": (b"prompt,caf\xe9\n1,2\n", "line 1, the header: not UTF-8"),
        "semicolon.csv": (b"prompt;answer\na;1\n", "data.prompt_column=prompt: semicolon.csv has no such column"),
        "lacks.csv": (b"text\na\n", "data.prompt_column=prompt: lacks.csv has no such column; it has text"),
    }  # fmt: skip
    for name, (content, problem) in cases.items():
        Path(name).write_bytes(content)
        for strict in (True, False):
            said = message(name, strict=strict)
            assert said.startswith("data.p")
            assert name in said
            assert problem in said, name


def test_a_table_with_two_columns_of_one_name_is_refused():
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, "a.parquet")
    assert "data.path: a.parquet cannot be loaded" in message("a.parquet")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    Path("a.jsonl").symlink_to("/proc/self/mem")  # reading its first bytes fails, whoever reads
    assert message("a.jsonl") == "data.path: a.jsonl cannot be read: Input/output error"


def test_a_byte_order_mark_and_the_endings_of_lines_do_not_matter():
    mark = b"\xef\xbb\xbf"
    Path("a.jsonl").write_bytes(mark + b"\r\n".join([line(), line(prompt="B")]))
    assert read("a.jsonl")["prompt"] == ["A film", "B"]
    records = [b"prompt,chosen,reward,label", b"A film,x,1,true", b"B,x,1,true"]
    for ending in (b"\n", b"\r\n", b"\r"):
        Path("a.csv").write_bytes(mark + ending.join(records))
        assert read("a.csv")["prompt"] == ["A film", "B"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_of_a_hundred_megabytes_takes_no_more_memory_than_the_longest_good_one(name):
    with open(name, "wb") as file:
        file.write(line() + b"\n" if name == "a.jsonl" else b"prompt,chosen,reward,label\nA film,x,1,true\n")
        for _ in range(100):
            file.write(b"x" * 10**6)
    tracemalloc.start()
    try:
        assert read(name, strict=False)["prompt"] == ["A film"]
        assert tracemalloc.get_traced_memory()[1] < 5 * LONGEST
    finally:
        tracemalloc.stop()


# ---- what the columns become ----------------------------------------------------------------------------------------


def test_columns_of_csv_are_numbers_or_true_and_false_where_all_their_values_are():
    Path("a.csv").write_text(
        "prompt,whole,number,flag,text,id,,missing\n12,1,.5,true,NA,007,x,\n13,-2,1e3,FALSE,1_0,12345678901234567890,y,\n"
    )
    assert read("a.csv", types=None) == {
        "prompt": ["12", "13"], "whole": [1, -2], "number": [0.5, 1000.0], "flag": [True, False],
        "text": ["NA", "1_0"], "id": [7.0, 12345678901234567890.0], "missing": [None, None],
    }  # fmt: skip


def test_texts_need_no_prompts():
    Path("a.csv").write_text('text\n"A film, a play"\nA book\n')
    assert read("a.csv", prompt_column=None, types={"text": "text"}) == {"text": ["A film, a play", "A book"]}


def test_wrong_types_and_strictness_are_refused_by_name():
    for arguments, problem in [
        ({"types": {"a": "truth"}}, "data.types.a='truth': there is no such type; choose from text, number, bool"),
        ({"strict": "no"}, "data.strict must be true or false, got 'no'"),
        ({"prompt_column": 3}, "data.prompt_column must be a text, got 3"),
    ]:
        with pytest.raises(UserError) as caught:
            DatasetPrompts(format="jsonl", path="a.jsonl", **arguments)
        assert str(caught.value) == problem


# ---- through the command line ---------------------------------------------------------------------------------------

RUN = [option for option in TINY if not option.startswith("data")]


@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_a_run_says_one_line_of_a_bad_row_and_goes_on_without_it_if_told_to(format):
    columns = {"prompt": ["A film that", " ", "The plot"], "answer": [1, 2, 3]}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if format == "jsonl":
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif format == "csv":
        Path("a.csv").write_text("prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.table(columns), "a.parquet")
    run = ["train", *RUN, f"data={format}", f"data.path=a.{format}", "paths.output_dir=run", "data.shuffle=false"]
    result = run_here(*run)
    assert result.code == 1
    place = {"jsonl": "line 2", "csv": "line 3", "parquet": "row 2"}[format]
    assert f"data.path: a.{format}, {place}: column 'prompt' is empty. Mend it" in result.err
    assert "Traceback" not in result.err
    result = run_here(*run, "data.strict=false", "paths.output_dir=other")
    assert result.code == 0, result.err
    assert "left out 1 bad rows" in result.out + result.err
    samples = [json.loads(line) for line in Path("other/samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} == {"A film that", "The plot"}
