"""The rewards that need no model: each against values worked out by hand."""

import sys

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import (
    DistinctReward,
    FunctionReward,
    JsonReward,
    KeywordReward,
    LengthReward,
    RegexReward,
    RepetitionPenalty,
    VaderReward,
    VerifierReward,
)
from lit_rlhf.rewards.scoring import required_columns, score


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
        (tmp_path / "my_styles").mkdir()
        (tmp_path / "my_styles" / "__init__.py").write_text("")
        (tmp_path / "my_styles" / "style.py").write_text(
            "def shouting(prompts, completions, number, **columns):\n"
            "    return [sum(c.isupper() for c in text) + n for text, n in zip(completions, number)]\n"
            "async def later(prompts, completions, **columns):\n"
            "    return {'first': [1.0] * len(completions), 'second': [2.0] * len(completions)}\n"
            "class Thing:\n    pass\n"
            "value = 3\n"
        )
        (tmp_path / "my_styles" / "broken.py").write_text("import a_module_that_is_not_there\n")
        (tmp_path / "my_styles" / "raises.py").write_text("1 / 0\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield
        for name in [name for name in sys.modules if name.startswith("my_styles")]:
            del sys.modules[name]

    @pytest.mark.usefixtures("module")
    def test_it_gets_prompts_completions_and_columns(self):
        reward = FunctionReward(function="my_styles.style.shouting")
        assert call(reward, ["ABc", "d"], number=[10, 20]) == [12, 20]
        assert list(score(reward, ["", ""], ["a", "B"], {"number": [0, 0]}).components) == ["shouting"]
        assert required_columns(reward) == ["number"]

    @pytest.mark.usefixtures("module")
    def test_it_may_be_async_and_have_components(self):
        components = score(FunctionReward(function="my_styles.style.later"), ["", ""], ["a", "b"], {}).components
        assert {name: values.tolist() for name, values in components.items()} == {"first": [1, 1], "second": [2, 2]}

    @pytest.mark.usefixtures("module")
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("shouting", "must be a dotted name"),
            ("no_such_package.reward", "there is no module 'no_such_package'"),
            ("my_styles.missing.reward", "there is no module 'my_styles.missing'"),
            ("my_styles.style.missing", r"the module 'my_styles.style' \(.*style.py\) has no 'missing'"),
            ("my_styles.style.Thing", "is a type, not a function"),
            ("my_styles.style.value", "is a int, not a function"),
            ("my_styles.broken.reward", "importing 'my_styles.broken' failed: .*a_module_that_is_not_there"),
            ("my_styles.raises.reward", "importing 'my_styles.raises' failed: ZeroDivisionError"),
        ],
    )
    def test_the_part_of_the_name_that_failed_is_named(self, name, message):
        with pytest.raises(UserError, match=message):
            FunctionReward(function=name)


class TestRegex:
    def test_it_is_found_anywhere_or_must_match_the_whole(self):
        texts = ["Yes, 42.", "42", " 42 ", "no\n42", ""]
        assert call(RegexReward(pattern=r"\d+"), texts) == [1, 1, 1, 1, 0]
        assert call(RegexReward(pattern=r"\d+", whole=True), texts) == [0, 1, 1, 0, 0]
        assert call(RegexReward(pattern=r"^no.42$"), texts) == [0, 0, 0, 1, 0]

    @pytest.mark.parametrize(("pattern", "message"), [("", "empty"), ("(", "is no regular expression")])
    def test_a_bad_pattern_is_refused(self, pattern, message):
        with pytest.raises(UserError, match=rf"reward\.pattern.*{message}"):
            RegexReward(pattern=pattern)


class TestJson:
    def test_one_value_and_nothing_around_it(self):
        texts = ['{"a": 1}', " [1, 2]\n", "3", "{'a': 1}", '{"a": 1} ok', "", "NaN", "[" * 100_000]
        assert call(JsonReward(), texts) == [1, 1, 1, 0, 0, 0, 0, 0]

    def test_required_keys_must_be_there_all_or_in_part(self):
        texts = ['{"a": 1, "b": null, "c": 2}', '{"a": 1}', '["a", "b"]', "{}"]
        assert call(JsonReward(required_keys=["a", "b"]), texts) == [1, 0, 0, 0]
        assert call(JsonReward(required_keys=["a", "b"], partial=True), texts) == [1, 0.5, 0, 0]

    @pytest.mark.parametrize("bad", [{"partial": True}, {"required_keys": "name"}])
    def test_settings_without_sense_are_refused(self, bad):
        with pytest.raises(UserError, match=r"reward\.required_keys"):
            JsonReward(**bad)


class TestVerifier:
    def test_the_last_number_must_equal_the_columns_exactly(self):
        texts = ["7 + 5 = 12", "The answer is 1,200.", "0.30000000000000004", "-3", "twelve", "12 or 13", "+.5", "8-3"]
        answers = [12, "1200.0", 0.3, -3, 12, 12, "0.50", 3]
        assert call(VerifierReward(), texts, answer=answers) == [1, 1, 0, 1, 0, 0, 1, 1]

    def test_a_list_of_numbers_is_not_one_number(self):
        assert call(VerifierReward(), ["3,4", "1,2,3", "3,4", "12,345"], answer=[34, 123, 4, 12345]) == [0, 0, 1, 1]

    def test_a_pattern_says_where_the_answer_is(self):
        reward = VerifierReward(column="right", pattern=r"Answer: (\S+)")
        texts = ["Answer: 4, not 5", "Answer: 5. Answer: 4", "4", "Answer: four"]
        assert call(reward, texts, right=[4] * 4) == [1, 1, 0, 0]
        assert reward.columns == ["right"]

    def test_bad_patterns_and_answers_are_refused(self):
        for pattern in ("(", "no group", "(two) (groups)"):
            with pytest.raises(UserError, match=r"reward\.pattern"):
                VerifierReward(pattern=pattern)
        with pytest.raises(UserError, match=r"reward\.column=answer: the answer 'a dozen' of sample 1 is no number"):
            call(VerifierReward(), ["1", "2"], answer=[1, "a dozen"])


class TestRepetition:
    def test_distinct_n_is_the_share_of_different_ngrams(self):
        texts = ["a b a b", "A a a", "one two three", "one", ""]
        assert call(DistinctReward(n=1), texts) == pytest.approx([0.5, 1 / 3, 1, 1, 1])
        assert call(DistinctReward(n=2), texts) == pytest.approx([2 / 3, 0.5, 1, 1, 1])

    def test_every_repeated_ngram_costs_the_penalty(self):
        texts = ["a b a b a", "x " * 6, "one two three", ""]
        assert call(RepetitionPenalty(n=2, penalty=0.5), texts) == [-1.0, -2.0, 0.0, 0.0]

    @pytest.mark.parametrize("make", [DistinctReward, RepetitionPenalty])
    def test_sizes_out_of_range_are_refused(self, make):
        with pytest.raises(UserError, match=r"reward\.n must be a whole number of at least 1"):
            make(n=0)
        with pytest.raises(UserError, match=r"reward\.penalty"):
            RepetitionPenalty(penalty=0)
