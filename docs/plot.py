"""The plot of loss against bytes on docs/compression.md, from finished comparisons: python docs/plot.py runs/compression ..."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 50
SEED = "seed-0"  # the one that all variants have


def points(folders: list[Path]) -> dict[str, tuple[float, float]]:
    """Variant -> (kB per client and round, both directions; held-out loss after the last round)."""
    found = {}
    for metrics in sorted(file for folder in folders for file in folder.glob(f"*/{SEED}/metrics.jsonl")):
        rounds = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        sent = sum(client["bytes_up"] + client["bytes_down"] for one in rounds for client in one["clients"].values())
        per_round = sent / rounds[-1]["round"] / len(rounds[-1]["clients"])
        found[metrics.parent.parent.name] = (per_round / 1e3, rounds[-1]["loss"])
    return found


def drawn(given: dict[str, tuple[float, float]]) -> str:
    """SVG: bytes to the right, logarithmic; loss upwards; a dashed line 1 % above what plain numbers reach."""
    plain = given["plain"][1]
    low, high = min(loss for _, loss in given.values()) - 0.005, max(loss for _, loss in given.values()) + 0.01
    first, last = math.log10(10), math.log10(3000)

    def x(kilobytes: float) -> float:
        return LEFT + (math.log10(kilobytes) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    rows = [line(LEFT, y(plain * share), WIDTH - RIGHT, dash) for share, dash in ((1.0, ""), (1.01, "4 4"))]
    rows.append(text(WIDTH - RIGHT, y(1.01 * plain) - 5, "1 % above plain", "end"))
    for kilobytes in (10, 30, 100, 300, 1000, 3000):
        rows.append(
            text(x(kilobytes), HEIGHT - BOTTOM + 20, f"{kilobytes} kB" if kilobytes < 1000 else f"{kilobytes // 1000} MB")
        )
    for loss in [step / 100 for step in range(math.ceil(low * 100), math.floor(high * 100) + 1, 2)]:
        rows.append(text(LEFT - 8, y(loss) + 4, f"{loss:.2f}", "end"))
    before = (0.0, 0.0)
    for name, (kilobytes, loss) in sorted(given.items(), key=lambda one: one[1]):
        rows.append(f'<circle cx="{x(kilobytes):.1f}" cy="{y(loss):.1f}" r="4" fill="#2563a8"/>')
        below = x(kilobytes) - before[0] < 60 and abs(y(loss) - before[1]) < 15  # where the name before it would be hidden
        rows.append(text(x(kilobytes), y(loss) + (18 if below else -9), name))
        before = (0.0, 0.0) if below else (x(kilobytes), y(loss))
    rows.append(text(WIDTH / 2, HEIGHT - 10, "bytes per client and round, both directions"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *rows, "</svg>"]) + "\n"


def line(left: float, height: float, right: float, dash: str) -> str:
    return f'<path d="M{left} {height:.1f}H{right}" stroke="#999" stroke-dasharray="{dash}"/>'


def text(left: float, height: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{left:.1f}" y="{height:.1f}" text-anchor="{anchor}" fill="#222">{words}</text>'


if __name__ == "__main__":
    picture = drawn(points([Path(folder) for folder in sys.argv[1:]]))
    Path(__file__).with_name("compression.svg").write_text(picture, encoding="utf-8")
