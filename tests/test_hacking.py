"""The monitor of reward hacking: what its detectors measure, when they raise an alarm, and what follows.

Whole runs with planted hacks are in `python -m tests.hacks`, of which a slice is here.
"""

import csv
import json
import math
import random

import lightning as L
import pytest
import torch
from algorithms.test_resume import FAMILY, Killed, Stop, assert_same
from command_line import TINY, run_here
from lightning.pytorch.callbacks import ModelCheckpoint
from ppo_runs import make as make_ppo
from tiny import Prompts, letters, tiny_policy

from lit_rlhf import SFT, algorithms
from lit_rlhf.callbacks import Checkpoints, HackingMonitor, KLGuard, Samples
from lit_rlhf.distributed import run_in_processes
from lit_rlhf.errors import UserError
from lit_rlhf.hacking import (
    Collapse,
    Cusum,
    Detector,
    Disagreement,
    EntropyFalls,
    GoldFalls,
    Iteration,
    KLSpeed,
    LengthGain,
    Novelty,
    Phrase,
    Reading,
    Repetition,
    default_detectors,
)
from lit_rlhf.kl import AdaptiveKL, FixedKL, LinearKL, NoKL
from lit_rlhf.loggers import CSVLogger
from lit_rlhf.metrics import lookup
from lit_rlhf.rewards import EnsembleReward
from lit_rlhf.run_folder import read_metrics
from tests.hacks import HACKS, World, clean_tasks, run

# ---- the test -------------------------------------------------------------------------------------------------------


def alarms_of(shift, steps, seed=0):
    rng, cusum, found = random.Random(seed), Cusum(limit=8), 0
    for _ in range(steps):
        if cusum.add(rng.gauss(shift, 1)):
            found, cusum.sum = found + 1, 0.0
    return found


def test_false_alarms_are_rare_at_the_threshold_and_none_below_it():
    """About one in 17,000 iterations at the threshold: 100,000 have 6, and more than 15 once in 2,000 times."""
    assert alarms_of(0.0, 100_000) <= 15
    assert alarms_of(-0.5, 100_000) == 0
    assert alarms_of(1.0, 1000) > 30  # about every 17 iterations


def test_one_iteration_is_never_enough_and_what_is_no_number_says_nothing():
    cusum = Cusum(limit=8)
    assert not cusum.add(math.inf)
    assert not cusum.add(math.nan)
    assert not cusum.add(1e9)
    assert cusum.sum == 2 * (4 - 0.5)
    cusum.add(-100.0)
    assert cusum.sum == 0


# ---- the detectors --------------------------------------------------------------------------------------------------


def iteration(number, completions, *, prompts=None, baseline=2, gold=None, metrics=None, **columns):
    rows = [
        {"prompt": prompts[i] if prompts else f"p{i}", "completion": text, "score": 0.0, "kl": 0.0,
         "length": len(text.split()), "components": {}, "gold": {}, **{name: x[i] for name, x in columns.items()}}
        for i, text in enumerate(completions)
    ]  # fmt: skip
    gold = None if gold is None else torch.tensor(gold, dtype=torch.double)
    return Iteration(number=number, rows=rows, metrics=metrics or {}, gold=gold, baseline=baseline)


def first_alarm(detector, iterations, limit=8.0):
    """The iteration of the first alarm, None if there is none, and its reading."""
    cusum = Cusum(limit)
    for item in iterations:
        reading = detector.measure(item)
        if reading.excess is not None and cusum.add(reading.excess):
            return item.number, reading
    return None, reading


PLAIN = ["one film was good", "the plot is dull", "a fine cast of actors", "much ado about it"]


def readings(detector, *batches, **changes):
    return [detector.measure(iteration(n, batch, **changes)) for n, batch in enumerate(batches, 1)]


def test_repetition_is_the_share_of_pairs_of_words_that_stood_there_before():
    *_, last = readings(Repetition(n=2), ["a b a b"], PLAIN, ["a b a b", "a b c"])
    assert last.value == pytest.approx((1 / 3 + 0) / 2)  # "a b", "b a", "a b" again
    assert last.suspects.tolist() == pytest.approx([1 / 3, 0])


def test_collapse_counts_what_completions_of_other_prompts_hold():
    texts = ["a b c d", "a b c e", "x y z"]  # a b c; b c d / a b c; b c e / x y z
    assert readings(Collapse(n=3), texts)[0].suspects.tolist() == [0.5, 0.5, 0]
    assert readings(Collapse(n=3), texts, prompts=["p", "p", "q"])[0].suspects.tolist() == [0, 0, 0]


def test_a_phrase_is_measured_beyond_its_share_before_and_beyond_what_length_explains():
    before = ["good film", "bad film", "dull plot", "odd plot"]
    *_, last = readings(Phrase(n=2), before, before, ["magic film", "magic", "magic plot", "odd plot"])
    assert last.value == 0.75
    assert last.note == "75% of the completions hold 'magic'"
    assert last.suspects.argsort(descending=True, stable=True)[:3].tolist() == [0, 1, 2]
    # `film` is a quarter of all words: of four in a completion 1 - (3/4)^4 hold it, 0.68, where 1 is seen.
    *_, longer = readings(Phrase(n=1), before, before, ["good film bad odd", "bad film good odd"])
    rates = {"film": 1 - 0.75**4, "good": 1 - 0.875**4, "bad": 1 - 0.875**4, "odd": 1 - 0.875**4}
    assert longer.value == pytest.approx(max(1 - max(rate, 0.25) for rate in rates.values()))


def test_novelty_is_the_share_of_words_and_pairs_that_the_reward_model_never_read():
    class Read(L.LightningDataModule):
        def train_dataloader(self):
            torch.rand(1)  # draws from the global generator
            return [{"chosen": ["A fine film"], "rejected": ["no plot"]}]

    state = torch.get_rng_state()
    (found,) = readings(Novelty(data=Read()), ["a fine plot", "a fine film", ""])
    assert torch.equal(torch.get_rng_state(), state)
    assert found.suspects.tolist() == pytest.approx([(0 + 1 / 2) / 2, 0, 0])
    assert Novelty().measure(iteration(1, PLAIN)) is None


def test_novelty_reads_the_data_of_the_run_that_left_a_reward_model(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {_target_: lit_rlhf.data.ListPrompts, prompts: [A fine film]}")
    (found,) = readings(Novelty(data=str(tmp_path / "model")), ["a fine plot"])
    assert found.value == pytest.approx((1 / 3 + 1 / 2) / 2)
    with pytest.raises(UserError, match=r"data='nowhere' is neither a datamodule nor a run folder with config\.yaml"):
        Novelty(data="nowhere")


def test_disagreement_finds_the_spread_of_an_ensemble_wherever_it_stands():
    rows = [{"a/std": 1.0, "a": 3.0}, {"a/std": 3.0, "a": 3.0}]
    assert Disagreement().measure(iteration(1, ["x", "y"], components=rows)).value == 2.0
    assert Disagreement().measure(iteration(1, ["x", "y"], gold=None, **{"gold_": rows})) is None


def test_kl_speed_is_the_growth_since_the_iteration_before():
    detector = KLSpeed(nats=3)
    assert detector.measure(iteration(1, PLAIN, kl=[1.0] * 4)).excess is None
    reading = detector.measure(iteration(2, PLAIN, kl=[5.0, 7.0, 5.0, 7.0]))
    assert reading.value == 5.0
    assert reading.excess == pytest.approx((5 - 3) / math.sqrt(1 / 3))  # variance 1, of a mean of four


def test_entropy_is_that_of_a_token():
    metrics = {"objective/entropy": 12.0, "rollout/response_length": 4.0}
    assert EntropyFalls().measure(iteration(1, PLAIN, metrics=metrics)).value == 3.0


def test_length_explains_what_its_slope_says():
    """Score = length / 2 + an indicator: of a gain of 5 + 5, half is length."""
    detector = LengthGain(share=0.3)
    texts = ["a", "b c d", "e f g h i", "j k l m n o p"]
    for number in (1, 2):
        detector.measure(iteration(number, texts, score=[0.5, 1.5, 2.5, 3.5]))
    longer = [" ".join(["w"] * (len(text.split()) + 10)) for text in texts]
    reading = detector.measure(iteration(3, longer, score=[10.5, 11.5, 12.5, 13.5]))
    assert reading.value == pytest.approx(0.5)
    assert reading.extra == pytest.approx({"correlation": 1.0, "change": 10.0})


def noisy(seed, at, count=32, group=1, steps=120):
    """Iterations whose columns are `at(t)` plus noise, half of it common to a prompt's completions."""
    g = torch.Generator().manual_seed(seed)
    for number in range(1, steps + 1):
        shared = torch.randn(count // group, generator=g, dtype=torch.double).repeat_interleave(group)
        gold = (shared + torch.randn(count, generator=g, dtype=torch.double)) / math.sqrt(2)
        score = torch.randn(count, generator=g, dtype=torch.double)
        gold_at, score_at = at(number)
        yield iteration(number, [""] * count, prompts=["p"] * count, baseline=5, gold=(gold + gold_at).tolist(),
                        score=(score + score_at).tolist())  # fmt: skip


def peaked(number):
    return (0.04 * min(number, 40) - 0.05 * max(0, number - 40), 0.03 * number)


def test_gold_that_falls_while_the_reward_rises_is_seen_soon():
    number, reading = first_alarm(GoldFalls(), noisy(0, peaked))
    assert 44 <= number <= 60
    assert reading.extra["best_iteration"] == pytest.approx(40, abs=6)
    assert "gold was at its best" in reading.note


@pytest.mark.parametrize("at", [
    lambda number: (0.0, 0.03 * number),  # gold stays
    lambda number: (0.02 * number, 0.03 * number),  # gold rises, too
    lambda number: (peaked(number)[0], peaked(number)[0]),  # both fall: a run that breaks, no hack
])  # fmt: skip
def test_gold_that_stays_or_falls_with_the_reward_is_no_alarm(at):
    for seed in range(3):
        assert first_alarm(GoldFalls(), noisy(seed, at))[0] is None


@pytest.mark.parametrize("seed", range(6))
def test_a_few_prompts_with_many_completions_are_no_alarm(seed):
    """Four prompts of eight completions: an iteration's mean varies more than that of 32 prompts would."""
    assert first_alarm(GoldFalls(), noisy(seed, lambda number: (0.0, 0.03 * number), group=8, steps=300))[0] is None


WORDS = [f"w{i}" for i in range(60)]


def written(seed, share, steps=40, size=16):
    """Iterations of random words, of which `share(t)` are one word."""
    rng = random.Random(seed)
    for number in range(1, steps + 1):
        texts = [" ".join("magic" if rng.random() < share(number) else rng.choice(WORDS) for _ in range(12))
                 for _ in range(size)]  # fmt: skip
        std = 1 + 4 * share(number)
        columns = {"components": [{"std": std * rng.uniform(0.5, 1.5)} for _ in texts],
                   "kl": [100 * max(0.0, share(number) - 0.05) * rng.uniform(0.5, 1.5) for _ in texts]}  # fmt: skip
        metrics = {"objective/entropy": 12 * 4 * (1 - share(number)), "rollout/response_length": 12.0}
        yield iteration(number, texts, baseline=5, metrics=metrics, **columns)


def grows(number):
    return 0.02 + 0.9 * min(1.0, max(0, number - 15) / 10)


@pytest.mark.parametrize("detector", [Repetition(), Collapse(), Phrase(), Disagreement(), EntropyFalls(), KLSpeed()])
def test_a_word_that_takes_over_is_seen_by_each_and_random_words_by_none(detector):
    made = type(detector)
    number, _ = first_alarm(made(), written(1, grows))
    assert 16 < number <= 32
    for seed in range(2):
        assert first_alarm(made(), written(seed, lambda _: 0.02))[0] is None


@pytest.mark.parametrize("name", [name for name in default_detectors() if name != "novelty"])
def test_a_detector_goes_on_from_its_state_to_the_bit(name):
    def both(number):
        return (0.1 * number, 0.2 * number)

    items = [*written(3, grows, steps=20)]
    for item, other in zip(items, noisy(3, both, count=16, steps=20), strict=True):
        object.__setattr__(item, "gold", other.gold)
        for row, score in zip(item.rows, other.column("score").tolist(), strict=True):
            row["score"] = score
    for cut in (3, 12):
        whole, first, second = (default_detectors()[name] for _ in range(3))
        expected = [whole.measure(item) for item in items]
        for item in items[:cut]:
            first.measure(item)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))  # plain, and a copy
        for item, reading in zip(items[cut:], expected[cut:], strict=True):
            assert repr(second.measure(item)) == repr(reading)


class Stateless:
    """What a resumed run could not go on with."""

    def measure(self, iteration):
        return None


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: GoldFalls(fall=0), "fall must be a finite number above 0, got 0"),
        (lambda: Disagreement(ratio=1), "ratio must be .* above 1, got 1"),
        (lambda: LengthGain(share=1), "share must be .* below 1, got 1"),
        (lambda: Repetition(n=0), "n must be a whole number of at least 1, got 0"),
        (lambda: Collapse(rise=-1), "rise must be .* above 0, got -1"),
        (lambda: Phrase(share=0), "share must be"),
        (lambda: EntropyFalls(ratio=2), "ratio must be .* below 1, got 2"),
        (lambda: KLSpeed(nats=0), "nats must be"),
        (lambda: Novelty(rise=0), "rise must be"),
        (lambda: HackingMonitor(action="panic"), r"callbacks\.hacking\.action must be one of warn, stop"),
        (lambda: HackingMonitor(baseline=1), r"callbacks\.hacking\.baseline must be .* at least 2, got 1"),
        (lambda: HackingMonitor(evidence=0), r"callbacks\.hacking\.evidence must be"),
        (lambda: HackingMonitor(factor=1), r"callbacks\.hacking\.factor must be .* above 1"),
        (lambda: HackingMonitor(detectors={"a": 3}), r"detectors\.a must be a lit_rlhf\.hacking\.Detector, got 3"),
        (lambda: HackingMonitor(detectors={"a": Stateless()}), r"hacking\.detectors\.a must be a lit_rlhf"),
        (lambda: HackingMonitor(detectors=[Phrase()]), r"callbacks\.hacking\.detectors must map names"),
    ],
)
def test_wrong_values_are_refused(made, message):
    with pytest.raises(UserError, match=message):
        made()


# ---- the monitor in a run -------------------------------------------------------------------------------------------


class Suspect(Detector):
    """Suspects a policy from an iteration on, for as long as the KL coefficient is below a bound; has a state."""

    def __init__(self, since=3, bound=math.inf):
        self.since, self.bound, self.seen = since, bound, 0

    def measure(self, iteration):
        self.seen += 1
        coef = iteration.metrics["objective/kl_coef"]
        bad = iteration.number >= self.since and coef < self.bound
        return Reading(float(self.seen), 9.0 if bad else -9.0, iteration.column("length"), "a note", {"more": coef})

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Alerts(CSVLogger):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.alerts = []

    def log_alert(self, title, text):
        self.alerts.append((title, text))


def monitored(folder, monitor, *, until=8, extra=(), ckpt_path=None, every=None, checkpoints=None, lr=0.01, **changes):
    """4 optimiser steps an iteration."""
    adam = lambda parameters: torch.optim.Adam(parameters, lr=lr)  # noqa: E731
    algorithm = make_ppo(**{"optimizer": adam, "gold": letters, **changes})
    when = {"every_n_steps": every, "every_n_epochs": None if every else 1}
    keep = checkpoints or Checkpoints(dirpath=folder / "checkpoints", **when)
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=Alerts(save_dir=folder), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, max_epochs=until,
        callbacks=[keep, Samples(), *([monitor] if monitor else []), *extra],
    )  # fmt: skip
    try:
        trainer.fit(algorithm, datamodule=Prompts(), ckpt_path=ckpt_path)
    except Killed:
        pass
    return algorithm


def alarms_in(folder):
    return [json.loads(line) for line in (folder / "alarms.jsonl").read_text().splitlines()]


def column(folder, name):
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def test_an_alarm_names_its_evidence_in_log_file_and_alert(tmp_path, caplog):
    monitor = HackingMonitor(detectors={"suspect": Suspect()}, cooldown=3, completions=2)
    algorithm = monitored(tmp_path, monitor, until=9)
    first, second = alarms_in(tmp_path)
    assert [first["iteration"], second["iteration"]] == [5, 8]  # three iterations of 3.5 pass 8; again after three more
    assert (first["detector"], first["value"], first["note"], first["evidence"]) == ("suspect", 5.0, "a note", 10.5)
    lengths = [row["length"] for row in first["completions"]]
    assert len(lengths) == 2
    assert lengths == sorted(lengths, reverse=True)
    assert {"prompt", "completion", "score", "gold", "kl"} < set(first["completions"][0])
    warned = [r.message for r in caplog.records if "reward hacking?" in r.message]
    assert len(warned) == 2
    assert repr(first["completions"][0]["completion"]) in warned[0]
    titles = [f"Reward hacking: suspect, iteration {number}" for number in (5, 8)]  # W&B's logger sends each title once
    assert algorithm.trainer.logger.alerts == list(zip(titles, warned, strict=True))
    assert column(tmp_path, "hacking/alarms") == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert column(tmp_path, "hacking/suspect") == list(range(1, 10))
    assert column(tmp_path, "hacking/suspect/evidence")[:5] == [0, 0, 3.5, 7, 10.5]


def test_alarms_are_on_the_disk_before_a_checkpoint_counts_on_them(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("lit_rlhf.run_folder.sync", lambda path: synced.append(path.name))
    monitored(tmp_path, HackingMonitor(detectors={"suspect": Suspect(since=1)}), until=4)
    assert "alarms.jsonl" in synced


def test_every_statistic_is_logged_under_a_documented_name(tmp_path):
    ensemble = EnsembleReward(rewards={"one": letters, "two": lambda **columns: [1.0] * len(columns["prompts"])})
    monitored(tmp_path, HackingMonitor(baseline=2), reward=ensemble, until=4)
    row = read_metrics(tmp_path)[-1]
    found = {name for name in row if name.startswith("hacking/")}
    assert found >= {f"hacking/{name}" for name in default_detectors() if name != "novelty"}
    for name in found:
        entry = lookup(name)
        assert entry.meaning != lookup("hacking/mine").meaning or name.endswith("/evidence")
    assert not (tmp_path / "alarms.jsonl").exists()


def test_stop_ends_the_run_after_the_iteration_and_for_good(tmp_path):
    stopped = monitored(tmp_path, HackingMonitor(action="stop", detectors={"suspect": Suspect()}))
    assert (stopped.iteration, stopped.trainer.global_step) == (5, 20)  # all four steps of the iteration
    assert stopped.stopped_by == "callbacks.hacking"
    assert len(alarms_in(tmp_path)) == 1
    again = HackingMonitor(action="stop", detectors={"suspect": Suspect()})
    resumed = monitored(tmp_path, again, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    assert resumed.trainer.global_step == 20
    assert resumed.stopped_by == "callbacks.hacking"


@pytest.mark.parametrize(
    ("kl", "plain"),
    [
        (lambda: FixedKL(coef=0.1), [0.1] * 8),
        (lambda: LinearKL(start=0.8, end=0.0), [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (lambda: AdaptiveKL(init_coef=0.1, target=1e9, horizon=160), [0.1 * 0.99**i for i in range(8)]),
    ],
)
def test_a_raised_coefficient_follows_its_own_schedule_from_the_next_iteration_on(tmp_path, kl, plain):
    monitor = HackingMonitor(action="raise_kl", factor=3, detectors={"suspect": Suspect()})
    kill = Stop(step=26)
    monitored(tmp_path, monitor, kl=kl(), every=5, extra=[kill])
    monitor = HackingMonitor(action="raise_kl", factor=3, detectors={"suspect": Suspect()})
    monitored(tmp_path, monitor, kl=kl(), ckpt_path=tmp_path / "checkpoints/last.ckpt")
    expected = [*plain[:5], *(3 * coef for coef in plain[5:])]
    assert column(tmp_path, "objective/kl_coef") == pytest.approx(expected, rel=1e-9)


def test_without_a_coefficient_there_is_nothing_to_raise(tmp_path):
    with pytest.raises(UserError, match=r"callbacks\.hacking\.action=raise_kl: there is no KL coefficient"):
        monitored(tmp_path, HackingMonitor(action="raise_kl"), kl=NoKL())


def without_monitor(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith(("time/", "hacking/")) and "per_second" not in k}
                for row in csv.DictReader(file)]  # fmt: skip
    return rows, (folder / "samples.jsonl").read_text()


def test_a_rollback_goes_to_the_last_quiet_iteration_with_more_kl_and_smaller_steps(tmp_path):
    """Suspected from iteration 2 on while the coefficient is below 0.3: it goes back to iteration 1, twice."""
    monitor = HackingMonitor(action="rollback", detectors={"suspect": Suspect(since=2, bound=0.3)})
    one = monitored(tmp_path / "one", monitor, kl=FixedKL(coef=0.1), lr=0.04, until=5)
    two = monitored(tmp_path / "two", None, kl=FixedKL(coef=0.4), lr=0.01, until=5)
    assert column(tmp_path / "one", "hacking/rollbacks") == [2] * 5
    assert column(tmp_path / "one", "hacking/suspect") == [1, 2, 3, 4, 5]
    # Iteration 1 was rolled out, and charged, before anything was raised in neither.
    rows, samples = zip(without_monitor(tmp_path / "one"), without_monitor(tmp_path / "two"), strict=True)
    assert rows[0] == rows[1]
    assert samples[0] == samples[1]
    assert all(torch.equal(x, two.state_dict()[name]) for name, x in one.state_dict().items())
    assert [(alarm["iteration"], alarm["logged"]) for alarm in alarms_in(tmp_path / "one")] == [(4, 1), (4, 1)]


def test_where_no_rollback_is_left_the_run_stops(tmp_path):
    monitor = HackingMonitor(action="rollback", max_rollbacks=1, detectors={"suspect": Suspect(since=2)})
    stopped = monitored(tmp_path, monitor, kl=NoKL())
    assert stopped.iteration == 4
    assert monitor.rollback.count == 1
    assert stopped.stopped_by == "callbacks.hacking"
    assert stopped.lr_scale == 0.5


class Seen(Detector):
    """Notes the iterations it was shown; the first two are suspect."""

    def __init__(self):
        self.numbers = []

    def measure(self, iteration):
        self.numbers.append(iteration.number)
        return Reading(1.0, 4.0 if iteration.number <= 2 else -4.0, torch.zeros(len(iteration.rows)))

    def state_dict(self):
        return {"numbers": list(self.numbers)}

    def load_state_dict(self, state):
        self.numbers = list(state["numbers"])


@pytest.mark.parametrize("first", [KLGuard, HackingMonitor])
def test_an_iteration_that_a_guard_has_done_again_counts_once(tmp_path, first):
    """Two iterations of evidence 3.5 are 7; what the guard takes back is neither seen, raised nor lost."""
    guard = KLGuard(max_kl=12, max_rollbacks=10)
    monitor = HackingMonitor(action="raise_kl", evidence=6, detectors={"seen": Seen()})
    one, *others = sorted([guard, monitor], key=lambda callback: not isinstance(callback, first))
    found = monitored(tmp_path, one, extra=others, lr=0.06, until=3)
    assert guard.rollback.count >= 2
    assert monitor.detectors["seen"].numbers == [1, 2, 3]
    assert [(alarm["iteration"], alarm["logged"]) for alarm in alarms_in(tmp_path)] == [(2, 2)]
    assert column(tmp_path, "hacking/alarms") == [0, 1, 1]
    assert found.kl.scale == 2


def test_a_rollback_needs_checkpoints(tmp_path):
    with pytest.raises(UserError, match=r"callbacks\.hacking needs lit_rlhf\.callbacks\.Checkpoints"):
        monitored(tmp_path, HackingMonitor(action="rollback"), checkpoints=ModelCheckpoint(dirpath=tmp_path))


def sensitive(action="warn"):
    """Alarms come and go, with every detector's state in play."""
    detectors = {"suspect": Suspect(since=2), **default_detectors()}
    return HackingMonitor(action=action, baseline=2, cooldown=2, evidence=1.0, detectors=detectors)


@pytest.mark.parametrize("action", ["warn", "rollback"])
@pytest.mark.parametrize("step", [8, 9, 17])
def test_a_kill_changes_nothing(tmp_path, step, action):
    """Checkpoints every three steps; an iteration has four, and its alarms are written after the last one."""
    whole = monitored(tmp_path / "whole", sensitive(action), every=3, until=5)
    monitored(tmp_path / "split", sensitive(action), every=3, until=5, extra=[Stop(step=step)])
    resumed = monitored(
        tmp_path / "split", sensitive(action), every=3, until=5, ckpt_path=tmp_path / "split/checkpoints/last.ckpt"
    )
    assert_same(whole, resumed, tmp_path / "whole", tmp_path / "split")
    assert (tmp_path / "whole/alarms.jsonl").read_text() == (tmp_path / "split/alarms.jsonl").read_text()
    assert alarms_in(tmp_path / "whole")


@pytest.mark.parametrize("name", ["PPO", *FAMILY])
def test_every_online_algorithm_is_watched(tmp_path, name, trainer):
    settings = {"rollout_batch_size": 6, "minibatch_size": 2, "gold": letters, **FAMILY.get(name, {})}
    settings |= {"ppo_epochs": 1} if name == "PPO" else {"ppo_epochs": None}
    if name != "PPO":
        del settings["ppo_epochs"]
    algorithm = getattr(algorithms, name.split()[0])(policy=tiny_policy(), reward=letters, **settings)
    algorithm.sampler.max_new_tokens = 4
    monitor = HackingMonitor(detectors={"suspect": Suspect(since=1), **default_detectors()}, evidence=3)
    trainer(callbacks=[monitor], max_epochs=2).fit(algorithm, datamodule=Prompts())
    assert [alarm["iteration"] for alarm in alarms_in(tmp_path)] == [1]
    assert monitor.detectors["suspect"].seen == 2


def test_an_offline_algorithm_has_no_use_for_it(trainer):
    with pytest.raises(UserError, match=r"callbacks\.hacking is for algorithms that complete prompts"):
        trainer(callbacks=[HackingMonitor()], max_epochs=1).fit(SFT(policy=tiny_policy()), [{"text": ["a b"]}])


def on_two(folder):
    """A run of this process's; its monitor's state is saved."""
    monitor = sensitive()
    watch = monitored(folder, monitor, until=3)
    torch.save(monitor.state_dict(), folder / f"{watch.trainer.global_rank}.pt")


def test_two_processes_watch_the_same_completions(tmp_path):
    """In both the states are the same, and one of them writes."""
    run_in_processes(on_two_of, 2, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one == two
    alone = tmp_path / "alone"
    on_two(alone)
    assert len(alarms_in(tmp_path)) == len(alarms_in(alone)) > 0
    assert alarms_in(tmp_path)[0]["completions"][0]["completion"] == alarms_in(alone)[0]["completions"][0]["completion"]


def on_two_of(folder):
    original = L.Trainer

    class Two(original):
        def __init__(self, **settings):
            super().__init__(devices=2, strategy="ddp", **settings)

    L.Trainer = Two
    on_two(folder)


# ---- from the command line ------------------------------------------------------------------------------------------


class Mine(Suspect):
    """A user's own."""


def test_detectors_are_taken_away_and_added_in_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [
        *TINY, "callbacks=hacking", "callbacks.hacking.detectors.length=null", "trainer.max_epochs=2",
        "+callbacks.hacking.detectors.mine._target_=test_hacking.Mine", "callbacks.hacking.baseline=2",
        "+callbacks.hacking.detectors.mine.since=1", "callbacks.hacking.evidence=3", "trainer.limit_val_batches=0",
        "+callbacks.hacking.detectors.novelty.data._target_=lit_rlhf.data.ListPrompts",
        "+callbacks.hacking.detectors.novelty.data.prompts=[A film]", "paths.output_dir=run",
    ]  # fmt: skip
    result = run_here("train", *settings)
    assert result.code == 0, result.err
    row = read_metrics(tmp_path / "run")[-1]
    assert "hacking/length" not in row
    assert row["hacking/mine"] == 2
    assert row["hacking/novelty"] > 0.5
    (alarm,) = alarms_in(tmp_path / "run")
    assert alarm["detector"] == "mine"
    assert "Alarm of the reward-hacking monitor in iteration 1: mine" in (tmp_path / "run/report.html").read_text()
    settings[-1] = "paths.output_dir=again"
    result = run_here("train", *settings, "callbacks.hacking.detectors.gold.fall=-1")
    assert result.code == 1
    assert "callbacks.hacking.detectors.gold.fall must be a finite number above 0, got -1" in result.err


# ---- a slice of the campaign ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Reviews from a grammar of few words, rated by their adjectives."""
    rng, liking = random.Random(0), {"fine": 2.0, "good": 1.5, "plain": 0.0, "dull": -1.5, "bad": -2.0}
    rated = []
    for _ in range(600):
        adjectives = [rng.choice(list(liking)) for _ in range(2)]
        nouns = [rng.choice(["film", "plot", "cast", "story", "heart"]) for _ in range(2)]
        end = rng.choice(["to me", "for all of us", "", "in the end", "i think"])
        text = f"the {nouns[0]} is {adjectives[0]} and its {nouns[1]} was {adjectives[1]} {end}"
        rated.append((text, sum(liking[word] for word in adjectives) / 2))
    return World(rated, tmp_path_factory.mktemp("world"), epochs=8)


@pytest.mark.parametrize("name", ["length", "magic word"])
def test_a_planted_hack_is_found(world, name):
    (task,) = [task for task in HACKS if task.name == name]
    outcome = run(task, world, iterations=25, size=32)
    assert outcome.alarms
    assert outcome.score[-1] > outcome.score[0]


def test_a_clean_run_is_silent(world):
    outcome = run(clean_tasks()[0], world, iterations=15, size=32)
    assert outcome.alarms == []
    assert outcome.score[-1] > outcome.score[0]
