"""What many tests share: a tiny Llama with its tokenizer, three clients with a file each, and jobs on them. All made here."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from fedtune.starting import start

# Heavy libraries are imported where they are used: the process that hands the tests out needs none of them.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from fedtune.adapter import Adapter
    from fedtune.job import Job

settings.register_profile("untimed", settings(), deadline=None)  # a busy machine fails no test
settings.load_profile("untimed")

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog met on a mat", "user assistant"]
EXAMPLES = {"ann": 6, "bob": 8, "cy": 11}  # rows of each client
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays to the end. Where the garbage collector looks through it again and again, this takes
    twice as long, and so do tests that make many objects."""
    start()
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices gain nothing from more, and sums in another order have other bits."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """A shell starts what it puts into the background with SIGINT ignored, and that is inherited: a terminal does not."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Ids: <pad> 0, <bos> 1, <eos> 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<bos>", "<eos>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXTS * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **names)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a Llama of 2 layers; its weights are large enough that logits differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of JSON lines for each of three clients; no two texts are the same."""
    folder = tmp_path_factory.mktemp("data")
    for client, size in EXAMPLES.items():
        rows = [{"text": f"{client}: {TEXTS[i % 3]} {i}"} for i in range(size)]
        (folder / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def job_file(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_data: Path) -> Path:
    """Two rounds of two steps. alpha / rank is not 1, so that a forgotten scale is seen. Nothing is lost on the wire, and bytes
    can be counted by hand."""
    path = tmp_path_factory.mktemp("job") / "tiny.toml"
    path.write_text(
        f"""
name = "tiny"
model.path = "{tiny_model}"
model.dtype = "float32"
adapter = {{ rank = 4, alpha = 6.0 }}
data = {{ path = "{tiny_data}", max_length = 48, packing = false }}
train = {{ steps = 2, batch = 2, lr = 0.01, precision = "fp32" }}
rounds.count = 2
machine.device = "cpu"
wire = "plain"
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def make_job(job_file: Path) -> Callable[..., Job]:
    """make_job("train.steps=1", ...): the tiny job with some keys set."""
    from fedtune.job import load_job

    return lambda *overrides: load_job(job_file, overrides)


@pytest.fixture(scope="session")
def draw_adapter() -> Callable[..., Adapter]:
    """draw_adapter({path: (d, k)}, rank, scale, seed): an adapter whose B is not zero."""
    import torch

    from fedtune.adapter import Adapter, Factors

    def draw(shapes: Mapping[str, tuple[int, int]], rank: int, scale: float = 1.5, seed: int = 0) -> Adapter:
        numbers = torch.Generator().manual_seed(seed)
        normal = lambda *shape: 0.3 * torch.randn(*shape, generator=numbers)  # noqa: E731
        return Adapter({path: Factors(normal(rank, k), normal(d, rank), scale) for path, (d, k) in shapes.items()})

    return draw


@pytest.fixture
def run_command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """run_command("simulate", ...): the exit code of `fedtune simulate ...`, and what went to stdout and stderr."""
    from simulations.commands import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fedtune", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capfd.readouterr())

    return run
