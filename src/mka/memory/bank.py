"""A bank: the chunks of documents that a model has read, kept in a folder from one process to the next.

    bank.json                  what model it is of, and the form of its files; with a checksum of itself
    documents/ID/              one folder a document, written aside and renamed once (mka.storage), ID from its text
        manifest.json          name, number, tokens, chunks; sizes and checksums of all files, checked at every opening
        000.k  000.v  ...      per block and store: records as mka.memory.store has them, chunk by chunk
        000.chunk_mean  ...    what they are found by

To a model that opens it, the bank is the far past: its chunks are candidates for every token, the documents in the
order in which they were added.
"""

import hashlib
import json
import mmap
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

from mka.limits import InputError
from mka.memory.disk import MappedFile
from mka.memory.longterm import INDEX_STORES
from mka.memory.places import BankLayer
from mka.memory.state import State
from mka.memory.store import RecordForm, Records
from mka.storage import check_folder, checksum_of, locked, remove, sync_folder, write_folder, write_json

FORMAT = 2
BANK, DOCUMENTS, LOCK = "bank.json", "documents", ".lock"
COPIED_CHUNKS = 256


@dataclass(frozen=True)
class Document:
    """What a bank knows of a document without opening its chunks."""

    folder: Path
    name: str
    number: int
    tokens: int
    chunks: int

    @property
    def identity(self) -> str:
        """By its text: two documents may have one name, and one text is there once."""
        return self.folder.name

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())


class Pieces(Records):
    """The records of one block and store in all documents, one file after the other."""

    def __init__(self, paths: Sequence[Path], chunks: Sequence[int], form: RecordForm) -> None:
        self.form = form
        self.ends = torch.tensor([0, *accumulate(chunks)])
        self.files: list[MappedFile] = []
        for path, count in zip(paths, chunks, strict=True):
            self.files.append(MappedFile(os.open(path, os.O_RDONLY), form, mmap.MAP_PRIVATE))
            self.files[-1].remap(count)

    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        chunk, group = chunk.cpu(), group.cpu()
        owner = torch.bucketize(chunk, self.ends[1:], right=True)
        found = torch.empty(len(chunk), self.form.block, self.form.width, dtype=self.form.dtype)
        for number in owner.unique().tolist():
            mine = owner == number
            found[mine] = self.files[number].read(chunk[mine] - self.ends[number], group[mine])
        return found

    def __del__(self) -> None:
        for file in getattr(self, "files", ()):
            file.close()


class Bank:
    """A bank's folder. Raises InputError, with nothing changed, for what is no bank or is one of another model."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        self.info: dict[str, Any] = {}
        try:
            self.info = json.loads((self.folder / BANK).read_text(encoding="utf-8"))
            checksum = self.info.pop("sha256", None)
            format_, ours = self.info["format"], self.info["fingerprint"]
            if format_ == FORMAT and checksum != checksum_of(self.info):
                raise ValueError(f"{BANK} is altered")
        except OSError as error:
            raise InputError(f"bank is {str(folder)!r}; it is no bank: {BANK}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"bank is {str(folder)!r}; its {BANK} is altered; make the bank anew") from error
        if format_ != FORMAT:
            raise InputError(
                f"bank is {str(folder)!r}, of format {format_}; this reads {FORMAT}; make the bank anew from its "
                "documents, in another folder"
            )
        if fingerprint is not None and ours != fingerprint:
            raise InputError(
                f"bank is {str(folder)!r}, of the model {ours[:12]}; this model is {fingerprint[:12]}: what one has "
                "read means nothing to another; make a bank for each"
            )

    @classmethod
    def create(cls, folder: str | os.PathLike[str], fingerprint: str) -> "Bank":
        """Open a bank, or make an empty one where nothing is."""
        path = Path(folder)
        if not (path / BANK).exists():
            if path.exists() and (not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir())):
                raise InputError(f"bank is {str(folder)!r}; it is there and no bank; give another folder")
            info = {"format": FORMAT, "fingerprint": fingerprint}
            write_json(path / BANK, info | {"sha256": checksum_of(info)})
        return cls(folder, fingerprint)

    # Documents.

    def documents(self) -> list[Document]:
        """Those that are whole, in the order in which they were added. Raises InputError where one is damaged."""
        found = []
        for folder, details, damage in self.checked():
            if details is None:
                raise InputError(
                    f"bank is {str(self.folder)!r}; its document {folder.name} is damaged: {damage}; take it out: "
                    f"mka memory remove {folder.name} --bank {self.folder}"
                )
            found.append(Document(folder, **{key: details[key] for key in ("name", "number", "tokens", "chunks")}))
        return sorted(found, key=lambda document: document.number)

    def checked(self) -> Iterator[tuple[Path, dict[str, Any] | None, str]]:
        """Every document's folder, its details, None if it is damaged, and what is wrong with it."""
        place = self.folder / DOCUMENTS
        for folder in sorted(place.iterdir()) if place.is_dir() else ():
            if not folder.name.startswith("."):
                details, damage = check_folder(folder)
                if details is not None and details.get("fingerprint") != self.info["fingerprint"]:
                    details, damage = None, "it is of another model"
                elif details is not None and details.get("identity") != folder.name:
                    details, damage = None, f"it is {details.get('identity')} under another name"
                yield folder, details, damage

    def add(self, name: str, text: str, tokens: int, states: Sequence[State]) -> Document:
        """Keep the completed chunks of a document that the model has read, block by block, all or nothing.

        `states`: those after reading, of one row, with chunks stored apart. The caller holds `writing`.
        """
        chunks = next(chunks_of(state) for state in states if kept_stores(state))
        number = max((document.number for document in self.documents()), default=-1) + 1
        details = {"name": name, "number": number, "tokens": tokens, "chunks": chunks}
        whose = {"fingerprint": self.info["fingerprint"], "identity": identity(text)}

        def fill(folder: Path) -> Mapping[str, Any]:
            for layer, state in enumerate(states):
                for store in kept_stores(state):
                    write_store(folder / file_name(layer, store), state, store, chunks)
            return details | whose

        folder = self.folder / DOCUMENTS / identity(text)
        write_folder(folder, fill)
        return Document(folder, **details)

    def remove(self, wanted: str) -> Path:
        """Take out the document of that identity, or else of that name. Raises InputError unless it is exactly one."""
        names: dict[str, list[Path]] = {}
        identities: dict[str, Path] = {}
        for folder, details, _ in self.checked():
            identities[folder.name] = folder
            if details is not None:
                names.setdefault(details["name"], []).append(folder)
        found = [identities[wanted]] if wanted in identities else names.get(wanted, [])
        if not found:
            known = ", ".join(sorted({*identities, *names})) or "none"
            raise InputError(f"the bank {str(self.folder)!r} has no document {wanted!r}; there are: {known}")
        if len(found) > 1:
            raise several(self.folder, wanted, [folder.name for folder in found])
        aside = found[0].with_name(f".{found[0].name}.building")  # what is left of it after a kill is swept
        remove(aside)
        os.replace(found[0], aside)
        sync_folder(aside.parent)
        shutil.rmtree(aside)
        return found[0]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One process at a time. Raises InputError while another one writes."""
        try:
            with locked(self.folder / LOCK, wait=False):
                for left in (self.folder / DOCUMENTS).glob(".*.building"):
                    shutil.rmtree(left, ignore_errors=True)
                yield
        except BlockingIOError as error:
            raise InputError(
                f"bank is {str(self.folder)!r}; another process is writing to it; try again when it has ended"
            ) from error

    # What a model reads.

    def layers(self, entries: Sequence[State]) -> list[BankLayer]:
        """For each block what the bank has of it; `entries` are empty states of the model's blocks."""
        documents = self.documents()
        counts = [document.chunks for document in documents]
        found = []
        for layer, state in enumerate(entries):
            records, summaries = {}, {}
            for name in kept_stores(state):
                paths = [document.folder / file_name(layer, name) for document in documents]
                if is_record(state, name):
                    records[name] = Pieces(paths, counts, form_of(state, name))
                else:
                    summaries[name] = read_entries(paths, state, name)
            found.append(BankLayer(sum(counts), summaries, records))
        return found


def several(bank: Path, name: str, identities: Sequence[str]) -> InputError:
    return InputError(
        f"the bank {str(bank)!r} has {len(identities)} documents named {name!r}: {', '.join(identities)}; give the "
        f"identity of the one to take out: mka memory remove IDENTITY --bank {bank}"
    )


def identity(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def file_name(layer: int, store: str) -> str:
    return f"{layer:03d}.{store}"


def is_record(state: State, name: str) -> bool:
    return state.entries[name].block is not None


def kept_stores(state: State) -> list[str]:
    """The stores that chunks are read from, and those that they are found by."""
    return [name for name, entry in state.entries.items() if entry.block is not None or name in INDEX_STORES]


def form_of(state: State, name: str) -> RecordForm:
    entry = state.entries[name]
    return RecordForm.of(entry.shape, entry.block or 1, entry.dtype)


def chunks_of(state: State) -> int:
    """Completed chunks of the one row."""
    return max(state.lengths) // state.tokens_a_chunk


def write_store(path: Path, state: State, name: str, chunks: int) -> None:
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
                    f"{path.name} would hold NaN or infinity: what the model made of the document is no number; "
                    "nothing was added"
                )
            file.write(values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())


def read_entries(paths: Sequence[Path], state: State, name: str) -> Tensor:
    """(chunks, ...): the entries of all documents."""
    entry = state.entries[name]
    raw = bytearray().join(path.read_bytes() for path in paths)
    if not raw:
        return torch.empty(0, *entry.shape, dtype=entry.dtype)
    return torch.frombuffer(raw, dtype=entry.dtype).view(-1, *entry.shape)
