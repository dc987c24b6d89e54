"""The original's protocol, rebuilt from its description, beside the right one: what each of its defects does alone.

    no causal mask        every token attends to the whole row
    whole-row mean        the session average is over the row, its future included
    padding scored        a row is a paragraph filled up to the block's length; the padding is predicted and counted
    evaluated on train    on the rows that it was trained on

A "perplexity" under any of them is none: it is printed to show where such figures come from. On independent uniform
random tokens there is nothing to learn, so a loss below ln V is a leak, whatever the model.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mka.audit_commands import AuditOriginalConfig
from mka.data import load_corpus, prepare_tokens
from mka.data.corpus import Corpus
from mka.data.tokenizer import TextTokenizer
from mka.experiments.original_model import OriginalLM
from mka.limits import InputError
from mka.storage import write_atomically
from mka.training import minimise

SYMBOLS, UNIFORM_LENGTH, UNIFORM_ROWS = 64, 64, 32
VOCAB_SIZE, TEXT_ROWS, HELD_OUT_ROWS, LEARNING_RATE = 1024, 4, 64, 3e-3
HELD_OUT = 2**32
"""Seeds from here on are not trained on."""

HEADER = f"{'protocol':<32} {'loss':>8} " + '"perplexity"'

Rows = Callable[[int], Tensor]
"""(B, T + 1) token ids of a step."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The right one, unless a defect is switched on."""

    no_causal_mask: bool = False
    whole_row_mean: bool = False
    padding_scored: bool = False
    evaluated_on_train: bool = False

    @property
    def name(self) -> str:
        defects = [name.replace("_", " ") for name, on in asdict(self).items() if on]
        return {0: "right", 4: "all four: the original"}.get(len(defects), ", ".join(defects))


ALONE = [Protocol(**{name: True}) for name in asdict(Protocol())]
ON_TEXT = [Protocol(), *ALONE, Protocol(**dict.fromkeys(asdict(Protocol()), True))]
ON_UNIFORM = [Protocol(), *ALONE[:2], Protocol(no_causal_mask=True, whole_row_mean=True)]


def audit_original(config: AuditOriginalConfig, say: Callable[[str], None]) -> None:
    """Print both tables, a row as soon as it is known. Raises InputError for a dataset that is not there."""
    corpus = load_corpus(config.dataset, config.text_path)
    lines: list[str] = []

    def note(data: str, protocol: Protocol, loss: float) -> None:
        row = {"data": data, "protocol": protocol.name, "loss": loss, "perplexity": math.exp(loss)}
        lines.append(json.dumps(row | {"steps": config.max_steps, "seed": config.seed}))
        if config.output is not None:
            write_atomically(Path(config.output), "\n".join(lines) + "\n")
        say(f"{protocol.name:<32} {loss:>8.3f} {math.exp(loss):>12.2f}")

    floor = math.log(SYMBOLS)
    say(f"Independent uniform tokens from {SYMBOLS} symbols: no causal model can go below ln {SYMBOLS} = {floor:.3f}")
    say(HEADER)
    for protocol in ON_UNIFORM:
        note("uniform", protocol, on_uniform(protocol, config))
    tokenizer = prepare_tokens(corpus, "bpe", vocab_size=VOCAB_SIZE).tokenizer
    data = {split: paragraphs(corpus, split, tokenizer) for split in ("train", "validation")}
    say("")
    say(f"{config.dataset}, {config.sequence_length} tokens a row: the original's defects one by one")
    say(HEADER)
    for protocol in ON_TEXT:
        note(config.dataset, protocol, on_text(protocol, config, data, tokenizer.eos_id))


def on_uniform(protocol: Protocol, config: AuditOriginalConfig) -> float:
    def rows(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, step])
        return torch.from_numpy(rng.integers(SYMBOLS, size=(UNIFORM_ROWS, UNIFORM_LENGTH + 1)))

    model = train_model(protocol, SYMBOLS, UNIFORM_LENGTH, rows, config)
    return mean_loss(model, [rows(HELD_OUT + number) for number in range(HELD_OUT_ROWS // UNIFORM_ROWS)])


def on_text(protocol: Protocol, config: AuditOriginalConfig, data: dict[str, list[np.ndarray]], padding: int) -> float:
    length = config.sequence_length
    rows = {split: (padded if protocol.padding_scored else packed)(data[split], length, padding) for split in data}

    def at(step: int) -> Tensor:
        chosen = np.random.default_rng([config.seed, step]).integers(len(rows["train"]), size=TEXT_ROWS)
        return torch.from_numpy(rows["train"][chosen])

    model = train_model(protocol, VOCAB_SIZE, length, at, config)
    if protocol.evaluated_on_train:
        return mean_loss(model, [at(step) for step in range(min(config.max_steps, HELD_OUT_ROWS // TEXT_ROWS))])
    held_out = torch.from_numpy(rows["validation"])
    every = max(1, len(held_out) // HELD_OUT_ROWS)
    return mean_loss(model, list(held_out[::every][:HELD_OUT_ROWS].split(TEXT_ROWS)))


def paragraphs(corpus: Corpus, split: str, tokenizer: TextTokenizer) -> list[np.ndarray]:
    """Token ids of each paragraph: what stands between blank lines."""
    texts = [part for _, text in corpus.documents[split] for part in text.split("\n\n") if part.strip()]
    if not texts:
        raise InputError(f"the {split} split of the corpus is empty; give more text")
    return [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(texts)]


def padded(rows: Sequence[np.ndarray], length: int, padding: int) -> np.ndarray:
    """(N, length + 1): a paragraph a row, cut or filled up."""
    filled = np.full((len(rows), length + 1), padding, dtype=np.int64)
    for place, ids in zip(filled, rows, strict=True):
        place[: len(ids)] = ids[: length + 1]
    return filled


def packed(rows: Sequence[np.ndarray], length: int, padding: int) -> np.ndarray:
    """(N, length + 1): one stream of all of them, cut into blocks; the rest is left out."""
    stream = np.concatenate([np.append(ids, padding) for ids in rows])
    count = len(stream) // (length + 1)
    if not count:
        raise InputError(f"a split has {len(stream)} tokens; a row takes {length + 1}: give more text or a shorter row")
    return stream[: count * (length + 1)].reshape(count, length + 1)


def train_model(
    protocol: Protocol, vocab_size: int, length: int, rows: Rows, config: AuditOriginalConfig
) -> OriginalLM:
    torch.manual_seed(config.seed)
    switches = {"is_causal": not protocol.no_causal_mask, "mean_so_far": not protocol.whole_row_mean}
    model = OriginalLM(vocab_size, length, **switches)
    minimise(model, lambda step: next_token_loss(model, rows(step)), config.max_steps, LEARNING_RATE)
    return model.eval()


def next_token_loss(model: OriginalLM, ids: Tensor) -> Tensor:
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: OriginalLM, batches: Sequence[Tensor]) -> float:
    """Nats per predicted token, of batches that are equally large but for the last."""
    weights = [batch.shape[0] for batch in batches]
    losses = [next_token_loss(model, batch).item() for batch in batches]
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
