"""The exact optimum: its closed forms against hand computation, brute force and simulation."""

import dataclasses
import functools
import math

import pytest
import torch
from benchmarks import exact_optimum
from benchmarks import preference_goals as goals
from torch.utils.data import DataLoader

from lit_rlhf.algorithms import DPO, DQN, ILQL
from lit_rlhf.algorithms.pairs import sequence_logprobs
from lit_rlhf.errors import UserError
from lit_rlhf.exact import ExactProblem, enumerate_completions, letters_policy, table_reward

ROWS = [{"prompt": "a"}, {"prompt": "ba"}]


def problem(*, letters="ab", beta=0.5, max_new_tokens=2, reward=None, rows=ROWS):
    policy = letters_policy(letters, seed=1)
    reward = reward or table_reward(seed=1)
    return policy, ExactProblem(policy=policy, rows=rows, reward=reward, beta=beta, max_new_tokens=max_new_tokens)


def test_every_completion_occurs_once_and_their_probabilities_sum_to_1():
    _, exact = problem(letters="abcde", max_new_tokens=3)
    assert exact.shape == (2, 1 + 5 + 25 * 6)  # the end at once, after one letter, and three tokens
    assert len(set(exact.completions)) == len(set(exact.texts)) == 156
    torch.testing.assert_close(exact.reference.exp().sum(-1), torch.ones(2).double())
    assert enumerate_completions(3, 1, stop_ids=[]) == [(0,), (1,), (2,)]


def test_the_optimum_by_hand():
    # One token; rewards 1 for "a", 0 else, beta 1/log 2: exp(r / beta) is 2 for "a" and 1 else.
    _, exact = problem(max_new_tokens=1, beta=1 / math.log(2), rows=ROWS[:1],
                       reward=lambda completions, **_: [float(text == "a") for text in completions])  # fmt: skip
    ref = dict(zip(exact.texts, exact.reference[0].exp().tolist(), strict=True))
    partition = 1 + ref["a"]
    found = dict(zip(exact.texts, exact.optimum[0].exp().tolist(), strict=True))
    assert found == pytest.approx({"": ref[""] / partition, "a": 2 * ref["a"] / partition, "b": ref["b"] / partition})
    assert float(exact.objective(exact.optimum)) == pytest.approx(math.log(partition) / math.log(2))


def test_no_policy_is_better_than_the_optimum():
    _, exact = problem()
    best = exact.objective(exact.optimum)
    torch.manual_seed(0)
    for _ in range(200):
        other = (exact.optimum + 0.3 * torch.randn(exact.shape).double()).log_softmax(-1)
        assert exact.objective(other) < best


def test_regret_is_the_share_of_the_kl_to_the_optimum_that_is_left():
    policy, exact = problem()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        logprobs = exact.logprobs(policy)
    left = (logprobs.exp() * (logprobs - exact.optimum)).sum()
    first = (exact.reference.exp() * (exact.reference - exact.optimum)).sum()
    distance = exact.measure(policy)
    assert distance.regret == pytest.approx(float(left / first))
    assert distance.objective == pytest.approx(distance.reward - exact.beta * distance.kl)
    assert 0 < distance.total_variation < 1


def test_left_padding_changes_no_probability():
    policy, exact = problem(rows=[*ROWS, {"prompt": "abab"}])
    alone = ExactProblem(policy=policy, rows=ROWS[:1], reward=table_reward(seed=1), beta=0.5, max_new_tokens=2)
    torch.testing.assert_close(exact.reference[:1], alone.reference, atol=1e-5, rtol=1e-5)


def test_the_best_of_n_by_simulation_with_ties():
    _, exact = problem(reward=lambda completions, **_: [float(len(text)) for text in completions])
    torch.manual_seed(0)
    drawn = torch.multinomial(exact.reference[0].exp(), 3 * 40_000, replacement=True).reshape(-1, 3)
    scores = exact.scores[0][drawn] + 1e-6 * torch.rand(drawn.shape)  # one of several best at random
    best = drawn.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
    shares = torch.bincount(best, minlength=exact.shape[1]).double() / len(best)
    torch.testing.assert_close(shares, exact.best_of(3)[0].exp(), atol=0.01, rtol=0)
    torch.testing.assert_close(exact.best_of(1), exact.reference)


def test_best_of_n_twice_is_best_of_n_squared():
    _, exact = problem()
    twice = exact.best_of(9)
    exact.reference = exact.best_of(3)
    torch.testing.assert_close(exact.best_of(3), twice)


@pytest.mark.parametrize("flipped", [0.0, 0.2])
def test_preferences_follow_bradley_terry(flipped):
    _, exact = problem(max_new_tokens=1)
    pairs = exact.preferences(40_000, seed=0, flipped=flipped)
    a, b = exact.texts[:3].index("a"), exact.texts[:3].index("b")
    for prompt in range(2):
        among = pairs[pairs.min(-1).values // 3 == prompt] - 3 * prompt
        assert len(among) / len(pairs) == pytest.approx(0.5, abs=0.01)  # prompts are equally likely
        of = among[(among.sort(-1).values == torch.tensor([a, b]).sort().values).all(-1)]
        win = 1 / (1 + math.exp(exact.scores[prompt][b] - exact.scores[prompt][a]))
        assert float((of[:, 0] == a).double().mean()) == pytest.approx(
            (1 - flipped) * win + flipped * (1 - win), abs=0.02
        )
        share = exact.reference[prompt].exp()
        assert len(of) / len(among) == pytest.approx(float(2 * share[a] * share[b] / (1 - share.square().sum())),
                                                     abs=0.02)  # fmt: skip
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert (pairs // 3 == (pairs // 3)[:, :1]).all()  # both of one prompt


def test_pair_batches_hold_the_completions_themselves_the_end_at_once_included():
    policy, exact = problem()
    rows = torch.cat([torch.stack([torch.arange(14), torch.arange(14).roll(1)], 1), torch.tensor([[3, 0], [0, 3]])])
    batch = exact.pair_batch(rows)
    pairs = batch.inputs
    assert (len(pairs.completions), batch.terms, batch.sequences) == (14, 16, 32)  # each completion once
    chosen, rejected = pairs.sides(sequence_logprobs(policy, pairs.completions).detach())
    wanted = exact.reference.flatten().float()[rows]
    torch.testing.assert_close(torch.stack([chosen, rejected], 1), wanted)


def test_dpo_on_the_preferences_comes_to_the_optimum():
    policy, exact = problem(rows=[{"prompt": "ab"}, {"prompt": "ba"}])
    algorithm = DPO(policy=policy, beta=exact.beta, **exact_optimum.decaying(1e-2))
    algorithm.collate = exact.pair_batch
    exact_optimum.fit(algorithm, DataLoader(exact.preferences(50_000, seed=0), batch_size=1000), max_epochs=1)
    assert exact.measure(policy).regret < 0.05


# ---- the goals of the algorithms of preferences ----------------------------------------------------------------------


def test_without_noise_the_minimiser_of_dpos_loss_is_the_optimum_and_so_is_robust_dpos_with_noise():
    _, exact = problem()
    for loss, settings in [(goals.cdpo_loss, {"smoothing": 0.0}), (goals.robust_dpo_loss, {"smoothing": 0.1})]:
        found = goals.minimum_of(loss, beta=exact.beta, **settings)(exact)
        torch.testing.assert_close(found, exact.optimum, atol=1e-4, rtol=0)
    assert exact.measure(goals.minimum_of(goals.cdpo_loss, beta=exact.beta, smoothing=0.1)(exact)).regret > 0.02


def test_the_minimiser_of_ipos_loss_is_its_closed_form():
    # arXiv:2310.12036, Psi the identity: the log-ratio to the reference is p(y preferred to the data's) / tau.
    _, exact = problem(letters="abc")
    wins = torch.sigmoid(exact.scores.unsqueeze(2) - exact.scores.unsqueeze(1))
    preferred = (wins * exact.reference.exp().unsqueeze(1)).sum(-1)
    found = goals.minimum_of(goals.ipo_loss, beta=0.1, by_length=False)(exact)
    torch.testing.assert_close(found, (exact.reference + preferred / 0.1).log_softmax(-1), atol=1e-4, rtol=0)


def test_by_length_ipo_sets_the_same_ratios_per_token():
    _, exact = problem(letters="abc")
    wins = torch.sigmoid(exact.scores.unsqueeze(2) - exact.scores.unsqueeze(1))
    preferred = (wins * exact.reference.exp().unsqueeze(1)).sum(-1) / 0.5
    ratios = (goals.minimum_of(goals.ipo_loss, beta=0.5)(exact) - exact.reference) / goals.lengths(exact)
    torch.testing.assert_close(ratios - ratios[:, :1], preferred - preferred[:, :1], atol=1e-4, rtol=0)


def test_no_policy_near_orpos_minimum_has_a_smaller_loss():
    _, exact = problem()
    loss = functools.partial(goals.orpo_loss, weight=1.0)
    best = goals.minimiser(exact, loss)
    torch.manual_seed(0)
    for spread in [0.01, 0.1, 1.0]:
        for _ in range(50):
            other = (best + spread * torch.randn(exact.shape).double()).log_softmax(-1)
            assert loss(exact, other) > loss(exact, best)


def test_ktos_target_has_the_smallest_loss_and_its_reference_point_is_0():
    _, exact = problem(letters="abc")
    target = goals.kto_target(exact, exact.beta)
    torch.testing.assert_close(target.exp().sum(-1), torch.ones(2).double())
    assert torch.equal(target > -torch.inf, exact.scores > 0)
    loss = functools.partial(goals.kto_loss, beta=exact.beta)
    best = float(loss(exact, target))
    by_descent = float(loss(exact, goals.minimiser(exact, loss)))
    assert best <= by_descent + 1e-12
    assert by_descent == pytest.approx(best, abs=1e-4)
    assert best < float(loss(exact, exact.reference)) - 0.01
    # Any completion of another prompt is one of this prompt's: the mean log-ratio of the mismatched is -inf.
    everywhere = exact.reference.exp().mean(0)
    assert (everywhere * (target - exact.reference)).sum(-1).eq(-torch.inf).all()


def test_soft_values_by_dynamic_programming_are_the_optimum():
    _, exact = problem(letters="abc", max_new_tokens=3)
    beta = exact.beta

    def soft(q, ref):
        return beta * (ref + q / beta).logsumexp(0)

    tree = exact.action_values(soft)[0]
    assert len(tree) == 1 + 3 + 9
    best = beta * (exact.reference[0] + exact.scores[0] / beta).logsumexp(0)
    first = torch.tensor([
        sum(float(p) for c, p in zip(exact.completions, exact.reference[0].exp(), strict=True) if c[0] == token)
        for token in range(4)
    ])  # fmt: skip
    assert float(soft(tree[()], first.double().log())) == pytest.approx(float(best))
    assert float(tree[()][0]) == pytest.approx(float(exact.scores[0][exact.completions.index((0,))]))


def test_values_of_the_reference_are_its_expected_reward_and_the_discount_counts_tokens():
    _, exact = problem()
    plain = exact.action_values(lambda q, ref: (ref.exp() * q).sum())
    ends = [float(plain[0][()][token]) for token in range(3)]
    after = [[c for c in exact.completions if c[0] == token] for token in range(3)]
    for token in range(3):
        rows = [exact.completions.index(c) for c in after[token]]
        weights = exact.reference[0][rows].exp()
        assert ends[token] == pytest.approx(float((weights * exact.scores[0][rows]).sum() / weights.sum()))
    halved = exact.action_values(lambda q, ref: (ref.exp() * q).sum(), discount=0.5)
    assert float(halved[0][()][1]) == pytest.approx(ends[1] / 2)
    assert float(halved[0][()][0]) == pytest.approx(ends[0])  # the end is paid at once


def test_conditionals_of_the_reference_are_those_of_its_network():
    policy, exact = problem(letters="abc", max_new_tokens=3)
    prompt = policy.tokenizer("ba", return_tensors="pt")["input_ids"]
    for prefix in [(), (2,), (1, 3)]:
        ids = torch.cat([prompt, torch.tensor([prefix], dtype=torch.long)], dim=1)
        with torch.no_grad():
            wanted = policy.model(ids).logits[0, -1].double().log_softmax(-1)
        torch.testing.assert_close(exact.next_tokens()[1][prefix], wanted, atol=1e-5, rtol=1e-5)


def minimum(loss, start):
    """Where a convex function of a few numbers is smallest, by descent: knows no closed form."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10,
                                  tolerance_change=1e-12)  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach()


def values_by_the_papers_loss(exact, prompt):
    """Q and V of ILQL by its loss (arXiv:2206.11871, section 4) at each prefix, actions as the reference draws them."""
    scores = dict(zip(exact.completions, exact.scores[prompt].tolist(), strict=True))
    q_table, v_table = {}, {}

    def solve(prefix):
        share = exact.next_tokens()[prompt][prefix].exp()
        after = [(*prefix, token) for token in range(len(share))]
        y = torch.tensor([scores[p] if p in scores else solve(p) for p in after]).double()
        q = minimum(lambda q: (share * ((q - y) ** 2 + 0.1 * (q.logsumexp(0) - q))).sum(), y)

        def expectile_loss(v):
            return (share * torch.where(q > v, 0.7, 0.3) * (q - v) ** 2).sum()

        q_table[prefix], v_table[prefix] = q, minimum(expectile_loss, q.mean())
        return float(v_table[prefix])

    solve(())
    return q_table, v_table


def test_the_exact_values_of_ilql_minimise_its_loss_at_every_prefix():
    _, exact = problem(letters="abc", max_new_tokens=2)
    q_table, v_table = exact_optimum.ILQL_GOAL.tables(exact)
    for prompt in range(2):
        q_wanted, v_wanted = values_by_the_papers_loss(exact, prompt)
        assert q_wanted.keys() == q_table[prompt].keys() == v_table[prompt].keys()
        for prefix, wanted in q_wanted.items():
            torch.testing.assert_close(q_table[prompt][prefix], wanted, atol=1e-4, rtol=0)
            torch.testing.assert_close(v_table[prompt][prefix], v_wanted[prefix], atol=1e-4, rtol=0)


def test_the_exact_values_of_q_learning_are_the_best_continuations():
    _, exact = problem(letters="abc", max_new_tokens=3)
    tables = exact_optimum.DQN_GOAL.tables(exact)[0]
    for prompt, prefix, token in [(0, (), 2), (1, (), 0), (1, (3,), 1), (0, (1, 2), 0)]:
        start = (*prefix, token)
        best = max(float(exact.scores[prompt][i]) for i, c in enumerate(exact.completions) if c[: len(start)] == start)
        assert float(tables[prompt][prefix][token]) == pytest.approx(best)


# A heavy conservative term, so that a run without it, or with another expectile or discount, misses by more than 0.1.
HEAVY = dataclasses.replace(exact_optimum.ILQL_GOAL, fit=functools.partial(exact_optimum.conservative, coef=0.5))


@pytest.mark.parametrize(
    ("algorithm", "goal", "names"),
    [
        (functools.partial(ILQL, gamma=1.0, cql_coef=0.5, expectile=0.7, polyak=0.1), HEAVY, ["Q", "V"]),
        (functools.partial(DQN, gamma=1.0, polyak=0.1), exact_optimum.DQN_GOAL, ["Q"]),
    ],
)
def test_learned_values_are_those_of_dynamic_programming_entry_by_entry(algorithm, goal, names):
    rows = [{"prompt": "ab"}, {"prompt": "ba"}]  # whose prefixes the network can all tell apart
    policy, exact = problem(rows=rows)
    world = exact_optimum.World(policy, table_reward(seed=1), exact, rows)
    at_first = exact_optimum.q_found(exact, algorithm(policy=policy), goal)
    solver = exact_optimum.q_learning(algorithm, goal, completions=30_000, batch_size=256, epochs=1, lr=1e-2)
    found = solver.run(world, seed=0)
    assert list(found.errors) == names
    for name, errors in found.errors.items():
        assert errors.max() < 0.1, (name, errors)
        assert at_first.errors[name].max() > 0.8
    assert solver.measure(exact, found.logprobs).regret < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta must be above 0"),
        ({"max_new_tokens": 13}, "too many completions"),
        ({"rows": []}, "rows is empty"),
    ],
)
def test_a_problem_that_cannot_be_solved_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        problem(**changes)


def test_a_share_of_flipped_labels_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"flipped must be .* at least 0 and at most 1, got 1\.5"):
        problem()[1].preferences(1, seed=0, flipped=1.5)


def test_the_table_names_what_is_over_the_bound_and_the_largest_errors():
    row = exact_optimum.Row("one", [exact_optimum.Result(0.01, 1.0, 0.1, 2.0, {"Q": torch.tensor([0.1, 0.3])})])
    assert "over" not in row.text()
    row.results.append(exact_optimum.Result(0.06, 1.0, 0.1, 2.0, {"Q": torch.tensor([0.2, 0.4])}))
    assert row.text().endswith("over 0.05")
    assert row.errors() == ["one Q: 0.250 mean, 0.400 largest"]
