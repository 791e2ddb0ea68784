"""A real update through whole codecs: measured bits against the zeroth-order entropy of what is sent, tables included.

The update is that of make_updates.py. In streams of scales hardly two numbers are alike, and what is frequent among them says
nothing: where they go beside the symbols, they count as what they take, and a second test says how little that is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from fedtune.wire.codec import CARRIER, Codec, codec_from
from fedtune.wire.stage import Array, Form, Kind
from fedtune.wire.streams import read, written

UPDATES = {name: tensor.float().numpy() for name, tensor in load_file(Path(__file__).with_name("updates.safetensors")).items()}
CODECS = [
    "int8 | entropy",
    "int4 | entropy",
    "int2 | entropy",
    "bf16 | entropy",
    "fp16 | entropy",
    "topk(0.1) | int8 | entropy",
    "topk(0.1) | int4 | entropy",
    "topk(0.01) | int4 | entropy",
    "topk(0.5) | int2 | entropy",
    "ternary(0.1) | entropy",
    "ternary(0.01) | entropy",
]


def joined(codec: Codec) -> dict[str, tuple[Form, Array]]:
    """As in a message: streams of the same name of all tensors are one."""
    encoded = {name: codec.encode(x, 7, name) for name, x in UPDATES.items()}
    streams = {}
    for stream in codec.forms(next(iter(UPDATES.values())).shape):
        forms = [codec.forms(x.shape)[stream] for x in UPDATES.values()]
        high, count = max(form.high for form in forms), sum(form.count for form in forms)
        form = replace(forms[0], shape=(count,), high=high)
        streams[stream] = form, np.concatenate([own[stream] for own in encoded.values()]).astype(form.dtype)
    return streams


def entropy(values: Array) -> float:
    """Bits of all values together, where each is as likely as it is frequent here."""
    counts = np.unique(values, return_counts=True)[1]
    return float(counts @ np.log2(values.size / counts))


def of_positions(codec: Codec, stream: str) -> float:
    """Bits of which numbers are kept, where any are as likely: n H(k / n) for each tensor. What is frequent among gaps says
    less, as many of them come once only."""
    kept = [(codec.forms(x.shape)[stream].count / x.size, x.size) for x in UPDATES.values()]
    return sum(n * (p * math.log2(1 / p) + (1 - p) * math.log2(1 / (1 - p))) for p, n in kept)


def is_side(name: str, form: Form) -> bool:
    return form.kind is Kind.WORDS and name != CARRIER


def least(codec: Codec, streams: Mapping[str, tuple[Form, Array]]) -> float:
    """Bits of all but scales."""
    symbols = {name: stream for name, stream in streams.items() if not is_side(name, stream[0])}
    return sum(
        of_positions(codec, name) if form.kind is Kind.GAPS else entropy(values) for name, (form, values) in symbols.items()
    )


@pytest.mark.parametrize("text", CODECS)
def test_a_real_update_takes_the_entropy_of_its_symbols(text: str) -> None:
    codec = codec_from(text)
    streams = joined(codec)
    data = {name: written(values, form, codec.entropy) for name, (form, values) in streams.items()}
    for name, (form, values) in streams.items():
        assert np.array_equal(read(data[name], form, codec.entropy), values)
    bits = 8 * sum(len(data[name]) for name, (form, _) in streams.items() if not is_side(name, form))
    assert bits <= 1.03 * least(codec, streams)


@pytest.mark.parametrize("text", [text for text in CODECS if "(0.01)" not in text])
def test_scales_take_little_beside(text: str) -> None:
    """Of a hundredth of the numbers, they would not."""
    codec = codec_from(text)
    streams = joined(codec)
    sides = sum(
        8 * len(written(values, form, codec.entropy)) for name, (form, values) in streams.items() if is_side(name, form)
    )
    assert sides <= 0.02 * least(codec, streams)
