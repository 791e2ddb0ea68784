"""Numbers as people read them: 1.2 MB, 3 min 12 s, −0.123. Shared by the live table and the report."""

from __future__ import annotations

import math

MISSING = "–"


def known(number: float | None) -> float | None:
    """None in place of what cannot be drawn or compared: a loss that was not measured, or that overflowed."""
    return number if number is not None and math.isfinite(number) else None


def size(count: float) -> str:
    """Bytes in decimal units, as networks count them."""
    scaled, unit = _scaled(count)
    return f"{scaled:.0f} {unit}" if unit == "B" or scaled >= 100 else f"{scaled:.1f} {unit}"


def size_tick(count: float) -> str:
    """A round number of bytes on an axis: 2.5 MB, 500 kB, 0."""
    scaled, unit = _scaled(count)
    return f"{scaled:.3g} {unit}" if count else "0"


def _scaled(count: float) -> tuple[float, str]:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return count, unit
        count /= 1000
    return count, "TB"


def ratio(times: float | None) -> str:
    """How many times as large: 8.3x, 25x. Beyond 999 it is more than anybody compares."""
    times = known(times)
    if times is None:
        return MISSING
    return f"{times:.1f}x" if times < 9.95 else f"{times:.0f}x" if times < 999.5 else ">999x"


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def loss(nats: float | None) -> str:
    nats = known(nats)
    return MISSING if nats is None else f"{nats:.3f}"


def signed(difference: float | None, digits: int = 3) -> str:
    """With its sign, and a true minus."""
    difference = known(difference)
    if difference is None:
        return MISSING
    text = f"{difference:+.{digits}f}".replace("-", "−")
    return text if float(f"{difference:.{digits}f}") else "0"


def perplexity(nats: float | None) -> str:
    """exp(loss): as many equally likely next tokens."""
    nats = known(nats)
    if nats is None:
        return MISSING
    if nats > 25:
        return f"e^{nats:.0f}"
    value = math.exp(nats)
    return f"{value:.2f}" if value < 99.995 else f"{value:,.0f}".replace(",", " ")


def metric(value: float | None) -> str:
    """A number of unknown meaning: four digits."""
    return MISSING if value is None else f"{value:.4g}".replace("-", "−")


def count(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ")


def plural(number: int, thing: str) -> str:
    return f"{count(number)} {thing}{'s' * (number != 1)}"


def one_line(text: str, limit: int = 200) -> str:
    """Text of a stranger, safe in a terminal: no control codes, no line breaks, not longer than `limit`."""
    kept = "".join(" " if c.isspace() else c if c.isprintable() else "?" for c in text.strip()[: limit + 1])
    return kept if len(kept) <= limit else kept[: limit - 1] + "…"
