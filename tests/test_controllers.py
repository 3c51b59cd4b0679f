import math
import struct

import pytest
import torch

from lit_rlhf.clip import AdaptiveKLPenalty, AsymmetricClip, ClipBounds, DualClip, LinearClip, NoClip, SymmetricClip
from lit_rlhf.entropy import ConstantEntropy, LinearEntropy, NoEntropy, TargetEntropy
from lit_rlhf.errors import UserError
from lit_rlhf.kl import AdaptiveKL, FixedKL, LinearKL, NoKL

NAN, INF = math.nan, math.inf


# ---- KL ------------------------------------------------------------------------------------------------------


def test_a_fixed_coefficient_stays_and_resume_takes_the_configs():
    kl = FixedKL(coef=0.3, estimator="k3")
    kl.update(kl=1e6, episodes=1000)
    assert (kl.coef, kl.estimator) == (0.3, "k3")
    resumed = FixedKL(coef=0.1)
    resumed.load_state_dict(kl.state_dict())
    assert resumed.coef == 0.1


def test_no_kl_has_coefficient_zero_and_still_measures():
    kl = NoKL()
    kl.update(kl=10.0, episodes=8)
    assert (kl.coef, kl.estimator) == (0.0, "k1")


@pytest.mark.parametrize(
    ("measured", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 0.05),  # error +.1, 512 of 10,240 episodes = .05
        (5.4, 1 - 0.1 * 0.05),
        (60.0, 1 + 0.2 * 0.05),  # error 9, clipped to .2
        (0.0, 1 - 0.2 * 0.05),
        (-3.0, 1 - 0.2 * 0.05),  # k1's mean can be negative
    ],
)
def test_adaptive_coefficient_moves_by_the_clipped_proportional_error(measured, factor):
    kl = AdaptiveKL(init_coef=0.2, target=6.0, horizon=10_240)
    kl.update(measured, episodes=512)
    assert kl.coef == pytest.approx(0.2 * factor, rel=1e-12)


def test_adaptive_coefficient_pulls_a_simple_system_to_its_target():
    # a policy whose KL is 1/coef settles at KL = target, coef = 1/target
    kl = AdaptiveKL(init_coef=1.0, target=4.0, horizon=100)
    for _ in range(300):
        kl.update(1 / kl.coef, episodes=50)
    assert kl.coef == pytest.approx(0.25, rel=1e-3)


def test_adaptive_state_survives_saving_to_the_bit(tmp_path):
    kl = AdaptiveKL(init_coef=0.1, target=6.0, horizon=999)
    for measured in (3.3, 7.7, 100.0, 5.9):
        kl.update(measured, episodes=64)
    torch.save(kl.state_dict(), tmp_path / "kl.pt")
    resumed = AdaptiveKL(init_coef=0.1, target=6.0, horizon=999)
    resumed.load_state_dict(torch.load(tmp_path / "kl.pt", weights_only=True))
    assert struct.pack("d", resumed.coef) == struct.pack("d", kl.coef)
    assert resumed.coef != 0.1


def test_a_horizon_that_could_turn_the_coefficient_negative_is_refused():
    # 1 - .2 n/horizon is 0 at n = 5 horizon
    kl = AdaptiveKL(horizon=100)
    kl.update(0.0, episodes=499)
    assert kl.coef > 0
    with pytest.raises(UserError, match=r"kl\.horizon=100 is too short for 500 episodes.*above 100"):
        kl.update(6.0, episodes=500)


@pytest.mark.parametrize("measured", [NAN, INF])
def test_a_kl_that_is_no_number_never_reaches_the_coefficient(measured):
    kl = AdaptiveKL(init_coef=0.2)
    with pytest.raises(UserError, match=f"measured KL is {measured}"):
        kl.update(measured, episodes=8)
    assert kl.coef == 0.2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FixedKL(coef=-0.1), r"kl\.coef .*at least 0, got -0\.1"),
        (lambda: FixedKL(coef=NAN), r"kl\.coef .*finite.*got nan"),
        (lambda: FixedKL(coef=INF), r"kl\.coef .*finite.*got inf"),
        (lambda: FixedKL(coef="0.1"), r"kl\.coef .*got '0\.1'"),
        (lambda: FixedKL(coef=True), r"kl\.coef .*got True"),
        (lambda: FixedKL(estimator="k4"), r"kl\.estimator='k4' .*k1, k2, k3, abs, full"),
        (lambda: AdaptiveKL(estimator="K1"), r"kl\.estimator='K1'"),
        (lambda: FixedKL(place="loss"), r"kl\.estimator='k1' .*kl.place=loss .*mean zero.*one of k2, k3, k3_st, full"),
        (lambda: LinearKL(start=1, end=0, place="loss", estimator="abs"), r"kl\.estimator='abs' .*no KL's"),
        (lambda: FixedKL(estimator="k3_st"), r"kl\.estimator='k3_st' .*kl.place=reward .*in its gradient alone"),
        (lambda: FixedKL(place="both"), r"kl\.place must be one of reward, loss, got 'both'"),
        (lambda: NoKL(budget=0), r"kl\.budget .*above 0, got 0"),
        (lambda: LinearKL(start=-1, end=0), r"kl\.start .*at least 0, got -1"),
        (lambda: LinearKL(start=0, end=NAN), r"kl\.end .*got nan"),
        (lambda: AdaptiveKL(target=0), r"kl\.target .*above 0, got 0"),
        (lambda: AdaptiveKL(target=-6.0), r"kl\.target .*got -6\.0"),
        (lambda: AdaptiveKL(horizon=0), r"kl\.horizon .*above 0, got 0"),
        (lambda: AdaptiveKL(horizon=-5), r"kl\.horizon .*got -5"),
        (lambda: AdaptiveKL(horizon=INF), r"kl\.horizon .*finite.*got inf"),
        (lambda: AdaptiveKL(init_coef=0), r"kl\.init_coef .*above 0, got 0"),
        (lambda: AdaptiveKL(init_coef=NAN), r"kl\.init_coef .*got nan"),
    ],
)
def test_impossible_kl_settings_are_refused_with_their_value(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_a_linear_coefficient_runs_from_start_to_end():
    kl = LinearKL(start=0.2, end=0.0)
    assert [kl.at(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([0.2, 0.15, 0.0])


# ---- clip ranges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_clip_ranges_are_constant(progress):
    assert SymmetricClip(range=0.1, value_range=0.3).at(progress) == ClipBounds(low=0.1, high=0.1, value=0.3)
    asymmetric = AsymmetricClip(low=0.1, high=0.5, value_range=None)
    assert asymmetric.at(progress) == ClipBounds(low=0.1, high=0.5, value=None, dual=None)


def test_bounds_cannot_be_changed_behind_the_loss():
    with pytest.raises(AttributeError):
        SymmetricClip().at(0.0).low = 0.5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SymmetricClip(range=0), r"clip\.range .*above 0 and below 1, got 0"),
        (lambda: SymmetricClip(range=1), r"clip\.range .*got 1"),
        (lambda: SymmetricClip(range=NAN), r"clip\.range .*got nan"),
        (lambda: SymmetricClip(value_range=0.0), r"clip\.value_range .*above 0, got 0\.0"),
        (lambda: AsymmetricClip(low=0), r"clip\.low .*got 0"),
        (lambda: AsymmetricClip(low=1.0), r"clip\.low .*below 1, got 1\.0"),
        (lambda: AsymmetricClip(high=-0.1), r"clip\.high .*above 0, got -0\.1"),
        (lambda: AsymmetricClip(high=INF), r"clip\.high .*finite.*got inf"),
        (lambda: AsymmetricClip(value_range=-1), r"clip\.value_range .*got -1"),
        (lambda: LinearClip(start=1.0), r"clip\.start .*below 1, got 1\.0"),
        (lambda: LinearClip(end=-0.1), r"clip\.end .*at least 0 and below 1, got -0\.1"),
        (lambda: DualClip(range=1.0), r"clip\.range .*got 1\.0"),
        (lambda: DualClip(dual=1.0), r"clip\.dual .*above 1, got 1\.0"),
        (lambda: NoClip(value_range=0), r"clip\.value_range .*got 0"),
        (lambda: AdaptiveKLPenalty(target=0), r"clip\.target .*above 0, got 0"),
        (lambda: AdaptiveKLPenalty(init_weight=-1), r"clip\.init_weight .*at least 0\.001 and at most 1000, got -1"),
        (lambda: AdaptiveKLPenalty(min_weight=0), r"clip\.min_weight .*above 0, got 0"),
        (lambda: AdaptiveKLPenalty(min_weight=2, max_weight=1), r"clip\.max_weight .*above 2, got 1"),
    ],
)
def test_impossible_clip_ranges_are_refused_with_their_value(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_the_upper_bound_may_exceed_one():
    assert AsymmetricClip(low=0.2, high=3.0).at(0.0).high == 3.0


def test_the_other_clips_have_the_bounds_that_their_names_say():
    assert LinearClip(start=0.3, end=0.1, value_range=None).at(0.25).high == pytest.approx(0.25)
    assert LinearClip(start=0.2, end=0.0).at(1.0) == ClipBounds(low=0.0, high=0.0, value=0.2)
    assert DualClip(range=0.1, dual=2.5).at(0.0) == ClipBounds(low=0.1, high=0.1, value=0.2, dual=2.5)
    assert NoClip().at(0.0) == ClipBounds(low=None, high=None, value=None)


def test_the_penalty_on_the_update_halves_and_doubles_around_its_target():
    # Schulman et al., section 4: d < target / 1.5 halves, d > 1.5 target doubles, between them it stays
    clip = AdaptiveKLPenalty(target=0.03, init_weight=1.0)
    for measured, weight in ((0.019, 0.5), (0.021, 0.5), (0.044, 0.5), (0.046, 1.0), (9.0, 2.0)):
        clip.update(measured)
        assert clip.at(0.0).penalty == weight
    resumed = AdaptiveKLPenalty(target=0.03)
    resumed.load_state_dict(clip.state_dict())
    assert resumed.at(0.0).penalty == 2.0
    with pytest.raises(UserError, match="KL of the last updates is nan"):
        clip.update(NAN)


def test_the_penalty_on_the_update_comes_back_from_its_bounds():
    clip = AdaptiveKLPenalty(target=0.03, min_weight=0.25, max_weight=4)
    for measured, weight in ((0.0, 0.25), (1e6, 4.0)):
        for _ in range(2000):  # more halvings and doublings than a float has
            clip.update(measured)
        assert clip.at(0.0).penalty == weight


# ---- entropy -------------------------------------------------------------------------------------------------


def test_constant_entropy_weights():
    assert [NoEntropy().at(p) for p in (0.0, 1.0)] == [0, 0]
    assert [ConstantEntropy(coef=0.03).at(p) for p in (0.0, 1.0)] == [0.03, 0.03]


def test_linear_entropy_runs_from_start_to_end():
    entropy = LinearEntropy(start=0.04, end=0.0)
    assert [entropy.at(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([0.04, 0.03, 0.0])
    assert LinearEntropy(start=0.0, end=0.01).at(0.5) == pytest.approx(0.005)


@pytest.mark.parametrize("schedule", [LinearKL, LinearClip, LinearEntropy])
@pytest.mark.parametrize("progress", [-0.1, 1.1, NAN])
def test_no_line_goes_on_beyond_its_ends(schedule, progress):
    with pytest.raises(ValueError, match=r"progress=.* must lie in \[0, 1\]"):
        schedule(start=0.04, end=0.0).at(progress)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConstantEntropy(coef=-0.01), r"entropy\.coef .*at least 0, got -0\.01"),
        (lambda: LinearEntropy(start=-1, end=0), r"entropy\.start .*got -1"),
        (lambda: LinearEntropy(start=0, end=NAN), r"entropy\.end .*got nan"),
        (lambda: ConstantEntropy(top_k=1), r"entropy\.top_k .*at least 2, got 1"),
        (lambda: TargetEntropy(target=0), r"entropy\.target .*above 0, got 0"),
        (lambda: TargetEntropy(target=1, init_coef=0), r"entropy\.init_coef .*at least 1e-05 and at most 0\.1, got 0"),
        (lambda: TargetEntropy(target=1, min_coef=0), r"entropy\.min_coef .*above 0, got 0"),
        (lambda: TargetEntropy(target=1, lr=-1), r"entropy\.lr .*got -1"),
        (lambda: TargetEntropy(target=1, max_coef=0), r"entropy\.max_coef .*got 0"),
    ],
)
def test_impossible_entropy_weights_are_refused_with_their_value(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_a_target_entropy_moves_the_logarithm_of_its_weight_by_the_difference():
    entropy = TargetEntropy(target=2.0, init_coef=0.01, lr=0.5, max_coef=0.05)
    entropy.update(1.0)
    assert entropy.at(0.0) == pytest.approx(0.01 * math.exp(0.5))
    entropy.update(4.0)
    assert entropy.at(0.0) == pytest.approx(0.01 * math.exp(-0.5))
    resumed = TargetEntropy(target=2.0)
    resumed.load_state_dict(entropy.state_dict())
    assert resumed.at(0.0) == entropy.at(0.0)
    entropy.update(-100.0)
    assert entropy.at(0.0) == pytest.approx(0.05)
    with pytest.raises(UserError, match="measured entropy is nan"):
        entropy.update(NAN)


def test_the_weight_of_the_entropy_comes_back_from_its_bounds():
    entropy = TargetEntropy(target=2.0, init_coef=0.01, lr=1.0, min_coef=0.001, max_coef=0.1)
    for measured, coef in ((1e6, 0.001), (-1e6, 0.1)):  # by exp(+-1e6), which no float holds
        for _ in range(3):
            entropy.update(measured)
        assert entropy.at(0.0) == pytest.approx(coef)
    entropy.update(2.0 + math.log(10))
    assert entropy.at(0.0) == pytest.approx(0.01)
