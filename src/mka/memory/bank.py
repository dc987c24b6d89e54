"""A bank: the chunks of documents that a model has read, kept in a folder for later
processes.

    bank.json                  the model it belongs to and the format of its files, with
                               a checksum
    documents/ID/              one folder per document, ID from its text; written under
                               another name, then renamed (mka.storage)
        manifest.json          name, number, tokens, chunks; sizes and checksums of all
                               files, checked at every opening
        000.k  000.v  ...      per layer and store: records, as in mka.memory.store
        000.chunk_mean  ...    what the chunks are found by

To a model that opens it, the bank is the far past: its chunks are candidates for every
token, and documents are in the order in which they were added.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mka.errors import InputError
from mka.memory.disk import MappedRecords
from mka.memory.longterm import INDEX_STORES
from mka.memory.places import BankLayer
from mka.memory.state import State
from mka.memory.store import RecordForm, Records
from mka.storage import (
    MANIFEST,
    Count,
    check_folder,
    checksum_of,
    locked,
    of_kind,
    read_regular,
    remove,
    sync_folder,
    write_folder,
    write_json,
)

FORMAT = 2
"""Version of the files; a bank of another version is refused."""
BANK, DOCUMENTS, LOCK = "bank.json", "documents", ".lock"
COPIED_CHUNKS = 256
"""Chunks that are written at once."""


LARGEST_INFO = 2**20
"""Bytes of bank.json."""


@dataclass(frozen=True)
class Info:
    """What bank.json holds, apart from its checksum."""

    format: int
    fingerprint: str


@dataclass(frozen=True)
class Details:
    """What the manifest of a document says of it."""

    name: str
    number: Count
    tokens: Count
    chunks: Count
    fingerprint: str
    identity: str


@dataclass(frozen=True)
class Document:
    """What a bank knows of a document without opening its chunks."""

    folder: Path
    """Where its files are"""
    name: str
    """The name that it was added under; several documents may have it"""
    number: int
    """Its place in the order in which documents were added"""
    tokens: int
    """Tokens of the text, those after the last whole chunk included"""
    chunks: int
    """Chunks that are kept"""

    @property
    def identity(self) -> str:
        """Its name in the bank, made from its text (`identity`): the same text is kept
        once."""
        return self.folder.name

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())


class Pieces(Records):
    """The records of one layer and store in all documents, one file after the other.

    Args:
        paths: the files, one per document.
        chunks: how many chunks each file holds.
        form: the form of their records.
    """

    def __init__(self, paths: Sequence[Path], chunks: Sequence[int], form: RecordForm) -> None:
        self.form = form
        self.ends = torch.tensor([0, *accumulate(chunks)])
        self.files = [
            MappedRecords(path, form, count) for path, count in zip(paths, chunks, strict=True)
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pieces":
        """Itself: nothing ever changes it."""
        return self

    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        """The N records named, as (N, block, width), on the CPU; the same in every
        row."""
        chunk, group = chunk.cpu(), group.cpu()
        # Chunks are numbered through all documents: the first end above a number tells
        # its file.
        owner = torch.bucketize(chunk, self.ends[1:], right=True)
        found = torch.empty(len(chunk), self.form.block, self.form.width, dtype=self.form.dtype)
        for number in owner.unique().tolist():
            mine = owner == number
            found[mine] = self.files[number].read(chunk[mine] - self.ends[number], group[mine])
        return found


class Bank:
    """A bank in a folder.

    Args:
        folder: where the bank is.
        fingerprint: that of the model that will read it. Default: None, any model's
            bank is opened.

    Raises InputError, with nothing changed, if the folder is not a bank, if its
    bank.json is corrupt or of another format, or if it belongs to another model.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        self.info: dict[str, Any] = {}
        try:
            held = json.loads(read_regular(self.folder / BANK, LARGEST_INFO))
            self.info = of_kind(dict[str, Any], held)
            checksum = self.info.pop("sha256", None)
            known = of_kind(Info, self.info)
            format_, ours = known.format, known.fingerprint
            # A bank of another format may have no checksum; it is refused by its
            # number, below.
            if format_ == FORMAT and checksum != checksum_of(self.info):
                raise ValueError(f"{BANK} is corrupt")
        except OSError as error:
            raise InputError(
                f"bank is {str(folder)!r}; it is not a bank: {BANK}: {error.strerror}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"bank is {str(folder)!r}; its {BANK} is corrupt; recreate the bank"
            ) from error
        if format_ != FORMAT:
            raise InputError(
                f"bank is {str(folder)!r}, of format {format_}; this version reads {FORMAT}; "
                "recreate the bank from its documents, in another folder"
            )
        if fingerprint is not None and ours != fingerprint:
            raise InputError(
                f"bank is {str(folder)!r}, of the model {ours[:12]}; this model is "
                f"{fingerprint[:12]}: banks are not interchangeable between models; make one "
                "per model"
            )

    @classmethod
    def create(cls, folder: str | os.PathLike[str], fingerprint: str) -> "Bank":
        """Open a bank, or make an empty one if the folder is missing or empty.

        Raises InputError if the folder holds anything else.
        """
        path = Path(folder)
        # A lock file alone is left by a process that stopped before it made the bank.
        if not (path / BANK).exists():
            if path.exists() and (
                not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir())
            ):
                raise InputError(
                    f"bank is {str(folder)!r}; it exists but is not a bank; choose another folder"
                )
            info = {"format": FORMAT, "fingerprint": fingerprint}
            write_json(path / BANK, info | {"sha256": checksum_of(info)})
        return cls(folder, fingerprint)

    # Documents.

    def documents(self) -> list[Document]:
        """All documents, in the order in which they were added.

        Raises InputError if one is damaged.
        """
        found = []
        for folder, details, damage in self.checked():
            if details is None:
                raise self.damaged(folder.name, damage)
            found.append(
                Document(
                    folder, **{key: details[key] for key in ("name", "number", "tokens", "chunks")}
                )
            )
        return sorted(found, key=lambda document: document.number)

    def checked(self) -> Iterator[tuple[Path, dict[str, Any] | None, str]]:
        """For every document its folder, its details (None if it is damaged), and the
        damage in words."""
        # Names with a dot are documents that were being written or removed when a
        # process stopped.
        place = self.folder / DOCUMENTS
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            if not folder.name.startswith("."):
                # Checksums are not enough: a folder copied from another bank, or
                # renamed, is whole.
                details, damage = check_folder(folder)
                # A link could lead out of the bank.
                if folder.is_symlink():
                    details, damage = None, "it is a link"
                if details is not None:
                    try:
                        of_kind(Details, details)
                    except ValueError:
                        details, damage = None, f"{MANIFEST} is not that of a document"
                if details is not None and details.get("fingerprint") != self.info["fingerprint"]:
                    details, damage = None, "it is of another model"
                elif details is not None and details.get("identity") != folder.name:
                    details, damage = None, f"it is {details.get('identity')} under another name"
                yield folder, details, damage

    def add(self, name: str, text: str, tokens: int, states: Sequence[State]) -> Document:
        """Keep the completed chunks of a document that the model has read, or nothing
        at all.

        Args:
            name: a name for people; it need not be unique.
            text: the text that was read; the document's identity is made from it.
            tokens: how many tokens the text has.
            states: the state of each layer after reading, of one row.

        The caller holds `writing`. Raises InputError if a state holds NaN or infinity.
        """
        # The first layer that keeps chunks tells how many; layers without a memory keep
        # none.
        chunks = next(chunks_of(state) for state in states if kept_stores(state))
        # One above the highest: documents stay in the order of adding, whatever is
        # removed.
        number = max((document.number for document in self.documents()), default=-1) + 1
        details = {"name": name, "number": number, "tokens": tokens, "chunks": chunks}
        whose = {"fingerprint": self.info["fingerprint"], "identity": identity(text)}

        def fill(folder: Path) -> Mapping[str, Any]:
            """Write the files; returns what the manifest says in addition to their
            checksums."""
            for layer, state in enumerate(states):
                for store in kept_stores(state):
                    write_store(folder / file_name(layer, store), state, store, chunks)
            return details | whose

        folder = self.folder / DOCUMENTS / identity(text)
        write_folder(folder, fill)
        return Document(folder, **details)

    def remove(self, wanted: str) -> Path:
        """Remove the document with this identity, or else with this name; returns its
        folder.

        Raises InputError unless there is exactly one.
        """
        # A damaged document has no name any more, but can still be removed by its
        # identity.
        names: dict[str, list[Path]] = {}
        identities: dict[str, Path] = {}
        for folder, details, _ in self.checked():
            identities[folder.name] = folder
            if details is not None:
                names.setdefault(details["name"], []).append(folder)
        found = [identities[wanted]] if wanted in identities else names.get(wanted, [])
        if not found:
            known = ", ".join(sorted({*identities, *names})) or "none"
            raise InputError(
                f"the bank {str(self.folder)!r} has no document {wanted!r}; there are: {known}"
            )
        if len(found) > 1:
            raise several(self.folder, wanted, [folder.name for folder in found])
        # Renamed first, in one step: a process that is killed while it deletes leaves
        # no damaged document, only a hidden folder that `writing` sweeps.
        if found[0].is_symlink():
            found[0].unlink()
            return found[0]
        aside = found[0].with_name(f".{found[0].name}.building")
        remove(aside)
        os.replace(found[0], aside)
        sync_folder(aside.parent)
        shutil.rmtree(aside)
        return found[0]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The right to change the bank, for one process at a time.

        Raises InputError while another process holds it.
        """
        try:
            with locked(self.folder / LOCK, wait=False):
                # Under the lock nobody is building anything: these are left from a
                # process that was killed.
                for left in (self.folder / DOCUMENTS).glob(".*.building"):
                    shutil.rmtree(left, ignore_errors=True)
                yield
        except BlockingIOError as error:
            raise InputError(
                f"bank is {str(self.folder)!r}; another process is writing to it; try again "
                "when it has finished"
            ) from error

    # What a model reads.

    def layers(self, entries: Sequence[State]) -> list[BankLayer]:
        """What the bank has for each layer; `entries` are empty states of the model's
        layers.

        Raises InputError if a document is damaged.
        """
        # Summaries are read at once, as every query is compared with them; records stay
        # in files.
        documents = self.documents()
        counts = [document.chunks for document in documents]
        found = []
        for layer, state in enumerate(entries):
            records, summaries = {}, {}
            for name in kept_stores(state):
                paths = [document.folder / file_name(layer, name) for document in documents]
                for document, path in zip(documents, paths, strict=True):
                    self.check_size(document, path, form_of(state, name).chunk_bytes)
                if is_record(state, name):
                    records[name] = Pieces(paths, counts, form_of(state, name))
                else:
                    summaries[name] = read_entries(paths, state, name)
            found.append(BankLayer(sum(counts), summaries, records))
        return found

    def check_size(self, document: Document, path: Path, chunk_bytes: int) -> None:
        """Raise InputError unless a file of a document holds as many chunks as its
        manifest says."""
        size = path.stat().st_size if path.is_file() else 0
        if size != document.chunks * chunk_bytes:
            raise self.damaged(
                document.folder.name,
                f"{path.name} has {size:,} bytes, which are not {document.chunks:,} chunks",
            )

    def damaged(self, name: str, damage: str) -> InputError:
        """The error for a damaged document, with what can be done."""
        return InputError(
            f"bank is {str(self.folder)!r}; its document {name} is damaged: {damage}; remove it: "
            f"mka memory remove {name} --bank {self.folder}"
        )


def several(bank: Path, name: str, identities: Sequence[str]) -> InputError:
    """The error for a name that several documents have; it lists their identities."""
    return InputError(
        f"the bank {str(bank)!r} has {len(identities)} documents named {name!r}: "
        f"{', '.join(identities)}; give the identity of the one to remove: "
        f"mka memory remove IDENTITY --bank {bank}"
    )


def identity(text: str) -> str:
    """The identity of a text: the first 16 hexadecimal digits of its SHA-256."""
    # surrogateescape: text that was decoded so from invalid UTF-8 has an identity too.
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def file_name(layer: int, store: str) -> str:
    """The file of one layer and store, as 007.chunk_mean."""
    return f"{layer:03d}.{store}"


def is_record(state: State, name: str) -> bool:
    """Whether a store is read as records, chunk by chunk."""
    return state.entries[name].block is not None


def kept_stores(state: State) -> list[str]:
    """Names of the stores that chunks are read from, and of those that they are found
    by."""
    return [
        name
        for name, entry in state.entries.items()
        if entry.block is not None or name in INDEX_STORES
    ]


def form_of(state: State, name: str) -> RecordForm:
    """The form of a store's records in a bank; a store of single entries has one per
    record."""
    entry = state.entries[name]
    return RecordForm.of(entry.shape, entry.block or 1, entry.dtype)


def chunks_of(state: State) -> int:
    """How many chunks the one row of a state has completed."""
    return max(state.lengths) // state.tokens_a_chunk


def write_store(path: Path, state: State, name: str, chunks: int) -> None:
    """Write the first `chunks` chunks of a store to a file, as they lie in records.

    Raises InputError if they hold NaN or infinity.
    """
    # A few at a time: the store may be larger than the memory.
    with path.open("wb") as file:
        for start in range(0, chunks, COPIED_CHUNKS):
            stop = min(chunks, start + COPIED_CHUNKS)
            if state.is_apart(name):
                groups = form_of(state, name).groups
                chunk = torch.arange(start, stop).repeat_interleave(groups)
                group = torch.arange(groups).repeat(stop - start)
                values = state.records(name).read(torch.zeros_like(chunk), chunk, group)
            else:
                values = state.all(name)[0, start:stop]
            if not bool(values.isfinite().all()):
                raise InputError(
                    f"{path.name} would hold NaN or infinity, computed by the model from this "
                    "document; nothing was added"
                )
            # As bytes: NumPy has no bfloat16.
            file.write(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def read_entries(paths: Sequence[Path], state: State, name: str) -> Tensor:
    """(chunks, ...): the entries of a store in all documents, one file after the
    other."""
    entry = state.entries[name]
    raw = bytearray().join(path.read_bytes() for path in paths)
    if not raw:
        return torch.empty(0, *entry.shape, dtype=entry.dtype)
    return torch.frombuffer(raw, dtype=entry.dtype).view(-1, *entry.shape)
