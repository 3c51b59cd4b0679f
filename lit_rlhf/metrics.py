"""Every logged name, what it means, its unit and which direction is better: one table.

`<component>` and `<stage>` stand for any name. Each metric also exists with the prefix `val/`: the same
quantity on the validation prompts or the validation split. A sum or mean over tokens runs over the tokens of
completions, the emitted end-of-sequence token included.
"""

import re
from dataclasses import dataclass
from typing import Literal

from lit_rlhf.errors import UserError

Direction = Literal["higher", "lower"] | None

#: The columns that say when a row was written; every row has them, in this order.
AXES = ("iteration", "episode", "tokens")

_TABLE: dict[str, tuple[str, str, Direction]] = {
    # axes
    "iteration": ("rollout-and-update rounds completed; offline stages: optimiser steps", "count", None),
    "episode": ("completions sampled so far; offline stages: examples seen", "count", None),
    "tokens": ("completion tokens sampled so far; offline stages: tokens seen", "tokens", None),
    "step": ("in rows of Lightning and its callbacks alone: optimiser steps before them", "count", None),
    "attempt": ("W&B alone: how often the run was resumed or rolled back before this row", "count", None),
    # what is maximised
    "objective/scores": ("score of a completion, mean: sum of its components, unshaped", "reward", "higher"),
    "objective/scores_std": ("standard deviation of the scores over completions", "reward", None),
    "objective/kl": ("KL(policy || reference), summed over tokens, mean over completions", "nats", None),
    "objective/kl_per_token": ("KL(policy || reference), mean over tokens", "nats/token", None),
    "objective/kl_coef": ("coefficient of the KL penalty", "reward/nat", None),
    "objective/entropy": ("-log policy(token), summed over tokens, mean over completions", "nats", None),
    "objective/non_score_reward": ("KL penalty of a completion: minus kl_coef times its KL", "reward", None),
    "objective/rlhf_reward": ("scores + non_score_reward: what PPO maximises", "reward", "higher"),
    "reward/<component>/weighted": ("the same times its weight in the total, where it has one", "reward", "higher"),
    "reward/<component>/pass@<k>": ("chance that one of k completions of a prompt is right", "fraction", "higher"),
    "gold/<component>/pass@<k>": ("the same of a gold score that says right or wrong", "fraction", "higher"),
    "reward/<component>": ("mean of one component as its reward gave it", "reward", "higher"),
    "gold/<component>": ("mean value of a judge that the policy never trains on", "gold score", "higher"),
    # what completions are like
    "text/distinct_<n>": ("different n-grams of words as a share of all", "fraction", "higher"),
    "text/self_bleu": ("BLEU of a completion with the others as references, mean", "fraction", "lower"),
    "text/empty_rate": ("share of completions without anything but white space", "fraction", "lower"),
    "text/refusal_rate": ("share of completions that begin as refusals do", "fraction", "lower"),
    "text/perplexity": ("exp(mean negative log-likelihood of a token) of held-out texts", "", "lower"),
    "text/bits_per_byte": ("-log2 policy(text) of held-out texts per byte of UTF-8", "bits/byte", "lower"),
    "win_rate/<judge>/equal_length": ("win_rate/<judge> if both answered at the same length", "fraction", "higher"),
    "win_rate/<judge>": ("share of prompts on which the policy is preferred to the start", "fraction", "higher"),
    # rollout
    "rollout/response_length": ("mean length of a completion", "tokens", None),
    "rollout/prompt_length": ("mean length of a prompt", "tokens", None),
    "rollout/eos_rate": ("share of completions that ended by themselves", "fraction", None),
    "rollout/truncated_rate": ("share of completions cut at the length limit", "fraction", None),
    "rollout/tokens_per_second": ("completion tokens per second of rollout", "tokens/s", "higher"),
    "rollout/kept_reward": ("reward of the completions that are learned from, mean", "reward", "higher"),
    "rollout/kept_rate": ("share of completions that are right and learned from", "fraction", "higher"),
    "rollout/constant_groups": ("share of prompts all of whose completions score the same", "fraction", "lower"),
    "rollout/skipped_batches": ("batches left out because their reward failed or was not finite", "count", "lower"),
    "rollout/logprob_gap": ("mean |logprob in the sampler - in the training pass|", "nats/token", "lower"),
    # update
    "policy/approxkl": ("0.5 * (log ratio)^2 to the rollout policy, mean over tokens", "nats/token", None),
    "policy/clipfrac": ("share of tokens whose policy ratio is clipped", "fraction", None),
    "policy/ratio": ("probability ratio to the rollout policy, mean over tokens", "ratio", None),
    "policy/ratio_max": ("largest probability ratio of any token", "ratio", None),
    "policy/entropy": ("entropy of the next-token distribution, mean over tokens", "nats/token", None),
    "policy/early_stopped": ("1 if the updates ended early on the target KL, else 0", "flag", None),
    "policy/updates": ("optimiser steps in the iteration", "count", None),
    "loss/policy": ("policy loss; mean over tokens, or over completions where the algorithm says so", "loss", None),
    "loss/value": ("clipped value loss, 0.5 * squared error, mean over tokens", "loss", None),
    "loss/entropy": ("minus the entropy of the next-token distribution, mean over tokens", "nats/token", None),
    "loss/total": ("the loss that is differentiated", "loss", None),
    "value/clipfrac": ("share of tokens whose value prediction is clipped", "fraction", None),
    "value/explained_variance": ("1 - Var(returns - values) / Var(returns) at rollout", "fraction", "higher"),
    "value/mean": ("mean value prediction over completion tokens, during the updates", "reward", None),
    "returns/mean": ("return, mean over tokens", "reward", None),
    "returns/var": ("return, variance over tokens", "reward^2", None),
    "clip/low": ("how far below 1 the policy ratio counts", "ratio", None),
    "clip/high": ("how far above 1 the policy ratio counts", "ratio", None),
    "clip/penalty": ("weight of KL(old || new) in the loss, in the place of clipping", "loss/nat", None),
    "policy/update_kl": ("KL(rollout policy || policy) after the updates, mean over tokens", "nats/token", None),
    "online_dpo/accuracy": ("share of pairs whose implicit rewards are ordered as the rewards", "fraction", "higher"),
    "loss/kl": ("KL(policy || reference) in the loss, mean over tokens, before its coefficient", "nats/token", None),
    "entropy/coef": ("coefficient of the entropy term", "reward/nat", None),
    "kl_guard/rollbacks": ("iterations taken back because their KL exploded, so far", "count", "lower"),
    # signs of reward hacking, in an iteration's training completions; lit_rlhf/hacking/detectors.py
    "hacking/alarms": ("alarms of the reward-hacking monitor so far", "count", "lower"),
    "hacking/rollbacks": ("times that it put the run back, so far", "count", "lower"),
    "hacking/gold": ("how far the gold score is below its best", "standard deviations", "lower"),
    "hacking/gold/correlation": ("correlation of score and gold score over an iteration's completions", "", "higher"),
    "hacking/gold/best_iteration": ("iteration around which the gold score was at its best", "count", None),
    "hacking/disagreement": ("standard deviation of an ensemble's members, mean over completions", "reward", "lower"),
    "hacking/length": ("share of the score's gain since the start that length explains", "fraction", "lower"),
    "hacking/length/correlation": ("correlation of score and length over an iteration's completions", "", None),
    "hacking/length/change": ("length of a completion less that at the start, mean", "tokens", None),
    "hacking/repetition": ("share of a completion's n-grams that stood in it before, mean", "fraction", "lower"),
    "hacking/collapse": ("share of its n-grams that completions of other prompts hold, mean", "fraction", "lower"),
    "hacking/phrase": ("share of completions with the n-gram that has spread most, less its share before", "fraction",
                       "lower"),
    "hacking/entropy": ("minus the log-probability of a token, mean over the rollout", "nats/token", None),
    "hacking/kl_speed": ("growth of objective/kl since the iteration before, a completion", "nats", "lower"),
    "hacking/novelty": ("share of n-grams that are nowhere in the reward model's training texts", "fraction", "lower"),
    "hacking/<detector>/evidence": ("sum of evidence, in standard errors over the threshold", "", "lower"),
    "hacking/<detector>": ("what a detector of your own measures", "", None),
    "optim/lr": ("learning rate of the first parameter group", "", None),
    "optim/skipped_steps": ("optimiser steps skipped, since the row before, for numbers not finite", "count", "lower"),
    "optim/grad_norm": ("norm of the gradient before clipping, mean over optimiser steps", "", None),
    # offline stages
    "sft/perplexity": ("exp(mean negative log-likelihood of a target token)", "", "lower"),
    "sft/token_accuracy": ("share of target tokens that are the likeliest next token", "fraction", "higher"),
    "reward_model/loss": ("loss of the reward model: Bradley-Terry unless set otherwise", "loss", "lower"),
    "reward_model/accuracy": ("share of pairs whose chosen text scores higher", "fraction", "higher"),
    "reward_model/margin": ("score of the chosen minus that of the rejected text, mean", "reward", None),
    "reward_model/mean_score": ("score of a text, mean", "reward", None),
    "rewards/chosen": ("implicit reward of a preferred completion: beta * log(policy / reference)", "reward", None),
    "rewards/rejected": ("the same of a rejected completion; ORPO: beta * mean log policy of a token", "reward", None),
    "rewards/margins": ("implicit reward of the chosen minus that of the rejected completion", "reward", "higher"),
    "rewards/accuracies": ("share of pairs whose chosen completion has the higher reward", "fraction", "higher"),
    "logps/chosen": ("log policy of a preferred completion, summed over tokens, mean", "nats", None),
    "logps/rejected": ("log policy of a rejected completion, summed over tokens, mean", "nats", None),
    "kto/kl": ("reference point: KL(policy || reference) of other rows' completions, at least 0", "nats", None),
    "kto/desirable": ("share of rows with a desirable completion", "fraction", None),
    "loss/nll": ("minus log policy of a chosen completion, mean over its tokens", "nats/token", None),
    "loss/odds_ratio": ("-log sigmoid of the log odds ratio, before its weight", "loss", None),
    "orpo/log_odds_ratio": ("log odds of the chosen minus log odds of the rejected completion, mean", "", "higher"),
    "loss/q": ("squared error of Q to its target, mean over tokens, summed over the heads", "reward^2", None),
    "loss/v": ("expectile loss of V, mean over tokens", "reward^2", None),
    "loss/cql": ("conservative loss: -log softmax(Q)(token), mean over tokens, summed over the heads", "nats", None),
    "loss/lm": ("minus log policy of a token, mean over tokens", "nats/token", None),
    "q/mean": ("Q of the data's tokens, the smallest of the heads, mean over tokens", "reward", None),
    "q/state_value": ("V of the states, or the largest Q where there is no V, mean over tokens", "reward", None),
    "q/return": ("discounted reward to come that the data really got, mean over tokens", "reward", None),
    # wall time in one iteration
    "time/rollout": ("stage 1: sampling the completions", "s", None),
    "time/score": ("stage 2: scoring them", "s", None),
    "time/anchor": ("stage 3: log-probabilities of policy and reference, values", "s", None),
    "time/gather": ("waiting for the other processes' shares of stages 1 to 3, where there are several", "s", None),
    "time/advantage": ("stages 4 and 5: token rewards, advantages", "s", None),
    "time/update": ("stages 6 to 8: the optimiser steps", "s", None),
    "time/iteration": ("all stages together", "s", None),
    "time/<stage>": ("another stage", "s", None),
}


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A logged quantity: its name, definition, unit ("" if none) and better direction (None if neither is)."""

    name: str
    meaning: str
    unit: str
    better: Direction


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.sub(r"<\w+>", ".+", pattern), name) is not None


def lookup(name: str) -> Metric:
    """The entry of a logged name.

    Raises:
        UserError: the name is not in the table.

    >>> lookup("objective/kl").unit
    'nats'
    >>> lookup("val/reward/politeness").better
    'higher'
    """
    base = name.removeprefix("val/")
    key = base if base in _TABLE else next((p for p in _TABLE if "<" in p and _matches(p, base)), None)
    if key is None:
        raise UserError(f"no metric is called {name!r}; they are listed in lit_rlhf/metrics.py")
    meaning, unit, better = _TABLE[key]
    return Metric(name=name, meaning=meaning, unit=unit, better=better)


def table_markdown() -> str:
    """The whole table in Markdown, for the documentation."""
    lines = ["| metric | meaning | unit | better |", "|---|---|---|---|"]
    for name, (meaning, unit, better) in _TABLE.items():
        meaning = meaning.replace("|", r"\|")
        lines.append(f"| `{name}` | {meaning} | {unit} | {better or ''} |")
    return "\n".join(lines) + "\n"
