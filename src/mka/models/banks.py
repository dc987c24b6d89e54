"""Documents into a bank: a model reads them once, and other processes can then use what
it read."""

from typing import Any

from mka.memory.bank import Bank, Document, kept_stores
from mka.memory.options import LongTermConfig
from mka.models.cache import memory_cache, states
from mka.models.reading import PIECE, read_in_pieces


def read_document(
    bank: Bank, name: str, text: str, model: Any, tokenizer: Any, piece: int = PIECE
) -> tuple[Document, int]:
    """Let the model read a text, and keep its chunks in the bank, all of them or none.

    Args:
        bank: open for writing.
        name: name of the document in the bank.
        text: the document.
        model, tokenizer: the bank's model, and its tokenizer.
        piece: tokens that are read at a time, which bounds memory. Default: 4096.

    Returns the document, and how many of its last tokens were dropped because they fill
    no chunk.

    Raises ValueError for a text of less than one chunk, and for keys or values that are
    not finite.
    """
    # No special tokens: a beginning-of-text token belongs to the row that will read the
    # bank.
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
    # The chunks lie in a file beside the bank while the text is read, however long it
    # is.
    cache = memory_cache(
        model, LongTermConfig(longterm_store="disk", longterm_folder=str(bank.folder))
    )
    read_in_pieces(model, ids, cache, piece)
    document = bank.add(name, text, ids.shape[1], states(cache))
    size = next(state.tokens_a_chunk for state in states(cache) if kept_stores(state))
    return document, ids.shape[1] - document.chunks * size
