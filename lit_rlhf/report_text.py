"""How a report writes numbers, durations and settings, and fills its templates."""

import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

MINUS = "\N{MINUS SIGN}"


def decimals(value: float) -> int:
    """How many decimals three significant digits of a value have; none of an integer.

    >>> [decimals(value) for value in (0.123, 1.23, 12.3, 123.4, 8)]
    [3, 2, 1, 0, 0]
    """
    size = abs(value)
    if not math.isfinite(value) or value == int(value) or size >= 100:
        return 0
    return 1 if size >= 10 else 2 if size >= 1 else 3


def number(value: float | None, digits: int | None = None) -> str:
    """Three significant digits, or so many decimals, with a real minus sign.

    >>> number(-0.12345), number(18.213), number(1234.5), number(3e-5), number(0)
    ('\u22120.123', '18.2', '1,234', '3e-05', '0')
    >>> number(8, 2), number(10.24, 2)
    ('8.00', '10.24')
    """
    if value is None or not math.isfinite(value):
        return "—" if value is None else str(value)
    if value == 0 or 0.001 <= abs(value) < 1e6:
        text = f"{value:,.{decimals(value) if digits is None else digits}f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def signed(value: float) -> str:
    """As `number`, with a sign in front.

    >>> signed(0.52), signed(-3), signed(0)
    ('+0.520', '\u22123', '0')
    """
    return number(value) if value <= 0 else f"+{number(value)}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as far as they matter.

    >>> duration(412.3), duration(59), duration(7384)
    ('6 min 52 s', '59 s', '2 h 3 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def settings_line(value: Any, prefix: str = "") -> str:
    """A part of the configuration as one line: its class, then key and value.

    What is null is left out, and a long value, say a list of prompts, is cut.
    """
    if not isinstance(value, dict):
        text = str(value)
        return f"{prefix} {text if len(text) <= 160 else text[:160] + '…'}".strip()
    target = str(value.get("_target_", "")).split(".")
    name = ".".join(target[-2:] if len(target) > 1 and target[-2][:1].isupper() else target[-1:])
    parts = [
        settings_line(item, f"{prefix}.{key}" if prefix else str(key))
        for key, item in value.items()
        if item is not None and not str(key).startswith("_")
    ]
    return " · ".join(part for part in [f"{prefix} {name}".strip() if name else "", *parts] if part)


def render(template: str, **values: Any) -> str:
    """A page from a template of this package, with every value escaped."""
    environment = Environment(
        loader=PackageLoader("lit_rlhf", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed}
    return environment.get_template(template).render(values)
