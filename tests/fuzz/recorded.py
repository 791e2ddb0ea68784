"""What the fuzzer starts from: short runs of three clients that train for real, with every ask, every answer, and the state in
which the coordinator asked. They are played once, in this process, on a model of a few thousand weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from unittest.mock import patch

import torch

from client.trainer import Trainer
from fedtune.envelope import Envelope
from fedtune.job import Job, load_job
from fedtune.strategy import Answer, Ask, ServerState
from server import coordinator
from server.federation import Federation
from server.journal import Journal
from server.opening import Opened, Stand
from server.round import Round
from server.run_folder import RunFolder
from server.watchers import Quiet
from simulations.grid import InProcessGrid

CLIENTS = {"ann": 5, "bob": 7, "cy": 9}  # rows of each
TEXTS = ("the cat sat on the mat", "the dog sat on the log", "a cat and a dog met on a mat")
METHODS = {"fedavg": (), "fedkseed": ("strategy.K=64", "train.optimizer=sgd", "train.clip=0.0")}
WIRES = ("balanced", "plain")
ROUNDS = 2
CUT = "2.0"  # the ask in the midst of which the folder of a run is kept, as a crash would leave it
PLAY, ADMITTED = coordinator.play, Round._admitted
Tree = Mapping[str, bytes]  # path -> content, of all files in a folder


@dataclass(frozen=True)
class Message:
    """An ask to one client, and its answer."""

    client: str
    ask: Envelope
    answer: Envelope

    @property
    def id(self) -> str:
        return str(self.ask.header["ask"])


@dataclass(frozen=True)
class OpenAsk:
    """Of one round, as it stood when it was asked."""

    stand: Stand  # at the start of its round
    state: ServerState
    ask: Ask
    id: str
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Recorded:
    """`federation` is the coordinator's own, and must be left as it is; `torn` is the folder in the midst of `CUT`, and
    `whole` the one at the end."""

    name: str
    job: Job
    federation: Federation
    messages: tuple[Message, ...]
    asks: tuple[OpenAsk, ...]
    torn: Tree
    whole: Tree
    final: ServerState

    def to(self, client: str) -> list[Message]:
        return [message for message in self.messages if message.client == client]

    def message(self, client: str, id: str) -> Message:
        return next(message for message in self.to(client) if message.id == id)


def recorded(folder: Path, methods: Sequence[str]) -> list[Recorded]:
    """One run of each method over each wire."""
    torch.set_num_threads(1)
    make_model(folder / "model")
    make_data(folder / "data")
    return [_run(folder, method, wire) for method in methods for wire in WIRES]


def _run(folder: Path, method: str, wire: str) -> Recorded:
    name = f"{method}-{wire}"
    job = _job(folder, name, [f"strategy.name={method}", f"wire.preset={wire}", *METHODS[method]])
    taken, run = _Taken(folder / name), folder / name
    grid = InProcessGrid(Listening.for_simulation(job))
    listening: Listening = grid._trainer  # type: ignore[assignment]
    with taken.listening(), _the_same_each_time():
        result = coordinator.run_job(job, grid, run, Quiet(), write_model=False)
    assert taken.federation is not None
    heard = tuple(listening.heard)
    return Recorded(name, job, taken.federation, heard, tuple(taken.asks), taken.torn, tree(run), result.state)


class Listening(Trainer):
    """Keeps what is asked and answered."""

    def __init__(self, *given: object, **named: object) -> None:
        super().__init__(*given, **named)  # type: ignore[arg-type]
        self.heard: list[Message] = []

    def answer(self, envelope: Envelope, client: str | None = None) -> Envelope:
        answer = super().answer(envelope, client)
        self.heard.append(Message(str(client), envelope, answer))
        return answer


@dataclass
class _Taken:
    """What a coordinator knows at work, taken from under its hands."""

    folder: Path
    federation: Federation | None = None
    asks: list[OpenAsk] = field(default_factory=list)
    torn: Tree = field(default_factory=dict)
    _stand: Stand | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        with patch.object(coordinator, "play", self.play), patch.object(Round, "_admitted", self.admitted):
            yield

    def play(self, run: Opened, stand: Stand) -> Stand:
        self.federation, self._stand = run.federation, stand
        return PLAY(run, stand)

    @property
    def admitted(self) -> Callable[..., Iterator[tuple[str, Answer]]]:
        def admitted(round: Round, clients: Sequence[str], ask: Ask, id: str) -> Iterator[tuple[str, Answer]]:
            assert self._stand is not None
            self.asks.append(OpenAsk(self._stand, self._stand.state, ask, id, tuple(clients)))
            for number, found in enumerate(ADMITTED(round, clients, ask, id), 1):
                if (id, number) == (CUT, len(clients) - 1):
                    self.torn = tree(self.folder)
                yield found

        return admitted


@contextmanager
def _the_same_each_time() -> Iterator[None]:
    """The number of a case stands for its bytes only where none of them tells the time, or was drawn."""
    ticks = count(1)
    clock = lambda: next(ticks) / 64  # noqa: E731
    defaults = (lambda: 1.8e9, *(Journal.__init__.__defaults__ or ())[1:])
    names = patch("server.opening.token_hex", lambda size: "f" * 2 * size)
    times = [patch(f"time.{name}", clock) for name in ("monotonic", "perf_counter")]
    with names, times[0], times[1], patch.object(Journal.__init__, "__defaults__", defaults):
        yield


def tree(folder: Path) -> dict[str, bytes]:
    """Links are followed by nobody: what they lead to lies in the folder itself."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files if "events" not in path.parts}


def plant(folder: Path, files: Tree) -> RunFolder:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return RunFolder(folder)


def _job(folder: Path, name: str, keys: Sequence[str]) -> Job:
    path = folder / f"{name}.toml"
    path.write_text(
        f"""
name = "{name}"
model = {{ path = "{folder / "model"}", dtype = "float32" }}
adapter = {{ rank = 2, alpha = 3.0, targets = ["q_proj", "v_proj"] }}
data = {{ path = "{folder / "data"}", max_length = 16, packing = false }}
train = {{ steps = 1, batch = 1, lr = 0.01, precision = "fp32" }}
rounds = {{ count = {ROUNDS}, timeout = 20.0, quorum = 0.3 }}
machine = {{ device = "cpu", threads = 1 }}
compare = false
""",
        encoding="utf-8",
    )
    return load_job(path, keys)


def make_data(folder: Path) -> None:
    folder.mkdir()
    for client, rows in CLIENTS.items():
        lines = (json.dumps({"text": f"{client}: {TEXTS[row % 3]} {row}"}) + "\n" for row in range(rows))
        (folder / f"{client}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_model(folder: Path) -> None:
    """A Llama of one layer, whose tokens are letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted({letter for text in TEXTS for letter in text} | set("abcnyo:0123456789"))
    known = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *letters])}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(known), **sizes, **heads, **tokens)).save_pretrained(folder)
