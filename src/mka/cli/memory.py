"""mka memory: banks of documents that a model has read once, kept on disk for later
runs.

add: text -> tokens -> through the model in pieces -> a file of chunks -> the bank. A
document is in the bank as a whole or not at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mka.errors import InputError, check_at_least, printable
from mka.memory.options import LongTermConfig

if TYPE_CHECKING:  # torch takes seconds to load
    from mka.memory.bank import Document

Say = Callable[[str], None]
"""What gets the lines that a command prints."""


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """The bank to use."""

    bank: str
    """Folder of the bank."""


@dataclass(frozen=True, kw_only=True)
class MemoryAddConfig(BankConfig):
    """Read documents once and keep their chunks in a bank.

    The bank is created if it does not exist.
    """

    documents: tyro.conf.Positional[tuple[str, ...]]
    """UTF-8 text files to add."""
    model: str
    """Folder of a saved mka or fmka model, or its name on the hub; a bank belongs to
    one model."""
    piece: int = 4096
    """Tokens to read at a time; peak memory grows with this number, not with the
    document."""
    replace: bool = False
    """Remove an older document of the same name, once the new one is in the bank."""

    def __post_init__(self) -> None:
        check_at_least("piece", self.piece, 1)
        if not self.documents:
            raise InputError("no document is given; give one or more UTF-8 text files")


@dataclass(frozen=True, kw_only=True)
class MemoryListConfig(BankConfig):
    """List the documents of a bank.

    They are in the order in which they were added.
    """


@dataclass(frozen=True, kw_only=True)
class MemoryVerifyConfig(BankConfig):
    """Compare everything in a bank with its checksums.

    Exit status 1 if a document is damaged.
    """


@dataclass(frozen=True, kw_only=True)
class MemoryRemoveConfig(BankConfig):
    """Remove a document from a bank."""

    document: tyro.conf.Positional[str]
    """Name or identity of the document, as `mka memory list` prints them."""


def run_add(config: MemoryAddConfig, say: Say = print) -> int:
    """Read each document that is not in the bank yet; returns 0.

    An older document of the same name is reported, or with `replace` removed. Raises
    InputError; the documents added before it stay.
    """
    from mka.data.files import read_named_file
    from mka.memory.bank import Bank, identity, several
    from mka.models import fingerprint, memory_cache
    from mka.models.banks import read_document
    from mka.models.loading import load

    # All files are read before the model is loaded, so that a wrong path costs no time.
    texts = {path: read_named_file(Path(path), "document") for path in config.documents}
    if config.replace:
        check_names(texts)
    model, tokenizer = load(config.model)
    # Fails for a model that retrieves nothing, before a bank is made that could hold
    # nothing.
    try:
        memory_cache(model, LongTermConfig(longterm_store="host"))
    except InputError as error:
        raise InputError(
            f"model is {config.model!r}; it retrieves nothing; a bank needs a model of mka or fmka "
            "with top_k above 0"
        ) from error
    bank = Bank.create(config.bank, fingerprint(model))
    with bank.writing():
        # Listed first, so that damage is reported before minutes of reading.
        held = bank.documents()
        older = {path: namesakes(held, Path(path).name, text) for path, text in texts.items()}
        for path, documents in older.items():
            # With several older ones it is unclear which to replace; the user has to
            # decide.
            if config.replace and len(documents) > 1:
                raise several(
                    bank.folder, Path(path).name, [document.identity for document in documents]
                )
        for path, text in texts.items():
            name = Path(path).name
            same = next(
                (document for document in held if document.identity == identity(text)), None
            )
            if same is None:
                document, rest = read_document(bank, name, text, model, tokenizer, config.piece)
                # Two paths may hold the same text; the second one is then found here.
                held.append(document)
                dropped = (
                    f"; the last {rest} tokens were dropped (incomplete chunk)" if rest else ""
                )
                say(f"{line(document)}{dropped}")
            else:
                known = (
                    f" as {same.name}, {same.identity}" if same.name != name else ", nothing to do"
                )
                say(f"{name}: already in the bank{known}")
            # Removed only now: an interruption leaves two documents rather than none.
            if config.replace:
                for document in older[path]:
                    held.remove(document)
                    say(f"removed the older {name}, {bank.remove(document.identity).name}")
            elif others := namesakes(held, name, text):
                which = ", ".join(document.identity for document in others)
                say(
                    f"{name}: another text of this name stays in the bank, {which}; to remove "
                    f"it: mka memory remove {others[0].identity} --bank {config.bank}, or add "
                    "with --replace"
                )
    return 0


def check_names(texts: dict[str, str]) -> None:
    """Raise InputError for two texts of one name: the second would replace the
    first."""
    found: dict[str, tuple[str, str]] = {}
    for path, text in texts.items():
        first, before = found.setdefault(Path(path).name, (path, text))
        if before != text:
            raise InputError(
                f"documents holds {first!r} and {path!r}, two texts of one name; with --replace "
                "the second would remove the first: rename one"
            )


def namesakes(documents: Sequence["Document"], name: str, text: str) -> list["Document"]:
    """The documents of this name that have another text."""
    from mka.memory.bank import identity

    return [
        document
        for document in documents
        if document.name == name and document.identity != identity(text)
    ]


def run_list(config: MemoryListConfig, say: Say = print) -> int:
    """Print one line per document, in the order in which they were added; returns 0."""
    from mka.memory.bank import Bank

    documents = Bank(config.bank).documents()
    for document in documents:
        say(line(document))
    chunks, size = sum(d.chunks for d in documents), sum(d.nbytes for d in documents)
    say(f"{len(documents)} documents, {chunks:,} chunks, {size / 2**20:.1f} MiB")
    return 0


def run_verify(config: MemoryVerifyConfig, say: Say = print) -> int:
    """Print one line per document, whole or damaged; returns 1 if one is damaged."""
    from mka.memory.bank import Bank

    whole = True
    for folder, details, damage in Bank(config.bank).checked():
        whole &= details is not None
        say(
            f"{folder.name} {details['name']}: whole"
            if details
            else f"{folder.name}: damaged, {damage}"
        )
    return int(not whole)


def run_remove(config: MemoryRemoveConfig, say: Say = print) -> int:
    """Remove a document from the bank, and print its name; returns 0."""
    from mka.memory.bank import Bank

    bank = Bank(config.bank)
    with bank.writing():
        say(f"removed {bank.remove(config.document).name}")
    return 0


def line(document: "Document") -> str:
    """One line on a document: its folder in the bank, its name and its size."""
    size = (
        f"{document.tokens:,} tokens, {document.chunks:,} chunks, {document.nbytes / 2**20:.1f} MiB"
    )
    return printable(f"{document.folder.name} {document.name}: {size}")
