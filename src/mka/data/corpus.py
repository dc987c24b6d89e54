"""Text in, documents out: which texts there are, and which split each belongs to.

load_corpus   a name from DATASETS -> Corpus
Corpus        train, validation and test: (document name, text) pairs, and where they
              come from
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mka.data.files import read_folder, read_named_file
from mka.data.wikitext import WIKITEXT_SOURCE, load_wikitext
from mka.errors import InputError, unknown_name
from mka.record.config import DATASETS

Document = tuple[str, str]
Splits = dict[str, list[Document]]

SPLITS = ("train", "validation", "test")
MIN_DOCUMENTS_TO_SPLIT_BY = 100
"""With fewer documents, splitting by document would leave a split almost or entirely
empty."""
BY_DOCUMENT = "by document: sha256 of its name, 90 % train, 5 % validation, 5 % test"
BY_POSITION = (
    "within each document, at line ends: first 90 % of its characters train, next 5 "
    "% validation, last 5 % test"
)
BY_SOURCE = "the dataset's own splits"
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
"""Folders inside that of the standard library that are not part of it."""


@dataclass(frozen=True)
class Corpus:
    """The documents of each split, in a fixed order.

    Args:
        name: of the dataset.
        documents: (document name, text) pairs of "train", "validation" and "test".
        split_rule: how documents were split, in words.
        skipped: how many files were skipped because they are not text.
        origin: where the text comes from, by the kind of place.
    """

    name: str
    documents: Splits
    split_rule: str
    skipped: int
    origin: dict[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 (hex) of splits, document names and texts, but not of where the
        files are."""
        digest = hashlib.sha256()
        # The number of documents too: otherwise a document could move between splits
        # unnoticed.
        for split in SPLITS:
            for part in (split, str(len(self.documents[split]))):
                update_with_length(digest, part)
            for name, text in self.documents[split]:
                update_with_length(digest, name)
                update_with_length(digest, text)
        return digest.hexdigest()


def load_corpus(
    dataset: str, text_path: Sequence[str] = (), wikitext_source: str = WIKITEXT_SOURCE
) -> Corpus:
    """Load a corpus.

    Args:
        dataset: a name in DATASETS.
        text_path: the files and folders of dataset "text". Default: none.
        wikitext_source: the hub repository, or a folder laid out like it, that
            "wikitext2" and "wikitext103" are read from. Default: Salesforce/wikitext.

    Raises InputError for an unknown name, for a hub that cannot be reached, and for a
    path without text.
    """
    if dataset not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    if dataset == "stdlib":
        return load_stdlib()
    if dataset == "text":
        return load_text(text_path)
    origin = {
        "source": Path(wikitext_source).name if os.path.isdir(wikitext_source) else wikitext_source
    }
    return Corpus(dataset, load_wikitext(dataset, wikitext_source), BY_SOURCE, 0, origin)


def load_stdlib() -> Corpus:
    """The source files of the running interpreter's standard library, split by
    document. Raises InputError if there are none."""
    documents, skipped = read_folder(
        Path(sysconfig.get_paths()["stdlib"]), "*.py", is_stdlib_source
    )
    if not documents:
        raise InputError(
            "this interpreter has no standard library in source form; use --dataset text "
            "--text_path FILE"
        )
    origin = {"interpreter": f"{platform.python_implementation()} {platform.python_version()}"}
    return Corpus("stdlib", split_by_document(documents.values()), BY_DOCUMENT, skipped, origin)


def is_stdlib_source(relative: Path) -> bool:
    """Whether a file, relative to the standard library's folder, is part of it."""
    return NOT_STDLIB.isdisjoint(relative.parts)


def is_visible(relative: Path) -> bool:
    """Whether neither the file nor a folder above it, relative to the named one, is
    hidden."""
    return not any(part.startswith(".") for part in relative.parts)


def load_text(text_path: Sequence[str]) -> Corpus:
    """The user's own files and folders; a file that several paths lead to counts once.

    Raises InputError without a path, and for a path without text.
    """
    if not text_path:
        raise InputError(
            "text_path is empty; --dataset text needs --text_path with files or folders of "
            "UTF-8 text"
        )
    documents: dict[Path, Document] = {}
    skipped = 0
    for given in map(Path, text_path):
        if os.path.isdir(given):
            found, not_text = read_folder(given, "*", is_visible)
            skipped += not_text
            if not found:
                raise InputError(
                    f"text_path {str(given)!r} is a folder without any UTF-8 text; give one "
                    "that holds some"
                )
        else:
            text = read_named_file(given)
            found = {given.resolve(): (given.name, text)}
        # The first path that leads to a file names it.
        documents = found | documents
    rule = BY_DOCUMENT if len(documents) >= MIN_DOCUMENTS_TO_SPLIT_BY else BY_POSITION
    split = split_by_document if rule == BY_DOCUMENT else split_by_position
    # The order in which paths are given must not change the corpus.
    ordered = sorted(documents.values())
    # Without the folders above: a record must not depend on where the files are.
    origin = {"paths": ", ".join(Path(path).resolve().name for path in text_path)}
    return Corpus("text", split(ordered), rule, skipped, origin)


def split_by_document(documents: Iterable[Document]) -> Splits:
    """Whole documents to each split, by a hash of the name, so that adding a document
    moves no other."""
    splits: Splits = {split: [] for split in SPLITS}
    for name, text in documents:
        # surrogateescape: names of files need not be valid UTF-8.
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        percentile = int.from_bytes(digest[:8], "big") % 100
        split = "train" if percentile < 90 else "validation" if percentile < 95 else "test"
        splits[split].append((name, text))
    return splits


def split_by_position(documents: Iterable[Document]) -> Splits:
    """Consecutive pieces of each document to each split; empty pieces are left out."""
    splits: Splits = {split: [] for split in SPLITS}
    for name, text in documents:
        first, second = cut_near(text, 0.90), cut_near(text, 0.95)
        pieces = text[:first], text[first:second], text[second:]
        for split, piece in zip(SPLITS, pieces, strict=True):
            if piece:
                splits[split].append((name, piece))
    return splits


def cut_near(text: str, share: float) -> int:
    """The index of the line end nearest to that share of the text, or of the share
    itself if none is within 2.5 % of the text."""
    target = int(len(text) * share)
    reach = len(text) // 40
    before = text.rfind("\n", target - reach, target) + 1
    after = text.find("\n", max(target - 1, 0), target + reach) + 1
    # 0: no line end was found on that side.
    cuts = [cut for cut in (before, after) if cut]
    return min(cuts, key=lambda cut: abs(cut - target), default=target)


def update_with_length(digest: "hashlib._Hash", text: str) -> None:
    """Add a text to the digest, its length first, which keeps ("ab", "c") and ("a",
    "bc") apart."""
    raw = text.encode("utf-8", "surrogateescape")
    digest.update(len(raw).to_bytes(8, "little"))
    digest.update(raw)
