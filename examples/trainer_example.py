"""Give a Llama-like model three memories and train it with transformers' Trainer.

python examples/trainer_example.py
python examples/trainer_example.py --model path/to/a/pretrained/llama --max_steps 200

Without --model a small Llama is trained from scratch. A pretrained one is converted: at first it
predicts as before, and gates then let its memories in as far as they help.
"""

from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from mka.data import load_corpus, prepare_tokens
from mka.memory.router import Router
from mka.models import build_model, convert


@dataclass(frozen=True, kw_only=True)
class Example:
    """Train fmka in a Llama with transformers' Trainer."""

    model: str | None = None
    """Folder or name of a pretrained Llama, Mistral, Qwen2 or Qwen3; None: a small Llama, trained
    from scratch."""
    max_steps: int = 60
    """Number of optimizer steps, each of 8 x 256 tokens."""


SEQUENCE_LENGTH, BATCH_SIZE = 256, 8


class Blocks(Dataset[dict[str, Tensor]]):
    """Token ids, cut into at most `limit` blocks of SEQUENCE_LENGTH."""

    def __init__(self, ids: Any, limit: int) -> None:
        blocks = min(limit, len(ids) // SEQUENCE_LENGTH)
        # Tokens are stored as smaller integers, which an embedding does not take.
        taken = torch.as_tensor(ids[: blocks * SEQUENCE_LENGTH].astype("int64"))
        self.rows = taken.view(blocks, SEQUENCE_LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # Labels equal the inputs: transformers shifts them by one token itself.
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main(example: Example) -> None:
    """Train the model, and print its loss before and after and the gates of its memories."""
    # A pretrained model needs its own tokenizer.
    corpus = prepare_tokens(load_corpus("stdlib"), example.model or "bpe", vocab_size=8192)
    model = make_model(example, corpus.tokenizer.vocab_size)
    train, held_out = (
        Blocks(corpus.splits[name].ids, limit)
        for name, limit in (("train", 10**6), ("validation", 32))
    )
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=example.max_steps,
            per_device_train_batch_size=BATCH_SIZE,
            # A pretrained model is to change little.
            learning_rate=1e-3 if example.model is None else 1e-4,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=held_out)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        print(
            f"held-out loss {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after "
            f"{example.max_steps} steps"
        )
    # In a converted model gates begin at 0, shut, and training opens them; in a new one they are 1.
    gates = [module.gate.item() for module in model.modules() if isinstance(module, Router)]
    print("gates of the memories, by layer: " + ", ".join(f"{gate:.3f}" for gate in gates))


def make_model(example: Example, vocab_size: int) -> Any:
    """The model with fmka: a pretrained one, converted, or a new small Llama."""
    if example.model is not None:
        return convert(
            AutoModelForCausalLM.from_pretrained(example.model), "fmka", local_window=128
        )
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=True,
    )
    return build_model(config, "fmka", local_window=64)


if __name__ == "__main__":
    main(tyro.cli(Example, use_underscores=True))
