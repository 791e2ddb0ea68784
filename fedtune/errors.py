"""The errors of fedtune.

    FedtuneError
    ├── UserError             something to be mended by the user: one line, exit code 2
    │   ├── JobError          the job file: missing, not TOML, unknown key, wrong type
    │   ├── DataError         a data file: missing, empty, malformed, without the needed column
    │   ├── ModelError        the base model: missing, without tokenizer, targets that match nothing
    │   ├── StrategyError     an unknown strategy, settings or clients that it cannot work with
    │   ├── RunFolderError    the output folder: already holds a run, disk full
    │   └── KeysError         keys, certificates, the bundle of a client: missing, expired, open to others
    ├── MalformedMessage      bytes that are no message of ours
    ├── Damaged               a file of ours is not what was written: what it held is fetched or done again
    ├── Refused               the gate let an answer not in; the round goes on without it
    ├── ClientFailed          a client could not answer, with its own reason; the round goes on without it
    │   └── Forbidden         the client's own policy forbids it
    └── RoundFailed           too few answers to go on: the run ends with exit code 1

A message says what was given, what was wanted and what to type.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedtuneError(Exception):
    """Every error that fedtune raises on purpose."""


class UserError(FedtuneError):
    """Mended by the user: the command ends with this one line and exit code 2."""


class JobError(UserError):
    """The job file or a `--set` is wrong."""


class DataError(UserError):
    """A data file cannot be learnt from."""


class ModelError(UserError):
    """The base model cannot be used as the job asks."""


class StrategyError(UserError):
    """The strategy is unknown, or cannot work with these settings or clients."""


class RunFolderError(UserError):
    """The run folder cannot be written."""


class KeysError(UserError):
    """Keys or certificates are missing, expired, revoked, or not kept as they must be."""


class MalformedMessage(FedtuneError):
    """Bytes arrived that are not a message of ours."""


class Damaged(FedtuneError):
    """A file of ours is not what was written."""


class Refused(FedtuneError):
    """The gate refused an answer; the message is the reason."""


class ClientFailed(FedtuneError):
    """A client could not answer; the message is its reason."""


class Forbidden(ClientFailed):
    """The policy of a client forbids it; the message begins with the rule's name."""


class RoundFailed(FedtuneError):
    """Fewer clients answered than the quorum."""


# What values of the wrong type or size do to code that takes them for what they should be.
MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word: `, did you mean 'x'?` or nothing."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean '{found[0]}'?" if found else ""
