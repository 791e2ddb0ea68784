from __future__ import annotations

import sysconfig

import pytest
from datasets import Dataset

from client.data.sources import clients_in, rows_of
from fedtune.errors import DataError
from fedtune.job import Clients, Data

ROWS = [{"text": "one"}]


def found(path, clients=None, **data):
    return clients_in(Data(path=str(path), **data), clients or Clients())


@pytest.fixture
def folder(write, tmp_path):
    """Two clients, ann and bob, and a file that is no data."""
    write("data/bob.jsonl", [{"text": "b"}])
    write("data/ann.jsonl", [{"text": "a"}])
    (tmp_path / "data" / "README.md").write_text("about")
    return tmp_path / "data"


def test_a_folder_has_a_client_per_file_sorted_by_name(folder):
    sources = found(folder)
    assert list(sources) == ["ann", "bob"]
    assert rows_of(sources["bob"]) == [{"text": "b"}]


def test_a_folder_may_hold_datasets_folders(tmp_path):
    Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "data" / "ann")
    Dataset.from_list([{"text": "b"}]).save_to_disk(tmp_path / "data" / "bob")
    sources = found(tmp_path / "data")
    assert {name: rows_of(source) for name, source in sources.items()} == {"ann": [{"text": "a"}], "bob": [{"text": "b"}]}


def test_one_file_is_one_client(write):
    assert list(found(write("mine.jsonl", ROWS))) == ["mine"]


def test_one_file_holds_many_clients_by_a_column(write):
    rows = [{"who": 2, "text": "x"}, {"who": "ann", "text": "y"}, {"who": 2, "text": "z"}]
    sources = found(write("all.jsonl", rows), client_column="who")
    assert list(sources) == ["2", "ann"]
    assert [row["text"] for row in rows_of(sources["2"])] == ["x", "z"]


def test_one_datasets_folder_holds_many_clients_by_a_column(tmp_path):
    Dataset.from_list([{"who": "b", "text": "x"}, {"who": "a", "text": "y"}]).save_to_disk(tmp_path / "all")
    assert list(found(tmp_path / "all", client_column="who")) == ["a", "b"]


def test_a_changed_file_is_read_again(write):
    path = write("all.jsonl", [{"who": "ann", "text": "x"}])
    found(path, client_column="who")
    write("all.jsonl", [{"who": "ann", "text": "x"}, {"who": "bob", "text": "y"}])
    assert list(found(path, client_column="who")) == ["ann", "bob"]


def test_names_and_count_choose(folder):
    assert list(found(folder, Clients(count=1))) == ["ann"]
    assert list(found(folder, Clients(names=("bob",)))) == ["bob"]


def test_the_default_clients_are_the_eight_largest_packages():
    eight = ["asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml"]
    assert list(found("builtin:stdlib", Clients(count=8))) == eight


def test_one_package_can_be_the_data():
    sources = found("builtin:stdlib/asyncio")
    assert list(sources) == ["asyncio"]
    assert "tasks.py" in {row["file"] for row in rows_of(sources["asyncio"])}


def refused(path, clients=None, **data):
    with pytest.raises(DataError) as error:
        found(path, clients, **data)
    return str(error.value)


def test_missing_path(tmp_path):
    message = refused(tmp_path / "nothing")
    assert "nothing' does not exist; wanted a folder with a file per client" in message


def test_empty_folder(tmp_path):
    assert "holds no data; wanted one file per client (.jsonl, .json, .csv, .parquet)" in refused(tmp_path)


def test_unknown_client(folder):
    message = refused(folder, Clients(names=("bobb",)))
    assert "there is no client 'bobb'" in message
    assert "did you mean 'bob'?" in message


def test_no_names(folder):
    assert "clients.names is empty" in refused(folder, Clients(names=()))


def test_fewer_clients_than_asked_for(folder):
    message = refused(folder, Clients(count=3))
    assert "clients.count = 3, but there are 2 clients (ann, bob)" in message
    assert "--set clients.count=2" in message


def test_unknown_file_type(tmp_path):
    (tmp_path / "data.xlsx").write_text("")
    assert "'.xlsx' files cannot be read; wanted one of .jsonl" in refused(tmp_path / "data.xlsx")


def test_two_files_for_one_client(folder):
    (folder / "ann.csv").write_text("text\nx\n")
    assert "two files for the client 'ann'" in refused(folder)


def test_client_column_that_is_not_there(write):
    message = refused(write("all.jsonl", ROWS), client_column="who")
    assert "row 1: no client in the column 'who' (data.client_column); columns: text" in message


@pytest.mark.parametrize("builtin", [True, False])
def test_client_column_where_files_are_the_clients(folder, builtin):
    path = "builtin:stdlib" if builtin else folder
    assert "leave data.client_column out" in refused(path, client_column="who")


def test_unknown_builtin():
    assert "'builtin:wiki' is unknown; the one built-in data set is 'builtin:stdlib'" in refused("builtin:wiki")


def test_unknown_package():
    assert "there is no client 'asincio', did you mean 'asyncio'?" in refused("builtin:stdlib/asincio")


def test_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    message = refused("builtin:stdlib")
    assert f"{tmp_path} has none" in message
    assert "--set data.path=FOLDER" in message
