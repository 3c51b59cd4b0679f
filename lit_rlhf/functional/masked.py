"""Reductions over the tokens that count.

Masks are bool and mean "this token counts". What stands at a masked position is never read: NaN or inf there
reaches neither the result nor a gradient. Sums run in float32 (float64 stays float64), so bf16 input gives a
float32 result.
"""

import torch
from torch import Tensor


def as_float(x: Tensor) -> Tensor:
    """``x`` in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def same_shape(**tensors: Tensor) -> None:
    """Refuse silent broadcasting.

    Raises:
        ValueError: a tensor's shape differs from the first one's; names both.
    """
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != reference.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {first} has shape {tuple(reference.shape)}")


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` as float, with 0 where ``mask`` is False.

    Selects instead of multiplying, because 0 * nan is nan.

    Raises:
        TypeError: ``mask`` is not bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True = this token counts, but has dtype {mask.dtype}")
    return torch.where(mask, as_float(x), 0)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the elements that count; 0 where none does.

    Equation: ``sum_t m_t x_t / max(1, sum_t m_t)``.

    Args:
        x: any shape.
        mask: bool, shape of ``x``.
        dim: reduce this dimension only (``dim=1`` of (batch, time): one mean per sequence). None reduces all.

    Returns:
        A scalar, or ``x``'s shape without ``dim``.

    Raises:
        ValueError: ``mask`` has another shape than ``x``.
        TypeError: ``mask`` is not bool.

    >>> x, mask = torch.tensor([[1.0, 3.0, float("nan")]]), torch.tensor([[True, True, False]])
    >>> masked_mean(x, mask)
    tensor(2.)
    """
    same_shape(x=x, mask=mask)
    return zero_masked(x, mask).sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Variance of the elements that count, with Bessel's correction, as ``torch.var`` and TRL have it.

    Equation: ``sum_t m_t (x_t - mean)^2 / (n - 1)`` with ``n = sum_t m_t``. One element, or none, has
    variance 0.

    Args:
        x: any shape.
        mask: bool, shape of ``x``.

    Returns:
        A scalar.

    Raises:
        ValueError: ``mask`` has another shape than ``x``.
        TypeError: ``mask`` is not bool.
    """
    squares = zero_masked(_centred(x, mask).square(), mask)
    return squares.sum() / (mask.sum() - 1).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale the elements that count to variance 1 (as ``masked_var`` measures it), and shift them to mean 0.

    Equation: ``(x - mean) / sqrt(var + 1e-8)``, plus ``mean`` with ``shift_mean=False``. The 1e-8 keeps
    elements that are all equal at 0 instead of NaN.

    Args:
        x: any shape.
        mask: bool, shape of ``x``.
        shift_mean: False keeps the mean.

    Returns:
        Shape of ``x``; 0 where masked.

    Raises:
        ValueError: ``mask`` has another shape than ``x``.
        TypeError: ``mask`` is not bool.
    """
    centred = _centred(x, mask)
    whitened = centred * torch.rsqrt(masked_var(centred, mask) + 1e-8)
    return whitened if shift_mean else zero_masked(whitened + masked_mean(x, mask), mask)


def _centred(x: Tensor, mask: Tensor) -> Tensor:
    # The second pass removes the rounding error of the first mean. Without it, equal elements far from 0 have
    # a spread of rounding noise, which whitening would blow up to size 1.
    centred = zero_masked(x - masked_mean(x, mask), mask)
    return zero_masked(centred - masked_mean(centred, mask), mask)
