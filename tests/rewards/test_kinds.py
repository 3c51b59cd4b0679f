"""The rewards that need no model: each against values worked out by hand."""

import sys

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import CompositeReward, FunctionReward, KeywordReward, LengthReward, VaderReward
from lit_rlhf.rewards.scoring import score, total


def call(reward, completions, prompts=None, **columns):
    return reward(prompts=prompts or [""] * len(completions), completions=completions, **columns)


class TestVader:
    def test_scores_are_the_published_ones(self):
        """The examples of vaderSentiment's README (3.3.2)."""
        texts = ["VADER is smart, handsome, and funny.", "The book was good.", "Today SUX!"]
        assert call(VaderReward(), texts) == [0.8316, 0.4404, -0.5461]

    def test_the_prompt_counts_only_on_text(self):
        prompts, completions = ["The book was "], ["good."]
        assert call(VaderReward(), completions, prompts) == [0.4404]
        awful = ["The awful book was "]
        assert call(VaderReward(on="completion"), completions, awful) == call(VaderReward(), completions)
        assert call(VaderReward(), completions, awful)[0] < call(VaderReward(), completions)[0]

    def test_a_chat_prompt_is_left_out(self):
        chat = [{"role": "user", "content": "horrible awful"}]
        assert call(VaderReward(), ["The book was good."], [chat]) == [0.4404]

    def test_another_scope_is_refused(self):
        with pytest.raises(UserError, match=r"reward\.on='prompt': choose 'text'"):
            VaderReward(on="prompt")


class TestLength:
    def test_every_word_away_from_the_target_costs_the_penalty(self):
        completions = ["", "one", "one two three", "a b  c\nd e"]
        assert call(LengthReward(target=3, penalty=0.5), completions) == [-1.5, -1.0, 0.0, -1.0]
        assert call(LengthReward(target=3, penalty=0.5, tolerance=2), completions) == [-0.5, 0.0, 0.0, 0.0]

    @pytest.mark.parametrize("bad", [{"target": -1}, {"target": 3, "penalty": 0}, {"target": 3, "tolerance": -1}])
    def test_bad_numbers_are_refused(self, bad):
        with pytest.raises(UserError, match=rf"reward\.{list(bad)[-1]}"):
            LengthReward(**bad)


class TestKeyword:
    def test_different_whole_words_count_once_in_any_case(self):
        reward = KeywordReward(keywords=["art", "very good"], forbidden=["bad"])
        completions = ["Art, ART and art", "a party", "It is very good art", "bad bad art", "badly", ""]
        assert call(reward, completions) == [1.0, 0.0, 2.0, 0.0, 0.0, 0.0]

    def test_words_are_no_regular_expressions(self):
        assert call(KeywordReward(keywords=["c++", "a.b"]), ["I like C++.", "aXb"]) == [1.0, 0.0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "both empty"),
            ({"keywords": "good"}, "must be a list of words, got 'good'"),
            ({"keywords": ["good", " "]}, "must be a list of words"),
            ({"keywords": ["Good"], "forbidden": ["good"]}, r"share \['good'\]"),
        ],
    )
    def test_bad_words_are_refused(self, arguments, message):
        with pytest.raises(UserError, match=message):
            KeywordReward(**arguments)


class TestFunction:
    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        (tmp_path / "my_rewards").mkdir()
        (tmp_path / "my_rewards" / "__init__.py").write_text("")
        (tmp_path / "my_rewards" / "style.py").write_text(
            "def shouting(prompts, completions, number, **columns):\n"
            "    return [sum(c.isupper() for c in text) + n for text, n in zip(completions, number)]\n"
            "async def later(prompts, completions, **columns):\n"
            "    return {'first': [1.0] * len(completions), 'second': [2.0] * len(completions)}\n"
            "class Thing:\n    pass\n"
            "value = 3\n"
        )
        (tmp_path / "my_rewards" / "broken.py").write_text("import a_module_that_is_not_there\n")
        (tmp_path / "my_rewards" / "raises.py").write_text("1 / 0\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield
        for name in [name for name in sys.modules if name.startswith("my_rewards")]:
            del sys.modules[name]

    @pytest.mark.usefixtures("module")
    def test_it_gets_prompts_completions_and_columns(self):
        reward = FunctionReward(function="my_rewards.style.shouting")
        assert call(reward, ["ABc", "d"], number=[10, 20]) == [12, 20]
        assert list(score(reward, ["", ""], ["a", "B"], {"number": [0, 0]})) == ["shouting"]

    @pytest.mark.usefixtures("module")
    def test_it_may_be_async_and_have_components(self):
        components = score(FunctionReward(function="my_rewards.style.later"), ["", ""], ["a", "b"], {})
        assert {name: values.tolist() for name, values in components.items()} == {"first": [1, 1], "second": [2, 2]}

    @pytest.mark.usefixtures("module")
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("shouting", "must be a dotted name"),
            ("no_such_package.reward", "there is no module 'no_such_package'"),
            ("my_rewards.missing.reward", "there is no module 'my_rewards.missing'"),
            ("my_rewards.style.missing", r"the module 'my_rewards.style' \(.*style.py\) has no 'missing'"),
            ("my_rewards.style.Thing", "is a type, not a function"),
            ("my_rewards.style.value", "is a int, not a function"),
            ("my_rewards.broken.reward", "importing 'my_rewards.broken' failed: .*a_module_that_is_not_there"),
            ("my_rewards.raises.reward", "importing 'my_rewards.raises' failed: ZeroDivisionError"),
        ],
    )
    def test_the_part_of_the_name_that_failed_is_named(self, name, message):
        with pytest.raises(UserError, match=message):
            FunctionReward(function=name)


def ones(prompts, completions, **columns):
    return [1.0] * len(completions)


def lengths(prompts, completions, **columns):
    return torch.tensor([len(text) for text in completions])


class TestComposite:
    def test_components_are_weighted_and_sum_to_the_total(self):
        reward = CompositeReward(rewards={"a": ones, "b": lengths}, weights={"a": 2.0, "b": -0.5})
        components = score(reward, ["", ""], ["xy", ""], {})
        assert {name: values.tolist() for name, values in components.items()} == {"a": [2.0, 2.0], "b": [-1.0, 0.0]}
        assert total(components).tolist() == [1.0, 2.0]

    def test_columns_and_async_rewards_are_passed_on(self):
        async def column(prompts, completions, wanted):
            return wanted

        reward = CompositeReward(rewards={"a": column}, weights={"a": 3})
        assert score(reward, [""], ["x"], {"wanted": [5.0]})["a"].tolist() == [15.0]

    @pytest.mark.parametrize(
        ("rewards", "weights", "message"),
        [
            ({}, {}, "reward.rewards is empty"),
            ({"a": ones}, {"a": 1, "b": 1}, r"reward.weights names \['b'\], but the rewards are \['a'\]"),
            ({"a": ones, "b": ones}, {"a": 1}, r"reward.weights has no weight for \['b'\]"),
            ({"a": ones}, {"a": float("nan")}, r"reward.weights.a must be a finite number"),
        ],
    )
    def test_names_and_weights_must_match(self, rewards, weights, message):
        with pytest.raises(UserError, match=message):
            CompositeReward(rewards=rewards, weights=weights)

    def test_a_bad_score_names_the_sample(self):
        reward = CompositeReward(rewards={"a": lambda prompts, completions: [1.0, None]}, weights={"a": 1})
        with pytest.raises(UserError, match="sample 1"):
            score(reward, ["p", "q"], ["x", "y"], {})

    def test_to_moves_the_rewards_that_can_move(self):
        class Movable:
            device = "cpu"

            def to(self, device):
                self.device = device

        movable = Movable()
        CompositeReward(rewards={"a": ones, "b": movable}, weights={"a": 1, "b": 1}).to("meta")
        assert movable.device == "meta"
