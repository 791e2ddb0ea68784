"""Answers on disk come back as they were, and their mean does not depend on who was first."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch

from fedtune.envelope import Envelope
from fedtune.errors import Damaged
from fedtune.payload import Payload, Role
from fedtune.strategy import Answer, Fold
from fedtune.wire import pack_answer, unpack_answer
from server.spool import Spool, SpooledAnswers

NAMES = ["ann", "../x", "/etc/passwd", "..", ".", "Zoë 東京 \n", "", "a" * 300, "ä" * 500, "ANN"]


def envelope(payload: Payload, weight: float = 1.0) -> Envelope:
    return pack_answer(Answer(payload, weight, {"loss": 0.1}), {"ask": "1.0", "base": "b", "client": "x"})


def plain(client: str, envelope: Envelope) -> Answer:
    return unpack_answer(envelope)


def vector(*values: float) -> Payload:
    return Payload({"v": torch.tensor(values)}, {"v": Role.VECTOR}, {"s": values[0]})


def everything() -> Payload:
    numbers = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randn(3, 2, generator=numbers).to(dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    }
    tensors |= {"line\nbreak": torch.tensor([float("nan"), float("inf"), -0.0]), "empty": torch.zeros(0, 4)}
    tensors |= {"scalar": torch.tensor(3, dtype=torch.int64)}
    return Payload(tensors, dict.fromkeys(tensors, Role.VECTOR), {"s": 0.1})


def test_an_answer_comes_back_bit_for_bit(tmp_path: Path) -> None:
    spool, sent = Spool(tmp_path / "spool"), envelope(everything())
    got = spool.get("ann", spool.put("ann", sent))
    assert got == sent
    assert unpack_answer(got).payload.tensors["torch.bfloat16"].dtype is torch.bfloat16


def test_any_name_of_a_client_is_a_file_in_the_spool_and_in_no_other_place(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "run" / "spool")
    digests = {name: spool.put(name, envelope(vector(float(number)))) for number, name in enumerate(NAMES)}
    for number, name in enumerate(NAMES):
        assert unpack_answer(spool.get(name, digests[name])).payload.scalars["s"] == number
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {tmp_path / "run" / "spool"}
    assert len(files) == len(NAMES)


def test_a_later_answer_replaces_the_earlier(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    digests = [spool.put("ann", envelope(vector(value))) for value in (1.0, 2.0)]
    assert unpack_answer(spool.get("ann", digests[1])).payload.scalars["s"] == 2
    with pytest.raises(Damaged, match="not what was written"):
        spool.get("ann", digests[0])


@pytest.mark.parametrize("how", ["a bit", "cut", "gone"])
def test_an_answer_that_is_not_as_it_was_written_is_never_read(how: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    digest = spool.put("ann", envelope(vector(1.0)))
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data if how == "a bit" else data[:-1])
    if how == "gone":
        path.unlink()
    with pytest.raises(Damaged, match="the answer of 'ann'"):
        spool.get("ann", digest)


def test_an_answer_that_was_not_written_whole_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path)
    digest = spool.put("ann", envelope(vector(1.0)))

    def fails(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="gone"):
        spool.put("ann", envelope(vector(2.0)))
    assert unpack_answer(spool.get("ann", digest)).payload.scalars["s"] == 1


def test_a_cleared_spool_is_gone(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.put("ann", envelope(vector(1.0)))
    spool.clear()
    spool.clear()
    assert not (tmp_path / "spool").exists()


def test_a_spool_that_holds_nothing_takes_no_place(tmp_path: Path) -> None:
    """So that it can be cleared on a disk that is full."""
    Spool(tmp_path / "spool").clear()
    assert not (tmp_path / "spool").exists()


def test_the_mean_has_the_same_bits_in_whatever_order_answers_came(tmp_path: Path) -> None:
    """1/3 of 1e8, -1e8 and 0.1 in float64: another order of adding gives other bits."""
    values, weights = {"ann": 1e8, "bob": -1e8, "cy": 0.1}, {"ann": 3.0, "bob": 3.0, "cy": 1.0}
    means = []
    for number, order in enumerate(itertools.permutations(values)):
        spool = Spool(tmp_path / str(number))
        digests = {client: spool.put(client, envelope(vector(values[client]))) for client in order}
        answers = SpooledAnswers(spool, digests, {client: weights[client] for client in order}, Fold.SUM, plain)
        assert list(answers.weights.items()) == [("ann", 3 / 7), ("bob", 3 / 7), ("cy", 1 / 7)]
        means.append(answers.mean().tensors["v"])
    assert all(torch.equal(mean, means[0]) for mean in means)
    torch.testing.assert_close(means[0], torch.tensor([0.1 / 7]))


def test_a_mean_by_hand(tmp_path: Path) -> None:
    """(1 * 2 + 3 * 6) / 4 = 5; of the roles only those that were asked for."""
    spool, digests = Spool(tmp_path), {}
    for client, value in (("ann", 2.0), ("bob", 6.0)):
        payload = Payload(
            {"v": torch.tensor([value], dtype=torch.bfloat16), "d": torch.ones(1)}, {"v": Role.A, "d": Role.DENSE}, {"s": value}
        )
        digests[client] = spool.put(client, envelope(payload))
    answers = SpooledAnswers(spool, digests, {"ann": 1.0, "bob": 3.0}, Fold.SUM, plain)
    mean = answers.mean([Role.A])
    assert mean.tensors == {"v": torch.tensor([5.0])}
    assert mean.tensors["v"].dtype is torch.float32
    assert mean.scalars == {"s": 5.0}
    assert set(answers.mean().tensors) == {"v", "d"}


def test_a_sum_does_not_show_single_answers(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    digests = {"ann": spool.put("ann", envelope(vector(1.0)))}
    with pytest.raises(TypeError, match=r"use mean\(\), or yield Ask\(..., fold=Fold.EACH\)"):
        iter(SpooledAnswers(spool, digests, {"ann": 1.0}, Fold.SUM, plain))


def test_each_shows_them_in_the_order_of_clients(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    digests = {client: spool.put(client, envelope(vector(value))) for client, value in (("bob", 6.0), ("ann", 2.0))}
    seen = [
        (client, share, answer.payload.scalars["s"])
        for client, share, answer in SpooledAnswers(spool, digests, {"bob": 3.0, "ann": 1.0}, Fold.EACH, plain)
    ]
    assert seen == [("ann", 0.25, 2.0), ("bob", 0.75, 6.0)]


def test_a_spool_is_gone_also_when_ctrl_c_comes_while_it_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, rmtree, begun = Spool(tmp_path / "spool"), shutil.rmtree, list[Path]()
    spool.put("ann", envelope(vector(1.0)))

    def stopped_at_first(folder: Path, ignore_errors: bool) -> None:
        begun.append(folder)
        if len(begun) == 1:
            raise KeyboardInterrupt
        rmtree(folder, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", stopped_at_first)
    with pytest.raises(KeyboardInterrupt):
        spool.clear()
    assert not (tmp_path / "spool").exists()


def test_each_answer_is_on_the_disk_when_the_spool_is_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = set[str](), os.fsync

    def noted(opened: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{opened}"))
        sync(opened)

    monkeypatch.setattr(os, "fsync", noted)
    spool = Spool(tmp_path / "spool")
    spool.settle()  # nothing came
    for name in NAMES:
        spool.put(name, envelope(vector(1.0)))
    assert synced == set()
    spool.settle()
    assert synced == {str(path) for path in [tmp_path / "spool", *(tmp_path / "spool").iterdir()]}


def test_a_disk_that_fails_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "spool")
    spool.put("ann", envelope(vector(1.0)))

    def broken(opened: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        spool.settle()
