"""The numbers behind an iteration's means, against a run of PPO that is watched from outside."""

import pytest
from lightning.pytorch.loggers.logger import Logger
from ppo_runs import fit, make

from lit_rlhf.callbacks import Distributions
from lit_rlhf.errors import UserError
from lit_rlhf.functional import selective_logprobs


class Collects(Logger):
    name = version = ""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_metrics(self, *_, **__):
        pass

    log_hyperparams = log_metrics

    def log_distributions(self, values, step):
        self.seen[step] = values


def run(trainer, callback, epochs=3, **settings):
    logger, ppo = Collects(), make(ppo_epochs=epochs)
    watch = fit(trainer, ppo, callbacks=[callback], logger=logger, **settings)
    return logger.seen, watch


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_ratios_are_those_of_the_last_pass_before_each_step(trainer, micro_batches):
    seen, watch = run(trainer, Distributions(), accumulate_grad_batches=micro_batches)
    per_pass = 2 * micro_batches
    assert list(seen) == [1, 2]
    for iteration, values in seen.items():
        last = slice(iteration * 3 * per_pass - per_pass, iteration * 3 * per_pass)
        expected, advantages = [], []
        for batch, logits in zip(watch.batches[last], watch.logits[last], strict=True):
            now = selective_logprobs(logits, batch.response_ids)
            expected += (now - batch.logprobs).exp()[batch.response_mask].tolist()
            advantages += batch.advantages[batch.response_mask].tolist()
        assert values["ratios"] == pytest.approx(expected, abs=1e-5)
        assert max(abs(ratio - 1) for ratio in values["ratios"]) > 1e-3
        assert sorted(values["advantages"]) == sorted(advantages)
        samples = [row for row in watch.samples if row["iteration"] == iteration]
        assert values["scores"] == [row["score"] for row in samples]
        assert values["kl"] == [row["kl"] for row in samples]


def test_only_every_nth_iteration_is_handed_on(trainer):
    seen, _ = run(trainer, Distributions(every_n_iterations=2), max_epochs=5)
    assert list(seen) == [2, 4]


def test_watching_changes_nothing(trainer):
    timed = ("time/", "rollout/tokens_per_second")
    alone, watched = (
        [{k: v for k, v in row.items() if not k.startswith(timed)} for row in fit(trainer, make(), callbacks=more).rows]
        for more in ([], [Distributions()])
    )
    assert alone == watched


def test_too_small_a_value_is_refused():
    with pytest.raises(UserError, match="every_n_iterations=0"):
        Distributions(every_n_iterations=0)
