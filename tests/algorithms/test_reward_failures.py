"""A reward that fails for good: the run stops and loses nothing, or goes on without the batch."""

import csv
import time

import pytest
import torch
from algorithms.test_resume import assert_same, make, run, written
from lightning.pytorch.callbacks import ModelCheckpoint
from local_server import Answer, Server
from ppo_runs import fit
from ppo_runs import make as tiny_ppo
from tiny import Prompts, letters

from lit_rlhf.algorithms.attempts import MOST_SKIPPED
from lit_rlhf.callbacks import Samples
from lit_rlhf.callbacks.checkpoints import Checkpoints
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import CSVLogger
from lit_rlhf.rewards import CompositeReward, ConstrainedReward, EnsembleReward, JudgeReward, RemoteReward, http
from lit_rlhf.rewards.failure import RewardFailure, sample_in_hand


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)


def healthy(body):
    return {"scores": letters(body["prompts"], body["completions"])}


def slow(body):
    time.sleep(1)
    return healthy(body)


#: fault -> (what the server answers, what the error says)
FAULTS = {
    "too few": (lambda body: {"scores": [1.0]}, "answered with 1 scores 'remote' for 6 completions"),
    "nan": (lambda body: Answer(body=b'{"scores": [0, 1, NaN, 3, 4, 5]}'), r"nan for sample 2 \(prompt '.*completion"),
    "infinite": (lambda body: Answer(body=b'{"scores": [0, 1, 2, 3, 4, Infinity]}'), "inf for sample 5"),
    "not numbers": (lambda body: {"scores": ["high"] * 6}, "must answer"),
    "garbage": (lambda body: Answer(body=b"\x00\xff<html>"), "something that is no JSON"),
    "500": (lambda body: Answer(500, b"oh no"), r"answered 500: 'oh no' \(try 2 of 2\)"),
    "slow": (slow, r"had no whole answer within 0\.3 s"),
    "hangs up": (lambda body: Answer(headers={"Content-Length": "9999"}), "failed: RemoteProtocolError"),
    "100 MB": (lambda body: Answer(body=(b"1" * 10**6 for _ in range(100))), r"more than reward.max_bytes=10000000"),
}  # fmt: skip


class Failing:
    """Answers as a healthy server but at some requests, counted from 0."""

    def __init__(self, answer, *requests):
        self.answer, self.requests, self.count = answer, requests, -1

    def __call__(self, body):
        self.count += 1
        return self.answer(body) if self.count in self.requests else healthy(body)


def remote(server, **settings):
    return RemoteReward(url=server.url, retries=0, timeout=0.3, **settings)


def fresh(reward):
    return make(reward=reward, gold=None, ppo_epochs=1)


QUIET = {"until": 3, "limit_val_batches": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with Server(healthy) as server:
        return run(folder, fresh(RemoteReward(url=server.url)), **QUIET), folder


@pytest.mark.parametrize(("fault", "request_number"), [*((fault, 2) for fault in FAULTS), ("500", 0)])
def test_it_stops_with_a_checkpoint_that_goes_on_as_if_nothing_had_happened(tmp_path, whole, fault, request_number):
    answer, message = FAULTS[fault]
    requests = range(request_number, 99)
    with Server(Failing(answer, *requests)) as server:
        reward = remote(server)
        if fault == "500":
            reward = RemoteReward(url=server.url, retries=1)
        with pytest.raises(RewardFailure, match=rf"(?s){message}.*{tmp_path}/checkpoints/last.ckpt is of this moment"):
            run(tmp_path, fresh(reward), every_n_train_steps=10**6, **QUIET)
    with Server(healthy) as server:
        path = tmp_path / "checkpoints/last.ckpt"
        assert torch.load(path, weights_only=True)["lit_rlhf"]["iteration"] == request_number
        resumed = run(tmp_path, fresh(remote(server)), ckpt_path=path, **QUIET)
    assert_same(whole[0], resumed, whole[1], tmp_path)


def test_a_server_that_is_down_stops_it_too(tmp_path):
    with Server(healthy) as server:
        reward = RemoteReward(url=server.url, retries=1)
    with pytest.raises(RewardFailure, match=r"failed: ConnectError .* \(try 2 of 2\).*is of this moment"):
        run(tmp_path, fresh(reward), **QUIET)


NESTED = {
    "alone": lambda reward: reward,
    "composite": lambda reward: CompositeReward(rewards={"remote": reward}, weights={"remote": 1.0}),
    "constraint": lambda reward: ConstrainedReward(objective=letters, constraint=reward, threshold=0.0),
    "nested": lambda reward: EnsembleReward(
        rewards={"a": CompositeReward(rewards={"b": reward}, weights={"b": 2.0}), "letters": letters}
    ),
}


@pytest.mark.parametrize(("fault", "nesting"), [("nan", "alone"), ("100 MB", "alone"), *(("500", n) for n in NESTED)])
def test_or_it_goes_on_with_the_next_prompts(tmp_path, caplog, fault, nesting):
    """With the same random numbers: the batch that was left out is the only difference in what is drawn."""
    with Server(Failing(FAULTS[fault][0], 1, 2)) as server:
        reward = NESTED[nesting](remote(server, on_failure="skip_batch"))
        ppo = run(tmp_path, fresh(reward), **{**QUIET, "until": 2})
        assert len(server.requests) == 4
    assert ppo.axes["iteration"] == 2
    assert [float(row["rollout/skipped_batches"]) for row in written(tmp_path)[0]] == [0, 2]
    assert "iteration 2: the batch is left out" in caplog.text
    # 18 prompts in a row: 6 of iteration 1, 6 and 6 left out, 6 of iteration 2.
    prompts = [request.body["prompts"] for request in server.requests]
    assert ppo.loader.prompts.state_dict()["passes"]["number"] == 2  # of 8 prompts each, the third pass
    with Server(healthy) as server:
        run(tmp_path / "more", fresh(remote(server)), **{**QUIET, "until": 4})
        assert [request.body["prompts"] for request in server.requests] == prompts


def test_a_run_that_left_a_batch_out_resumes_exactly(tmp_path):
    settings = {"until": 3, "limit_val_batches": 0}
    with Server(Failing(FAULTS["500"][0], 1)) as server:
        one = run(tmp_path / "one", fresh(remote(server, on_failure="skip_batch")), **settings)
    with Server(Failing(FAULTS["500"][0], 1)) as server:
        run(tmp_path / "two", fresh(remote(server, on_failure="skip_batch")), **{**settings, "until": 2})
        path = tmp_path / "two/checkpoints/last.ckpt"
        two = run(tmp_path / "two", fresh(remote(server, on_failure="skip_batch")), ckpt_path=path, **settings)
    assert_same(one, two, tmp_path / "one", tmp_path / "two")


def test_it_gives_up_at_the_fifth_in_a_row_and_loses_nothing(tmp_path, whole):
    with Server(Failing(FAULTS["500"][0], *range(1, 99))) as server:
        with pytest.raises(RewardFailure, match=r"answered 500.*\(5 batches in a row\).*is of this moment"):
            run(tmp_path, fresh(remote(server, on_failure="skip_batch")), **QUIET)
        assert len(server.requests) == 1 + MOST_SKIPPED == 6
    with Server(healthy) as server:
        resumed = run(tmp_path, fresh(remote(server)), ckpt_path=tmp_path / "checkpoints/last.ckpt", **QUIET)
    assert_same(whole[0], resumed, whole[1], tmp_path)


def test_a_batch_of_the_validation_is_left_out_and_counted(trainer, caplog):
    """Requests of an iteration: 8 training completions, then 2 validation batches."""
    def broken_second_batch(body):
        return Answer(500) if body["prompts"] == list(Prompts.texts[2:4]) else healthy(body)

    rows = []
    for answer, skipped in ((healthy, 0), (broken_second_batch, 1)):
        with Server(answer) as server:
            ppo = tiny_ppo(reward=remote(server, on_failure="skip_batch"))
            watch = fit(trainer, ppo, data=Prompts(validation=True), max_epochs=1)
        rows.append([row for row in watch.samples if row["split"] == "validation"])
        assert watch.rows[0]["val/rollout/skipped_batches"] == skipped
    assert rows[1] == rows[0][:2]
    assert "validation: the batch is left out (1 of at most 4 in a row): reward.url: POST" in caplog.text


def test_a_validation_of_which_every_batch_is_left_out_is_not_repeated(trainer):
    def broken_validation(body):
        return Answer(500) if len(body["prompts"]) == 2 else healthy(body)

    with Server(broken_validation) as server:
        ppo = tiny_ppo(reward=remote(server, on_failure="skip_batch"), target_kl=1e-9)  # updates end early
        watch = fit(trainer, ppo, data=Prompts(validation=True), max_epochs=1)
        assert len(server.requests) == 3
    assert watch.rows[0]["val/rollout/skipped_batches"] == 2
    assert not any(row["split"] == "validation" for row in watch.samples)


class Dead:
    """Raises when ``ppo`` validates after ``number`` iterations and the one under way."""

    name = "letters"

    def __init__(self, number, raises=None):
        self.number, self.raises, self.ppo = number, raises, None

    def __call__(self, prompts, completions, **columns):
        if len(prompts) == 2 and self.ppo.iteration == self.number:
            raise self.raises
        return letters(prompts, completions)


KEEPERS = {
    "Checkpoints": lambda folder: Checkpoints(dirpath=folder / "checkpoints", every_n_epochs=100),
    "ModelCheckpoint": lambda folder: ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=10**6),
}


@pytest.mark.parametrize(
    ("case", "error", "keeper"),
    [
        ("in the middle", KeyError("mistake"), "ModelCheckpoint"),
        ("the last", UserError("gone"), "ModelCheckpoint"),
        ("missed", UserError("gone"), "Checkpoints"),
        ("updates that end early", UserError("gone"), "Checkpoints"),
    ],
)
def test_a_validation_whose_reward_stops_ends_the_run_with_a_checkpoint_that_loses_nothing(
    tmp_path, trainer, case, error, keeper
):
    """The last one, too, and one that is not the fit loop's: a run never looks complete without it."""
    number = 0 if case == "in the middle" else 2

    def once(folder, dead=None, ckpt_path=None):
        changes = {"target_kl": 1e-9} if case == "updates that end early" else {}
        ppo = make(reward=dead or letters, gold=None, ppo_epochs=1, **changes)
        if dead is not None:
            dead.ppo = ppo
        fit = trainer(
            max_epochs=3, check_val_every_n_epoch=2 if case == "missed" else 1, logger=CSVLogger(save_dir=folder),
            callbacks=[KEEPERS[keeper](folder), Samples(every_n_iterations=1)], default_root_dir=folder,
            enable_checkpointing=True,
        )  # fmt: skip
        fit.fit(ppo, datamodule=Prompts(validation=True), ckpt_path=ckpt_path)
        return ppo

    whole = once(tmp_path / "whole")
    folder, path = tmp_path / "cut", None
    for _ in range(2):  # it may be gone for longer
        with pytest.raises(type(error)) as caught:
            once(folder, Dead(number, error), path)
        said = "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
        assert ("validation: gone" if isinstance(error, UserError) else "mistake") in said
        assert "is of this moment" in said
        path = folder / "checkpoints/last.ckpt"
        assert torch.load(path, weights_only=True)["lit_rlhf"]["iteration"] == number
    assert_same(whole, once(folder, None, path), tmp_path / "whole", folder)


def test_a_left_out_batch_of_the_validation_moves_no_random_number(trainer):
    def broken_first_batch(body):
        return Answer(500) if body["prompts"] == list(Prompts.texts[:2]) else healthy(body)

    samples = []
    for answer in (healthy, broken_first_batch):
        with Server(answer) as server:
            ppo = tiny_ppo(reward=remote(server, on_failure="skip_batch"))
            watch = fit(trainer, ppo, data=Prompts(validation=True), max_epochs=1)
        samples.append([row["completion"] for row in watch.samples if row["split"] == "validation"])
    assert samples[1] == samples[0][2:]


def test_before_training_a_reward_that_stops_ends_the_validation(trainer):
    with Server(lambda body: Answer(500)) as server:
        for on_failure in ("stop", "skip_batch"):
            validation = trainer()
            settings = {"datamodule": Prompts(validation=True), "verbose": False}
            if on_failure == "stop":
                with pytest.raises(RewardFailure, match="answered 500"):
                    validation.validate(tiny_ppo(reward=remote(server)), **settings)
            else:
                validation.validate(tiny_ppo(reward=remote(server, on_failure=on_failure)), **settings)


def test_a_judge_may_leave_a_batch_out(trainer):
    count = 0

    def chat(body):
        nonlocal count
        count += 1
        return Answer(500) if count <= 8 else {"choices": [{"message": {"content": "Score: 5"}}]}

    with Server(chat) as server:
        judge = JudgeReward(base_url=server.url, model="m", rubric="r", retries=0, on_failure="skip_batch")
        watch = fit(trainer, tiny_ppo(reward=judge), max_epochs=1)
    assert watch.rows[0]["rollout/skipped_batches"] >= 1
    assert watch.rows[0]["objective/scores"] == pytest.approx(4 / 9)


@pytest.mark.parametrize("kind", [RemoteReward, JudgeReward])
def test_another_way_to_fail_is_refused(kind):
    where = {"url": "http://x"} if kind is RemoteReward else {"base_url": "http://x", "model": "m", "rubric": "r"}
    with pytest.raises(UserError, match=r"reward\.on_failure must be one of stop, skip_batch, got 'ignore'"):
        kind(**where, on_failure="ignore")


class Spoiled:
    """A function of the user's: NaN for the third completion of some calls, counted from 0."""

    name = "own"

    def __init__(self, *calls):
        self.calls, self.count = calls, -1

    def __call__(self, prompts, completions, **columns):
        self.count += 1
        scores = letters(prompts, completions)
        return [*scores[:2], float("nan"), *scores[3:]] if self.count in self.calls else scores


def test_a_batch_with_a_reward_that_is_not_finite_is_skipped_and_counted(tmp_path, caplog):
    run(tmp_path / "own", fresh(Spoiled(1, 2)), **{**QUIET, "until": 2})
    assert [float(row["rollout/skipped_batches"]) for row in written(tmp_path / "own")[0]] == [0, 2]
    assert "(2 of at most 9 in a row): reward 'own' returned nan for sample 2 (prompt " in caplog.text
    with Server(Failing(FAULTS["500"][0], 1, 2)) as server:
        run(tmp_path / "remote", fresh(remote(server, on_failure="skip_batch")), **{**QUIET, "until": 2})
    rows = [written(tmp_path / name)[0] for name in ("own", "remote")]
    losses = [[(row["objective/scores"], row["loss/total"]) for row in found] for found in rows]
    assert losses[0] == losses[1]  # nothing of the batch is learned


def test_too_many_of_them_in_a_row_stop_with_the_last_good_checkpoint(tmp_path, whole):
    spoiled = make(reward=Spoiled(1, *range(3, 99)), gold=None, ppo_epochs=1, max_skipped_steps=2)
    message = r"iteration 3: reward 'own' returned nan for sample 2 \(prompt '.*completion .*\) \(2 batches in a row, "
    with pytest.raises(RewardFailure, match=rf"{message}algorithm.max_skipped_steps=2\)\. .*is of this moment"):
        run(tmp_path, spoiled, **QUIET)
    stored = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["lit_rlhf"]
    assert stored["iteration"] == 2
    composite = CompositeReward(rewards={"mine": Spoiled(*range(99))}, weights={"mine": 1.0})
    with pytest.raises(RewardFailure, match=r"nan .*\(10 batches in a row, algorithm.max_skipped_steps=10\)"):
        run(tmp_path / "composite", fresh(composite), **QUIET)


@pytest.mark.parametrize(("on_failure", "count"), [("stop", ""), ("skip_batch", r"\(5 batches in a row\)")])
def test_a_reward_that_says_what_happens_when_it_fails_says_it_of_nan_too(tmp_path, on_failure, count):
    own = Spoiled(*range(99))
    own.on_failure = on_failure
    with pytest.raises(RewardFailure, match=rf"returned nan for sample 2 \(prompt .*\) ?{count}\. .*is of this moment"):
        run(tmp_path, fresh(own), **QUIET)


def test_a_mistake_in_a_reward_names_the_sample_and_leaves_a_checkpoint(tmp_path):
    seen = []

    def careless(prompts, completions, **columns):
        scores = []
        for text in completions:
            if len(scores) == 3:
                seen.append(text)
                raise KeyError("missing")
            scores.append(1.0)
        return scores

    with pytest.raises(KeyError, match="missing") as caught:
        run(tmp_path, fresh(careless), **QUIET)
    first, second = caught.value.__notes__
    assert first.startswith("The reward 'careless' raised this for sample 3 (prompt '")
    assert f"completion {seen[0][:80]!r})" in first
    assert f"{tmp_path}/checkpoints/last.ckpt is of this moment" in second
    assert caught.traceback[-1].name == "careless"


def test_where_no_variable_holds_a_sample_the_first_one_is_named(tmp_path):
    def vectorised(prompts, completions, **columns):
        raise ZeroDivisionError

    composite = CompositeReward(rewards={"mine": vectorised}, weights={"mine": 1.0})
    with pytest.raises(ZeroDivisionError) as caught:
        run(tmp_path, fresh(composite), **QUIET)
    assert caught.value.__notes__[0].startswith(
        "The reward 'vectorised' raised this for one of 6 samples, of which the first is sample 0 (prompt '"
    )


def test_the_innermost_frame_counts():
    texts = ["".join(["a", str(i)]) for i in range(4)]

    def inner(text):
        raise ValueError

    def outer(completions):
        other = completions[0]
        return [inner(text) for text in completions[2:] if other]

    with pytest.raises(ValueError, match=r"^$") as caught:
        outer(texts)
    assert sample_in_hand(caught.value.__traceback__, texts) == 2
    assert sample_in_hand(None, texts) is None


def test_rows_of_before_stay(tmp_path):
    with Server(Failing(FAULTS["500"][0], *range(2, 99))) as server, pytest.raises(RewardFailure):
        run(tmp_path, fresh(remote(server)), **QUIET)
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["1", "2"]


def test_a_rewards_state_is_that_of_before_the_failure(tmp_path):
    class Counting:
        calls = 0

        def __call__(self, prompts, completions, **columns):
            self.calls += 1
            if self.calls == 2:
                raise UserError("gone")
            return letters(prompts, completions)

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    with pytest.raises(RewardFailure, match="gone"):
        run(tmp_path, fresh(Counting()), **QUIET)
    stored = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["lit_rlhf"]
    assert stored["reward"] == {"calls": 1}
