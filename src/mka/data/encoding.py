"""Documents to token ids and to the bytes of text per token, a bounded amount of text
at a time."""

from collections.abc import Iterable, Iterator

import numpy as np

from mka.data.tokenizer import TextTokenizer

# Bounds on what is encoded at once; a longer document is encoded in pieces that end at
# line ends.
PIECE_CHARACTERS = 2**20
BATCH_CHARACTERS = 2**21


def encoded_pieces(
    documents: Iterable[tuple[str, str]], tokenizer: TextTokenizer, with_ends: bool
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Encode documents piece by piece.

    Args:
        documents: (name, text) pairs.
        tokenizer: the tokenizer.
        with_ends: whether to yield token ends; they take longer.

    Yields the text, the token ids and the token ends (character indices, empty without
    `with_ends`) of each piece. The last piece of a document also has the end-of-text
    token, which has no end.
    """
    for batch in batches_of_pieces(text for _, text in documents):
        texts = [text for text, _ in batch]
        if with_ends:
            encoded = tokenizer.encode_batch_with_ends(texts)
        else:
            encoded = [(ids, []) for ids in tokenizer.encode_batch(texts)]
        for (text, ends_document), (ids, ends) in zip(batch, encoded, strict=True):
            yield text, ids + [tokenizer.eos_id] * ends_document, ends


def batches_of_pieces(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Lists, of about BATCH_CHARACTERS each, of (piece, whether it is the last of its
    document)."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for text in texts:
        start = 0
        while start < len(text):
            piece = text[start : end_of_piece(text, start)]
            start += len(piece)
            batch.append((piece, start == len(text)))
            characters += len(piece)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def end_of_piece(text: str, start: int) -> int:
    """The end of a piece that begins at `start`: the last line end within
    PIECE_CHARACTERS, or that limit if there is none."""
    end = start + PIECE_CHARACTERS
    return len(text) if end >= len(text) else text.rfind("\n", start, end) + 1 or end


def bytes_of_tokens(text: str, ends: list[int], num_tokens: int) -> np.ndarray:
    """How many UTF-8 bytes of `text` each token represents, (num_tokens,) int64; the
    sum is all.

    Args:
        text: the text.
        ends: for each token its end in the text, as a character index; an end-of-text
            token has none.
        num_tokens: how many tokens there are, with the end-of-text token.
    """
    # From the end of the token before, not from its own beginning: what a tokenizer
    # skips is then counted, and what several tokens share is counted once. The UTF-8
    # width of each character, without encoding them one by one.
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    place = np.concatenate([[0], np.cumsum(widths)])
    counts = np.zeros(num_tokens, dtype=np.int64)
    # Tokens that share a character may end before the one in front of them; bytes may
    # not.
    reached = place[np.maximum.accumulate(np.array(ends, dtype=np.int64))]
    counts[: len(ends)] = np.diff(reached, prepend=0)
    # The last token represents all that is left.
    if num_tokens:
        counts[max(len(ends) - 1, 0)] += place[-1] - counts.sum()
    return counts
