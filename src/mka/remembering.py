"""Banks on the command line: what a model reads once, and other processes remember.

add     text -> tokens -> pieces through the model, its chunks in a file -> the bank, all or nothing
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mka.commands import BankConfig, MemoryAddConfig, MemoryRemoveConfig
from mka.config import LongTermConfig
from mka.data.files import read_named_file
from mka.limits import InputError
from mka.loading import load
from mka.memory.bank import Bank, Document, identity, kept_stores, several
from mka.models import fingerprint, memory_cache, read_in_pieces, states

Say = Callable[[str], None]


def add(config: MemoryAddConfig, say: Say) -> None:
    """Read each document that the bank does not hold yet; what it has under a document's name is said, or replaced.

    Raises InputError; what was added before stays.
    """
    texts = {path: read_named_file(Path(path), "document") for path in config.documents}
    if config.replace:
        check_names(texts)
    model, tokenizer = load(config.model)
    memory_cache(model, LongTermConfig(longterm_store="host"))  # a model that retrieves nothing has nothing to keep
    bank = Bank.create(config.bank, fingerprint(model))
    with bank.writing():
        held = bank.documents()  # a damaged one is said before anything is read
        older = {path: namesakes(held, Path(path).name, text) for path, text in texts.items()}
        for path, documents in older.items():
            if config.replace and len(documents) > 1:
                raise several(bank.folder, Path(path).name, [document.identity for document in documents])
        for path, text in texts.items():
            name = Path(path).name
            same = next((document for document in held if document.identity == identity(text)), None)
            if same is None:
                held.append(read(config, bank, name, text, model, tokenizer, say))
            else:
                known = f" as {same.name}, {same.identity}" if same.name != name else ", nothing to do"
                say(f"{name}: already in the bank{known}")
            if config.replace:
                for document in older[path]:
                    held.remove(document)
                    say(f"took out the older {name}, {bank.remove(document.identity).name}")
            elif others := namesakes(held, name, text):
                which = ", ".join(document.identity for document in others)
                say(
                    f"{name}: another text of this name stays in the bank, {which}; to take it out: mka memory remove "
                    f"{others[0].identity} --bank {config.bank}, or add with --replace"
                )


def check_names(texts: dict[str, str]) -> None:
    """Raises InputError for two texts of one name, of which the second would replace the first."""
    found: dict[str, tuple[str, str]] = {}
    for path, text in texts.items():
        first, before = found.setdefault(Path(path).name, (path, text))
        if before != text:
            raise InputError(
                f"documents holds {first!r} and {path!r}, two texts of one name; with replace the second would take "
                "out the first: rename one"
            )


def namesakes(documents: Sequence[Document], name: str, text: str) -> list[Document]:
    """Those of this name that have another text."""
    return [document for document in documents if document.name == name and document.identity != identity(text)]


def read(config: MemoryAddConfig, bank: Bank, name: str, text: str, model: Any, tokenizer: Any, say: Say) -> Document:
    """Let the model read a document, keep its chunks, and say so."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
    cache = memory_cache(model, LongTermConfig(longterm_store="disk", longterm_folder=str(bank.folder)))
    read_in_pieces(model, ids, cache, config.piece)
    document = bank.add(name, text, ids.shape[1], states(cache))
    size = next(state.tokens_a_chunk for state in states(cache) if kept_stores(state))
    rest = ids.shape[1] - document.chunks * size
    say(f"{line(document)}{f'; its last {rest} tokens fill no chunk' if rest else ''}")
    return document


def show(config: BankConfig, say: Say) -> None:
    """A line for each document, in the order in which they were added."""
    documents = Bank(config.bank).documents()
    for document in documents:
        say(line(document))
    chunks, size = sum(d.chunks for d in documents), sum(d.nbytes for d in documents)
    say(f"{len(documents)} documents, {chunks:,} chunks, {size / 2**20:.1f} MiB")


def verify(config: BankConfig, say: Say) -> bool:
    """Read everything and compare it with its checksums: a line for each document; False if one is damaged."""
    whole = True
    for folder, details, damage in Bank(config.bank).checked():
        whole &= details is not None
        say(f"{folder.name} {details['name']}: whole" if details else f"{folder.name}: damaged, {damage}")
    return whole


def remove(config: MemoryRemoveConfig, say: Say) -> None:
    bank = Bank(config.bank)
    with bank.writing():
        say(f"removed {bank.remove(config.document).name}")


def line(document: Document) -> str:
    size = f"{document.tokens:,} tokens, {document.chunks:,} chunks, {document.nbytes / 2**20:.1f} MiB"
    return f"{document.folder.name} {document.name}: {size}"
