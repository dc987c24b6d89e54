"""Train a small FastMKA language model on Python's standard library, and sample from it.

python examples/fmka_example.py
python examples/fmka_example.py --max_steps 600 --prompt "class Queue:"
"""

from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import nn
from transformers import GenerationConfig

from mka.data import BlockBatches, TextTokenizer, evaluation_batches, load_corpus, prepare_tokens
from mka.distributed import start_ranks
from mka.evaluation import HeldOutLoss, held_out_loss
from mka.models import build_model, gpt2_config, mechanisms
from mka.training import TrainingPlan, TrainingRun, choose_precision, keep_freed_memory, train


@dataclass(frozen=True, kw_only=True)
class Example:
    """Train a small FastMKA model and sample from it."""

    max_steps: int = 150
    """Number of optimizer steps, each of 8 x 256 tokens."""
    prompt: str = "def read_file(path):\n"
    """Text for the model to continue."""
    num_tokens: int = 120
    """Number of tokens to sample."""
    seed: int = 0
    """Random seed for the weights, the order of the batches and the sampling."""


SEQUENCE_LENGTH, BATCH_SIZE = 256, 8


def main(example: Example) -> None:
    """Train the model, printing progress, and print a sample at the end."""
    keep_freed_memory()
    torch.manual_seed(example.seed)
    # A single rank here, on the GPU if there is one.
    ranks = start_ranks(timeout=600)
    device = ranks.device
    corpus = prepare_tokens(load_corpus("stdlib"), "bpe", vocab_size=8192)
    model = make_model(corpus.tokenizer, example.seed).to(device)
    size = sum(p.numel() for p in model.parameters())
    state = sum(
        layer.state_nbytes(1, SEQUENCE_LENGTH, torch.bfloat16) for layer in mechanisms(model)
    )
    print(f"{size:,} parameters; {state:,} bytes of bfloat16 state hold {SEQUENCE_LENGTH} tokens")

    batches = BlockBatches(corpus.splits["train"].ids, SEQUENCE_LENGTH, BATCH_SIZE, example.seed)
    precision = choose_precision(device)

    def held_out() -> HeldOutLoss:
        """The loss on the first 16,384 tokens of the validation split."""
        scored = evaluation_batches(
            corpus.splits["validation"], SEQUENCE_LENGTH, BATCH_SIZE, max_tokens=16384
        )
        return held_out_loss(model, scored, device, precision.autocast())

    def look() -> float:
        """Print and return the held-out loss."""
        held = held_out()
        print(
            f"held out: {held.perplexity:8.1f} perplexity per token, {held.bits_per_byte:.3f} "
            "bits per byte"
        )
        return held.loss

    def progress(run: TrainingRun) -> None:
        """Print a line after every tenth step."""
        if len(run.losses) % 10 == 0:
            print(f"step {len(run.losses)}/{example.max_steps}, loss {run.losses[-1]:.3f}")

    plan = TrainingPlan(
        batch_at=batches.at,
        steps=example.max_steps,
        accumulation=1,
        learning_rate=3e-3,
        precision=precision,
        ranks=ranks,
    )
    # `look` is called before, during and after the training; its losses become a curve.
    train(model, plan, look, progress)
    print("-" * 80)
    print(sample(model, corpus.tokenizer, example.prompt, example.num_tokens, device))


def make_model(tokenizer: TextTokenizer, seed: int) -> nn.Module:
    """A GPT-2 of 4 layers with fmka as its attention."""
    config = gpt2_config(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=SEQUENCE_LENGTH,
        eos_token_id=tokenizer.eos_id,
    )
    # A window of a quarter of the row, so that the memories have something to do.
    return build_model(config, "fmka", seed, local_window=64, num_kv_heads=2)


def sample(
    model: Any, tokenizer: TextTokenizer, prompt: str, num_tokens: int, device: torch.device
) -> str:
    """The prompt and its continuation, by top-40 sampling at temperature 0.8."""
    row = torch.tensor(tokenizer.encode_batch([prompt]), device=device)
    # GPT-2's learned positions end at SEQUENCE_LENGTH. The model reads each token once, and its
    # state carries the memories along.
    settings = GenerationConfig(
        max_new_tokens=min(num_tokens, SEQUENCE_LENGTH - row.shape[1]),
        do_sample=True,
        temperature=0.8,
        top_k=40,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
    )
    written = model.eval().generate(
        row, attention_mask=torch.ones_like(row), generation_config=settings
    )
    return tokenizer.decode(written[0].tolist())


if __name__ == "__main__":
    main(tyro.cli(Example, use_underscores=True))
