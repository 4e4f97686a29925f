"""Numbers and names as short text for people."""

from __future__ import annotations

import math
import unicodedata

MINUS = "\N{MINUS SIGN}"
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(value: float, digits: int = 3) -> str:
    """`value` with `digits` significant digits: 0.0312, 1,797, 3.1×10⁻⁵."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{MINUS if value < 0 else ''}∞"
    if value == 0:
        return "0"
    if 1e5 > abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}".replace("-", MINUS)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = int(exponent)
    if power < -3 or power >= 5:
        return f"{mantissa}×10{str(power).translate(_SUPERSCRIPTS)}".replace("-", MINUS)
    return f"{value:.{max(digits - 1 - power, 0)}f}".replace("-", MINUS)


def signed(value: float, digits: int = 2) -> str:
    """`number` with its sign always written."""
    text = number(value, digits)
    return f"+{text}" if value > 0 else text


def statistic(value: float) -> str:
    """`number` of a statistic that may not exist."""
    return number(value) if math.isfinite(value) else "—"


def percent(share: float) -> str:
    """A share of one as per cent: 0.4 %, 12 %, 99.6 %, and 100 % for all only."""
    if not math.isfinite(share):
        return "—"
    value = 100 * share
    if 0 < value < 0.1:
        return "< 0.1\N{NO-BREAK SPACE}%"
    if 99.9 <= value < 100:
        return "> 99.9\N{NO-BREAK SPACE}%"
    whole = value in (0, 100) or 10 <= value < 99
    return f"{value:.{0 if whole else 1}f}\N{NO-BREAK SPACE}%"


def count(value: int, noun: str) -> str:
    """`1 row`, `1,797 rows`."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def shorten(text: str, limit: int) -> str:
    """`text` on at most `limit` characters; control characters and text-direction overrides are shown as a blank.

    They would otherwise let a row of the data reorder or hide what stands beside it.
    """
    cut = text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t\u200d" else c for c in cut)
