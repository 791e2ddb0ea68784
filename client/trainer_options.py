"""The options of the trainer's process."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m client.trainer_main", description="Train where the data is.")
    parser.add_argument("--client", help="this client's name; with --bundle, the bundle's")
    parser.add_argument("--socket", required=True, type=Path, help="where the relay finds this trainer")
    trust = parser.add_mutually_exclusive_group(required=True)
    trust.add_argument("--bundle", type=Path, help="folder that the coordinator handed over: whose asks are answered")
    trust.add_argument("--insecure", action="store_true", help="answer anybody who reaches the socket")
    parser.add_argument("--policy", type=Path, help="what this client allows, such as policy.toml")
    parser.add_argument("--relay-user", help="user that the relay runs as; absent is this one")
    parser.add_argument("--model", help="base model on this node, in place of the job's")
    parser.add_argument("--data", help="data on this node, in place of the job's")
    parser.add_argument(
        "--budget", type=_above_zero, help="what this node can afford, where the job's ranks go by it; 1 is usual"
    )
    parser.add_argument("--layers", type=_layers, help="how many this node trains, or all, where the method selects them")
    parser.add_argument(
        "--memory", type=_bytes, help="that a training step may take on this node, such as 2GB: fewer layers fit"
    )
    parser.add_argument("--seconds", type=_above_zero, help="that a training step may take on this node: fewer layers fit")
    parser.add_argument("--dir", type=Path, help="for what the client keeps between rounds; without it, in memory only")
    return parser


def _above_zero(text: str) -> float:
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} was given, wanted a number above 0")
    return number


def _layers(text: str) -> int | str:
    if text != "all" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} was given, wanted a number from 1, or all")
    return text if text == "all" else int(text)


def _bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text} was given, wanted bytes, such as 2GB or 800MiB")
    return size
