"""Rewards made of other rewards: each against values worked out by hand."""

import pytest
import torch
from classifiers import save_classifier

from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import byte_tokenizer
from lit_rlhf.rewards import CompositeReward, ConstrainedReward, EnsembleReward, ModelReward, PrefixReward
from lit_rlhf.rewards.scoring import Scores, freeze, required_columns, score


def ones(prompts, completions, **columns):
    return [1.0] * len(completions)


def lengths(prompts, completions, **columns):
    return torch.tensor([len(text) for text in completions])


def halves(prompts, completions, **columns):
    return {"early": [1.0] * len(completions), "late": [0.5] * len(completions)}


def tokens(prompts, completions, completion_ids, **columns):
    return [[float(i) for i in ids] for ids in completion_ids]


def both(prompts, completions, completion_ids, **columns):
    return {"tokens": tokens(prompts, completions, completion_ids), "whole": [10.0] * len(completions)}


def lists(scores):
    return {name: values.tolist() for name, values in scores.components.items()}


class TestComposite:
    def test_components_are_raw_and_the_total_is_weighted(self):
        reward = CompositeReward(rewards={"a": ones, "b": lengths}, weights={"a": 2, "b": -0.5})
        scores = score(reward, ["", ""], ["xy", ""], {})
        assert lists(scores) == {"a": [1, 1], "b": [2, 0]}
        assert scores.weights == {"a": 2, "b": -0.5}
        assert scores.total.tolist() == [1, 2]

    def test_parts_are_logged_and_do_not_count_twice(self):
        scores = score(CompositeReward(rewards={"a": halves, "b": ones}, weights={"a": 2, "b": 1}), [""], ["x"], {})
        assert lists(scores) == {"a": [1.5], "b": [1], "a/early": [1], "a/late": [0.5]}
        assert scores.total.tolist() == [4]

    def test_token_rewards_stay_token_rewards(self):
        reward = CompositeReward(rewards={"t": tokens, "b": both, "a": ones}, weights={"t": 2, "b": 3, "a": 1})
        scores = score(reward, ["", ""], ["x", "yz"], {}, [[5], [6, 7]])
        assert scores.dense.tolist() == [[2 * 5 + 3 * 5, 0], [2 * 6 + 3 * 6, 2 * 7 + 3 * 7]]
        assert scores.whole.tolist() == [3 * 10 + 1, 3 * 10 + 1]
        assert scores.total.tolist() == [25 + 31, 65 + 31]

    def test_columns_and_async_rewards_are_passed_on(self):
        async def column(prompts, completions, wanted):
            return wanted

        reward = CompositeReward(rewards={"a": column}, weights={"a": 3})
        assert required_columns(reward) == ["wanted"]
        assert score(reward, [""], ["x"], {"wanted": [5.0]}).total.tolist() == [15]

    def test_a_member_that_is_null_is_left_out(self):
        rewards = {"ones": lambda prompts, completions: [1.0] * len(completions), "not_here": None}
        composite = CompositeReward(rewards=rewards, weights={"ones": 2.0, "not_here": None})
        assert list(composite.rewards) == ["ones"]
        with pytest.raises(UserError, match=r"reward\.rewards\.not_here is null: .* reward\.weights\.not_here to null"):
            CompositeReward(rewards=rewards, weights={"ones": 2.0, "not_here": 1.0})

    @pytest.mark.parametrize(
        ("rewards", "weights", "message"),
        [
            ({}, {}, "reward.rewards must be a mapping of at least one name to its reward, got {}"),
            ({"a": ones}, {"a": 1, "b": 1}, r"reward.weights.b: there is no such reward; they are a"),
            ({"a": ones, "b": ones}, {"a": 1}, r"reward.weights.b is missing"),
            ({"a": ones}, None, r"reward.weights must give .* got None"),
            ({"a": ones}, {"a": float("nan")}, r"reward.weights.a must be a finite number"),
            ({"a/b": ones}, {"a/b": 1}, r"reward.rewards.a/b: .* another name"),
            ({"a": 3}, {"a": 1}, r"reward.rewards.a must be a reward, got 3"),
        ],
    )
    def test_names_and_weights_must_match(self, rewards, weights, message):
        with pytest.raises(UserError, match=message):
            CompositeReward(rewards=rewards, weights=weights)

    def test_a_bad_score_names_the_sample(self):
        reward = CompositeReward(rewards={"a": lambda prompts, completions: [1.0, None]}, weights={"a": 1})
        with pytest.raises(UserError, match="sample 1"):
            score(reward, ["p", "q"], ["x", "y"], {})

    def test_to_moves_and_freezes_the_rewards_that_can_be(self):
        class Movable:
            device = "cpu"
            __call__ = ones

            def to(self, device):
                self.device = device

        movable, network = Movable(), torch.nn.Dropout().train()
        rewards = {"a": ones, "b": movable, "c": network}
        freeze(CompositeReward(rewards=rewards, weights=dict.fromkeys(rewards, 1)), "meta")
        assert movable.device == "meta"
        assert not network.training


MEMBERS = {"low": lambda completions, **_: [1.0, 0.0], "high": lambda completions, **_: [3.0, 8.0]}


class TestEnsemble:
    @pytest.mark.parametrize(
        ("settings", "expected"),
        [  # standard deviations 1 and 4
            ({"combine": "mean"}, [2, 4]),
            ({"combine": "min"}, [1, 0]),
            ({"combine": "mean_minus_std", "k": 0.5}, [1.5, 2]),
        ],
    )
    def test_only_the_combination_counts_and_every_member_is_logged(self, settings, expected):
        scores = score(EnsembleReward(rewards=MEMBERS, **settings), ["", ""], ["x", "y"], {})
        assert scores.total.tolist() == expected
        assert lists(scores) == {"ensemble": expected, "low": [1, 0], "high": [3, 8], "std": [1, 4]}

    def test_members_score_in_the_precision_that_the_whole_is_given(self, tmp_path):
        paths = [save_classifier(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
        ensemble = EnsembleReward.from_paths(paths=paths)
        freeze(ensemble, "cpu", torch.bfloat16)
        assert [member.cast for member in ensemble.rewards.values()] == [torch.bfloat16] * 2

    def test_reward_models_are_loaded_by_path(self, tmp_path):
        paths = [save_classifier(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
        scores = score(EnsembleReward.from_paths(paths=paths, combine="min"), ["", ""], ["good", "bad"], {})
        alone = torch.stack([ModelReward(path=path)(["", ""], ["good", "bad"]) for path in paths])
        assert not torch.equal(alone[0], alone[1])
        torch.testing.assert_close(scores.total, alone.min(0).values)

    @pytest.mark.parametrize(
        ("rewards", "settings", "message"),
        [
            ({"a": ones}, {}, "needs at least two"),
            ({"a": ones, "std": ones}, {}, "reward.rewards.std: .* another name"),
            (MEMBERS, {"combine": "max"}, "reward.combine must be one of mean, min, mean_minus_std, got 'max'"),
            (MEMBERS, {"combine": "mean_minus_std"}, "reward.k=None"),
            (MEMBERS, {"combine": "mean", "k": 1.0}, r"reward.k=1.0 with reward.combine=mean"),
            (MEMBERS, {"combine": "mean_minus_std", "k": -1.0}, "reward.k must be"),
        ],
    )
    def test_settings_without_sense_are_refused(self, rewards, settings, message):
        with pytest.raises(UserError, match=message):
            EnsembleReward(rewards=rewards, **settings)


class TestConstrained:
    def make(self, **changes):
        def safe(prompts, completions, **_):
            return [float("bad" not in text) for text in completions]

        return ConstrainedReward(**{"objective": lengths, "constraint": safe, "threshold": 0.75, "lr": 2.0, **changes})

    def test_the_score_is_the_rescaled_lagrangian(self):
        scores = score(self.make(init_multiplier=3.0), ["", ""], ["bad", "fine"], {})
        assert scores.total.tolist() == [3 / 4, 4 / 4 + 3 / 4]
        assert scores.components["multiplier"].tolist() == [3, 3]

    def test_the_multiplier_grows_while_the_constraint_is_missed_and_falls_to_0_after(self):
        reward = self.make()
        for completions, expected in ((["bad", "fine"], 0.5), (["bad", "bad"], 2.0), (["ok"] * 2, 1.5), (["ok"], 1.0)):
            reward.learn_from(score(reward, [""] * len(completions), completions, {}))
            assert reward.multiplier == expected
        for _ in range(3):
            reward.learn_from(score(reward, [""], ["ok"], {}))
        assert reward.multiplier == 0
        limited = self.make(max_multiplier=1.0)
        limited.learn_from(score(limited, [""], ["bad"], {}))
        assert limited.multiplier == 1

    def test_the_multiplier_survives_a_resume_inside_a_composite_too(self):
        inner = self.make()
        reward = CompositeReward(rewards={"safe": inner, "other": ones}, weights={"safe": 1, "other": 1})
        reward.learn_from(score(reward, [""], ["bad"], {}))
        assert inner.multiplier == 1.5
        fresh = self.make()
        CompositeReward(rewards={"safe": fresh}, weights={"safe": 1}).load_state_dict(reward.state_dict())
        assert fresh.multiplier == 1.5

    @pytest.mark.parametrize(
        "bad", [{"threshold": float("nan")}, {"lr": 0.0}, {"init_multiplier": -1.0}, {"max_multiplier": 0.0}]
    )
    def test_numbers_out_of_range_are_refused(self, bad):
        with pytest.raises(UserError, match=rf"reward\.{next(iter(bad))}"):
            self.make(**bad)


class TestPrefix:
    def ids(self, text):
        return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]

    def test_each_token_gets_the_change_that_it_made(self):
        def vowels(prompts, completions, **_):
            return [float(sum(c in "aeiou" for c in text)) for text in completions]

        texts = ["abe", "x"]
        scores = score(PrefixReward(reward=vowels), ["", ""], texts, {}, [self.ids(t) for t in texts], byte_tokenizer())
        assert scores.dense.tolist() == [[1, 0, 1], [0, 0, 0]]
        every = PrefixReward(reward=vowels, every=2)
        scores = score(every, ["", ""], texts, {}, [self.ids(t) for t in texts], byte_tokenizer())
        assert scores.dense.tolist() == [[0, 1, 1], [0, 0, 0]]

    def test_the_tokens_sum_to_the_whole_score_and_columns_follow_their_rows(self):
        def reward(prompts, completions, offset, **_):
            rows = zip(prompts, completions, offset, strict=True)
            return [len(text) ** 2 + prompt * 100 + extra for prompt, text, extra in rows]

        texts = ["hello", "a", "four"]
        scores = score(PrefixReward(reward=reward, every=2), [1, 2, 3], texts, {"offset": [7, 8, 9]},
                       [self.ids(t) for t in texts], byte_tokenizer())  # fmt: skip
        assert scores.total.tolist() == [25 + 107, 1 + 208, 16 + 309]


class Learns:
    """A reward with several components, one for tokens, that keeps what it is told to learn from."""

    def __init__(self):
        self.told = None
        self.weights = {"a": 2.0, "tokens": 0.5}

    def __call__(self, prompts, completions, completion_ids, extra):
        return {
            "a": [len(text) + x for text, x in zip(completions, extra, strict=True)],
            "tokens": tokens(prompts, completions, completion_ids),
        }

    def learn_from(self, scores):
        self.told = scores

    def state_dict(self):
        return {"told": None if self.told is None else float(self.told.total.sum())}

    def load_state_dict(self, state):
        self.loaded = state["told"]


class LearnsOne(Learns):
    """The same with a single component, of another name than any group gives it."""

    def __init__(self):
        super().__init__()
        self.weights = {}

    def __call__(self, prompts, completions, extra):
        return {"only": [len(text) + x for text, x in zip(completions, extra, strict=True)]}


GROUPS = {
    "composite": lambda inner: CompositeReward(rewards={"in": inner, "one": ones}, weights={"in": -2, "one": 3}),
    "alone": lambda inner: CompositeReward(rewards={"in": inner}, weights={"in": -2}),
    "ensemble": lambda inner: EnsembleReward(rewards={"in": inner, "one": ones}),
    "objective": lambda inner: ConstrainedReward(objective=inner, constraint=ones, threshold=0, init_multiplier=3.0),
    "constraint": lambda inner: ConstrainedReward(objective=ones, constraint=inner, threshold=9, init_multiplier=3.0),
    "prefix": lambda inner: PrefixReward(reward=inner, every=2),
}
TOTALS = {
    "composite": lambda x: -2 * x + 3,
    "alone": lambda x: -2 * x,
    "ensemble": lambda x: (x + 1) / 2,
    "objective": lambda x: (x + 3) / 4,
    "constraint": lambda x: (1 + 3 * x) / 4,
    "prefix": lambda x: x,
}
TEXTS, IDS = ["abc", "x", "four5"], [[5, 6, 7], [8], [1, 2, 3, 4, 5]]


class TestNesting:
    def score(self, reward):
        return score(reward, ["p"] * 3, TEXTS, {"extra": [0.5, 1.0, 2.0]}, IDS, byte_tokenizer())

    @pytest.mark.parametrize("leaf", [Learns, LearnsOne])
    @pytest.mark.parametrize("inner", GROUPS)
    @pytest.mark.parametrize("outer", GROUPS)
    def test_every_group_may_hold_every_group(self, outer, inner, leaf):
        learner = leaf()
        group = GROUPS[inner](learner)
        reward = GROUPS[outer](group)
        alone = self.score(leaf())
        scores = self.score(reward)
        inside = TOTALS[inner](alone.total)
        torch.testing.assert_close(scores.total, TOTALS[outer](inside))

        reward.learn_from(scores)
        assert learner.told.weights == alone.weights
        assert set(learner.told.components) == set(alone.components)
        for name, values in alone.components.items():
            torch.testing.assert_close(learner.told.components[name], values)
        for level, constrained, mean in ((inner, group, alone.total.mean()), (outer, reward, inside.mean())):
            if level == "objective":  # a constraint of 1, a threshold of 0
                assert constrained.multiplier == pytest.approx(3 + 0.1 * (0 - 1))
            if level == "constraint":
                assert constrained.multiplier == pytest.approx(min(max(3 + 0.1 * (9 - float(mean)), 0), 100))

        other = leaf()
        fresh = GROUPS[inner](other)
        GROUPS[outer](fresh).load_state_dict(reward.state_dict())
        assert other.loaded == pytest.approx(float(alone.total.sum()))
        assert getattr(fresh, "multiplier", None) == getattr(group, "multiplier", None)
        assert required_columns(reward) == ["extra"]

    def test_what_is_learned_from_chunks_is_what_is_learned_from_the_whole(self):
        """As an algorithm does: it scores in chunks and puts the components together by their names."""
        reward = GROUPS["prefix"](GROUPS["composite"](GROUPS["constraint"](learner := LearnsOne())))
        chunks = [
            score(reward, ["p"], [text], {"extra": [extra]}, [ids], byte_tokenizer())
            for text, extra, ids in zip(TEXTS, [0.5, 1.0, 2.0], IDS, strict=True)
        ]
        names = [name for name, values in chunks[0].components.items() if values.ndim == 1]
        joined = {name: torch.cat([chunk.components[name] for chunk in chunks]) for name in names}
        reward.learn_from(Scores(joined, chunks[0].weights))
        assert learner.told.components["only"].tolist() == [3.5, 2.0, 7.0]

    def test_what_learns_nothing_is_logged_as_before(self):
        assert list(self.score(GROUPS["composite"](GROUPS["alone"](lengths))).components) == ["in", "one"]
        assert list(self.score(GROUPS["prefix"](lengths)).components) == ["prefix"]
