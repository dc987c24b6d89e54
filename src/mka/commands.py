"""The commands of `mka` beside bench and audit: what each takes from its command line."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mka.config import LongTermConfig
from mka.limits import InputError, check_at_least, unknown_name


@dataclass(frozen=True)
class ReportConfig:
    """Redraw the table and the figures of finished or unfinished runs; of one or several, a page."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    """Folders of `mka bench` runs; several stand side by side on the page."""
    html: str | None = None
    """Write the page: one file with everything in it, to be opened in a browser."""
    markdown: str | None = None
    """Write the same as Markdown."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise InputError("no folder is given; give one or more folders of `mka bench` runs")
        if len(self.folders) > 1 and self.html is None and self.markdown is None:
            raise InputError(
                f"{len(self.folders)} folders are given without a page; add --html FILE or --markdown FILE"
            )


@dataclass(frozen=True)
class VerifyConfig:
    """Compare everything in a folder with its checksums: a line for each file; exit status 1 if one is not whole."""

    folder: tyro.conf.Positional[str]
    """Folder of a `mka bench` run or of a saved model."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice(LongTermConfig):
    """A saved model, and how it continues a text."""

    model: str
    """Folder of a saved model, or a name on the hub; any causal model of transformers."""
    max_new_tokens: int = 128
    """Tokens written at most, in one answer."""
    temperature: float = 0.0
    """0: the likeliest token each time. Above: tokens are drawn, with more surprise the higher it is."""
    seed: int = 0
    """Of the draws."""
    bank: str | None = None
    """Folder of a bank (mka memory add): the documents in it are the far past of the text."""
    show_memory: bool = False
    """Say what the cache holds, and how the router divided its attention."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature is {self.temperature}; it must be 0 or above")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelChoice):
    """Continue a text with a saved model."""

    prompt: str | None = None
    """The text to go on from."""
    prompt_file: str | None = None
    """A file that holds it (UTF-8)."""
    prefill_chunk_size: int | None = None
    """Read the prompt in pieces of this many tokens, so that memory is that of a piece; None: at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("prefill_chunk_size", self.prefill_chunk_size, 1)
        if (self.prompt is None) == (self.prompt_file is None):
            raise InputError("give one of --prompt and --prompt_file")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ModelChoice):
    """Talk with a saved model, which reads each turn once: a line in, an answer out, until the input ends."""


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """Which bank."""

    bank: str
    """Folder of the bank."""


@dataclass(frozen=True, kw_only=True)
class MemoryAddConfig(BankConfig):
    """Read documents once and keep their chunks in a bank, which is made if there is none."""

    documents: tyro.conf.Positional[tuple[str, ...]]
    """UTF-8 text files."""
    model: str
    """Folder of a saved model of mka or fmka, or a name on the hub; a bank is of one model."""
    piece: int = 4096
    """Tokens read at a time; peak memory is that of a piece."""
    replace: bool = False
    """Take out what the bank has under a document's name, once the document itself is in."""

    def __post_init__(self) -> None:
        check_at_least("piece", self.piece, 1)
        if not self.documents:
            raise InputError("no document is given; give one or more UTF-8 text files")


@dataclass(frozen=True, kw_only=True)
class MemoryListConfig(BankConfig):
    """The documents of a bank, in the order in which they were added."""


@dataclass(frozen=True, kw_only=True)
class MemoryVerifyConfig(BankConfig):
    """Compare everything in a bank with its checksums; exit status 1 if a document is damaged."""


@dataclass(frozen=True, kw_only=True)
class MemoryRemoveConfig(BankConfig):
    """Take a document out of a bank."""

    document: tyro.conf.Positional[str]
    """Its name or its identity, as `mka memory list` shows them."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Banks: what a model has read once, kept for other processes."""

    action: (
        Annotated[MemoryAddConfig, tyro.conf.subcommand("add")]
        | Annotated[MemoryListConfig, tyro.conf.subcommand("list")]
        | Annotated[MemoryVerifyConfig, tyro.conf.subcommand("verify")]
        | Annotated[MemoryRemoveConfig, tyro.conf.subcommand("remove")]
    )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(LongTermConfig):
    """Which model is asked, how often, and where the table goes."""

    model: str
    """Folder of a saved model, or a name on the hub; any causal model of transformers."""
    samples: int = 1
    """Prompts of each kind."""
    seed: int = 0
    """Of the prompts."""
    output: str | None = None
    """Also write a JSON line for each row of the table to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("samples", self.samples, 1)
        check_at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(ScoreConfig):
    """Passkey: a number said once in a long text, asked for at its end."""

    lengths: tuple[int, ...] = (1024, 4096)
    """Tokens of a prompt."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the number is said: 0 at the beginning, 1 right before the question."""
    surroundings: Literal["filler", "stdlib", "text"] = "filler"
    """What stands around the number: the same few sentences over and over, Python's standard library (its test split),
    or text_path."""
    text_path: tuple[str, ...] = ()
    """Files or folders, with --surroundings text."""
    piece: int = 4096
    """Tokens read at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("piece", self.piece, 1)
        if (self.surroundings == "text") != bool(self.text_path):
            given = " ".join(self.text_path) or None
            raise InputError(
                f"surroundings is {self.surroundings!r} and text_path is {given!r}; text_path goes with text alone"
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
    """MQAR: pairs of tokens told once, then each key is asked for its value."""

    shapes: tuple[str, ...] = ("64/4", "128/8", "256/16")
    """Tokens of a row / pairs told in it."""
    samples: int = 256
    """Rows of each shape."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for shape in self.shapes:
            sizes = shape.split("/")
            if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
                raise InputError(f"shapes holds {shape!r}; give tokens/pairs, such as 64/4")


RULER_TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_fwe", "ruler_cwe", "ruler_vt")
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True, kw_only=True)
class RulerConfig:
    """RULER's synthetic tasks by lm-eval, offline: needles among filler, frequent words, chains of variables."""

    model: str
    """Folder of a saved model, or a name on the hub; any causal model of transformers."""
    tasks: tuple[str, ...] = RULER_TASKS[:4]
    """niah_single_1, niah_multikey_2, niah_multikey_3, ruler_fwe, ruler_cwe, ruler_vt (the last two need a tokenizer
    whose words are short)."""
    lengths: tuple[int, ...] = (4096,)
    """Tokens of a prompt: 4096, 8192, ... 131072."""
    samples: int = 10
    """Prompts of each task and length, of 500."""
    output: str | None = None
    """Also write a JSON line for each row of the table to this file."""

    def __post_init__(self) -> None:
        check_at_least("samples", self.samples, 1)
        if not self.tasks or not self.lengths:
            raise InputError("tasks or lengths is empty; give one or more")
        for task in self.tasks:
            if task not in RULER_TASKS:
                raise unknown_name("task", task, RULER_TASKS)
        for length in self.lengths:
            if length not in RULER_LENGTHS:
                raise InputError(f"lengths holds {length}; allowed: {', '.join(map(str, RULER_LENGTHS))}")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which model reads which text."""

    model: str
    """Folder of a saved model, or a name on the hub; any causal model of transformers."""
    dataset: str = "stdlib"
    """stdlib, wikitext2, wikitext103, or text: the files of text_path."""
    text_path: tuple[str, ...] = ()
    """Files or folders, with --dataset text."""
    split: Literal["test", "validation", "train"] = "test"
    """Which part of it."""
    batch_size: int = 4
    """Windows or rows read at once."""
    output: str | None = None
    """Also write all of it to this file, as JSON."""


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(TextConfig):
    """Perplexity per token and per word and bits per byte of whole documents, with 95 % intervals over documents."""

    max_length: int | None = None
    """Tokens of a window; None: as many as the model was made for."""
    stride: int | None = None
    """Tokens that each window after the first predicts; None: all of them (disjoint windows)."""
    max_tokens: int | None = 65536
    """Documents are taken in order until so many tokens are scored; None: all of them."""
    baseline: str | None = None
    """Another model: the difference on the same documents, and whether they can be told apart."""

    def __post_init__(self) -> None:
        for name in ("max_length", "stride", "max_tokens", "batch_size"):
            check_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(TextConfig):
    """What the router of mka or fmka does: shares, entropy, distances, time constants, and what each level is worth."""

    length: int = 512
    """Tokens of a row."""
    rows: int = 16
    """Rows of text, from the beginning of the split."""

    def __post_init__(self) -> None:
        check_at_least("length", self.length, 2)
        check_at_least("rows", self.rows, 1)
        check_at_least("batch_size", self.batch_size, 1)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What a saved model can do."""

    task: (
        Annotated[PerplexityConfig, tyro.conf.subcommand("perplexity")]
        | Annotated[RouterConfig, tyro.conf.subcommand("router")]
        | Annotated[NeedleConfig, tyro.conf.subcommand("needle")]
        | Annotated[RecallConfig, tyro.conf.subcommand("recall")]
        | Annotated[RulerConfig, tyro.conf.subcommand("ruler")]
    )
