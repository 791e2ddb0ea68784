"""Which codecs a job's messages go through: its presets, and what its method allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedtune.errors import JobError
from fedtune.wire.codec import Codec, codec_from
from fedtune.wire.packed import Codecs

if TYPE_CHECKING:
    from fedtune.job import Job
    from fedtune.strategy import Strategy


@dataclass(frozen=True)
class Preset:
    """Codecs as they are written: of updates, of broadcasts, of tensors that the other side has nothing like."""

    up: str
    down: str
    first: str


PRESETS = {
    "plain": Preset("fp32", "fp32", "fp32"),
    "lossless": Preset("fp32 | entropy", "fp32 | entropy", "fp32 | entropy"),
    # up: right on average and without memory, whoever is drawn; down: the server knows what is missing, and sends it next
    "balanced": Preset("uniform(0.7, dither=true) | entropy", "uniform(0.7) | entropy", "int8 | entropy"),
    # a quarter of an update waits for the next one
    "tiny": Preset("uniform(2) | entropy", "uniform(2) | entropy", "int8 | entropy"),
}
LOSSLESS = PRESETS["lossless"].up


@dataclass(frozen=True)
class Wire:
    """How the messages of a run travel: the same on both sides."""

    up: Codecs
    down: Codecs
    feedback: bool  # clients remember what their codec lost, and send it with the next update
    decay: float  # what a round in which a client does not answer leaves of that
    versions: int  # of broadcasts that the server remembers
    seed: int


def wire_of(job: Job, strategy: Strategy) -> Wire:
    """Raises JobError where the job asks for a codec that loses what the method needs."""
    given, preset = job.wire, PRESETS[job.wire.preset]
    up = _direction("up", given.up, preset.up, given.first or preset.first, strategy.name, strategy.exact_up)
    down = _direction("down", given.down, preset.down, given.first or preset.first, strategy.name, strategy.exact_down)
    if slow := [stage.name for codec in (up.change, up.first) for stage in codec.stages if stage.slow]:
        raise JobError(
            f"'{slow[0]}' is for wire.down: up, a client could keep the server busy with it; so not in wire.first either"
        )
    return Wire(up, down, _feedback(given.feedback, up.change, strategy), given.decay, given.versions, job.seed)


def _feedback(wanted: str, codec: Codec, strategy: Strategy) -> bool:
    if wanted == "always" and codec.amplifies:
        raise JobError(
            f"wire.feedback = 'always' with '{codec.text}', which can lose more than an update has: errors would grow without "
            "end; leave wire.feedback out"
        )
    useful = {"auto": not codec.unbiased and not codec.amplifies, "always": True, "never": False}[wanted]
    return useful and strategy.steady and not codec.exact


def _direction(way: str, given: str | None, preset: str, first: str, strategy: str, exact: str) -> Codecs:
    """Of a preset, a method that needs every bit gets every bit; a codec that the job names is refused."""
    change = codec_from(preset if given is None else given)
    if exact and not change.exact:
        if given:
            raise JobError(
                f"wire.{way} = '{given}' loses bits, and '{strategy}' needs all of them: {exact}; leave it out, or type "
                f"--set 'wire.{way}={LOSSLESS}'"
            )
        change = codec_from(LOSSLESS)
    return Codecs(change, change if change.exact else codec_from(first))
