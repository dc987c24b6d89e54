"""Train a small model to recall (MQAR), and save it for `mka eval recall`.

python examples/recall_example.py
python examples/recall_example.py --attention_type mha --local_window 16

Rows of 16 to 64 tokens that are full of pairs and questions teach the lookup. After two fifths of
the training come the shapes that are evaluated, 64/4, 128/8 and 256/16 (tokens/pairs); there the
model also has to learn to skip chunks without a pair.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import LlamaConfig
from transformers.utils import logging

from mka.data.recall import RecallBatch, recall_batch
from mka.errors import InputError
from mka.models import build_model
from mka.record.folders import claimed
from mka.storage import replace_folder
from mka.training import answers_right, train_on_answers

VOCAB_SIZE, HIDDEN_SIZE, NUM_HEADS, NUM_LAYERS = 8192, 128, 2, 2
TOKENS_A_STEP = 2048
FULL, SHAPES = ((16, 4), (32, 8), (64, 16)), ((64, 4), (128, 8), (256, 16))
CHUNK_SIZE = 4
HELD_OUT = 2**32
"""Seeds from here on are only used for evaluation."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Train a small model to recall."""

    attention_type: str = "mka"
    """The attention mechanism: mha, mqa, gqa, mla, mka or fmka."""
    local_window: int | None = 16
    """Tokens in the window; None: the whole past."""
    top_k: int = 8
    """mka and fmka: number of chunks of 4 tokens to retrieve."""
    max_steps: int = 6000
    """Number of optimizer steps, each of 2,048 tokens."""
    seed: int = 0
    """Random seed for the weights and the rows."""
    output_dir: str = "runs/recall"
    """Folder to save the model in; the model's own folder in it is named after the mechanism."""


def main(example: Example) -> None:
    """Train the model, printing its accuracy on held-out rows, and save it."""
    logging.disable_progress_bar()
    torch.manual_seed(example.seed)
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=SHAPES[-1][0],
        tie_word_embeddings=True,
        initializer_range=HIDDEN_SIZE**-0.5,
    )
    # Other mechanisms have no chunks, and refuse options that they do not know.
    options: dict[str, Any] = {"local_window": example.local_window}
    if example.attention_type in ("mka", "fmka"):
        options |= {"chunk_size": CHUNK_SIZE, "top_k": example.top_k}
    model = build_model(config, example.attention_type, example.seed, **options)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    def batch_at(step: int) -> RecallBatch:
        """The batch of a step: one of the full shapes at first, later one of those evaluated."""
        # Shapes take turns; longer rows are fewer, so that each step has as many tokens.
        tokens, pairs = (FULL if 5 * step < 2 * example.max_steps else SHAPES)[step % 3]
        return recall_batch(
            tokens, pairs, TOKENS_A_STEP // tokens, (example.seed, step), VOCAB_SIZE
        )

    def look() -> str:
        """The share of the answers that are right, by shape."""
        found = []
        for tokens, pairs in SHAPES:
            seed = (example.seed + HELD_OUT, tokens)
            batch = recall_batch(tokens, pairs, 64, seed, VOCAB_SIZE)
            found.append(f"{tokens}/{pairs} {answers_right(model, batch):.3f}")
        return ", ".join(found)

    def save(folder: Path) -> dict[str, Any]:
        """Write the model into an empty folder; MQAR draws token ids, so there is no tokenizer."""
        model.save_pretrained(folder)
        return {}

    window = "" if example.local_window is None else f"-w{example.local_window}"
    name = f"{example.attention_type}{window}-seed{example.seed}"
    folder = Path(example.output_dir) / name
    # Claimed before the training, so that two runs cannot train for the same folder.
    with claimed(folder.parent, name):
        train_on_answers(model, batch_at, example.max_steps, 3e-3, look)
        replace_folder(folder, save)
    print(f"Saved  {folder}; mka eval recall --model {folder}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Example, use_underscores=True))
    except InputError as error:
        print(f"recall_example.py: {error}", file=sys.stderr)
        sys.exit(2)
