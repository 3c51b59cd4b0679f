"""The exact optimum: problems so small that every completion is enumerated and the best possible policy is known.

For a reward r, a reference ref and a weight beta > 0, RLHF maximises, averaged over the prompts x,

    J(policy) = E_policy[r(x, y)] - beta KL(policy(.|x) || ref(.|x)).

Its maximum is known in closed form (Rafailov et al., arXiv:2305.18290, eq. 4):

    p*(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x),    J* = beta mean_x log Z(x),    Z(x) = E_ref[exp(r(x, y) / beta)],

so any policy's distance from it is a number: regret = (J* - J(policy)) / (J* - J(ref)), 0 at the optimum and 1 at the
reference. It equals KL(policy || p*) / KL(ref || p*), because J* - J(policy) = beta KL(policy || p*).
"""

import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.judged import decode_completions
from lit_rlhf.algorithms.offline import MicroBatch
from lit_rlhf.algorithms.pairs import PairBatch
from lit_rlhf.batch import CompletionBatch, Rollout
from lit_rlhf.checks import check_number
from lit_rlhf.data.tokenize import tokenize_prompts
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import Policy
from lit_rlhf.rewards.scoring import Reward, score

_MOST_ROWS = 500_000


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a policy is from the optimum, every number exact and averaged over the prompts.

    Attributes:
        regret: (J* - J) / (J* - J(ref)); 0 is the optimum, 1 the reference.
        objective: J, in units of the reward.
        reward: E[r].
        kl: KL(policy || ref), nats per completion.
        total_variation: half the sum of |policy(y) - target(y)|, in [0, 1]; the target is p* unless another is given.
    """

    regret: float
    objective: float
    reward: float
    kl: float
    total_variation: float


class ExactProblem:
    """Prompts, a reward and a reference whose completions can all be written down.

    A completion ends with a stop id, or at ``max_new_tokens`` without one. Tables over completions are (X, Y): X
    prompts, Y completions, the same ones for every prompt, in float64.

    Args:
        policy: the reference is this policy as it is now; only its log-probabilities are kept.
        rows: the prompts, as rows of a datamodule: dicts with ``prompt`` (or ``input_ids`` and ``attention_mask``) and
            the columns that the reward reads.
        reward: any reward, see ``rewards/scoring.py``; its components are added up.
        beta: weight of the KL, > 0, in reward per nat; an online run's ``kl.coef``.
        max_new_tokens: tokens of the longest completion, the stop token included.

    Attributes:
        rollout: every completion of every prompt, (X * Y) rows, the completions of a prompt next to each other.
        texts: the completions' texts, X * Y of them.
        scores: (X, Y) rewards.
        reference: (X, Y) log-probabilities of the reference.
        optimum: (X, Y) log-probabilities of p*.

    Raises:
        UserError: there are no rows, ``beta`` is not positive, or there are too many completions to write down.

    Example:
        >>> policy = letters_policy("ab", seed=0)
        >>> problem = ExactProblem(policy=policy, rows=[{"prompt": "a"}], reward=table_reward(seed=0), beta=0.5,
        ...                        max_new_tokens=2)
        >>> sorted(problem.texts)  # "" is the end at once; two letters are cut before their end
        ['', 'a', 'aa', 'ab', 'b', 'ba', 'bb']
        >>> round(problem.measure(policy).regret, 6), abs(problem.measure(problem.optimum).regret) < 1e-9
        (1.0, True)
    """

    def __init__(
        self, *, policy: Policy, rows: Sequence[Mapping[str, Any]], reward: Reward, beta: float, max_new_tokens: int = 3
    ) -> None:
        if not rows:
            raise UserError("rows is empty; a problem needs at least one prompt")
        if not beta > 0:
            raise UserError(f"beta must be above 0 for an optimum to exist in closed form, got {beta}")
        self.beta = beta
        self.stop_ids = tuple(policy.stop_ids)
        vocabulary = policy.base.config.get_text_config().vocab_size
        if len(rows) * vocabulary**max_new_tokens > _MOST_ROWS:
            raise UserError(
                f"{vocabulary} tokens, max_new_tokens={max_new_tokens} and {len(rows)} prompts are too many "
                "completions to enumerate; take a policy with a vocabulary of about 6"
            )
        self.rows = [dict(row) for row in rows]
        self.completions = enumerate_completions(vocabulary, max_new_tokens, self.stop_ids)
        self.rollout, repeated = self._rollout(policy, max_new_tokens)
        self.texts = decode_completions(self.rollout, policy.tokenizer)
        ids = [list(completion) for completion in self.completions] * len(self.rows)
        scores = score(reward, repeated.prompts, self.texts, repeated.columns, ids, policy.tokenizer)
        self.scores = scores.total.double().reshape(self.shape)
        with torch.no_grad():
            self.reference = self.logprobs(policy)
        self.optimum = (self.reference + self.scores / beta).log_softmax(-1)

    @property
    def shape(self) -> tuple[int, int]:
        """(X, Y): prompts, completions of each."""
        return len(self.rows), len(self.completions)

    def _rollout(self, policy: Policy, max_new_tokens: int) -> tuple[Rollout, Any]:
        count = len(self.completions)
        prompts = tokenize_prompts(
            [row for row in self.rows for _ in range(count)], policy.tokenizer,
            episodes=torch.arange(len(self.rows) * count), max_new_tokens=max_new_tokens,
            context_length=policy.context_length,
        )  # fmt: skip
        ids = torch.full((count, max_new_tokens), policy.tokenizer.pad_token_id)
        mask = torch.zeros(count, max_new_tokens, dtype=torch.bool)
        for number, completion in enumerate(self.completions):
            ids[number, : len(completion)], mask[number, : len(completion)] = torch.tensor(completion), True
        ended = torch.tensor([completion[-1] in self.stop_ids for completion in self.completions])
        times = len(self.rows)
        rollout = Rollout(
            prompt_ids=prompts.prompt_ids, prompt_mask=prompts.prompt_mask, response_ids=ids.repeat(times, 1),
            response_mask=mask.repeat(times, 1), logprobs=torch.zeros(times * count, max_new_tokens),
            finished=ended.repeat(times), episodes=prompts.episodes,
        )  # fmt: skip
        return rollout, prompts

    # ---- what a policy is worth -----------------------------------------------------------------------------------

    def logprobs(self, policy: Policy) -> Tensor:
        """(X, Y) log-probabilities of whole completions; gradients flow to the policy."""
        mask = self.rollout.response_mask
        tokens = (self.rollout.prompt_ids, self.rollout.prompt_mask, self.rollout.response_ids, mask)
        output = policy(*(x.to(next(policy.parameters()).device) for x in tokens))
        return torch.where(mask, output.logprobs.double().cpu(), 0.0).sum(-1).reshape(self.shape)

    def objective(self, logprobs: Tensor) -> Tensor:
        """J of a policy's log-probabilities (X, Y). Its gradient is the exact policy gradient."""
        return (logprobs.exp() * (self.scores - self.beta * (logprobs - self.reference))).sum(-1).mean()

    @torch.no_grad()
    def measure(self, policy: Policy | Tensor, target: Tensor | None = None) -> Distance:
        """A policy's distance from the optimum.

        Args:
            policy: a policy, or its log-probabilities (X, Y) where it has no network of its own.
            target: log-probabilities (X, Y) that ``total_variation`` measures to; p* by default.
        """
        logprobs = policy.double() if isinstance(policy, Tensor) else self.logprobs(policy)
        probabilities = logprobs.exp()
        kl = (probabilities * torch.where(probabilities > 0, logprobs - self.reference, 0)).sum(-1).mean()
        reward = (probabilities * self.scores).sum(-1).mean()
        best, first = self.objective(self.optimum), self.objective(self.reference)
        objective = reward - self.beta * kl
        target = self.optimum if target is None else target
        return Distance(
            regret=float((best - objective) / (best - first)),
            objective=float(objective),
            reward=float(reward),
            kl=float(kl),
            total_variation=float((probabilities - target.exp()).abs().sum(-1).mean() / 2),
        )

    # ---- other targets --------------------------------------------------------------------------------------------

    def best_of(self, count: int) -> Tensor:
        """(X, Y) log-probabilities of the best of ``count`` draws from the reference.

        With F the reference's distribution of scores, a completion of score s has probability
        ``ref(y) (F(s)^count - F(s-)^count) / (F(s) - F(s-))``; one of several best is taken at random. Choosing the
        best of ``count`` again, from this distribution, gives that of ``count^2``.
        """
        probabilities = self.reference.exp()
        below = (probabilities.unsqueeze(1) * (self.scores.unsqueeze(1) < self.scores.unsqueeze(2))).sum(-1)
        equal = (probabilities.unsqueeze(1) * (self.scores.unsqueeze(1) == self.scores.unsqueeze(2))).sum(-1)
        chosen = ((below + equal) ** count - below**count) / equal
        return (probabilities * chosen).log().log_softmax(-1)

    # ---- data for the offline algorithms --------------------------------------------------------------------------

    def preferences(self, count: int, *, seed: int, flipped: float = 0.0) -> Tensor:
        """``count`` pairs of completions of the reference, ordered by Bradley-Terry.

        P(chosen) = sigmoid(r(chosen) - r(rejected)), so DPO's optimum at ``beta`` is p*. Prompts are equally likely;
        pairs of equal completions are drawn again. They are numbers of completions and not texts, because a text cannot
        say whether its completion ended or was cut at ``max_new_tokens``: ``pair_batch`` gives their tokens.

        Args:
            count: pairs.
            seed: of the draws.
            flipped: share of pairs whose label is turned round, in [0, 1].

        Returns:
            (count, 2) rows of ``rollout``, the preferred one first.

        Raises:
            UserError: ``flipped`` is no share, or completions of a prompt hardly ever differ.

        Example:
            DPO on them, with a policy that is the reference::

                algorithm = DPO(policy=policy, beta=problem.beta)
                algorithm.collate = problem.pair_batch
                trainer.fit(algorithm, DataLoader(problem.preferences(100_000, seed=0), batch_size=1024))
        """
        check_number("flipped", flipped, at_least=0, at_most=1)
        if (self.reference.exp().square().sum(-1) > 1 - 1e-4).any():
            raise UserError("the reference completes a prompt in one way almost always: there are no pairs that differ")
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(self.shape[0], (count,), generator=generator)
        pairs = torch.zeros(count, 2, dtype=torch.long)
        for prompt, probabilities in enumerate(self.reference.exp()):
            while (again := (prompts == prompt) & (pairs[:, 0] == pairs[:, 1])).any():
                drawn = torch.multinomial(probabilities, 2 * int(again.sum()), replacement=True, generator=generator)
                pairs[again] = drawn.reshape(-1, 2)
        one, other = self.scores[prompts.unsqueeze(1), pairs].unbind(-1)
        wins = torch.sigmoid(one - other)
        wins = (1 - flipped) * wins + flipped * (1 - wins)
        lost = torch.rand(count, generator=generator) > wins
        return torch.where(lost.unsqueeze(1), pairs.flip(1), pairs) + prompts.unsqueeze(1) * self.shape[1]

    def pair_batch(self, pairs: Tensor) -> MicroBatch:
        """(B, 2) rows of ``preferences`` as tokens: a batch for DPO and its siblings, in place of their ``collate``."""
        rows, places = pairs.unique(return_inverse=True)
        completions = self.completion_batch(rows)
        return MicroBatch(
            PairBatch(completions, *places.unbind(-1)), terms=len(pairs), sequences=2 * len(pairs),
            tokens=completions.count,
        )  # fmt: skip

    def completion_batch(self, rows: Tensor) -> CompletionBatch:
        """(B,) rows of ``rollout`` as the batch of an offline algorithm; a cut completion has no end of sequence."""
        chosen = self.rollout[rows]
        return CompletionBatch(
            prompt_ids=chosen.prompt_ids, prompt_mask=chosen.prompt_mask, response_ids=chosen.response_ids,
            response_mask=chosen.response_mask,
        )  # fmt: skip

    # ---- dynamic programming --------------------------------------------------------------------------------------

    def next_tokens(self) -> list[dict[tuple[int, ...], Tensor]]:
        """For every prompt: prefix (token ids; ``()`` at the start) -> log ref(. | prefix), (V,), float64."""
        return [self._conditionals(prompt) for prompt in range(self.shape[0])]

    def _conditionals(self, prompt: int) -> dict[tuple[int, ...], Tensor]:
        # The mass of a prefix is the sum over its completions, so that no second forward pass is needed.
        mass: dict[tuple[int, ...], float] = {}
        for completion, probability in zip(self.completions, self.reference[prompt].exp().tolist(), strict=True):
            for length in range(len(completion) + 1):
                mass[completion[:length]] = mass.get(completion[:length], 0.0) + probability
        going = {completion[:length] for completion in self.completions for length in range(len(completion))}
        vocabulary = max(token for completion in self.completions for token in completion) + 1
        return {
            prefix: torch.tensor([mass[(*prefix, token)] / mass[prefix] for token in range(vocabulary)]).double().log()
            for prefix in sorted(going, key=len)
        }

    def action_values(
        self, value: Callable[[Tensor, Tensor], Tensor], *, discount: float = 1.0
    ) -> list[dict[tuple[int, ...], Tensor]]:
        """Dynamic programming over the tree of prefixes, with the reward at a completion's end.

        Q(prefix, a) is the reward where ``a`` ends the completion, else ``discount * V(prefix + a)``, and V(prefix) =
        ``value(Q(prefix, .), log ref(. | prefix))``. So ``value`` says what is solved: ``(ref.exp() * q).sum()`` the
        reference's own values, ``beta * (ref + q / beta).logsumexp(0)`` the soft ones of the KL-regularised optimum, an
        expectile IQL's.

        Args:
            value: Q (V,) and the reference's next-token log-probabilities (V,) to a number; V the vocabulary.
            discount: per token, in [0, 1].

        Returns:
            For every prompt: prefix (token ids; ``()`` at the start) -> Q (V,), float64.
        """
        tables = []
        for prompt, conditionals in enumerate(self.next_tokens()):
            scores = dict(zip(self.completions, self.scores[prompt], strict=True))
            values: dict[tuple[int, ...], Tensor] = {}
            table: dict[tuple[int, ...], Tensor] = {}
            for prefix, conditional in reversed(conditionals.items()):  # the longest first
                after = [(*prefix, token) for token in range(len(conditional))]
                table[prefix] = torch.stack([scores[p] if p in scores else discount * values[p] for p in after])
                values[prefix] = value(table[prefix], conditional)
            tables.append(table)
        return tables


def enumerate_completions(vocabulary: int, max_new_tokens: int, stop_ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Every completion: it ends at its first stop id, which it includes, or at ``max_new_tokens``.

    >>> enumerate_completions(2, 2, stop_ids=[0])
    [(0,), (1, 0), (1, 1)]
    """
    going = [token for token in range(vocabulary) if token not in stop_ids]
    completions = []
    for length in range(1, max_new_tokens + 1):
        last = range(vocabulary) if length == max_new_tokens else sorted(stop_ids)
        completions += [(*body, end) for body in itertools.product(going, repeat=length - 1) for end in last]
    return completions


# ---- a problem to try an algorithm on ------------------------------------------------------------------------------


def letters_policy(letters: str = "abcde", *, seed: int = 0, hidden_size: int = 32, spread: float = 0.1) -> Policy:
    """A tiny causal LM whose tokens are an end of sequence and single letters.

    Args:
        letters: the vocabulary, besides the end of sequence, which is also the padding.
        seed: of the weights.
        hidden_size: width of its two layers.
        spread: standard deviation of the weights: wider gives a reference with clearer preferences.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"</s>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    config = LlamaConfig(
        vocab_size=len(letters) + 1, hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=spread)
    return Policy(
        model=model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
    )


def table_reward(*, seed: int = 0) -> Reward:
    """A reward read from tables of normally distributed numbers, with a spread of about 1.

    Every prompt has a number for each letter at each place and one for each pair of neighbours; the end counts as a
    letter. A completion's reward is the sum of its numbers over the square root of 5.
    """

    @functools.cache
    def draw(key: str) -> float:
        return random.Random(f"{seed}|{key}").gauss()

    @functools.cache
    def reward(prompt: str, text: str) -> float:
        ended = f"{text}."
        letters = [f"{prompt}|{place}|{letter}" for place, letter in enumerate(ended)]
        pairs = [f"{prompt}|{pair}" for pair in map("".join, itertools.pairwise(ended))]
        return sum(draw(key) for key in letters + pairs) / math.sqrt(5)

    def table(prompts: Sequence[str], completions: Sequence[str], **_columns: Any) -> list[float]:
        return [reward(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    return table
