import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from lit_rlhf.functional import entropy_from_logits, selective_logprobs

INF = math.inf


def logits_and_ids(*shape: int, dtype=torch.float32, scale=3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return logits.to(dtype), torch.randint(shape[-1], shape[:-1], generator=generator)


def test_logprobs_by_hand():
    # softmax of (log 1, log 2, log 5) is (1, 2, 5)/8, whatever is added to all logits
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]])) + 100
    expected = torch.tensor([math.log(5 / 8), math.log(1 / 8)])
    torch.testing.assert_close(selective_logprobs(logits, torch.tensor([2, 0])), expected, atol=1e-5, rtol=0)


def test_entropy_by_hand():
    # (1/2, 1/4, 1/4, 0): 1/2 log 2 + 2 (1/4) log 4 = 1.5 log 2
    logits = torch.log(torch.tensor([0.5, 0.25, 0.25, 0.0]))
    assert entropy_from_logits(logits).item() == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert entropy_from_logits(torch.tensor([0.0, 0.0])).item() == pytest.approx(math.log(2), abs=1e-6)
    assert entropy_from_logits(torch.tensor([1e4, 0.0])) == 0


# 70 rows of 30,011 need three chunks of 2**20 elements, the last one smaller.
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 7), (2, 35, 30_011)])
def test_values_and_gradients_equal_torch_log_softmax(shape):
    logits, token_ids = logits_and_ids(*shape)
    weights = torch.randn(shape[:-1], generator=torch.Generator().manual_seed(1))
    ours, reference = logits.clone().requires_grad_(), logits.double().requires_grad_()
    logp = reference.log_softmax(-1)
    chosen = logp.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)

    for mine, theirs in (
        (selective_logprobs(ours, token_ids), chosen),
        (entropy_from_logits(ours), entropy),
    ):
        torch.testing.assert_close(mine.double(), theirs, atol=2e-6, rtol=1e-6)
        (grad,) = torch.autograd.grad((mine * weights).sum(), ours)
        (expected,) = torch.autograd.grad((theirs * weights).sum(), reference, retain_graph=True)
        torch.testing.assert_close(grad.double(), expected, atol=1e-6, rtol=1e-5)


def test_gradients_equal_finite_differences_to_second_order():
    logits, token_ids = logits_and_ids(2, 3, 5, dtype=torch.float64, scale=1.0)
    logits.requires_grad_()
    for function in (lambda z: selective_logprobs(z, token_ids), entropy_from_logits):
        assert torch.autograd.gradcheck(function, logits)
        assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_normalised_in_float32(dtype):
    logits, token_ids = logits_and_ids(4, 6, 1000, dtype=dtype)
    logits.requires_grad_()
    exact = logits.detach().double()
    chosen = exact.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    entropy = torch.distributions.Categorical(logits=exact).entropy()
    for mine, theirs in (
        (selective_logprobs(logits, token_ids), chosen),
        (entropy_from_logits(logits), entropy),
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-6)
        mine.sum().backward()
        assert logits.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_the_logits_are_kept_for_the_backward_pass(dtype):
    logits, token_ids = logits_and_ids(4, 8, 512, dtype=dtype)
    logits.requires_grad_()
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = selective_logprobs(logits, token_ids) + entropy_from_logits(logits)
    assert result.requires_grad
    assert sum(kept.values()) == logits.nbytes + token_ids.nbytes


def test_a_row_does_not_depend_on_the_rows_beside_it():
    # 100 rows make several chunks, one row makes one.
    logits, token_ids = logits_and_ids(100, 30_011)
    together = selective_logprobs(logits, token_ids)
    entropies = entropy_from_logits(logits)
    for row in (0, 34, 35, 99):
        assert selective_logprobs(logits[row], token_ids[row]) == together[row]
        assert entropy_from_logits(logits[row]) == entropies[row]


def test_banned_tokens_give_no_nan():
    logits = torch.tensor([[0.0, -INF, 0.0, -INF]], requires_grad=True)
    logp, entropy = selective_logprobs(logits, torch.tensor([0])), entropy_from_logits(logits)
    assert logp.item() == pytest.approx(-math.log(2), abs=1e-6)
    assert entropy.item() == pytest.approx(math.log(2), abs=1e-6)
    (logp + entropy).sum().backward()
    # log p: [v = 0] - p = (1/2, 0, -1/2, 0); the entropy is at its maximum: 0
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, 0.0, -0.5, 0.0]]))


def test_unaligned_tokens_are_refused():
    with pytest.raises(ValueError, match=r"token_ids has shape \(2, 4\), but logits has shape \(2, 3, 5\)"):
        selective_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token_ids has shape \(2, 1\)"):
        selective_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 1, dtype=torch.int64))


def test_entropy_of_the_likeliest_tokens_is_that_of_their_renormalised_distribution():
    p = torch.tensor([0.5, 0.25, 0.2, 0.05])
    # (2/3, 1/3): log 3 - 2/3 log 2
    assert entropy_from_logits(p.log(), top_k=2).item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2), abs=1e-6)
    assert torch.equal(entropy_from_logits(p.log(), top_k=4), entropy_from_logits(p.log()))
    logits = p.log().requires_grad_()
    entropy_from_logits(logits, top_k=2).backward()
    assert (logits.grad != 0).tolist() == [True, True, False, False]
