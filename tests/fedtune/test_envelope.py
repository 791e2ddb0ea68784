"""One message as plain bytes, and what it costs."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from fedtune.envelope import LONGEST, Envelope, WireTensor, header_in
from fedtune.errors import MalformedMessage
from fedtune.paths import app_root


def test_size_is_tensors_and_header() -> None:
    tensors = tuple(WireTensor(name, "uint8", (size,), "raw", bytes(size)) for name, size in (("x", 5), ("y", 0), ("z", 7)))
    assert Envelope({}, tensors).size() == len("{}") + 5 + 0 + 7
    assert Envelope({"a": "é"}).size() == len('{"a":"\\u00e9"}')  # JSON stays ASCII


def test_the_same_header_is_the_same_text() -> None:
    assert Envelope({"b": 1, "a": [2, None]}).header_json() == Envelope({"a": [2, None], "b": 1}).header_json()
    assert Envelope({"b": 1, "a": [2, None]}).header_json() == '{"a":[2,null],"b":1}'


def test_a_header_beyond_all_bounds_is_not_parsed() -> None:
    """Valid JSON, and twenty times as large in memory."""
    with pytest.raises(MalformedMessage, match="a header of 8,388,611 characters came, wanted at most 8,388,608"):
        header_in("[" + "[" * LONGEST + "]]")
    assert header_in('{"a":1}') == {"a": 1}


def test_a_line_beyond_all_bounds_is_not_read_to_its_end() -> None:
    file = io.BytesIO(b'{"header":{"a":"' + b"x" * 3 * LONGEST + b'"},"tensors":[]}\n')
    with pytest.raises(MalformedMessage):
        Envelope.read(file)
    assert file.tell() == 2 * LONGEST


def test_it_needs_neither_torch_nor_flower() -> None:
    """The relay imports it: a fresh interpreter shows what else that loads."""
    code = "import sys, fedtune.envelope; print(sorted({'torch', 'flwr', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=app_root(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
