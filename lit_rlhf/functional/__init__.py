"""Pure tensor maths of RLHF. Imports torch only; masks are bool, True = this token counts."""

from lit_rlhf.functional.advantages import gae, group_advantages, leave_one_out_advantages, per_token
from lit_rlhf.functional.conjugate_gradient import conjugate_gradient
from lit_rlhf.functional.kl import KL_ESTIMATORS, full_kl, kl_estimate
from lit_rlhf.functional.logprobs import entropy_from_logits, selective_logprobs
from lit_rlhf.functional.masked import masked_mean, masked_var, masked_whiten
from lit_rlhf.functional.policy_loss import clipped_policy_loss, clipped_surrogate, ratio_stats
from lit_rlhf.functional.preference import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    odds_ratio_loss,
    preference_loss,
    robust_dpo_loss,
)
from lit_rlhf.functional.q_learning import bellman_targets, conservative_loss, expectile_loss
from lit_rlhf.functional.value_loss import clipped_value_loss

__all__ = [
    "KL_ESTIMATORS",
    "bellman_targets",
    "clipped_policy_loss",
    "clipped_surrogate",
    "clipped_value_loss",
    "conjugate_gradient",
    "conservative_loss",
    "dpo_loss",
    "entropy_from_logits",
    "expectile_loss",
    "full_kl",
    "gae",
    "group_advantages",
    "ipo_loss",
    "kl_estimate",
    "kto_loss",
    "leave_one_out_advantages",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "odds_ratio_loss",
    "per_token",
    "preference_loss",
    "ratio_stats",
    "robust_dpo_loss",
    "selective_logprobs",
]
