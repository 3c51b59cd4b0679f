"""A small, repeatable slice of what `python -m tests.fuzz` does for as long as it is given."""

import json

import pytest
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

TEXT = st.text(st.characters(codec=None), max_size=20)
KEYS = st.sampled_from(["prompt", "role", "content", "label", "reward", "iteration"]) | TEXT
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT | st.sampled_from(["error", " "]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(KEYS, inner, max_size=4)
    | st.lists(st.fixed_dictionaries({"role": inner, "content": inner}), max_size=2),
    max_leaves=8,
)
JSON = VALUES.map(json.dumps).map(str.encode)
GOOD = [
    b'{"prompt": "a", "label": true, "reward": 1}', b"prompt,label,reward", b"a,true,1", b'"a, b",False,.5',
    b"iteration,objective/kl", b"1,0.5", b'{"iteration": 1}', b"iteration,episode\r1,2", b'"', b",", b"\xef\xbb\xbf",
    b"\x1f\x8b", b"nan", b"9" * 400, b"[" * 2000, b'{"iteration": 1e400}', b"Mon, 01 Jan 99999 00:00:00 GMT",
    b"Wed, 21 Oct 2015 07:28:00 -0000", b"-1e999", b"1,200.5.", b"Answer: ", b"Verdict: A", b"\\", b"'", b"Score: 7/10",
    b"x='", b"|", b"kl=null", b"~reward", b"@", b"\x00", b"\xff", b"\r", b"\x1b[2J", "\u2028\u0663".encode(),
    b"\\ud800", b"data._target_=",
]  # fmt: skip
PIECES = st.lists(st.sampled_from(GOOD) | st.binary(max_size=8) | JSON, max_size=8)
JOINED = st.builds(lambda pieces, by: by.join(pieces), PIECES, st.sampled_from([b"\n", b"\r\n", b"", b"|", b","]))
INPUTS = JOINED | JSON | st.binary(max_size=60)


@pytest.mark.parametrize("name", TARGETS)
@settings(
    max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip
@given(data=INPUTS)
def test_any_input_gives_a_value_or_a_readable_error(name, data):
    TARGETS[name](data)


#: What fuzzing has found, and was mended.
FOUND = {
    "data_file": [b'{"\\n":null}'],  # a message of two lines
    "chat": [b"null", b'[{"role":null}]', b'[{"role":["user"],"content":"a"}]'],
    "overrides": ['"A\u00aa"'.encode(), b"9" * 400],  # a letter that Hydra does not read; the name of no file
    "run_files": [b"[" * 10**5 + b"\n", b"a\rb\n"],  # too deep; not CSV
    "config_values": [b"[]", b'"a"'],  # where the least value is a number
}


@pytest.mark.parametrize(("name", "data"), [(name, data) for name, found in FOUND.items() for data in found])
def test_what_was_found_stays_mended(name, data):
    TARGETS[name](data)
