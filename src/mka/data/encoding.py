"""Documents to token ids and to the bytes behind each token, a bounded amount of text at a time."""

from collections.abc import Iterable, Iterator

import numpy as np

from mka.data.tokenizer import TextTokenizer

# Bounds on what is encoded at once; a longer document is encoded in pieces that end at line ends.
PIECE_CHARACTERS = 2**20
BATCH_CHARACTERS = 2**21


def encoded_pieces(
    documents: Iterable[tuple[str, str]], tokenizer: TextTokenizer, with_ends: bool
) -> Iterator[tuple[str, list[int], list[int]]]:
    """Text, token ids and token ends (empty without `with_ends`) of each piece; the last of a document has the
    end-of-text token, which has no end."""
    for batch in batches_of_pieces(text for _, text in documents):
        texts = [text for text, _ in batch]
        if with_ends:
            encoded = tokenizer.encode_batch_with_ends(texts)
        else:
            encoded = [(ids, []) for ids in tokenizer.encode_batch(texts)]
        for (text, ends_document), (ids, ends) in zip(batch, encoded, strict=True):
            yield text, ids + [tokenizer.eos_id] * ends_document, ends


def batches_of_pieces(texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of (piece, is it the last of its document) of about BATCH_CHARACTERS each."""
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
    end = start + PIECE_CHARACTERS
    return len(text) if end >= len(text) else text.rfind("\n", start, end) + 1 or end


def bytes_of_tokens(text: str, ends: list[int], num_tokens: int) -> np.ndarray:
    """UTF-8 bytes of `text` that each of `num_tokens` tokens stands for (int64); they add up to all of them.

    A token stands for the text between the end of the one before (not its own beginning: what a tokenizer skips
    counts, and what several tokens share counts once) and its own end; the last one for all that is left.
    """
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    place = np.concatenate([[0], np.cumsum(widths)])
    counts = np.zeros(num_tokens, dtype=np.int64)
    reached = place[np.maximum.accumulate(np.array(ends, dtype=np.int64))]
    counts[: len(ends)] = np.diff(reached, prepend=0)
    if num_tokens:
        counts[max(len(ends) - 1, 0)] += place[-1] - counts.sum()
    return counts
