"""Arithmetic problems, whose answers can be verified."""

import operator
import random

from lit_rlhf.checks import check_int
from lit_rlhf.data.base import PromptsData, Row
from lit_rlhf.errors import UserError

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class ArithmeticPrompts(PromptsData):
    """Problems such as `12 + 7 =`. Batches: `prompt`, a list of str, and `answer`, the list of whole numbers.

    The problems are drawn uniformly from all `len(operations) * (maximum + 1)^2`, the held-out ones first, and each
    occurs once: no held-out problem is a training problem (`12 + 7` and `7 + 12` are two). They are a function of
    `seed`, and a larger `count` adds problems to the same ones.

    Args:
        operations: any of +, - and *.
        maximum: numbers are drawn from 0 to this one.
        count: training problems.
        val_count: problems for validation and test.
        template: the prompt; `{problem}` stands for `12 + 7`.
        seed: of the draw.
        batch_size: prompts in a batch.
        shuffle: in training, a new order in every pass.

    Raises:
        UserError: a bad argument, or more problems than there are.

    Example:
        >>> data = ArithmeticPrompts(operations=["*"], maximum=1, count=3, val_count=1, shuffle=False)
        >>> sorted(next(iter(data.train_dataloader()))["prompt"] + next(iter(data.val_dataloader()))["prompt"])
        ['0 * 0 =', '0 * 1 =', '1 * 0 =', '1 * 1 =']
    """

    def __init__(
        self,
        *,
        operations: list[str] | tuple[str, ...] = ("+", "-"),
        maximum: int = 99,
        count: int = 1000,
        val_count: int = 200,
        template: str = "{problem} =",
        seed: int = 0,
        batch_size: int = 8,
        shuffle: bool = True,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle=shuffle)
        if not operations or not set(operations) <= set(OPERATIONS) or len(set(operations)) < len(operations):
            raise UserError(f"data.operations={operations!r}: must list any of {', '.join(OPERATIONS)}, each once")
        if "{problem}" not in template:
            raise UserError(f"data.template={template!r} must contain {{problem}}")
        numbers = check_int("data.maximum", maximum, at_least=1) + 1
        wanted = check_int("data.count", count, at_least=1) + check_int("data.val_count", val_count, at_least=0)
        if wanted > (total := len(operations) * numbers**2):
            raise UserError(
                f"data.count={count} and data.val_count={val_count} are more than the {total} problems that "
                f"data.operations and data.maximum={maximum} allow"
            )
        draw = random.Random(check_int("data.seed", seed, at_least=0))
        drawn: dict[tuple[str, int, int], None] = {}  # a set that keeps the order
        while len(drawn) < wanted:
            drawn[draw.choice(operations), draw.randrange(numbers), draw.randrange(numbers)] = None
        rows = [_row(template, *problem) for problem in drawn]
        self.held_out_rows, self.train_rows = rows[:val_count], rows[val_count:]


def _row(template: str, operation: str, left: int, right: int) -> Row:
    prompt = template.replace("{problem}", f"{left} {operation} {right}")
    return {"prompt": prompt, "answer": OPERATIONS[operation](left, right)}
