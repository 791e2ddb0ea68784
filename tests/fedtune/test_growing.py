"""Lines as they are added to a file."""

from __future__ import annotations

from pathlib import Path

from fedtune.growing import Growing


def test_each_whole_line_comes_once(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    growing = Growing(file)
    assert list(growing.new()) == []
    file.write_bytes(b"one\ntw")
    assert list(growing.new()) == [b"one\n"]
    file.write_bytes(b"one\ntwo\n")
    assert list(growing.new()) == [b"two\n"]
    file.write_bytes(b"anew\n")
    assert list(growing.new()) == [b"anew\n"]


def test_a_line_without_end_is_cut(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    file.write_bytes(b"12345678\n")
    assert list(Growing(file, read=1, longest=3).new()) == [b"234", b"567", b"8\n"]
