"""Envelopes as Flower messages. The only file of this package that knows Flower; it does not know torch.

A tensor becomes one `Array` with our `stype`; the header becomes one string in a `ConfigRecord`.
"""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedtune.envelope import Envelope, WireTensor, header_in
from fedtune.errors import MalformedMessage

HEADER, TENSORS = "fedtune.header", "fedtune.tensors"


def to_record(envelope: Envelope) -> RecordDict:
    arrays = {t.name: Array(dtype=t.dtype, shape=t.shape, stype=t.stype, data=t.data) for t in envelope.tensors}
    header = ConfigRecord({"json": envelope.header_json()})
    return RecordDict({HEADER: header, TENSORS: ArrayRecord(arrays)})


def from_record(record: RecordDict) -> Envelope:
    """Raises MalformedMessage when the record is none of ours."""
    try:
        header = header_in(str(record.config_records[HEADER]["json"]))
        arrays = record.array_records[TENSORS]
    except (KeyError, ValueError, RecursionError) as error:
        raise MalformedMessage(f"a Flower message without a fedtune header came: {error}") from error
    tensors = (WireTensor(name, a.dtype, tuple(a.shape), a.stype, a.data) for name, a in arrays.items())
    return Envelope(header, tuple(tensors))
