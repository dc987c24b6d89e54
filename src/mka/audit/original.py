"""The original protocol, rebuilt from its description, next to the right one: what each
of its defects does alone.

    no causal mask        every token attends to the whole row
    whole-row mean        the session average is over the row, its future included
    padding scored        a row is a paragraph padded to the full length, and the
                          padding is predicted and counted
    evaluated on train    the loss is measured on the rows that the model was trained on

With any of them the "perplexity" is not a perplexity: it is printed to show where such
numbers come from. In independent uniform random tokens there is nothing to learn, so a
loss below ln V is a leak, whatever the model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from mka.audit.original_model import OriginalLM
from mka.data import load_corpus, prepare_tokens
from mka.data.corpus import Corpus
from mka.data.tokenizer import TextTokenizer
from mka.errors import InputError, check_at_least
from mka.models import token_loss
from mka.training import minimize

SYMBOLS, UNIFORM_LENGTH, UNIFORM_ROWS = 64, 64, 32
"""Random tokens: the vocabulary, the tokens per row, and the rows per step."""
VOCAB_SIZE, TEXT_ROWS, HELD_OUT_ROWS, LEARNING_RATE = 1024, 4, 64, 3e-3
"""Text: the vocabulary and the rows per step; then, for both, the rows that are
evaluated, and the learning rate."""
HELD_OUT = 2**32
"""Numbers of steps from here on are never trained on, so their random rows are new."""

Rows = Callable[[int], Tensor]
"""Makes the token ids (B, T + 1) of a step, given its number."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol with the defects that are True; the right one by default.

    Args:
        no_causal_mask: every token attends to the whole row.
        whole_row_mean: the session average is over the whole row.
        padding_scored: rows are padded, and the padding is predicted and counted.
        evaluated_on_train: the loss is measured on the rows of the training.
    """

    no_causal_mask: bool = False
    whole_row_mean: bool = False
    padding_scored: bool = False
    evaluated_on_train: bool = False

    @property
    def name(self) -> str:
        """The defects, in words; "right" without any."""
        defects = [name.replace("_", " ") for name, on in asdict(self).items() if on]
        return {0: "right", 4: "all four: the original"}.get(len(defects), ", ".join(defects))


# Random tokens have neither paragraphs nor a training split to remember: two defects
# apply.
ALONE = [Protocol(**{name: True}) for name in asdict(Protocol())]
ON_TEXT = [Protocol(), *ALONE, Protocol(**dict.fromkeys(asdict(Protocol()), True))]
ON_UNIFORM = [Protocol(), *ALONE[:2], Protocol(no_causal_mask=True, whole_row_mean=True)]


@dataclass(frozen=True)
class ProtocolScore:
    """What one protocol reports.

    Args:
        data: "uniform", or the name of the corpus.
        protocol: its name.
        loss: nats per token.
    """

    data: str
    protocol: str
    loss: float

    @property
    def perplexity(self) -> float:
        """The reported perplexity, exp(loss)."""
        return math.exp(self.loss)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How each of the models is trained.

    Args:
        max_steps: optimizer steps. Default: 600.
        sequence_length: tokens per row of text. Default: 512.
        seed: random seed for weights and rows. Default: 0.

    Raises ValueError for a value that is too small.
    """

    max_steps: int = 600
    sequence_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("max_steps", self.max_steps, 1)
        check_at_least("sequence_length", self.sequence_length, 2)
        check_at_least("seed", self.seed, 0)


def original_scores(
    dataset: str = "stdlib",
    text_path: Sequence[str] = (),
    *,
    max_steps: int = 600,
    sequence_length: int = 512,
    seed: int = 0,
) -> Iterator[ProtocolScore]:
    """Train with each protocol, first on uniform random tokens, then on a corpus;
    yields each score as soon as it is known.

    Args:
        dataset: name of the corpus. Default: "stdlib".
        text_path: files and folders of dataset "text". Default: none.
        max_steps: optimizer steps of each training. Default: 600.
        sequence_length: tokens per row of text. Default: 512.
        seed: random seed for weights and rows. Default: 0.

    Raises ValueError for a dataset that cannot be loaded, and for values that are too
    small.
    """
    training = Training(max_steps=max_steps, sequence_length=sequence_length, seed=seed)
    corpus = load_corpus(dataset, tuple(text_path))
    for protocol in ON_UNIFORM:
        yield ProtocolScore("uniform", protocol.name, on_uniform(protocol, training))
    tokenizer = prepare_tokens(corpus, "bpe", vocab_size=VOCAB_SIZE).tokenizer
    data = {split: paragraphs(corpus, split, tokenizer) for split in ("train", "validation")}
    for protocol in ON_TEXT:
        loss = on_text(protocol, training, data, tokenizer.eos_id)
        yield ProtocolScore(dataset, protocol.name, loss)


def on_uniform(protocol: Protocol, training: Training) -> float:
    """Nats per token after training on independent uniform tokens."""

    def rows(step: int) -> Tensor:
        """The random rows (B, T + 1) of a step."""
        rng = np.random.default_rng([training.seed, step])
        return torch.from_numpy(rng.integers(SYMBOLS, size=(UNIFORM_ROWS, UNIFORM_LENGTH + 1)))

    model = train_model(protocol, SYMBOLS, UNIFORM_LENGTH, rows, training)
    return mean_loss(
        model, [rows(HELD_OUT + number) for number in range(HELD_OUT_ROWS // UNIFORM_ROWS)]
    )


def on_text(
    protocol: Protocol, training: Training, data: dict[str, list[np.ndarray]], padding: int
) -> float:
    """Nats per token after training on text.

    Args:
        protocol, training: how to train and to evaluate.
        data: token ids of the paragraphs of each split.
        padding: the token that fills up rows, or ends paragraphs.
    """
    length = training.sequence_length
    rows = {
        split: (padded if protocol.padding_scored else packed)(data[split], length, padding)
        for split in data
    }

    def at(step: int) -> Tensor:
        """The rows (B, T + 1) of a step, drawn from the training split."""
        chosen = np.random.default_rng([training.seed, step]).integers(
            len(rows["train"]), size=TEXT_ROWS
        )
        return torch.from_numpy(rows["train"][chosen])

    model = train_model(protocol, VOCAB_SIZE, length, at, training)
    # The numbers of the first steps again give the rows of the training.
    if protocol.evaluated_on_train:
        return mean_loss(
            model, [at(step) for step in range(min(training.max_steps, HELD_OUT_ROWS // TEXT_ROWS))]
        )
    # Rows spread evenly over the split, so that they do not all come from one document.
    held_out = torch.from_numpy(rows["validation"])
    every = max(1, len(held_out) // HELD_OUT_ROWS)
    return mean_loss(model, list(held_out[::every][:HELD_OUT_ROWS].split(TEXT_ROWS)))


def paragraphs(corpus: Corpus, split: str, tokenizer: TextTokenizer) -> list[np.ndarray]:
    """Token ids of each paragraph of a split: the text between blank lines. Raises
    InputError if there is none."""
    texts = [
        part for _, text in corpus.documents[split] for part in text.split("\n\n") if part.strip()
    ]
    if not texts:
        raise InputError(f"the {split} split of the corpus is empty; give more text")
    return [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(texts)]


def padded(rows: Sequence[np.ndarray], length: int, padding: int) -> np.ndarray:
    """One row per paragraph, cut or filled up with `padding`: (N, length + 1)."""
    filled = np.full((len(rows), length + 1), padding, dtype=np.int64)
    for place, ids in zip(filled, rows, strict=True):
        place[: len(ids)] = ids[: length + 1]
    return filled


def packed(rows: Sequence[np.ndarray], length: int, padding: int) -> np.ndarray:
    """All paragraphs as one stream, each followed by `padding`, cut into rows (N,
    length + 1); the rest is left out. Raises InputError if they do not fill one row."""
    stream = np.concatenate([np.append(ids, padding) for ids in rows])
    count = len(stream) // (length + 1)
    if not count:
        raise InputError(
            f"a split has {len(stream)} tokens; a row takes {length + 1}: give more text or a "
            "shorter row"
        )
    return stream[: count * (length + 1)].reshape(count, length + 1)


def train_model(
    protocol: Protocol, vocab_size: int, length: int, rows: Rows, training: Training
) -> OriginalLM:
    """A model with the protocol's attention, trained on `rows` of length + 1 tokens, in
    evaluation mode."""
    # The same seed for every protocol: they differ by their defects alone.
    torch.manual_seed(training.seed)
    switches = {
        "is_causal": not protocol.no_causal_mask,
        "mean_so_far": not protocol.whole_row_mean,
    }
    model = OriginalLM(vocab_size, length, **switches)
    minimize(model, lambda step: loss_of(model, rows(step)), training.max_steps, LEARNING_RATE)
    return model.eval()


def loss_of(model: OriginalLM, ids: Tensor) -> Tensor:
    """Mean nats per token of ids (B, T + 1)."""
    return token_loss(model(ids[:, :-1]), ids)


@torch.no_grad()
def mean_loss(model: OriginalLM, batches: Sequence[Tensor]) -> float:
    """Mean nats per predicted token of batches (B, T + 1), which may differ in B."""
    # Weighed by rows: the last batch may be smaller than the others.
    weights = [batch.shape[0] for batch in batches]
    losses = [loss_of(model, batch).item() for batch in batches]
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
