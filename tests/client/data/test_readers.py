from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from client.data.readers import read
from fedtune.errors import DataError

ROWS = [{"text": "Grüße, world", "label": 1}, {"text": 'two\nlines "quoted"', "label": 0}]


def as_jsonl(folder):
    path = folder / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8-sig")
    return path


def as_json(folder):
    path = folder / "a.json"
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    return path


def as_json_lines_called_json(folder):
    return as_jsonl(folder).rename(folder / "b.json")


def as_parquet(folder):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "a.parquet")
    return folder / "a.parquet"


def as_datasets_folder(folder):
    Dataset.from_list(ROWS).save_to_disk(folder / "a")
    return folder / "a"


@pytest.mark.parametrize("write_as", [as_jsonl, as_json, as_json_lines_called_json, as_parquet, as_datasets_folder])
def test_every_format_gives_the_same_rows(tmp_path, write_as):
    assert read(write_as(tmp_path)) == ROWS


def test_csv_gives_text_in_every_column(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"Grüße, world",1\n"two\nlines ""quoted""",0\nNA,0\n', encoding="utf-8")
    assert read(tmp_path / "a.csv") == [*({**row, "label": str(row["label"])} for row in ROWS), {"text": "NA", "label": "0"}]


def test_csv_with_a_long_text(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read(tmp_path / "a.csv")[0]["text"]) == 200_000


def refused(path, content=None):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_malformed_json_line(tmp_path):
    message = refused(tmp_path / "a.jsonl", b'{"text": "x"}\n\n{"text": \n')
    assert "line 3: not JSON (Expecting value at column 9)" in message
    assert 'wanted one JSON object per line, such as {"text": "…"}' in message


def test_json_line_that_is_no_object(tmp_path):
    assert "line 2: a list; wanted one JSON object" in refused(tmp_path / "a.jsonl", b'{"text": "x"}\n["x"]\n')


def test_malformed_json_array(tmp_path):
    assert "line 2: not JSON" in refused(tmp_path / "a.json", b'[{"text": "x"},\n{]')
    assert "row 2: a int; wanted an object" in refused(tmp_path / "a.json", b'[{"text": "x"}, 3]')


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_empty_file(tmp_path, name):
    assert "is empty; wanted at least one row" in refused(tmp_path / name, b"")


def test_csv_with_only_its_first_line(tmp_path):
    assert "is empty" in refused(tmp_path / "a.csv", b"text,label\n")


def test_empty_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    assert "is empty" in refused(tmp_path / "a.parquet")


@pytest.mark.parametrize("line", [b"a,b,c", b"a"])
def test_csv_line_with_other_fields(tmp_path, line):
    message = refused(tmp_path / "a.csv", b"text,label\nx,1\n" + line + b"\n")
    assert "line 3: not the 2 fields of the first line (text, label)" in message
    assert "double quotes" in message


def test_csv_with_an_open_quote(tmp_path):
    assert "the row that begins on line 3 is not CSV (unexpected end of data)" in refused(
        tmp_path / "a.csv", b'text\nfine\n"open\n'
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_not_utf8(tmp_path, name):
    content = '{"text": "Grüße"}'.encode("latin-1")
    assert "is not UTF-8 text" in refused(tmp_path / name, content)
    assert "save it as UTF-8" in refused(tmp_path / name, content)


def test_not_parquet(tmp_path):
    assert "is not Parquet" in refused(tmp_path / "a.parquet", b"text,label\n")


def test_file_that_went_away(tmp_path):
    assert "cannot be read: No such file" in refused(tmp_path / "a.jsonl")


def test_datasets_folder_with_splits(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "a")
    message = refused(tmp_path / "a")
    assert "holds the splits train; name one" in message
    assert str(tmp_path / "a" / "train") in message


def test_damaged_datasets_folder(tmp_path):
    folder = as_datasets_folder(tmp_path)
    [arrow] = folder.glob("*.arrow")
    arrow.write_bytes(b"damaged")
    assert "is not a whole `datasets` folder" in refused(folder)
    arrow.unlink()
    assert "cannot be read" in refused(folder)
