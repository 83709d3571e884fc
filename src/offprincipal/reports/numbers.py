"""Formats of numbers: few digits, percent for shares, a dash for undefined values.

Knows nothing of metrics: one number in, one text out; or one shorter number, for figures.
"""

import math
import re

UNDEFINED = "–"
_FINEST_PERCENT = 4
_DRAWN_DIGITS = 4
_NEGATIVE = re.compile(r"(?<![\w.)-])-(?=\.?\d)")


def short(value: float | None) -> float | None:
    """A number with the four significant digits that a figure can show; None if it is None or not finite.

    >>> short(0.123456), short(None)
    (0.1235, None)
    """
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DRAWN_DIGITS}g}")


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, with an exponent if it is far from 1.

    Integers are counts, and are shown with all digits.

    >>> number(0.27303), number(5.6997e-06), number(-1664.2), number(12), number(None)
    ('0.273', '5.70e-6', '−1,664', '12', '–')
    """
    if value is None:
        return UNDEFINED
    if isinstance(value, int):
        return _minus(f"{value:,}")
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -3 or exponent > 5:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        return _minus(f"{mantissa}e{int(power)}")
    return _minus(f"{value:,.{max(digits - 1 - exponent, 0)}f}")


def percent(value: float | None) -> str:
    """A share in percent: one decimal, two below 1 % and above 99 %, more if it would read as 0 or 100 %.

    >>> print(percent(0.26), percent(1.0), percent(0.99996), percent(1e-9), percent(None), sep=", ")
    26.0 %, 100 %, 99.996 %, <0.0001 %, –
    """
    if value is None:
        return UNDEFINED
    if value in (0, 1):
        return f"{100 * value:.0f}\xa0%"
    for decimals in range(1 if 0.01 <= value <= 0.99 else 2, _FINEST_PERCENT + 1):
        shown = round(100 * value, decimals)
        if shown not in (0, 100):
            return _minus(f"{shown:.{decimals}f}\xa0%")
    return f"<{10.0**-_FINEST_PERCENT:.4f}\xa0%" if value < 0.5 else f">{100 - 10.0**-_FINEST_PERCENT:.4f}\xa0%"


def bare(text: str) -> str:
    """A formatted number without its unit, for a column whose title has the unit.

    >>> bare(percent(0.26)), bare(degrees(1.5)), bare(points(0.01))
    ('26.0', '1.50', '+1.00')
    """
    return text.removesuffix(" points").removesuffix("\xa0%").removesuffix("°")


def points(value: float | None) -> str:
    """A difference of two shares, signed, in percentage points.

    >>> points(0.00148), points(-0.021), points(-1e-9), points(None)
    ('+0.15 points', '−2.10 points', '0.00 points', '–')
    """
    return UNDEFINED if value is None else f"{signed(100 * value, 2)} points"


def degrees(value: float | None) -> str:
    """An angle in degrees.

    >>> degrees(0.011284), degrees(None)
    ('0.0113°', '–')
    """
    return UNDEFINED if value is None else f"{number(value)}°"


def decimals(value: float | None, places: int = 2) -> str:
    """A number between −1 and 1, such as a cosine, with a fixed number of decimals.

    >>> decimals(-0.123), decimals(None)
    ('−0.12', '–')
    """
    return UNDEFINED if value is None else _minus(f"{value:.{places}f}")


def as_kind(value: float | None, kind: str) -> str:
    """A number in the format of a kind of figure: `percent`, `degrees` or `number`.

    >>> as_kind(1.5, "degrees"), as_kind(None, "percent")
    ('1.50°', '–')
    """
    return {"percent": percent, "degrees": degrees, "number": number}[kind](value)


def signed(value: float | None, decimals: int = 1) -> str:
    """A number with its sign, such as z; without a sign if it reads as zero.

    >>> signed(0.204), signed(-12.34), signed(-0.02), signed(None)
    ('+0.2', '−12.3', '0.0', '–')
    """
    if value is None:
        return UNDEFINED
    shown = f"{value:+,.{decimals}f}"
    return _minus(shown) if _is_some(shown) else shown[1:]


def estimate(value: float | None, low: float | None, high: float | None) -> str:
    """A value with its interval, with as many decimals as the width of the interval justifies.

    >>> estimate(-0.09, -0.1, -0.08)
    '−0.090 [−0.100, −0.080]'
    >>> estimate(5.7e-6, 5.3e-6, 6.2e-6), estimate(0.5, None, None), estimate(None, None, None)
    ('5.70e-6 [5.30e-6, 6.20e-6]', '0.500', '–')
    >>> estimate(-1e-6, -0.001, 0.001)
    '0.0000 [−0.0010, 0.0010]'
    """
    if value is None or low is None or high is None:
        return number(value)
    width, largest = high - low, max(abs(low), abs(high), abs(value))
    if width <= 0 or largest < 1e-3 or largest >= 1e6:
        return f"{number(value)} [{number(low)}, {number(high)}]"
    decimals = min(max(1 - math.floor(math.log10(width)), 0), 6)
    shown, from_, to = (_unsigned_zero(f"{x:,.{decimals}f}") for x in (value, low, high))
    return f"{shown} [{from_}, {to}]"


def minus_signs(text: str) -> str:
    """A sentence whose negative numbers have the sign that all numbers here have; hyphens of words and names stay.

    >>> minus_signs("grpo-1 is -0.149 [-0.156, -0.142], C7-10 at 1e-5")
    'grpo-1 is −0.149 [−0.156, −0.142], C7-10 at 1e-5'
    """
    return _NEGATIVE.sub("−", text)


def _is_some(text: str) -> bool:
    """Whether a number does not read as zero."""
    return any(digit in text for digit in "123456789")


def _unsigned_zero(text: str) -> str:
    return _minus(text) if _is_some(text) else text.removeprefix("-")


def _minus(text: str) -> str:
    """A number with a true minus sign, except in its exponent."""
    head, _, exponent = text.partition("e")
    return head.replace("-", "−") + (f"e{exponent}" if exponent else "")
