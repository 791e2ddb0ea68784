"""Make the small base model that fedtune ships: a Llama for Python source, and its tokenizer.

It reads only the *top-level modules* of the standard library (`Lib/*.py`), never its packages: those belong to the
clients of the default job. One module in twelve is held out, to know the loss on code that was never seen.

    python -m simulations.pretrain --out my_base_model          # about twenty minutes on two cores

Matrices are trained with Muon (Jordan et al. 2024, as in `torch.optim.Muon`, torch >= 2.9), the rest with AdamW.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
TURNS = ("<|system|>", "<|user|>", "<|assistant|>")
# A line break with its indentation is one piece, and snake_case splits before each underscore.
PIECES = r"\n[ \t]*| ?_*[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]+|[ \t\r\f\v]+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CONTEXT = 512  # positions that the model is built for
WINDOW = 256  # tokens in one training example


def top_level_modules() -> tuple[list[str], list[str]]:
    """The sources for training and the held-out ones: by a hash of the name, so that a new Python moves no file."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = [f for f in files if int(hashlib.sha256(f.name.encode()).hexdigest(), 16) % 12 == 0]
    read = [f.read_text(encoding="utf-8") for f in files if f not in held_out]
    return read, [f.read_text(encoding="utf-8") for f in held_out]


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [PAD, BOS, EOS, *TURNS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet))
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def as_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """All texts one after the other, each `<|bos|> … <|eos|>`: (tokens,)."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, verbose=False)["input_ids"] + [tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Nats per token over the stream in windows that do not overlap."""
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = []
    for batch in windows.split(16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model(input_ids=batch, labels=batch).loss.item() * len(batch))
    return sum(losses) / len(windows)


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step: int, steps: int, warmup: int, decay: int) -> float:
    """The share of the peak rate: up over `warmup` steps, constant, then straight down to 0 over the last `decay`."""
    return min((step + 1) / max(warmup, 1), 1.0, (steps - step) / decay)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    draw = torch.Generator().manual_seed(args.seed)
    train_texts, held_texts = top_level_modules()
    tokenizer = train_tokenizer(train_texts, 2048)
    train, held = as_stream(train_texts, tokenizer), as_stream(held_texts, tokenizer)
    model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32) if args.init else new_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} training tokens", flush=True)
    opts, began, running, best = optimizers(model, args.lr), time.monotonic(), math.nan, math.inf
    for step in range(args.steps):
        starts = torch.randint(len(train) - WINDOW, (args.batch,), generator=draw)
        ids = torch.stack([train[s : s + WINDOW] for s in starts.tolist()])  # (batch, WINDOW)
        loss = gradient_step(model, opts, ids, args.lr * schedule(step, args.steps, args.warmup, args.decay))
        running = loss if step == 0 else 0.99 * running + 0.01 * loss
        if (step + 1) % args.look_every == 0 or step + 1 == args.steps:
            minutes, loss_held = (time.monotonic() - began) / 60, mean_loss(model, held)
            print(f"step {step + 1} train {running:.3f} held-out {loss_held:.4f} {minutes:.1f} min", flush=True)
            if loss_held < best:
                best = loss_held
                save(model, tokenizer, args.out)
    print(f"kept the model with held-out loss {best:.4f}; Python {platform.python_version()}, torch {torch.__version__}")


def gradient_step(model: LlamaForCausalLM, opts: list[torch.optim.Optimizer], ids: torch.Tensor, lr: float) -> float:
    """One step on ids (batch, WINDOW); returns the loss before it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in opts:
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
        opt.zero_grad()
    return loss.item()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """A bfloat16 copy; the run goes on in float32."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(weights)
    copy.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--init", type=Path, help="go on from this model in place of a new one")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=int, default=300, help="steps at the end, over which the rate goes to 0")
    parser.add_argument("--batch", type=int, default=16, help=f"examples of {WINDOW} tokens in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--look-every", type=int, default=250, help="steps between looks at the held-out loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    pretrain(parser.parse_args())


if __name__ == "__main__":
    main()
