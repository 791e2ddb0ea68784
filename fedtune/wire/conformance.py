"""For those who write a stage: the rules that codecs count on.

check_stage(MyStage(0.1))                                   # every rule that a stage must keep

Numbers of an update are finite, and so is their Euclidean norm in float32; more is not asked of a stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass

import numpy as np

from fedtune.errors import MalformedMessage
from fedtune.wire.stage import Array, Draw, Form, Kind, Stage

SHAPES = ((), (0,), (1,), (2,), (7,), (256,), (1000,), (5000,), (0, 4), (1, 9), (3, 5), (64, 48), (130, 33), (3, 5, 7))
HUGE = (2**20, 2**20)  # of a tensor that no machine holds: forms are known without it
DRAWS = 400
LIKELY = 20  # a mean over DRAWS is farther off than Bernstein's bound with this exponent once in e^10 times, or it is biased
SLACK = 1e-9  # relative: the norms themselves are rounded
TINY = 2.0**-126  # the smallest normal number of float32: what is lost below it counts for nothing


def check_stage(stage: Stage) -> None:
    """Every rule below. Raises AssertionError that says which one was broken, by what, and what was wanted."""
    check_settings(stage)
    check_forms(stage)
    check_repeats(stage)
    check_error(stage)
    check_mean(stage)
    check_hostile(stage)


def check_settings(stage: Stage) -> None:
    """A stage has a name, and is a frozen dataclass: a codec keeps it, and uses it for every tensor of every round."""
    cls = type(stage)
    assert isinstance(getattr(cls, "name", None), str), f"{cls.__name__} has no name: add `name: ClassVar[str] = ...`"
    frozen = is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert frozen, f"{cls.__name__} is no frozen dataclass: put @dataclass(frozen=True) above it"


def check_forms(stage: Stage) -> None:
    """What encode yields has the forms that were announced, every entry in its range; decode gives float32, of the right
    count."""
    carried(stage, Form(HUGE))
    for x in samples():
        streams, forms = _encoded(stage, x), carried(stage, Form(x.shape))
        assert streams.keys() == forms.keys(), f"{_at(stage, x)}: encode gave {[*streams]}, announced are {[*forms]}"
        for name, form in forms.items():
            _require_form(streams[name], form, f"{_at(stage, x)}, '{name}'")
        _require_floats(_decoded(stage, streams, Form(x.shape)), Form(x.shape), _at(stage, x))


def check_repeats(stage: Stage) -> None:
    """The same numbers, however they lie in memory, make the same streams, and the same streams the same numbers; neither is
    changed."""
    for x in samples():
        before, streams = x.copy(), _encoded(stage, x)
        assert x.tobytes() == before.tobytes(), f"{_at(stage, x)}: encode changed what it was given; work on a copy"
        for again in (_encoded(stage, x), _encoded(stage, np.asfortranarray(x)), _encoded(stage, _scattered(x))):
            for name, values in streams.items():
                same = _bits(again[name]) == _bits(values)
                assert same, f"{_at(stage, x)}: the same numbers were encoded to another '{name}' the second time"
        _require_untouched(stage, x, streams)
        one, other = (_decoded(stage, streams, Form(x.shape)) for _ in range(2))
        assert _bits(one) == _bits(other), f"{_at(stage, x)}: the same streams were decoded to other numbers the second time"


def check_error(stage: Stage) -> None:
    """What comes back is no farther away than `error` says, and no bit away where `exact` stands."""
    for key, x in enumerate(samples()):
        back = _decoded(stage, _encoded(stage, x, key), Form(x.shape), key)
        away, promised = _norm(back - x.reshape(-1).astype(np.float64)), stage.error(x)
        near = away <= promised * (1 + SLACK) + TINY * x.size**0.5
        assert near, f"{_at(stage, x)}: off by {away:.4g}, its error promises {promised:.4g}"
        same = _bits(back) == _bits(x)
        assert same or not stage.exact, f"{_at(stage, x)}: said to be exact, but other bits came back"


def check_mean(stage: Stage) -> None:
    """Where `unbiased` stands, the mean over many draws is what went in: closer than chance alone would often leave it."""
    for shape in ((), (40,), (24, 20)) if stage.unbiased else ():
        x = _normal(shape)
        off = [
            _decoded(stage, _encoded(stage, x, key), Form(shape), key) - x.reshape(-1).astype(np.float64)
            for key in range(DRAWS)
        ]
        mean, each = _norm(np.mean(off, axis=0)), float(np.mean(np.square(off).sum(axis=1))) ** 0.5
        rare = LIKELY / DRAWS * stage.error(x)  # what happens in few draws, and may not have happened
        wanted = (LIKELY / DRAWS) ** 0.5 * each + rare + 2.0**-20 * _norm(x)
        assert mean <= wanted, (
            f"{_at(stage, x)}: the mean of {DRAWS} draws is off by {mean:.4g}, if unbiased by at most {wanted:.4g}"
        )


def check_hostile(stage: Stage) -> None:
    """Streams of the right forms that nobody encoded give numbers, finite or not, or raise MalformedMessage: nothing else."""
    rng = np.random.default_rng(0)
    for x in samples():
        given = Form(x.shape)
        for streams in _hostile(carried(stage, given), _encoded(stage, x), rng):
            try:
                with np.errstate(all="ignore"):
                    back = _decoded(stage, streams, given)
            except MalformedMessage:
                continue
            except Exception as error:
                raise AssertionError(f"{_at(stage, x)}: nonsense raised {error!r}, wanted MalformedMessage") from error
            _require_floats(back, given, f"{_at(stage, x)}, nonsense")


def samples() -> Iterator[Array]:
    """Arrays of many shapes: as updates are, with one number far larger, all the same, 0, and at both ends of float32."""
    for shape in SHAPES:
        normal = _normal(shape)
        yield normal
        yield normal**9
    for shape in ((1,), (300,), (64, 48)):
        normal = _normal(shape)
        yield np.zeros(shape, np.float32)
        yield np.full(shape, -0.3, np.float32)
        yield from (normal * np.float32(size) for size in (1e-44, 1e-38, 1e-20, 1e20, 1e34))


def carried(stage: Stage, given: Form) -> dict[str, Form]:
    """The forms of all that a stage makes of such an array."""
    forms = {**stage.sides(given), "carrier": stage.carrier(given)}
    for name, form in forms.items():
        what = f"{stage} of shape {given.shape}, '{name}'"
        assert name == "carrier" or form.kind is not Kind.FLOATS, f"{what} is of kind FLOATS: only the carrier can be"
        assert form.low <= form.high, f"{what} announces whole numbers from {form.low} to {form.high}"
    return forms


def _hostile(forms: Mapping[str, Form], honest: Mapping[str, Array], rng: np.random.Generator) -> Iterator[dict[str, Array]]:
    """Each stream at random, all at an end of their range, and one stream at random beside honest ones."""
    yield {name: _random(form, rng) for name, form in forms.items()}
    yield {name: np.full(form.count, form.low, form.dtype) for name, form in forms.items()}
    yield {
        name: np.full(form.count, np.inf if form.kind is Kind.FLOATS else form.high, form.dtype) for name, form in forms.items()
    }
    for name, form in forms.items():
        yield {**honest, name: _random(form, rng)}


def _random(form: Form, rng: np.random.Generator) -> Array:
    if form.kind is Kind.FLOATS:
        return rng.integers(0, 2**32, form.count, np.uint32).view(np.float32)
    return rng.integers(form.low, form.high, form.count, endpoint=True).astype(form.dtype)


def _encoded(stage: Stage, x: Array, key: int = 0) -> dict[str, Array]:
    carrier, sides = stage.encode(x, Draw(key, "a"))
    return {**sides, "carrier": carrier}


def _decoded(stage: Stage, streams: Mapping[str, Array], given: Form, key: int = 0) -> Array:
    """(count,)."""
    there = _sent(stage, streams, given)
    return stage.decode(there.pop("carrier"), there, given, Draw(key, "a")).reshape(-1)


def _sent(stage: Stage, streams: Mapping[str, Array], given: Form) -> dict[str, Array]:
    """As they come from the network: flat, and of the smallest type that holds their range."""
    return {name: streams[name].reshape(-1).astype(form.dtype) for name, form in carried(stage, given).items()}


def _require_untouched(stage: Stage, x: Array, streams: Mapping[str, Array]) -> None:
    there = _sent(stage, streams, Form(x.shape))
    before = {name: _bits(values) for name, values in there.items()}
    stage.decode(there["carrier"], {name: there[name] for name in stage.sides(Form(x.shape))}, Form(x.shape), Draw(0, "a"))
    for name, values in there.items():
        assert _bits(values) == before[name], f"{_at(stage, x)}: decode changed '{name}'; work on a copy"


def _require_form(values: Array, form: Form, what: str) -> None:
    assert values.size == form.count, f"{what}: {values.size} numbers came, announced are {form.count}"
    if form.kind is Kind.FLOATS:
        assert values.dtype == np.float32, f"{what}: wanted float32, {values.dtype} came"
        assert np.isfinite(values).all(), f"{what}: infinite numbers came of finite ones"
        return
    assert values.dtype.kind in "iu", f"{what}: wanted whole numbers, {values.dtype} came"
    inside = not values.size or (form.low <= values.min() and values.max() <= form.high)
    assert inside, f"{what}: numbers from {values.min()} to {values.max()} came, announced are {form.low} to {form.high}"


def _require_floats(back: Array, given: Form, what: str) -> None:
    right = back.dtype == np.float32 and back.size == given.count
    assert right, f"{what}: decode gave {back.size} of {back.dtype}, wanted {given.count} of float32"


def _at(stage: Stage, x: Array) -> str:
    return f"{stage} of shape {x.shape}, numbers up to {np.abs(x).max(initial=0):.3g}"


def _normal(shape: tuple[int, ...]) -> Array:
    return np.asarray(np.random.default_rng(len(shape)).normal(size=shape), np.float32)


def _scattered(x: Array) -> Array:
    """The same numbers, every second of an array."""
    there: Array = np.repeat(x[..., None], 2, axis=-1)[..., 0]
    return there


def _norm(x: Array) -> float:
    return float(np.linalg.norm(x.astype(np.float64).reshape(-1)))


def _bits(x: Array) -> bytes:
    return np.ascontiguousarray(x).tobytes()
