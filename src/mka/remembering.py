"""Banks on the command line: what a model reads once, and other processes remember.

add     text -> tokens -> pieces through the model, its chunks in a file -> the bank, all or nothing
"""

from collections.abc import Callable
from pathlib import Path

from mka.commands import BankConfig, MemoryAddConfig, MemoryRemoveConfig
from mka.config import LongTermConfig
from mka.data.files import read_named_file
from mka.loading import load
from mka.memory.bank import Bank, Document
from mka.models import fingerprint, memory_cache, read_in_pieces, states

Say = Callable[[str], None]


def add(config: MemoryAddConfig, say: Say) -> None:
    """Read each document that the bank does not hold yet. Raises InputError; what was added before stays."""
    texts = {path: read_named_file(Path(path), "document") for path in config.documents}
    model, tokenizer = load(config.model)
    memory_cache(model, LongTermConfig(longterm_store="host"))  # a model that retrieves nothing has nothing to keep
    bank = Bank.create(config.bank, fingerprint(model))
    with bank.writing():
        bank.documents()  # a damaged one is said before anything is read
        for path, text in texts.items():
            name = Path(path).name
            if bank.has(text):
                say(f"{name}: already in the bank, nothing to do")
                continue
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
            cache = memory_cache(model, LongTermConfig(longterm_store="disk", longterm_folder=str(bank.folder)))
            read_in_pieces(model, ids, cache, config.piece)
            document = bank.add(name, text, ids.shape[1], states(cache))
            rest = ids.shape[1] - document.chunks * states(cache)[0].tokens_a_chunk
            say(f"{line(document)}{f'; its last {rest} tokens fill no chunk' if rest else ''}")


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
