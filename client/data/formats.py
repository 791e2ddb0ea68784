"""From a row to token ids: which columns it has says how it is read, and which of its tokens are learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from client.allowance import shown, shown_names
from client.data import chat
from client.data.classes import class_of
from client.data.examples import Example, Labelled, single
from client.data.readers import Row
from fedtune.errors import DataError


@dataclass(frozen=True)
class Encoder:
    """The tokenizer as the formats need it."""

    tokenizer: Any
    max_length: int
    labels: Sequence[str] | None = None  # of all clients, for classification

    def ids(self, text: str) -> list[int]:
        """The tokens of the text and nothing else."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def start(self) -> list[int]:
        """What the tokenizer puts before every text: its <bos>, or nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("")["input_ids"][:1] == [bos] else []

    @property
    def end(self) -> list[int]:
        """<eos>, so that the model learns to stop."""
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [eos]


Encode = Callable[[Row, Encoder, str], Iterable[Example] | Iterable[Labelled]]


@dataclass(frozen=True)
class Format:
    columns: tuple[str, ...]
    learnt: str  # what the loss is on
    encode: Encode


def format_of(columns: Iterable[str], task: str, where: str) -> Format:
    """The first format whose columns are all there. Raises DataError with those that are understood."""
    columns, formats = list(columns), FORMATS[task]
    for format in formats:
        if set(format.columns) <= set(columns):
            return format
    wanted = "; ".join(" + ".join(format.columns) for format in formats)
    raise DataError(f"{where} has the columns {shown_names(columns)}; for model.task = '{task}' wanted one of: {wanted}")


def require_format(row: Row, where: str) -> None:
    """Raises DataError where no task could learn from this row."""
    for column in format_of(row, "causal", where).columns:  # classification's has the column `text` too
        if column == "messages":
            chat.checked(row[column], where)
        else:
            _string(row, column, where)


def encode(rows: Sequence[Row], format: Format, encoder: Encoder, where: str) -> list[list[Example] | list[Labelled]]:
    """The examples of each row, none for a row in which no token is left to learn."""
    encoded: list[Any] = []
    for number, row in enumerate(rows, 1):
        place = f"{where}, row {number}"
        missing = [column for column in format.columns if row.get(column) is None]
        if missing:
            raise DataError(f"{place}: nothing in the column '{missing[0]}', which the rows before it have")
        examples = format.encode(row, encoder, place)
        encoded.append([one for one in examples if (one.learnt if isinstance(one, Example) else one.input_ids)])
    return encoded


def _text(row: Row, encoder: Encoder, where: str) -> Iterable[Example]:
    """Every token is learnt; a long text is cut into pieces."""
    ids = encoder.start + encoder.ids(_string(row, "text", where)) + encoder.end
    for begin in range(0, len(ids), encoder.max_length):
        piece = ids[begin : begin + encoder.max_length]
        yield single(piece, [True] * len(piece))


def _completion(row: Row, encoder: Encoder, where: str) -> Iterable[Example]:
    return _answered(_string(row, "prompt", where), _string(row, "completion", where), encoder)


def _alpaca(row: Row, encoder: Encoder, where: str) -> Iterable[Example]:
    parts = [f"### Instruction:\n{_string(row, 'instruction', where)}"]
    if row.get("input"):
        parts.append(f"### Input:\n{_string(row, 'input', where)}")
    return _answered("\n\n".join([*parts, "### Response:\n"]), _string(row, "output", where), encoder)


def _answered(prompt: str, answer: str, encoder: Encoder) -> Iterable[Example]:
    """Only the answer is learnt. The two are tokenised apart, as they are when the model is asked the prompt."""
    before, after = encoder.start + encoder.ids(prompt), encoder.ids(answer) + encoder.end
    return _cut(before + after, [False] * len(before) + [True] * len(after), encoder)


def _messages(row: Row, encoder: Encoder, where: str) -> Iterable[Example]:
    ids, learnt = chat.encode(chat.checked(row["messages"], where), encoder.tokenizer, where)
    return _cut(ids, learnt, encoder)


def _classified(row: Row, encoder: Encoder, where: str) -> Iterable[Labelled]:
    ids = encoder.tokenizer(_string(row, "text", where), truncation=True, max_length=encoder.max_length)["input_ids"]
    yield Labelled(tuple(ids), class_of(row["label"], encoder.labels, where))


def _cut(ids: Sequence[int], learnt: Sequence[bool], encoder: Encoder) -> Iterable[Example]:
    if ids:
        yield single(ids[: encoder.max_length], learnt[: encoder.max_length])


def _string(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(f"{where}: '{column}' is {shown(value)}; wanted text")
    return value


# In the order in which they are tried: a row may have more columns than its format needs.
FORMATS: dict[str, tuple[Format, ...]] = {
    "causal": (
        Format(("messages",), "the assistant's turns", _messages),
        Format(("prompt", "completion"), "the completion", _completion),
        Format(("instruction", "output"), "the output", _alpaca),
        Format(("text",), "all of the text", _text),
    ),
    "classification": (Format(("text", "label"), "the label", _classified),),
}
