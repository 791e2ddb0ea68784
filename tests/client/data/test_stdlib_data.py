from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.sources import clients_in
from client.data.stdlib import held_out_files, read_package
from fedtune.errors import DataError
from fedtune.job import Clients, Data


def sizes_of(name: str) -> dict[str, int]:
    source = clients_in(Data(path=f"builtin:stdlib/{name}"), Clients())[name]
    return {row["file"]: len(row["text"].encode()) for row in read_package(source.path)}


def test_every_default_client_holds_out_about_a_fifth():
    for name in clients_in(Data(), Clients(count=8)):
        sizes = sizes_of(name)
        share = sum(sizes[file] for file in held_out_files(sizes, 0.2)) / sum(sizes.values())
        assert 0.15 < share < 0.25, name


def test_packages_are_read_below_but_not_their_tests(tmp_path):
    long = "x = 1\n" * 40  # 240 characters
    for file in ("a.py", "sub/b.py", "test/c.py", "sub/tests/d.py", "_bundled/e.py", "notes.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_text(long)
    (tmp_path / "__init__.py").write_text("short = True\n")
    assert read_package(tmp_path) == [{"text": long, "file": "a.py"}, {"text": long, "file": "sub/b.py"}]


def test_package_without_text(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    with pytest.raises(DataError, match="holds no Python source; choose another client"):
        read_package(tmp_path)


files = st.dictionaries(st.text("abc/._", min_size=1, max_size=8), st.integers(200, 50_000), min_size=2, max_size=12)


@given(files, st.floats(0.05, 0.95))
def test_at_least_one_file_never_all_and_as_near_as_any_single_file(sizes, share):
    held_out = held_out_files(sizes, share)
    assert 1 <= len(held_out) < len(sizes)
    wanted = share * sum(sizes.values())
    off = abs(sum(sizes[file] for file in held_out) - wanted)
    assert off <= min(abs(size - wanted) for size in sizes.values())


@given(files)
def test_the_order_of_the_files_does_not_matter(sizes):
    assert held_out_files(dict(reversed(sizes.items())), 0.2) == held_out_files(sizes, 0.2)


def test_nothing_held_out():
    assert held_out_files({"a.py": 300, "b.py": 300}, 0.0) == set()
    assert held_out_files({"a.py": 300}, 0.2) == set()


def test_never_all_files_even_where_that_would_be_nearest():
    assert len(held_out_files({"a.py": 300, "b.py": 300}, 0.99)) == 1  # 594 of 600 bytes are wanted
