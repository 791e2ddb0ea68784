"""The fuzzer's corpus, without the fuzzer: what it starts from is accepted, and what it found once is found no more."""

from __future__ import annotations

import pytest

from tests.fuzz.target import CORPUS, corpus, tried

FILES = {path.stem: bytes.fromhex(path.read_text()) for path in sorted(CORPUS.glob("*.hex"))}
VALID = [name for name in FILES if not name.startswith("found-")]


@pytest.mark.parametrize("name", FILES)
def test_it_is_accepted_or_was_found_once_and_is_refused(name: str) -> None:
    assert tried(FILES[name]) or name.startswith("found-"), "type python -m tests.fuzz.fuzz_wire --write-corpus"


def test_there_is_one_of_each_kind_and_codec() -> None:
    assert sorted(VALID) == sorted(name for name, _ in corpus()), "type python -m tests.fuzz.fuzz_wire --write-corpus"


def test_it_stays_small() -> None:
    assert sum(len(data) for data in FILES.values()) < 20_000
