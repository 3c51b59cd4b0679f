"""The expectation of each algorithm's gradient, over everything that it could sample, is the one that its theory says.

Two prompts, 7 completions each (two letters or the end, at most two tokens). The rollout of an iteration is replaced by
every group of completions that there is; a group's loss is weighted by its probability. What is left of the algorithm
is its own: token rewards with the KL penalty, advantages, experience, loss. The policy is not its reference.
"""

import copy
import itertools
import math
from functools import cache

import lightning as L
import pytest
import torch
from benchmarks.exact_optimum import fit

from lit_rlhf import algorithms
from lit_rlhf.baseline import BatchMeanBaseline, NoBaseline, ValueBaseline
from lit_rlhf.exact import ExactProblem, letters_policy, table_reward
from lit_rlhf.kl import FixedKL
from lit_rlhf.models.policy import PolicyOutput
from lit_rlhf.rollout.sampler import Sampler

BETA, STEPS = 0.3, 2
ROWS = [{"prompt": "a"}, {"prompt": "bab"}]


@cache
def moved_policy():
    """A reference and a policy that has moved away from it, in double precision."""
    policy = letters_policy("ab", seed=1).double()
    generator = torch.Generator().manual_seed(0)
    steps = [0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in policy.parameters()]
    return policy, steps


def setting(reward=None):
    reference, steps = moved_policy()
    policy = type(reference)(model=copy.deepcopy(reference.model), tokenizer=reference.tokenizer)
    reward = reward or table_reward(seed=1)
    problem = ExactProblem(policy=policy, rows=ROWS, reward=reward, beta=BETA, max_new_tokens=STEPS)
    return policy, steps, problem, reward


def expected_gradient(name, *, group_size=1, reward=None, loss=None, **settings):
    """The algorithm's expected gradient per completion, the moved policy, and the problem.

    Losses that are means over tokens are turned into sums over a completion's tokens.
    """
    policy, steps, problem, reward = setting(reward)
    groups = list(itertools.product(range(problem.shape[1]), repeat=group_size))
    pick = torch.tensor([x * problem.shape[1] + y for x in range(len(ROWS)) for g in groups for y in g])
    module = getattr(algorithms, name)(
        policy=policy, reward=reward, sampler=Sampler(max_new_tokens=STEPS), kl=FixedKL(coef=BETA),
        rollout_batch_size=len(pick), group_size=group_size,
        minibatch_size=len(pick) // (group_size if name == "RAFT" else 1),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), **settings,
    )  # fmt: skip
    if module.critic is not None:  # a baseline that is wrong, but no constant
        torch.nn.init.normal_(module.critic.head.weight, generator=torch.Generator().manual_seed(1))
    for parameter, step in zip(policy.parameters(), steps, strict=True):
        parameter.data += step
    module.rollout = lambda prompts, seed: problem.rollout[pick]
    module.update_policy = lambda experience: None  # TRPO's step, which would move the policy
    found = {}

    class Take(L.Callback):
        def on_train_batch_start(self, _trainer, module, _batch, _index):
            found["gradient"] = weighted_gradient(module, problem, pick.reshape(-1, group_size), loss)

    fit(module, [{"prompt": [row["prompt"] for row in ROWS for _ in groups]}], max_epochs=1, callbacks=[Take()])
    return found["gradient"], policy, problem


def weighted_gradient(module, problem, groups, loss):
    """Of minus the loss; one forward pass over the whole experience, then the loss of every group on its own."""
    experience, policy = module.loader.experience, module.policy
    tokens = (experience.prompt_ids, experience.prompt_mask, experience.response_ids, experience.response_mask)
    output = policy(*tokens, entropy=True, keep_logits=True)
    values = module.critic(output, *tokens)[:, :-1] if module.critic is not None else None
    with torch.no_grad():
        logprobs = problem.logprobs(policy).flatten()
    total = 0.0
    size = len(experience) // len(groups)  # rows that are left of a group
    for number, group in enumerate(groups):
        rows = torch.arange(number * size, (number + 1) * size)
        batch = experience[rows]
        part = PolicyOutput(*(None if x is None else x[rows] for x in output))
        objective = loss(module, batch, part) if loss else module.loss(batch, part)[0]
        if values is not None and not loss:
            objective = objective + module.value_loss(batch, values[rows])[0]
        scale = float(batch.response_mask.sum()) / size if module.loss_over == "tokens" else 1.0
        # DAPO puts groups in another order; of RAFT's, one row is left.
        sampled = batch.logprobs[batch.response_mask].double() if size == len(group) else logprobs[group]
        probability = sampled.sum().exp()
        total = total - probability / len(ROWS) * scale * objective
    return flat(torch.autograd.grad(total, list(policy.parameters()), allow_unused=True), policy)


def flat(gradients, policy):
    pairs = zip(gradients, policy.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs])


def gradient_of(objective, policy):
    return flat(torch.autograd.grad(objective, list(policy.parameters())), policy)


def policy_gradient(policy, problem):
    return gradient_of(problem.objective(problem.logprobs(policy)), policy)


def assert_equal(found, expected):
    assert expected.norm() > 1e-2
    assert float((found - expected).norm() / expected.norm()) < 1e-4


UNBIASED = {
    "PPO": {"lam": 1.0, "whiten_advantages": False, "value_coef": 0.0},
    "A2C": {"lam": 1.0, "value_coef": 0.0},
    "Reinforce none": {"baseline": NoBaseline()},
    "Reinforce mean": {"baseline": BatchMeanBaseline()},  # here of everything that there is, so a constant
    "Reinforce value": {"baseline": ValueBaseline(coef=0.0)},
    "RLOO": {"group_size": 2},
}


@pytest.mark.parametrize("name", UNBIASED)
def test_the_expected_gradient_is_the_policy_gradient(name):
    found, policy, problem = expected_gradient(name.split()[0], **UNBIASED[name])
    assert_equal(found, policy_gradient(policy, problem))


def test_the_tokenwise_advantages_of_a_true_value_function_need_no_lambda_of_1():
    """With V exact, GAE is unbiased for every lambda."""
    policy, steps, problem, _ = setting()
    for parameter, step in zip(policy.parameters(), steps, strict=True):
        parameter.data += step
    with torch.no_grad():
        moved = problem.logprobs(policy)
    penalised = problem.scores - BETA * (moved - problem.reference)
    values = []
    for x in range(len(ROWS)):
        for completion in problem.completions:
            row = []
            for t in range(STEPS + 1):
                same = [i for i, other in enumerate(problem.completions) if other[:t] == completion[:t]]
                weights = moved[x, same].exp()
                value = (weights * penalised[x, same]).sum() / weights.sum()
                # The KL of the tokens up to t is paid already.
                row.append(float(value) if t < len(completion) else 0.0)
            values.append(row)
    paid = prefix_kl(problem, moved)
    exact = torch.tensor(values).reshape(-1, STEPS + 1) + BETA * paid

    class Known(torch.nn.Module):
        def __init__(self, _policy):
            super().__init__()
            self.head = torch.nn.Linear(1, 1)

        def forward(self, *_):
            return exact + 0 * self.head.weight.sum()

    found, policy, problem = expected_gradient("PPO", critic=Known, lam=0.3, whiten_advantages=False, value_coef=0.0)
    assert_equal(found, policy_gradient(policy, problem))


def prefix_kl(problem, moved):
    """(X * Y, T + 1) log-ratio to the reference of the tokens before each place, from marginals."""
    rows = []
    for x in range(len(ROWS)):
        for completion in problem.completions:
            row = []
            for t in range(STEPS + 1):
                same = [i for i, other in enumerate(problem.completions) if other[:t] == completion[:t]]
                ratio = moved[x, same].logsumexp(0) - problem.reference[x, same].logsumexp(0)
                row.append(float(ratio) if t < len(completion) else 0.0)
            rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("group_size", [2, 3])
def test_dr_grpo_is_the_policy_gradient_times_a_constant(group_size):
    """A completion is in its own baseline, which takes 1 / group_size away; and L divides the loss."""
    found, policy, problem = expected_gradient("DrGRPO", group_size=group_size)
    scale = (group_size - 1) / group_size / STEPS
    assert_equal(found, scale * policy_gradient(policy, problem))


def whitened_over_tokens(problem, policy):
    """1 / standard deviation of the token returns of everything that there is, by plain loops."""
    with torch.no_grad():
        moved = problem.logprobs(policy)
    before = prefix_kl(problem, moved).reshape(*problem.shape, STEPS + 1)
    penalised = problem.scores - BETA * (moved - problem.reference)
    returns = [
        float(penalised[x, y] + BETA * before[x, y, t])
        for x in range(len(ROWS)) for y, completion in enumerate(problem.completions) for t in range(len(completion))
    ]  # fmt: skip
    return 1 / float(torch.tensor(returns).std())


def test_reinforce_pp_is_the_policy_gradient_over_the_spread_of_returns():
    found, policy, problem = expected_gradient("ReinforcePP")
    assert_equal(found, whitened_over_tokens(problem, policy) * policy_gradient(policy, problem))


@pytest.mark.parametrize("name", ["GRPO", "GSPO", "DAPO"])
def test_standardised_groups_by_plain_loops_over_all_groups(name):
    """mean_i A_i grad log p(y_i) / |y_i| with A in standard deviations of the group; DAPO does not divide by |y_i|."""
    found, policy, problem = expected_gradient(name, group_size=2)
    logprobs = problem.logprobs(policy)
    moved = logprobs.detach()
    penalised = problem.scores - BETA * (moved - problem.reference)
    objective = 0.0
    for x in range(len(ROWS)):
        for i, j in itertools.product(range(problem.shape[1]), repeat=2):
            mean = (penalised[x, i] + penalised[x, j]) / 2
            std = math.sqrt(float((penalised[x, i] - mean) ** 2 + (penalised[x, j] - mean) ** 2))  # n - 1 = 1
            for y in (i, j):
                advantage = float((penalised[x, y] - mean) / (std + 1e-4))
                length = 1 if name == "DAPO" else len(problem.completions[y])
                probability = float((moved[x, i] + moved[x, j]).exp()) / len(ROWS)
                objective = objective + probability * advantage / length / 2 * logprobs[x, y]
    assert_equal(found, gradient_of(objective, policy))


@pytest.mark.parametrize("group_size", [2, 3])
def test_raft_climbs_the_likelihood_of_the_best_of_n(group_size):
    found, policy, problem = expected_gradient("RAFT", group_size=group_size)
    # Ranked by what the reward is after the KL penalty, drawn from the policy as it is.
    with torch.no_grad():
        moved = problem.logprobs(policy)
    problem.scores = problem.scores - BETA * (moved - problem.reference)
    problem.reference = moved
    target = problem.best_of(group_size).exp()
    assert_equal(found, gradient_of((target * problem.logprobs(policy)).sum(-1).mean(), policy))


def test_expert_iteration_climbs_the_probability_of_being_right():
    found, policy, problem = expected_gradient("ExpertIteration", group_size=1, threshold=0.2)
    with torch.no_grad():
        right = (problem.scores - BETA * (problem.logprobs(policy) - problem.reference) >= 0.2).double()
    lengths = torch.tensor([len(completion) for completion in problem.completions]).expand(problem.shape)
    scale = float(lengths.sum() / (right * lengths).sum())  # over the mean of right tokens
    assert_equal(found, scale * gradient_of((problem.logprobs(policy).exp() * right).sum(-1).mean(), policy))


def test_online_dpo_by_the_formula_of_dpos_gradient():
    """beta (q - sigmoid(h)) (grad log p(y1) - grad log p(y2)), arXiv:2305.18290, section 4."""
    found, policy, problem = expected_gradient("OnlineDPO", group_size=2)
    logprobs = problem.logprobs(policy)
    moved = logprobs.detach()
    objective = 0.0
    for x in range(len(ROWS)):
        for i, j in itertools.product(range(problem.shape[1]), repeat=2):
            h = BETA * (moved[x, i] - problem.reference[x, i] - moved[x, j] + problem.reference[x, j])
            q = torch.sigmoid(problem.scores[x, i] - problem.scores[x, j])
            weight = float((moved[x, i] + moved[x, j]).exp() * BETA * (q - torch.sigmoid(h))) / len(ROWS)
            objective = objective + weight * (logprobs[x, i] - logprobs[x, j])
    assert_equal(found, gradient_of(objective, policy))


def test_trpos_objective_has_the_policy_gradient():
    def surrogate(module, batch, output):
        (part,) = module._parts(batch, len(batch))
        return -module._surrogate(part)

    found, policy, problem = expected_gradient("TRPO", lam=1.0, whiten_advantages=False, loss=surrogate)
    assert_equal(found, policy_gradient(policy, problem))


@pytest.mark.parametrize("name", ["RLOO", "GRPO", "DrGRPO", "DAPO", "GSPO", "OnlineDPO"])
def test_at_the_optimum_every_group_has_gradient_0(name):
    """Where the policy is p*, r - beta log(policy / ref) is the same for all completions of a prompt."""
    policy, steps, problem, _ = setting()
    for parameter, step in zip(policy.parameters(), steps, strict=True):
        parameter.data += step
    with torch.no_grad():
        optimal = BETA * (problem.logprobs(policy) - problem.reference)
    texts = problem.texts[: problem.shape[1]]
    table = {  # any constant may be added for a prompt
        (row["prompt"], text): float(optimal[x, y]) + x for x, row in enumerate(ROWS) for y, text in enumerate(texts)
    }

    def reward(prompts, completions, **_):
        return [table[key] for key in zip(prompts, completions, strict=True)]

    at, _, _ = expected_gradient(name, group_size=2, reward=reward)
    away, _, _ = expected_gradient(name, group_size=2)
    assert at.norm() < 1e-4 * away.norm() or name in ("GRPO", "DAPO", "GSPO")
    assert at.norm() < 1e-2 * away.norm()  # standardising divides rounding by 1e-4
