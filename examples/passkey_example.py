"""Train a small model to find a passkey in at most 1,024 tokens, and save it for `mka eval needle`.

python examples/passkey_example.py
python examples/passkey_example.py --attention_type mha --local_window None
python examples/passkey_example.py --surroundings stdlib --output_dir runs/passkey-stdlib

The text around the key is the same few sentences over and over, or Python's standard library, which
the model then learns to predict in addition. It is the train split; `mka eval needle --surroundings
stdlib` uses the test split, and may use longer texts. The tokenizer is a BPE of 1,024 tokens either
way.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from transformers import LlamaConfig
from transformers.utils import logging

from mka.data import load_corpus, prepare_tokens
from mka.data.needle import FILLER, PasskeyTask
from mka.data.recall import RecallBatch
from mka.errors import InputError
from mka.models import build_model
from mka.record.folders import claimed
from mka.storage import replace_folder
from mka.training import answers_and_text_loss, answers_loss, answers_right, train_on_answers

HIDDEN_SIZE, NUM_HEADS, NUM_LAYERS = 128, 2, 2
LENGTHS, TOKENS_A_STEP = (96, 128, 256, 512, 1024), 4096
# The last one is twice as long as the longest row that is trained.
LOOKS = (128, 512, 2048)
HELD_OUT = 2**32
"""Seeds from here on are only used for evaluation."""
CHUNK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Example:
    """Train a small model to find a passkey."""

    attention_type: str = "mka"
    """The attention mechanism: mha, mqa, gqa, mla, mka or fmka."""
    local_window: int | None = 64
    """Tokens in the window; None: the whole past."""
    longterm_positions: str = "clamped"
    """mka: position of retrieved keys: clamped, true or none."""
    mix: str = "joint"
    """mka: how the levels are combined: joint or routed."""
    top_k: int = 4
    """mka and fmka: number of chunks of 16 tokens to retrieve."""
    surroundings: Literal["filler", "stdlib"] = "filler"
    """Text around the key: filler (the same few sentences) or stdlib (Python's standard library;
    every token of the text is then trained on, in addition to the answers)."""
    max_steps: int = 1500
    """Number of optimizer steps, each of 4,096 tokens."""
    learning_rate: float = 3e-3
    """Peak learning rate, after the warm-up."""
    seed: int = 0
    """Random seed for the weights and the prompts."""
    output_dir: str = "runs/passkey"
    """Folder to save the model in; the model's own folder in it is named after the mechanism."""


def main(example: Example) -> None:
    """Train the model, printing its accuracy on held-out prompts, and save it."""
    logging.disable_progress_bar()
    torch.manual_seed(example.seed)
    corpus = prepare_tokens(load_corpus("stdlib"), "bpe", vocab_size=1024)
    tokenizer = corpus.tokenizer

    def encode(text: str) -> Sequence[int]:
        """The token ids of a text."""
        return tokenizer.encode_batch([text])[0]

    filler = np.asarray(encode(FILLER)) if example.surroundings == "filler" else None
    # Keys for evaluation come from other seeds, and with stdlib from another split's text too.
    tasks = {
        name: PasskeyTask(corpus.splits[name].ids if filler is None else filler, encode)
        for name in ("train", "validation")
    }
    config = LlamaConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=LENGTHS[-1],
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
        tie_word_embeddings=True,
        initializer_range=HIDDEN_SIZE**-0.5,
    )
    kind = example.attention_type
    options: dict[str, Any] = {"local_window": example.local_window}
    options |= {"chunk_size": CHUNK_SIZE, "top_k": example.top_k} if "mka" in kind else {}
    if kind == "mka":
        options |= {"longterm_positions": example.longterm_positions, "mix": example.mix}
    model = build_model(config, kind, example.seed, **options)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    def batch_at(step: int) -> RecallBatch:
        """The batch of a step: short rows at first, longer ones one by one."""
        # Lengths are opened over the first 60 % of the steps; every second step has the longest
        # opened one, so that it gets most of the training.
        opened = min(len(LENGTHS), 1 + int(len(LENGTHS) * step / (0.6 * example.max_steps)))
        length = LENGTHS[step % opened if step % 2 else opened - 1]
        return tasks["train"].batch(length, TOKENS_A_STEP // length, (example.seed, step))

    def look() -> str:
        """The share of the answers' tokens that are right, by length."""
        found = []
        for length in LOOKS:
            batch = tasks["validation"].batch(length, 16, (example.seed + HELD_OUT, length))
            found.append(f"{length}: {answers_right(model, batch):.3f}")
        return ", ".join(found)

    def save(folder: Path) -> dict[str, Any]:
        """Write model and tokenizer into an empty folder."""
        model.save_pretrained(folder)
        tokenizer.save(folder)
        return {}

    window = "" if example.local_window is None else f"-w{example.local_window}"
    window += "-unplaced" if example.longterm_positions == "none" else ""
    name = f"{kind}{window}-seed{example.seed}"
    folder = Path(example.output_dir) / name
    # Claimed before the training, so that two runs cannot train for the same folder.
    with claimed(folder.parent, name):
        # Filler sentences teach nothing, so only the answers count there.
        loss_of = answers_loss if example.surroundings == "filler" else answers_and_text_loss
        train_on_answers(model, batch_at, example.max_steps, example.learning_rate, look, loss_of)
        replace_folder(folder, save)
    print(f"Saved  {folder}; mka eval needle --model {folder}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Example, use_underscores=True))
    except InputError as error:
        print(f"passkey_example.py: {error}", file=sys.stderr)
        sys.exit(2)
