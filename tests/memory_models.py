"""A saved model with a long-term memory and a tokenizer, and a book for it to read."""

import random
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from checks_models import LLAMA, shake
from mka.data import load_tokenizer
from mka.models import build_model

WORDS = "the cat sat on a mat and looked at dog who told him of ship that sails to far islands"
OPTIONS: dict[str, dict[str, Any]] = {
    "mka": {"local_window": 6, "chunk_size": 4, "top_k": 3, "session_stride": 4},
    "fmka": {"local_window": 6, "chunk_size": 4, "top_k": 3, "index_size": 5},
    "mha": {},
}


def story(seed: int, words: int = 300) -> str:
    return " ".join(random.Random(seed).choices(WORDS.split(), k=words)) + "\n"


def save_model(folder: Path, kind: str, std: float = 0.2, **options: Any) -> Path:
    tokenizer = load_tokenizer("bpe", [story(seed) for seed in range(9)], 300)
    sizes: dict[str, Any] = LLAMA | {"vocab_size": tokenizer.vocab_size}
    config = LlamaConfig(**sizes, eos_token_id=tokenizer.eos_id)
    shake(build_model(config, kind, **OPTIONS[kind] | options), std).save_pretrained(folder)
    tokenizer.save(folder)
    return folder
