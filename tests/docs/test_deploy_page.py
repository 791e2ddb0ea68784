"""The commands of docs/deploy.md, typed in its order by both operators, on one machine with a small job; and `fedtune up`."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.policy import Policy, rules
from fedtune.daemon import State
from fedtune.paths import base_model
from fedtune.processes import free_port, started_in

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
PATIENCE = 120.0  # seconds for anything to happen; mostly it takes a few
ROWS = '{"prompt": "Summarise: the cat sat.", "completion": " A cat."}\n' * 8
JOB = """
name = "notes"
model.path = "builtin:stdlib"
data = { path = "notes", max_length = 32, held_out = 0.5 }
train = { steps = 1, batch = 2 }
rounds.count = 1
machine = { device = "cpu", threads = 1 }
"""


def commands() -> list[str]:
    found = [part.partition("\n```")[0] for part in PAGE.split("```sh\n")[1:]]
    return [line for block in found for line in block.splitlines() if line]


class Reader:
    """Types what the page says, at a place and port of its own, and remembers it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.typed = folder, free_port(), list[str]()
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, command: str) -> subprocess.Popen[bytes]:
        assert command in commands(), f"the page does not say: {command}"
        self.typed.append(command)
        words = [sys.executable, "-m", "fedtune.cli", *self._here(shlex.split(command)[1:])]
        with self._said(command).open("w") as said:
            process = subprocess.Popen(words, cwd=self.folder, stdout=said, stderr=subprocess.STDOUT)
        self.running.append(process)
        return process

    def said(self, command: str) -> str:
        return self._said(command).read_text(encoding="utf-8")

    def run(self, command: str) -> str:
        """What it said, once it has ended well."""
        assert self.start(command).wait(PATIENCE) == 0, (command, self.said(command))
        return self.said(command)

    def _said(self, command: str) -> Path:
        return self.folder / f"{commands().index(command)}.said"

    def end(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        for process in self.running:
            process.wait(30)

    def _here(self, words: list[str]) -> list[str]:
        words = ["localhost" if word == "coordinator.example.org" else word for word in words]
        if words[:2] == ["keys", "init"]:
            words += ["--address", f"localhost:{self.port}"]
        if words[0] == "server":
            words += ["--host", "127.0.0.1", "--port", str(self.port), "--wait", str(PATIENCE)]
        return words


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with tempfile.TemporaryDirectory(prefix="ft") as name:
        folder = Path(name)
        (folder / "notes").mkdir()
        (folder / "notes" / "north.jsonl").write_text(ROWS, encoding="utf-8")
        (folder / "notes.toml").write_text(JOB, encoding="utf-8")
        (folder / "model").symlink_to(base_model())
        shutil.copy(ROOT / "docs" / "policy.toml", folder)
        reader = Reader(folder)
        try:
            yield reader
        finally:
            reader.end()
        assert [found for place in ("server", "client", "network") for found in started_in(folder / place)] == []


def until(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)


def phase(folder: Path) -> str:
    return State.read(folder).phase if (folder / "state.json").is_file() else ""


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_the_page_as_it_is_typed(reader: Reader) -> None:
    folder = reader.folder
    reader.run("fedtune keys init coordinator.example.org")
    reader.run("fedtune keys client north")
    shutil.move(folder / "keys" / "bundles" / "north", folder / "north")  # the copy that the page asks for
    reader.run("fedtune doctor notes.toml --dir server --keys keys")
    served = "fedtune server notes.toml --dir server --keys keys"
    server = reader.start(served)
    until(lambda: phase(folder / "server") == "waiting", "the server")
    reader.run("fedtune doctor notes.toml --bundle north --data notes/north.jsonl --model model")
    client = reader.start("fedtune client --bundle north --data notes/north.jsonl --model model --dir client")
    assert server.wait(PATIENCE) == 0, reader.said(served)
    assert "adapter:" in reader.said(served)
    assert (folder / "server" / "runs" / "notes" / "adapter" / "adapter_model.safetensors").is_file()

    assert "round 1 of 1" in reader.run("fedtune status --dir server")
    assert '"role": "client"' in reader.run("fedtune status --dir client --json")
    assert "guard network" in reader.run("fedtune logs --dir client trainer --lines 50")
    reader.run("fedtune stop --dir client")
    assert client.wait(30) == 0

    reader.start("fedtune client --bundle north --data notes/north.jsonl --model model --dir client --policy policy.toml")
    until(lambda: phase(folder / "client") in ("waiting", "running"), "the client with a policy")
    reader.run("fedtune stop --dir client")
    trainer = "fedtune client --only trainer --bundle north --data notes/north.jsonl --model model --dir client"
    reader.start(f"{trainer} --socket trainer.sock")
    reader.start("fedtune client --only network --bundle north --dir network --socket trainer.sock")
    until(lambda: phase(folder / "network") == "waiting", "the network half")
    until((folder / "trainer.sock").is_socket, "the trainer's half")
    reader.end()

    assert "north" in reader.run("fedtune keys list")
    reader.run("fedtune keys revoke north")
    reader.run("fedtune keys rotate client north")
    reader.run("fedtune keys rotate server")
    assert "north" in reader.run("fedtune keys rotate signing")
    reader.run("fedtune keys request south")
    reader.run("fedtune keys register south.request.toml")
    assert set(commands()) - set(reader.typed) == {"fedtune up --clients 3"}


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_up_deploys_and_leaves_nothing_but_the_run(tmp_path: Path) -> None:
    before = set(Path(tempfile.gettempdir()).glob("fedtune-up-*"))
    small = ("rounds.count=1", "train.steps=1", "data.max_held_out=2", "data.max_length=32", "machine.threads=1")
    words = ["up", "--clients", "2", "--out", str(tmp_path / "run"), *(word for key in small for word in ("--set", key))]
    done = subprocess.run([sys.executable, "-m", "fedtune.cli", *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2/2 clients" in done.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    assert set(Path(tempfile.gettempdir()).glob("fedtune-up-*")) == before


def test_the_page_names_every_rule_of_a_policy() -> None:
    rows = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in rules().items())
    assert f"<!-- rules -->\n| rule | meaning |\n|---|---|\n{rows}<!-- /rules -->" in PAGE


def test_the_example_of_a_policy_switches_nothing_on() -> None:
    assert Policy.load(ROOT / "docs" / "policy.toml") == Policy()
