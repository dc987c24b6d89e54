"""Text in, documents out: which texts there are and which split each belongs to.

load_corpus   a name from DATASETS -> Corpus
Corpus        train, validation and test: (document name, text) pairs, and where they come from
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mka.config import DATASETS
from mka.data.files import read_folder, read_named_file
from mka.data.wikitext import WIKITEXT_SOURCE, load_wikitext
from mka.limits import InputError, unknown_name

Document = tuple[str, str]
Splits = dict[str, list[Document]]

SPLITS = ("train", "validation", "test")
MIN_DOCUMENTS_TO_SPLIT_BY = 100
BY_DOCUMENT = "by document: sha256 of its name, 90 % train, 5 % validation, 5 % test"
BY_POSITION = (
    "within each document, at line ends: first 90 % of its characters train, next 5 % validation, last 5 % test"
)
BY_SOURCE = "the dataset's own splits"
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """The documents of each split, in a fixed order.

    `documents` maps "train", "validation" and "test" to (document name, text) pairs; `skipped` counts the
    files that were passed over because they are not text; `origin` says where the text comes from.
    """

    name: str
    documents: Splits
    split_rule: str
    skipped: int
    origin: dict[str, str]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over splits, document names and texts, in order; no place on disk enters it."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for part in (split, str(len(self.documents[split]))):
                update_with_length(digest, part)
            for name, text in self.documents[split]:
                update_with_length(digest, name)
                update_with_length(digest, text)
        return digest.hexdigest()


def load_corpus(dataset: str, text_path: Sequence[str] = (), wikitext_source: str = WIKITEXT_SOURCE) -> Corpus:
    """Load the corpus of that name (see DATASETS).

    `text_path` names the files and folders of dataset "text"; `wikitext_source` is the hub repository, or a
    folder laid out like it, that "wikitext2" and "wikitext103" are read from. Raises InputError for an unknown
    name, for a hub that cannot be reached, and for a path that holds no text.
    """
    if dataset not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    if dataset == "stdlib":
        return load_stdlib()
    if dataset == "text":
        return load_text(text_path)
    origin = {"source": Path(wikitext_source).name if os.path.isdir(wikitext_source) else wikitext_source}
    return Corpus(dataset, load_wikitext(dataset, wikitext_source), BY_SOURCE, 0, origin)


def load_stdlib() -> Corpus:
    """The source files of the running interpreter's standard library, split by document."""
    documents, skipped = read_folder(Path(sysconfig.get_paths()["stdlib"]), "*.py", is_stdlib_source)
    if not documents:
        raise InputError("this interpreter has no standard library in source form; use --dataset text --text_path FILE")
    origin = {"interpreter": f"{platform.python_implementation()} {platform.python_version()}"}
    return Corpus("stdlib", split_by_document(documents.values()), BY_DOCUMENT, skipped, origin)


def is_stdlib_source(relative: Path) -> bool:
    return NOT_STDLIB.isdisjoint(relative.parts)


def is_visible(relative: Path) -> bool:
    return not any(part.startswith(".") for part in relative.parts)


def load_text(text_path: Sequence[str]) -> Corpus:
    """The user's own files and folders; a file that several paths lead to counts once."""
    if not text_path:
        raise InputError("text_path is empty; --dataset text needs --text_path with files or folders of UTF-8 text")
    documents: dict[Path, Document] = {}
    skipped = 0
    for given in map(Path, text_path):
        if os.path.isdir(given):
            found, passed_over = read_folder(given, "*", is_visible)
            skipped += passed_over
            if not found:
                raise InputError(
                    f"text_path {str(given)!r} is a folder without any UTF-8 text; give one that holds some"
                )
        else:
            text = read_named_file(given)
            found = {given.resolve(): (given.name, text)}
        documents = found | documents
    rule = BY_DOCUMENT if len(documents) >= MIN_DOCUMENTS_TO_SPLIT_BY else BY_POSITION
    split = split_by_document if rule == BY_DOCUMENT else split_by_position
    ordered = sorted(documents.values())
    origin = {"paths": ", ".join(Path(path).resolve().name for path in text_path)}
    return Corpus("text", split(ordered), rule, skipped, origin)


def split_by_document(documents: Iterable[Document]) -> Splits:
    """Whole documents to each split, by a hash of the name: adding a document moves no other."""
    splits: Splits = {split: [] for split in SPLITS}
    for name, text in documents:
        percentile = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") % 100
        split = "train" if percentile < 90 else "validation" if percentile < 95 else "test"
        splits[split].append((name, text))
    return splits


def split_by_position(documents: Iterable[Document]) -> Splits:
    """Consecutive pieces of each document to each split; pieces without a character are left out."""
    splits: Splits = {split: [] for split in SPLITS}
    for name, text in documents:
        first, second = cut_near(text, 0.90), cut_near(text, 0.95)
        for split, piece in zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True):
            if piece:
                splits[split].append((name, piece))
    return splits


def cut_near(text: str, share: float) -> int:
    """The line end nearest to that share of the text, or the very place where none is within 2.5 %."""
    target = int(len(text) * share)
    reach = len(text) // 40
    before = text.rfind("\n", target - reach, target) + 1
    after = text.find("\n", max(target - 1, 0), target + reach) + 1
    return min((cut for cut in (before, after) if cut), key=lambda cut: abs(cut - target), default=target)


def update_with_length(digest: "hashlib._Hash", text: str) -> None:
    """Lengths keep ("ab", "c") and ("a", "bc") apart."""
    raw = text.encode("utf-8", "surrogateescape")
    digest.update(len(raw).to_bytes(8, "little"))
    digest.update(raw)
