"""RemoteReward and the client under it, against real servers."""

import gzip
import itertools
import logging
import random
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from local_server import Answer, Server

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import RemoteReward, http
from lit_rlhf.rewards.scoring import required_columns, score

SECRET = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)


def lengths(body):
    return {"scores": [len(text) for text in body["completions"]]}


def ask(reward, completions, prompts=None, **columns):
    """Its components, through the function that a run calls."""
    components = score(reward, prompts or [""] * len(completions), completions, columns).components
    return {name: values.tolist() for name, values in components.items()}


def in_turn(*answers):
    """Gives these answers one after the other, the last for ever."""
    rest = itertools.chain(answers, itertools.repeat(answers[-1]))
    return lambda body: next(rest)


class TestBatches:
    def test_scores_stand_in_the_order_of_the_completions_whatever_is_done_first(self):
        draw = random.Random(0)

        def slow(body):
            time.sleep(draw.random() / 10)
            return lengths(body)

        completions = ["x" * draw.randrange(100) for _ in range(41)]
        with Server(slow) as server:
            assert ask(RemoteReward(url=server.url, batch_size=2, concurrency=21), completions) == {
                "remote": [len(text) for text in completions]
            }
            assert sorted(len(request.body["completions"]) for request in server.requests) == [1] + [2] * 20

    @pytest.mark.parametrize("concurrency", [1, 3])
    def test_no_more_requests_than_asked_for_are_under_way(self, concurrency):
        def slow(body):
            time.sleep(0.05)
            return lengths(body)

        with Server(slow) as server:
            ask(RemoteReward(url=server.url, batch_size=1, concurrency=concurrency), ["a"] * 12)
            assert (server.peak, len(server.requests)) == (concurrency, 12)

    def test_prompts_completions_and_columns_are_sent(self):
        chat = [{"role": "user", "content": "Où?"}]
        with Server(lengths) as server:
            reward = RemoteReward(url=f"{server.url}/score?key=1", columns=["answer"])
            ask(reward, ["a", "\ud800"], prompts=["p", chat], answer=[1, None], other=[0, 0])
            request = server.requests[0]
        assert required_columns(reward) == ["answer"]
        assert request.path == "/score?key=1"
        assert request.body == {"prompts": ["p", chat], "completions": ["a", "\ud800"], "answer": [1, None]}

    def test_what_is_no_json_is_refused_before_it_is_sent(self):
        with Server(lengths) as server:
            for value in (object(), float("nan")):
                with pytest.raises(UserError, match=r"cannot be sent as JSON"):
                    ask(RemoteReward(url=server.url, columns=["c"]), ["a"], c=[value])
            assert server.requests == []

    def test_components_are_named_by_the_server(self):
        def two(body):
            return {"scores": {"length": lengths(body)["scores"], "one": [1.0] * len(body["completions"])}}

        with Server(two) as server:
            assert ask(RemoteReward(url=server.url, batch_size=2), ["a", "bb", "ccc"]) == {
                "length": [1, 2, 3],
                "one": [1, 1, 1],
            }

    def test_their_names_must_be_the_same_in_all_batches(self):
        with Server(lambda body: {"scores": {body["completions"][0]: [0]}}) as server:
            with pytest.raises(UserError, match=rf"{server.url} named the components \['a'\], then \['b'\]"):
                ask(RemoteReward(url=server.url, batch_size=1), ["a", "b"])

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ({"scores": [1]}, "answered with 1 scores 'remote' for 2 completions"),
            ({"scores": {"a": [1, 2], "b": [1, 2, 3]}}, "answered with 3 scores 'b' for 2 completions"),
            *(
                (answer, r'must answer \{"scores": \[numbers\]\} or .*, got ')
                for answer in (
                    {"rewards": [1, 2]}, [1, 2], {"scores": {}}, {"scores": "12"}, {"scores": None},
                    {"scores": [1, "2"]}, {"scores": [1, None]}, {"scores": [1, True]}, {"scores": {"a": [[1], [2]]}},
                )
            ),
            (Answer(body=b"<html>hello</html>"), r"something that is no JSON: '<html>hello</html>' \(try 1 of 4\)"),
            (Answer(body=b"[" * 100_000), "something that is no JSON"),
        ],
    )  # fmt: skip
    def test_an_answer_of_another_form_is_an_error_with_the_url(self, answer, message):
        with Server(lambda body: answer) as server:
            with pytest.raises(UserError, match=rf"reward\.url: POST {server.url} .*{message}"):
                ask(RemoteReward(url=server.url), ["a", "b"])
            assert len(server.requests) == 1

    def test_a_number_that_no_float_can_hold_is_refused(self):
        with Server(lambda body: {"scores": [10**400]}) as server, pytest.raises(UserError, match="not numbers"):
            ask(RemoteReward(url=server.url), ["a"])

    def test_a_number_that_is_none_names_the_sample(self):
        with Server(lambda body: Answer(body=b'{"scores": [1, NaN]}')) as server:
            with pytest.raises(UserError, match="reward 'remote' returned nan for sample 1"):
                ask(RemoteReward(url=server.url), ["a", "b"])


class TestTries:
    def test_passing_failures_are_tried_again(self):
        fails = [Answer(status, b"busy") for status in (408, 429, 500, 503)]
        with Server(in_turn(*fails, {"scores": [5]})) as server:
            assert ask(RemoteReward(url=server.url, retries=4), ["a"]) == {"remote": [5]}
            assert len(server.requests) == 5

    def test_the_waits_between_grow(self, monkeypatch):
        monkeypatch.setattr(http, "FIRST_WAIT", 0.2)
        with Server(in_turn(Answer(500), Answer(500), Answer(500), {"scores": [5]})) as server:
            ask(RemoteReward(url=server.url), ["a"])
            waits = [b.time - a.time for a, b in itertools.pairwise(server.requests)]
        assert [wait >= least for wait, least in zip(waits, (0.1, 0.2, 0.4), strict=True)] == [True] * 3

    def test_failures_that_stay_say_what_was_tried_how_often(self):
        with Server(lambda body: Answer(503, b"b" * 1000)) as server:
            with pytest.raises(UserError, match=rf"POST {server.url} answered 503: 'b{{200}}' \(try 3 of 3\)$"):
                ask(RemoteReward(url=server.url, retries=2), ["a"])
            assert len(server.requests) == 3

    @pytest.mark.parametrize("status", [400, 401, 404, 422])
    def test_other_statuses_are_final(self, status):
        with Server(lambda body: Answer(status, b"no such thing")) as server:
            with pytest.raises(UserError, match=rf"answered {status}: 'no such thing' \(try 1 of 4\)"):
                ask(RemoteReward(url=server.url), ["a"])
            assert len(server.requests) == 1

    def test_a_server_that_is_not_there(self):
        with Server(lengths) as server:
            url = server.url
        with pytest.raises(UserError, match=rf"POST {url} failed: ConnectError .* \(try 2 of 2\)"):
            ask(RemoteReward(url=url, retries=1), ["a"])

    def test_the_timeout_is_for_the_whole_answer(self):
        def drops():
            for _ in range(100):
                time.sleep(0.05)
                yield b" "

        started = time.monotonic()
        with Server(lambda body: Answer(body=drops())) as server:
            with pytest.raises(UserError, match=r"had no whole answer within 0\.3 s \(try 2 of 2\)"):
                ask(RemoteReward(url=server.url, retries=1, timeout=0.3), ["a"])
            assert len(server.requests) == 2
        assert time.monotonic() - started < 3

    def test_waiting_for_a_turn_is_no_timeout(self):
        def slow(body):
            time.sleep(0.2)
            return lengths(body)

        with Server(slow) as server:
            ask(RemoteReward(url=server.url, batch_size=1, concurrency=1, timeout=1, retries=0), ["a"] * 8)
            assert len(server.requests) == 8

    def test_retry_after_is_waited_for(self):
        with Server(in_turn(Answer(429, headers={"Retry-After": "0.5"}), {"scores": [5]})) as server:
            assert ask(RemoteReward(url=server.url), ["a"]) == {"remote": [5]}
            first, second = server.requests
        assert second.time - first.time >= 0.5

    @pytest.mark.parametrize(
        "value",
        ["3600", "inf", format_datetime(datetime.now(UTC) + timedelta(days=1))],
        ids=["seconds", "infinite", "date"],
    )
    def test_but_not_for_ever(self, monkeypatch, value):
        monkeypatch.setattr(http, "LONGEST_WAIT", 0.3)
        with Server(in_turn(Answer(503, headers={"Retry-After": value}), {"scores": [5]})) as server:
            ask(RemoteReward(url=server.url), ["a"])
            first, second = server.requests
        assert 0.3 <= second.time - first.time < 3

    def test_a_failure_gives_the_other_requests_up(self):
        def one_bad(body):
            if body["completions"] == ["bad"]:
                return Answer(400)
            time.sleep(5)
            return lengths(body)

        started = time.monotonic()
        with Server(one_bad) as server, pytest.raises(UserError, match="answered 400"):
            ask(RemoteReward(url=server.url, batch_size=1), ["a", "bad", "b"])
        assert time.monotonic() - started < 3


class TestSafety:
    @pytest.mark.parametrize("status", [200, 400])
    def test_reading_stops_at_the_cap(self, status):
        endless = (b"x" * 10_000 for _ in range(100_000))
        with Server(lambda body: Answer(status, endless)) as server:
            message = "more than reward.max_bytes=1000 bytes: 'x{200}'" if status == 200 else "answered 400: 'x{200}'"
            with pytest.raises(UserError, match=message):
                ask(RemoteReward(url=server.url, max_bytes=1000), ["a"])
            assert len(server.requests) == 1
        assert server.sent < 100_000_000  # of 1 GB; some wait in the buffers between

    def test_a_compressed_answer_is_refused_and_not_unpacked(self):
        bomb = b'{"scores": [1]}'
        for _ in range(2):
            bomb = gzip.compress(bomb)
        for encoding in ("gzip, gzip", "gzip", "br"):
            with Server(lambda body, e=encoding: Answer(body=bomb, headers={"Content-Encoding": e})) as server:
                with pytest.raises(UserError, match=rf"answered with the Content-Encoding '{encoding}', .*try 1 of 4"):
                    ask(RemoteReward(url=server.url), ["a"])

    def test_an_answer_just_as_long_as_allowed_is_read(self):
        body = b'{"scores": [1]}'
        with Server(lambda _: Answer(body=body)) as server:
            assert ask(RemoteReward(url=server.url, max_bytes=len(body)), ["a"]) == {"remote": [1]}
            with pytest.raises(UserError, match=r"reward\.max_bytes=14"):
                ask(RemoteReward(url=server.url, max_bytes=len(body) - 1), ["a"])

    def test_redirects_are_not_followed(self):
        with Server(lengths) as elsewhere:
            with Server(lambda body: Answer(307, headers={"Location": elsewhere.url})) as server:
                with pytest.raises(UserError, match="answered 307: ''; redirects are not followed"):
                    ask(RemoteReward(url=server.url), ["a"])
            assert (len(server.requests), len(elsewhere.requests)) == (1, 0)

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("file:///etc/passwd", "must begin with http:// or https:// .*'file'"),
            ("ftp://host/x", "must begin with http:// or https://"),
            ("localhost:8000", "must begin with http:// or https://"),
            ("http://", "must begin with http:// or https:// and name a host"),
            ("", "must begin with"),
            (None, "is no valid URL"),
            ("http://host:port", "is no valid URL"),
            (f"http://me:{SECRET}@host/", "holds a user name or password"),
            (f"me:{SECRET}@host/", "must begin with"),
            (f"http://me:{SECRET}/@host/", "is no valid URL"),
        ],
    )
    def test_other_urls_are_refused_and_a_password_not_shown(self, url, message):
        with pytest.raises(UserError, match=rf"reward\.url {message}") as caught:
            RemoteReward(url=url)
        assert SECRET not in str(caught.value)

    def test_the_token_is_sent_and_never_shown(self, monkeypatch, caplog):
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("JUDGE_TOKEN", SECRET)

        def echo(body):
            return Answer(401, f"bad token: {server.requests[-1].headers['Authorization']}".encode())

        with Server(echo) as server:
            reward = RemoteReward(url=f"{server.url}/x?key=in-the-query", token_env="JUDGE_TOKEN")
            with pytest.raises(UserError, match=r"/x answered 401: 'bad token: Bearer \*\*\*'") as caught:
                ask(reward, ["a"])
        assert server.requests[0].headers["Authorization"] == f"Bearer {SECRET}"
        said = str(caught.value) + caplog.text
        assert SECRET not in said + repr(vars(reward._client))
        assert "in-the-query" not in said

    def test_without_a_token_no_header_is_sent(self):
        with Server(lengths) as server:
            ask(RemoteReward(url=server.url), ["a"])
            assert "Authorization" not in server.requests[0].headers

    @pytest.mark.parametrize("value", [None, "", "two words", "line\n"])
    def test_a_variable_without_a_token_is_refused(self, monkeypatch, value):
        monkeypatch.delenv("JUDGE_TOKEN", raising=False)
        if value is not None:
            monkeypatch.setenv("JUDGE_TOKEN", value)
        with pytest.raises(UserError, match=r"reward\.token_env must name an environment variable"):
            RemoteReward(url="http://host", token_env="JUDGE_TOKEN")

    def test_a_token_in_the_variables_place_is_not_shown(self):
        with pytest.raises(UserError) as caught:
            RemoteReward(url="http://host", token_env=SECRET)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0}, {"concurrency": 0}, {"timeout": 0}, {"retries": -1}, {"max_bytes": 0}, {"columns": "answer"},
        {"columns": ["prompts"]},
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(bad):
    with pytest.raises(UserError, match=rf"reward\.{next(iter(bad))}"):
        RemoteReward(url="http://host", **bad)
