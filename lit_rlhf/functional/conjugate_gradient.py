"""Solving a linear system through products with its matrix alone."""

import torch
from torch import Tensor


def conjugate_gradient(product, vector: Tensor, steps: int, tolerance: float = 1e-10) -> Tensor:
    """Solves ``F x = vector`` for x by conjugate gradients (Hestenes & Stiefel 1952), from x = 0.

    With d = n steps it is exact for an (n, n) matrix; TRPO stops after about 10 (arXiv:1502.05477, appendix C.1).

    Args:
        product: a function, x (n,) -> F x (n,); F symmetric and positive definite.
        vector: (n,).
        steps: at most this many products.
        tolerance: ends once the squared residual is below this times the squared norm of ``vector``.

    Returns:
        (n,).

    >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradient(lambda x: matrix @ x, torch.tensor([1.0, 2.0]), steps=2)  # 1/11, 7/11
    tensor([0.0909, 0.6364])
    """
    x = torch.zeros_like(vector)
    residual, direction = vector.clone(), vector.clone()
    squared = residual.dot(residual)
    smallest = tolerance * squared
    for _ in range(steps):
        if squared <= smallest:
            break
        image = product(direction)
        length = squared / direction.dot(image)
        x = x + length * direction
        residual = residual - length * image
        before, squared = squared, residual.dot(residual)
        direction = residual + squared / before * direction
    return x
