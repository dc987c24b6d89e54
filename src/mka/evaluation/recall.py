"""What a model finds again: MQAR by shape, a passkey by length and depth.

An answer counts when every token of it is the likeliest one after those before: what greedy decoding would say.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from mka.commands import NeedleConfig, RecallConfig
from mka.config import LongTermConfig
from mka.data import load_corpus
from mka.data.needle import FILLER, Passkey, PasskeyTask
from mka.data.recall import NOT_ASKED, RecallBatch, recall_batch
from mka.data.tokenizer import TextTokenizer, with_end_of_text
from mka.limits import InputError
from mka.loading import load, load_model
from mka.models import CACHE_ARGUMENT, mechanisms, memory_cache, read_in_pieces, states
from mka.storage import write_atomically

Say = Callable[[str], None]
ROWS = 32
TEXT_TOKENS = 2**20
"""Tokens of the text around a passkey: beyond them it begins again."""


@dataclass(frozen=True)
class Score:
    """A row of the table. `correct` of `asked` answers; seconds of reading and answering; bytes of the memory."""

    task: str
    tokens: int
    kind: str
    """The pairs of MQAR, the depth of a passkey."""
    correct: int
    asked: int
    seconds: float
    memory_bytes: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.asked


def score(config: NeedleConfig | RecallConfig, say: Say) -> None:
    """Print a row for each kind of prompt as soon as it is known. Raises InputError for what a model cannot read."""
    rows = needle_scores(config) if isinstance(config, NeedleConfig) else recall_scores(config)
    say(f"{'tokens':>10} {'depth' if isinstance(config, NeedleConfig) else 'pairs':>6}  accuracy")
    lines = []
    for row in rows:
        memory = f", {row.memory_bytes / 2**20:,.1f} MiB of memory" if row.memory_bytes else ""
        per = f"{row.correct}/{row.asked}, {row.seconds / max(1, config.samples):.1f} s a prompt{memory}"
        say(f"{row.tokens:>10,} {row.kind:>6}  {row.accuracy:.3f}  ({per})")
        lines.append(json.dumps(asdict(row) | {"model": config.model, "seed": config.seed}))
        if config.output is not None:
            write_atomically(Path(config.output), "\n".join(lines) + "\n")


def recall_scores(config: RecallConfig) -> Iterator[Score]:
    model = load_model(config.model)
    vocab_size = model.config.vocab_size
    for shape in config.shapes:
        tokens, pairs = map(int, shape.split("/"))
        begun, correct, asked = time.perf_counter(), 0, 0
        for start in range(0, config.samples, ROWS):
            rows = min(ROWS, config.samples - start)
            batch = recall_batch(tokens, pairs, rows, (config.seed, tokens, start), vocab_size)
            found, due = recalled(model, batch, config)
            correct, asked = correct + found, asked + due
        yield Score("recall", tokens, str(pairs), correct, asked, time.perf_counter() - begun, 0)


@torch.no_grad()
def recalled(model: Any, batch: RecallBatch, longterm: LongTermConfig) -> tuple[int, int]:
    """How many answers are right, and how many were due."""
    cache = memory_cache(model, longterm) if longterm.is_special else None
    logits = model(batch.tokens.to(model.device), use_cache=cache is not None, **{CACHE_ARGUMENT: cache}).logits
    due = batch.targets != NOT_ASKED
    said = logits.argmax(-1).cpu()[due]
    return int((said == batch.targets[due]).sum()), int(due.sum())


def needle_scores(config: NeedleConfig) -> Iterator[Score]:
    model, tokenizer = load(config.model)
    backend = with_end_of_text(tokenizer.backend_tokenizer, tokenizer.eos_token_id, config.model)
    task = PasskeyTask(text_around(backend, config), lambda text: backend.encode_batch([text])[0])
    for length in config.lengths:
        for depth in config.depths:
            begun, correct, held = time.perf_counter(), 0, 0
            for sample in range(config.samples):
                passkey = task.prompt(length, depth, (config.seed, length, round(1000 * depth), sample))
                right, held = answered(model, passkey, config, config.piece)
                correct += right
            taken = time.perf_counter() - begun
            yield Score("needle", length, f"{depth:g}", correct, config.samples, taken, held)


def text_around(tokenizer: TextTokenizer, config: NeedleConfig) -> Any:
    """Tokens of the surroundings, as many as are wanted at once."""
    documents = [FILLER]
    if config.surroundings != "filler":
        splits = load_corpus(config.surroundings, config.text_path).documents
        wanted = [splits["test"]] if config.surroundings == "stdlib" else splits.values()
        documents = [text for split in wanted for _, text in split]
    ids: list[int] = []
    for text in documents:
        ids += tokenizer.encode_batch([text])[0]
        if len(ids) > TEXT_TOKENS:
            break
    if not ids:
        raise InputError(f"text_path is {' '.join(config.text_path)!r}; it holds no token")
    return torch.tensor(ids).numpy()


@torch.no_grad()
def answered(model: Any, passkey: Passkey, longterm: LongTermConfig, piece: int) -> tuple[bool, int]:
    """Whether the model says the key, and the bytes of its cache after it has read the prompt."""
    prompt, answer = (torch.from_numpy(part)[None] for part in (passkey.prompt, passkey.answer))
    cache: Any = memory_cache(model, longterm) if mechanisms(model) or longterm.is_special else DynamicCache()
    first = read_in_pieces(model, prompt, cache, piece)
    held = sum(state.nbytes for state in states(cache))
    rest = model(answer[:, :-1].to(model.device), use_cache=True, **{CACHE_ARGUMENT: cache}).logits
    said = torch.cat([first[:, None], rest], dim=1).argmax(-1).cpu()
    return bool((said == answer).all()), held
