"""The table of `fedtune plan`: a line for each client, their sums, and in words what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from server import report_units as units
from server.watchers import Quiet
from simulations.plan import ClientPlan, Plan

NOTHING = "none fits"
SHOWN = 5  # clients of which a note speaks
ABOUT = {
    True: "Layers are numbered from the input up. Memory is the peak of a step on a batch of full size: the model, and "
    "what torch allocates beside it. Bytes are those of the first round of training; later ones also bring down what has "
    "changed meanwhile.",
    False: "Bytes of a round of training are those of the mean client; an evaluation, down and up together, comes on top.",
}
CODED = {
    True: "Nothing has trained yet, and what would come up is taken for normal numbers: coded sizes are about right.",
    False: "Nothing has trained yet, and updates are taken for normal numbers: coded sizes are about right. What an evaluation "
    "has brought down is not sent again to train; a client that was away for long is sent more.",
}


class Progress(Quiet):
    """A Watcher that keeps one line on stderr, while somebody watches."""

    def __init__(self) -> None:
        self._status = Console(stderr=True).status("loading the model")

    def __enter__(self) -> Progress:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def doing(self, what: str, done: int, total: int) -> None:
        self._status.update(Text(f"{what}: {done} of {units.plural(total, 'client')}"))


def plan_table(plan: Plan) -> RenderableType:
    table = Table(box=None, header_style="bold", pad_edge=False, footer_style="bold", show_footer=True)
    drawn = [one for one in plan.clients if one.down is not None]
    columns = [Column("client", lambda one: one.client, units.plural(len(drawn), "client"))]
    columns += _what_trains(plan, drawn) if plan.layers is not None else _rounds(drawn)
    columns += [Column("down", lambda one: _size(one.down), units.size(sum(one.down or 0 for one in drawn)))]
    columns += [Column("up", lambda one: _size(one.up), units.size(sum(one.up or 0 for one in drawn)))]
    if any(one.evaluation is not None for one in drawn):
        total = units.size(sum(one.evaluation or 0 for one in drawn))
        columns += [Column("evaluation", lambda one: _size(one.evaluation), total)]
    for column in columns:
        left = column.heading in ("client", "layers")
        table.add_column(column.heading, column.total, justify="left" if left else "right", overflow="fold", no_wrap=not left)
    for one in plan.clients:
        table.add_row(*(_styled(column.cell(one)) for column in columns))
    selective = plan.layers is not None
    about = [ABOUT[selective], *([CODED[selective]] if _is_coded(plan) else [])]
    return Group(table, "", *_wire(plan), *notes_of(plan), Text(" ".join(about), style="dim"))


def _is_coded(plan: Plan) -> bool:
    return plan.wire not in ("", "plain")


def _wire(plan: Plan) -> list[Text]:
    """What it is, how much smaller it makes messages, and where the method does not let it."""
    if not plan.wire:
        return []
    smaller = f": about {units.ratio(plan.ratio)} smaller than plain numbers" if _is_coded(plan) else ""
    return [Text(f"wire: {plan.wire}{smaller}"), *(Text(f"{way}, nothing is lost: {why}.") for way, why in plan.exact.items())]


class Column(NamedTuple):
    heading: str
    cell: Callable[[ClientPlan], str]
    total: str  # of the clients that take part


def _what_trains(plan: Plan, drawn: list[ClientPlan]) -> list[Column]:
    each = sum(sum((one.layers or {}).values()) for one in drawn) / max(len(drawn), 1)
    return [
        Column("layers", _layers, f"mean {each:.1f} of {plan.layers}"),
        Column(
            "memory", lambda one: _beside(one.memory, one.limits.get("memory"), units.size), _most(drawn, "memory", units.size)
        ),
        Column("a step", lambda one: _beside(one.seconds, one.limits.get("seconds"), step), _most(drawn, "seconds", step)),
    ]


def _rounds(drawn: list[ClientPlan]) -> list[Column]:
    columns = [
        Column(
            what, lambda one, what=what: units.count(getattr(one, what)), units.count(sum(getattr(one, what) for one in drawn))
        )
        for what in ("examples", "steps")
    ]
    ranks = any(one.rank is not None for one in drawn)
    return [*columns, *([Column("rank", lambda one: str(one.rank), "")] if ranks else [])]


def _styled(text: str) -> Text:
    return Text(text, style="yellow" if text == NOTHING else "")


def _layers(one: ClientPlan) -> str:
    if one.layers is None:
        return "not drawn"
    return NOTHING if one.short else spans(one.layers) or "none"


def spans(layers: Mapping[int, float]) -> str:
    """`0 2–3` for whole layers, and `1 (47 %)` for a part."""
    runs: list[list[int]] = []
    percents = {layer: round(100 * share) for layer, share in sorted(layers.items())}
    for layer, percent in percents.items():
        if percents.get(layer - 1) == percent:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return " ".join(_run(run) + ("" if percents[run[0]] == 100 else f" ({percents[run[0]]} %)") for run in runs)


def _run(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


def _beside(figure: float | None, limit: float | None, words: Callable[[float], str]) -> str:
    """And the share of its limit that it is."""
    if figure is None:
        return units.MISSING
    return f"{words(figure)} ({100 * figure / limit:.0f} %)" if limit else words(figure)


def _most(drawn: list[ClientPlan], what: str, words: Callable[[float], str]) -> str:
    figures = [figure for one in drawn if (figure := getattr(one, what)) is not None]
    return f"≤ {words(max(figures))}" if figures else units.MISSING


def _size(count: int | None) -> str:
    return units.MISSING if count is None else units.size(count)


def step(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 0.9995 else units.duration(seconds)


def notes_of(plan: Plan) -> list[Text]:
    """What is short in yellow."""
    plain = [*_probes(plan), *_left_out(plan)]
    return [*(Text(line, style="yellow") for line in _shortages(plan)), *map(Text, plain)]


def _shortages(plan: Plan) -> list[str]:
    short = [one for one in plan.clients if one.short]
    more = len(short) - SHOWN
    return [*map(_shortage, short[:SHOWN]), *([f"So it is with {units.plural(more, 'further client')}."] if more > 0 else [])]


def _shortage(one: ClientPlan) -> str:
    words = {"memory": units.size, "seconds": step}
    reasons = [
        f"{words[name](one.limits[name])} a step, and the least layer takes {words[name](least)}"
        for name, least in one.short.items()
    ]
    return f"{one.client} trains no layer: it can afford {'; '.join(reasons)}."


def _probes(plan: Plan) -> list[str]:
    """Nothing where nobody probes, or all who do declare memory."""
    probes = [one.probe for one in plan.clients if one.probe is not None]
    return [f"A probe takes {units.size(max(probes))}, and less on a client that declares its memory."] if probes else []


def _left_out(plan: Plan) -> list[str]:
    trained = {layer for one in plan.clients for layer in one.layers or {}}
    if plan.layers is None or len(trained) == plan.layers:
        return []
    left = dict.fromkeys(set(range(plan.layers)) - trained, 1.0)
    return [f"Nobody trains layer {spans(left)} in this round."]
