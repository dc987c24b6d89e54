"""mka eval: test what a saved model can do, and print the scores as tables."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mka.cli.output import JsonLines, check_output
from mka.errors import InputError, check_at_least, unknown_name
from mka.memory.options import LEVELS, LongTermConfig
from mka.storage import write_atomically

if TYPE_CHECKING:  # torch takes seconds to load
    from mka.evaluation import LayerRouting, Perplexity, Score
    from mka.record.intervals import Estimate

ROW_TOKENS = 512
"""Tokens per row of `mka eval router`, where the model has positions for them."""
SHOWN_IN_FULL = 1e6
"""Numbers from here on are printed with an exponent."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """The model to ask, how often, and where to write the table."""

    model: str
    """Folder of a saved model, or a name on the hub; any causal model of
    transformers."""
    samples: int = 1
    """Number of prompts per length and depth."""
    seed: int = 0
    """Random seed for the prompts."""
    output: str | None = None
    """Also write one JSON line per table row to this file."""

    longterm: LongTermConfig = field(default_factory=LongTermConfig)
    """Where to keep the long-term memory."""

    def __post_init__(self) -> None:
        check_at_least("samples", self.samples, 1)
        check_at_least("seed", self.seed, 0)
        check_output("output", self.output)


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(ScoreConfig):
    """Ask for a number stated once in a long text.

    This is the passkey test; the question is at the end of the text.
    """

    lengths: tuple[int, ...] = (1024, 4096)
    """Lengths of the prompts, in tokens."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the number is stated, from 0 (at the beginning) to 1 (right before the
    question)."""
    surroundings: Literal["filler", "stdlib", "text"] = "filler"
    """Text around the number: filler (the same few sentences over and over), stdlib
    (the test split of Python's standard library) or text (the files of text_path)."""
    text_path: tuple[str, ...] = ()
    """Files or folders to read; needs --surroundings text."""
    piece: int = 4096
    """Tokens to read at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("piece", self.piece, 1)
        if (self.surroundings == "text") != bool(self.text_path):
            given = " ".join(self.text_path) or None
            raise InputError(
                f"surroundings is {self.surroundings!r} and text_path is {given!r}; text_path "
                "is for --surroundings text, which needs it"
            )
        if not self.lengths or not self.depths:
            raise InputError("lengths or depths is empty; give one or more numbers")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise InputError(f"depths holds {depth}; each must be between 0 and 1")
        for length in self.lengths:
            check_at_least("lengths", length, 1)


@dataclass(frozen=True, kw_only=True)
class RecallConfig(ScoreConfig):
    """Test recall of pairs of tokens (MQAR).

    A row states pairs of a key and a value once, then asks for the value of each key.
    """

    shapes: tuple[str, ...] = ("64/4", "128/8", "256/16")
    """Shapes of the rows, each as TOKENS/PAIRS: tokens per row, and pairs stated in
    it."""
    samples: int = 256
    """Number of rows per shape."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for shape in self.shapes:
            sizes = shape.split("/")
            if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
                raise InputError(f"shapes holds {shape!r}; give tokens/pairs, such as 64/4")


RULER_TASKS = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "ruler_fwe",
    "ruler_cwe",
    "ruler_vt",
)
# The lengths that lm-eval's RULER tasks know.
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True, kw_only=True)
class RulerConfig:
    """Run RULER's synthetic tasks with lm-eval, offline.

    The tasks are needles in filler, frequent words and chains of variables.
    """

    model: str
    """Folder of a saved model, or a name on the hub; any causal model of
    transformers."""
    tasks: tuple[str, ...] = RULER_TASKS[:4]
    """Tasks to run: niah_single_1, niah_multikey_2, niah_multikey_3, ruler_fwe,
    ruler_cwe, ruler_vt (the last two need a tokenizer that splits words into few
    tokens)."""
    lengths: tuple[int, ...] = (4096,)
    """Lengths of the prompts, in tokens: 4096, 8192, 16384, 32768, 65536 or 131072."""
    samples: int = 10
    """Number of prompts per task and length, at most 500."""
    output: str | None = None
    """Also write one JSON line per table row to this file."""

    def __post_init__(self) -> None:
        check_at_least("samples", self.samples, 1)
        check_output("output", self.output)
        if not self.tasks or not self.lengths:
            raise InputError("tasks or lengths is empty; give one or more")
        for task in self.tasks:
            if task not in RULER_TASKS:
                raise unknown_name("task", task, RULER_TASKS)
        for length in self.lengths:
            if length not in RULER_LENGTHS:
                raise InputError(
                    f"lengths holds {length}; allowed: {', '.join(map(str, RULER_LENGTHS))}"
                )


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The model that reads, and the text it reads."""

    model: str
    """Folder of a saved model, or a name on the hub; any causal model of
    transformers."""
    dataset: str = "stdlib"
    """Text to read: stdlib, wikitext2, wikitext103 or text (the files of text_path)."""
    text_path: tuple[str, ...] = ()
    """Files or folders to read; needs --dataset text."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the text: test, validation or train."""
    batch_size: int = 4
    """Windows (or rows) per batch."""
    output: str | None = None
    """Also write all results to this file, as one JSON object."""

    def __post_init__(self) -> None:
        check_at_least("batch_size", self.batch_size, 1)
        check_output("output", self.output)


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(TextConfig):
    """Measure perplexity and bits per byte of whole documents.

    Perplexity is per token and per word; every figure has a 95 % interval over
    documents.
    """

    max_length: int | None = None
    """Tokens per window; None: as many as the model was made for."""
    stride: int | None = None
    """Tokens scored per window after the first; None: all of them (disjoint windows)."""
    max_tokens: int | None = 65536
    """Stop taking documents once this many tokens are scored (the last one is finished);
    None: score all documents."""
    baseline: str | None = None
    """Another model to compare with on the same documents: its folder, or its name on
    the hub."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "stride", "max_tokens"):
            check_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(TextConfig):
    """Show what the router of mka or fmka does, and how much each memory level contributes.

    The tables hold shares, entropy, distances, time constants, and the loss without
    each level.
    """

    length: int | None = None
    """Tokens per row; None: 512, or as many as the model has positions."""
    rows: int = 16
    """Number of rows, taken from the beginning of the split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("length", self.length, 2)
        check_at_least("rows", self.rows, 1)


def chosen_documents(config: TextConfig) -> list[str]:
    """The documents of the chosen split that are not blank. Raises InputError if there
    are none."""
    from mka.data import load_corpus

    splits = load_corpus(config.dataset, config.text_path).documents
    documents = [text for _, text in splits[config.split] if text.strip()]
    if not documents:
        raise InputError(f"split is {config.split!r}; it is empty in {config.dataset}")
    return documents


def run_perplexity(config: PerplexityConfig) -> int:
    """Print loss, perplexities, bits per byte and loss by position, with intervals.
    Returns 0."""
    # Read before the model is loaded, which takes longer: a wrong path is reported at
    # once.
    documents = chosen_documents(config)
    check_baseline(config.baseline)
    scores = score_model(config.model, documents, config)
    of = f"{config.dataset}, {config.split} split: {len(scores.nats):,} documents"
    # Words and bytes are known here, because texts were scored and not token ids.
    sums = [
        int(counts.sum())
        for counts in (scores.tokens, scores.words, scores.num_bytes)
        if counts is not None
    ]
    print(f"{of}, {sums[0]:,} tokens, {sums[1]:,} words, {sums[2]:,} bytes")
    print(
        f"windows of {scores.max_length:,} tokens, {scores.stride:,} predicted in each but the "
        "first"
    )
    figures = {
        "loss": ("nats per token", scores.loss),
        "token_perplexity": ("per token of this tokenizer", scores.token_perplexity),
        "word_perplexity": ("per word", scores.word_perplexity),
        "bits_per_byte": ("comparable between tokenizers", scores.bits_per_byte),
    }
    for name, (unit, estimate) in figures.items():
        print(f"{name.replace('_', ' '):<17} {shown(estimate)}  {unit}")
    if len(scores.nats) == 1:
        print("one document: no interval can be computed, it takes two or more")
    # Only documents that fill a window are in this table: the same text at every
    # position.
    positions = list(scores.by_position())
    if positions:
        many = f"in the {len(scores.long)} documents of {scores.max_length:,} tokens or more"
        print(f"loss by position, {many}, nats per token:")
    for begin, end, estimate in positions:
        print(f"{f'{begin:,} to {end - 1:,}':<17} {shown(estimate)}")
    found: dict[str, Any] = {
        "model": config.model,
        "dataset": config.dataset,
        "split": config.split,
        "windows": scores.max_length,
        "documents": len(scores.nats),
        "tokens": sums[0],
        "bytes": sums[2],
    }
    found |= {name: estimate.record() for name, (_, estimate) in figures.items()}
    found["by_position"] = [
        [begin, end, *estimate.record().values()] for begin, end, estimate in positions
    ]
    # Loaded only now, so that two models are not in memory while the first one reads.
    if config.baseline is not None:
        other = score_model(config.baseline, documents, config)
        difference, word = scores.minus(other)
        print(f"against {config.baseline}: {shown(difference, signed=True)}  bits per byte, {word}")
        found["difference"] = {"baseline": config.baseline, "verdict": word, **difference.record()}
    write_json_to(config.output, found)
    return 0


def check_baseline(name: str | None) -> None:
    """Raise InputError, before minutes of reading, if there is no such model; None is
    allowed."""
    from mka.models.loading import is_here

    try:
        if name is not None:
            is_here(name)
    except InputError as error:
        raise InputError(str(error).replace("model is", "baseline is", 1)) from error


def score_model(name: str, documents: list[str], config: PerplexityConfig) -> "Perplexity":
    """Load a saved model and score the documents. Raises InputError where it cannot be
    scored."""
    from mka.evaluation import text_perplexity
    from mka.models.loading import load

    model, tokenizer = load(name)
    return text_perplexity(
        model,
        tokenizer,
        documents,
        max_length=config.max_length,
        stride=config.stride,
        batch_size=config.batch_size,
        max_tokens=config.max_tokens,
    )


def write_json_to(path: str | None, found: dict[str, Any]) -> None:
    """Write all that a command found to a file, as one JSON object; path None: no
    file."""
    if path is not None:
        write_atomically(Path(path), json.dumps(found) + "\n")


def shown(estimate: "Estimate", *, signed: bool = False) -> str:
    """A value and its interval, in columns; `signed`: a plus sign before positive
    numbers."""
    value, low, high = (written(x, "+" if signed else "") for x in estimate)
    interval = f"{low} to {high}" if estimate.has_interval else "no interval"
    return f"{value:>12}  ({interval})"


def written(x: float, sign: str) -> str:
    """A number with four decimals, or with an exponent where it is large."""
    # Infinity is a perplexity that float64 cannot hold, not one without a limit.
    if x == float("inf"):
        return "above 1e308"
    return f"{x:{sign},.4f}" if abs(x) < SHOWN_IN_FULL else f"{x:{sign}.3e}"


def run_router(config: RouterConfig) -> int:
    """Print what each layer's router does, and the loss without each level. Returns
    0."""
    from mka.evaluation import knock_outs, layer_routings, text_rows
    from mka.evaluation.router import layers_with_memories
    from mka.evaluation.text import edges
    from mka.models.families import position_limit
    from mka.models.loading import load
    from mka.record.intervals import verdict

    documents = chosen_documents(config)
    model, tokenizer = load(config.model)
    layers_with_memories(model)  # a model without any is refused before the text is read
    length = config.length or min(ROW_TOKENS, position_limit(model) or ROW_TOKENS)
    rows = text_rows(documents, tokenizer, config.rows, length)
    # A row's last token is only predicted, for the losses below; the router never reads
    # it.
    routings = layer_routings(model, rows[:, :-1], config.batch_size)
    print(f"{len(rows)} rows of {length:,} tokens of {config.dataset}, {config.split} split")
    print(
        f"{'layer':<10} {'L1':>6} {'L2':>6} {'L3':>6} {'entropy':>9}   tokens back (median, 90 "
        "%)   time constants"
    )
    for routing in routings:
        print_layer(routing)
    print(f"{'positions':<10} {'L1':>6} {'L2':>6} {'L3':>6}   mean of the layers")
    # One mean over layers per range of positions: the far past only exists later in a
    # row.
    for begin, end in edges(length):
        here = [routing.by_position[begin] for routing in routings]
        means = [sum(shares) / len(here) for shares in zip(*here, strict=True)]
        print(f"{f'{begin}-{end - 1}':<10} {levels(means)}")
    knocked = {}
    for name, difference in knock_outs(model, rows, config.batch_size):
        print(
            f"without {name}: {shown(difference, signed=True)}  nats per token, "
            f"{verdict(difference)}"
        )
        knocked[name] = difference.record()
    layers = [asdict(routing) for routing in routings]
    found = {
        "model": config.model,
        "dataset": config.dataset,
        "layers": layers,
        "knock_out": knocked,
    }
    write_json_to(config.output, found)
    return 0


def print_layer(routing: "LayerRouting") -> None:
    """Print the row of one layer, its heads if they differ, and a warning if it has
    collapsed."""
    far = ", ".join(f"{tokens:,.0f}" for tokens in routing.distance) or "nothing retrieved"
    slow = ", ".join(f"{tokens:,.1f}" for tokens in routing.time_constants) or "none learned"
    entropy = "no choice" if routing.entropy is None else f"{routing.entropy:.3f}"
    print(f"{routing.layer:<10} {levels(routing.shares)} {entropy:>9}   {far:<26}   {slow}")
    # A single entry means that all heads share one mix, which is the row above.
    if len(routing.by_head) > 1:
        print("  by head  " + "   ".join(levels(head).strip() for head in routing.by_head))
    if routing.collapsed_onto is not None:
        print(f"warning: layer {routing.layer} has collapsed onto {routing.collapsed_onto}")


def levels(shares: list[float]) -> str:
    """The shares of L1, L2 and L3, one column each."""
    return " ".join(f"{share:>6.3f}" for _, share in zip(LEVELS, shares, strict=True))


def run_needle(config: NeedleConfig) -> int:
    """Print one row per length and depth, each as soon as it is known. Returns 0."""
    from mka.evaluation import needle_scores
    from mka.models.loading import load

    # Loaded before the first row is printed, so that a wrong name does not leave half a
    # table.
    model, tokenizer = load(config.model)
    scores = needle_scores(
        model,
        tokenizer,
        config.lengths,
        config.depths,
        surroundings=config.surroundings,
        text_path=config.text_path,
        samples=config.samples,
        seed=config.seed,
        piece=config.piece,
        longterm=config.longterm,
        name=config.model,
    )
    return print_scores(scores, "depth", config)


def run_recall(config: RecallConfig) -> int:
    """Print one row per shape, each as soon as it is known. Returns 0."""
    from mka.evaluation import recall_scores
    from mka.models.loading import load_model

    shapes = []
    for shape in config.shapes:
        tokens, pairs = shape.split("/")
        shapes.append((int(tokens), int(pairs)))
    # Without its tokenizer, which it may not have: recall draws token ids.
    model = load_model(config.model)
    scores = recall_scores(
        model, shapes, samples=config.samples, seed=config.seed, longterm=config.longterm
    )
    return print_scores(scores, "pairs", config)


def print_scores(scores: Iterator["Score"], kind: str, config: ScoreConfig) -> int:
    """Print one row per score and write its JSON line; returns 0.

    kind: the title of the second column.
    """
    output = JsonLines(config.output)
    print(f"{'tokens':>10} {kind:>6}  accuracy")
    # The scores are computed one by one as this loop asks for them; long ones take
    # minutes.
    for row in scores:
        # Recall keeps no cache unless one is asked for, so there is nothing to report
        # then.
        memory = f", {row.memory_bytes / 2**20:,.1f} MiB of memory" if row.memory_bytes else ""
        per = f"{row.correct}/{row.asked}, {row.seconds / config.samples:.1f} s per prompt{memory}"
        print(f"{row.tokens:>10,} {row.kind:>6}  {row.accuracy:.3f}  ({per})", flush=True)
        output.add(asdict(row) | {"model": config.model, "seed": config.seed})
    return 0


def run_ruler(config: RulerConfig) -> int:
    """Print one row per task and length, each as soon as it is known. Returns 0."""
    from mka.evaluation import ruler_scores
    from mka.evaluation.ruler import check_packages
    from mka.models.loading import load

    # Checked again in `ruler_scores`, but only here before the model is loaded.
    check_packages()
    model, tokenizer = load(config.model)
    output = JsonLines(config.output)
    print(f"{'task':<18} {'tokens':>7}  {'accuracy':>8}")
    for row in ruler_scores(
        model, tokenizer, config.model, config.tasks, config.lengths, config.samples
    ):
        print(
            f"{row.task:<18} {row.tokens:>7,}  {row.accuracy:>8.3f}  ({row.samples} prompts)",
            flush=True,
        )
        output.add({"model": config.model} | asdict(row))
    return 0
