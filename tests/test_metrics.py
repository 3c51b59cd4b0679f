"""The table of metrics: its entries, its patterns, its Markdown."""

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.metrics import AXES, lookup, table_markdown


def test_a_name_is_found_with_its_meaning_unit_and_direction():
    kl = lookup("objective/kl")
    assert (kl.name, kl.unit, kl.better) == ("objective/kl", "nats", None)
    assert "summed over tokens" in kl.meaning
    assert lookup("sft/perplexity").better == "lower"
    assert lookup("reward_model/accuracy").better == "higher"


@pytest.mark.parametrize(
    ("name", "better"),
    [("reward/vader", "higher"), ("gold/a/b", "higher"), ("reward/<odd>(name)", "higher"), ("time/warmup", None)],
)
def test_a_pattern_matches_any_component_or_stage(name, better):
    assert lookup(name).better == better


def test_validation_variants_keep_unit_and_direction():
    for name in ("objective/scores", "gold/vader", "sft/perplexity", "rollout/response_length"):
        assert (lookup(f"val/{name}").unit, lookup(f"val/{name}").better) == (lookup(name).unit, lookup(name).better)
        assert lookup(f"val/{name}").name == f"val/{name}"


@pytest.mark.parametrize("name", ["objective/Kl", "reward/", "reward", "val/", "", "xobjective/kl", "objective/kl "])
def test_an_unknown_name_is_refused_by_name(name):
    with pytest.raises(UserError, match=r"metrics\.py") as error:
        lookup(name)
    assert repr(name) in str(error.value)


def test_the_axes_are_metrics():
    assert AXES == ("iteration", "episode", "tokens")
    assert all(lookup(name).meaning for name in AXES)


def test_the_markdown_table_has_one_well_formed_row_per_metric():
    lines = table_markdown().splitlines()
    kl = next(line for line in lines if line.startswith("| `objective/kl` |"))
    assert r"KL(policy \|\| reference)" in kl  # a bare | would start another column
    assert all(line.replace(r"\|", "").count("|") == 5 for line in lines)
    assert len([line for line in lines if line.startswith("| `")]) == len(lines) - 2 > 40
