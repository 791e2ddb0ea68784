"""The wire: asks and answers as envelopes, and the codecs that make tensors small."""

from fedtune.wire.raw import (
    DTYPES,
    RAW,
    decoded,
    encoded,
    pack_answer,
    pack_ask,
    pack_failure,
    unpack_answer,
    unpack_ask,
)

__all__ = ["DTYPES", "RAW", "decoded", "encoded", "pack_answer", "pack_ask", "pack_failure", "unpack_answer", "unpack_ask"]
