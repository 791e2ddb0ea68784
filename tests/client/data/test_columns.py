"""Columns that may not be used are gone before anything sees them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from client.allowance import Allowance, within
from client.data.formats import format_of
from client.data.readers import read, rows_by_client
from fedtune.errors import DataError

ROWS = [{"text": f"t{i}", "prompt": f"p{i}", "completion": f"c{i}", "ward": "ab"[i % 2]} for i in range(3)]
Write = Callable[[Path], Path]


def as_jsonl(folder: Path) -> Path:
    (path := folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def as_json(folder: Path) -> Path:
    (path := folder / "a.json").write_text(json.dumps(ROWS))
    return path


def as_csv(folder: Path) -> Path:
    with (path := folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def as_parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    return folder / "a.parquet"


def as_folder(folder: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(folder / "a")
    return folder / "a"


def only(*columns: str) -> Any:
    return within(Allowance(columns=columns))


@pytest.mark.parametrize("write", [as_jsonl, as_json, as_csv, as_parquet, as_folder])
def test_other_columns_are_not_in_the_rows(write: Write, tmp_path: Path) -> None:
    path = write(tmp_path)
    with only("prompt", "completion"):
        assert read(path) == [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(3)]
    assert read(path) == ROWS


def test_so_the_format_is_one_of_what_is_left(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path)
    with only("text", "prompt"):
        assert format_of(read(path)[0], "causal", "a").columns == ("text",)
    assert format_of(read(path)[0], "causal", "a").columns == ("prompt", "completion")
    with only("ward"), pytest.raises(DataError, match="wanted one of: messages; prompt"):
        format_of(read(path)[0], "causal", "a")


def test_clients_in_one_file_too_and_not_from_what_was_read_without_the_rule(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path)
    assert rows_by_client(path, "ward")["b"] == [ROWS[1]]
    with only("text", "ward"):
        assert rows_by_client(path, "ward")["b"] == [{"text": "t1", "ward": "b"}]
