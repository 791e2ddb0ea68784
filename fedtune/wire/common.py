"""`common(bits, clip)`: whole multiples of one step that all clients have agreed on, rounded up or down at random.

    q = floor(clip(x, -c, c) / step + u),  u ~ U[0, 1),  step = c / m,  m = 2^(bits-1) - 1,  x' = q step

No scale travels, so the sum of the clients' integers means the sum of their updates: whoever sees nothing but the sum, as under
secure aggregation, learns the mean of the updates all the same. The step is rounded up to eight significant bits (the clip
grows with it, by less than a 100th): then q step is exact in float32, and so is what a sum of q means.

    sums = stage.added([carrier, ...])                      # modulo stage.field(clients): masks may be added as well
    stage.decoded_sum(sums, clients)                        # the sum of what each would be decoded to, bit for bit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedtune.wire.stage import Array, Draw, Form, Kind, Stage

CHUNK = 2**16  # values whose dither is drawn at once
UNIT = 2.0**-16  # of a step: what is added at random is a whole number of them


@dataclass(frozen=True)
class Common(Stage):
    """Unbiased for what lies within the clip, and so not for every x."""

    name: ClassVar[str] = "common"
    bits: Annotated[int, Field(ge=2, le=16)] = 8
    clip: Annotated[float, Field(ge=1e-30, le=1e30)] = 0.01

    @property
    def most(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    @property
    def step(self) -> float:
        """A bfloat16 number."""
        word = np.array([self.clip / self.most], np.float32).view(np.uint32)
        return float(((word + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)[0])

    def carrier(self, given: Form) -> Form:
        return Form((given.count,), Kind.SYMBOLS, -self.most, self.most)

    def encode(self, x: Array, draw: Draw) -> tuple[Array, Mapping[str, Array]]:
        flat = np.ascontiguousarray(x, np.float32).reshape(-1)
        symbols = np.empty(flat.size, self.carrier(Form(x.shape)).dtype)
        for start in range(0, flat.size, CHUNK):
            steps = np.divide(flat[start : start + CHUNK], self.step, dtype=np.float64).clip(-self.most, self.most)
            steps += draw.bytes(2 * steps.size, 2 * start).view("<u2") * UNIT
            symbols[start : start + CHUNK] = np.floor(steps, out=steps)
        return symbols, {}

    def decode(self, carrier: Array, sides: Mapping[str, Array], given: Form, draw: Draw) -> Array:
        x: Array = carrier.astype(np.float32)
        x *= np.float32(self.step)
        return x

    def error(self, x: Array) -> float:
        """A step, and what is beyond the clip."""
        beyond = np.maximum(np.abs(np.ravel(x)).astype(np.float64) - self.most * self.step, 0)
        return float(np.linalg.norm(self.step + beyond))

    def field(self, clients: int) -> int:
        """How many integers must be told apart for a sum of so many clients: 2^bits - 1 for each, and one."""
        return clients * int(2**self.bits - 1) + 1

    def added(self, carriers: Sequence[Array]) -> Array:
        """int64 (n,), from 0 to field - 1, of carriers (n,)."""
        total: Array = np.sum([np.asarray(carrier, np.int64) for carrier in carriers], axis=0) % self.field(len(carriers))
        return total

    def decoded_sum(self, sums: Array, clients: int) -> Array:
        """float64 (n,), exact, of sums modulo the field: those beyond its middle are negative."""
        field = self.field(clients)
        whole: Array = np.where(sums > field // 2, sums - field, sums) * self.step
        return whole
