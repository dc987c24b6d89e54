"""A bank remembers what stood in the context: the same chunks for the same queries, and the same
read from them."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
from checks_models import make_model, tokens
from mka.attention.fmka import FastMemoryKeyedAttention
from mka.attention.mka import TOKENS
from mka.errors import InputError
from mka.memory.bank import Bank, Pieces, file_name, kept_stores
from mka.memory.held import Chunks, Meeting, attend_held
from mka.memory.longterm import read_summaries
from mka.memory.options import LongTermConfig
from mka.memory.search import AsRead, retrieve, retrieve_as_read
from mka.memory.state import State
from mka.models import fingerprint, mechanisms, memory_cache, read_in_pieces, states

MEMORIES = ("mka", "fmka")
DOCUMENTS = (29, 12, 41)
DISK = LongTermConfig(longterm_store="disk")


def fill(folder: Path, model: Any, documents: list[Tensor]) -> Bank:
    bank = Bank.create(folder, fingerprint(model))
    with bank.writing():
        for number, ids in enumerate(documents):
            cache = memory_cache(model, DISK)
            read_in_pieces(model, ids, cache, piece=7)
            bank.add(f"d{number}", str(number), ids.shape[1], states(cache))
    return bank


def read_from(attn: Any, state: State, q: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The chunks of some query vectors at token indices t, and what is read from them, all of them
    far away."""
    limits = attn.limits(state)
    if isinstance(attn, FastMemoryKeyedAttention):
        keys = state.all("index_key")
        retrieved = retrieve(q, keys.unsqueeze(2), limits, t)
        means = (
            state.records("chunk_mean") if state.is_apart("chunk_mean") else state.all("chunk_mean")
        )
        return retrieved.chunk, read_summaries(q[:, :, 0], keys, means, retrieved)
    retrieved = retrieve_as_read(AsRead(q, state.all("far_mean")), None, None, limits, t)
    keys, values = (state.records(x) if state.is_apart(x) else state.all(x) for x in TOKENS)
    places = state.all("chunk_place").squeeze(2)
    chunks = Chunks(keys, values, state.all("chunk_mean"), banked=state.banked)

    def turn(k: Tensor, row: Tensor, chunk: Tensor) -> Tensor:
        return attn.turned(k.unsqueeze(2), -places[row, chunk].unsqueeze(1)).squeeze(2)

    return retrieved.chunk, attend_held(
        Meeting(q, retrieved, turn), chunks, attn.chunk_size, 0
    ).values


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("store", ["device", "host", "disk"])
@torch.no_grad()
def test_a_bank_is_the_text_outside_the_window(kind: str, store: Any, tmp_path: Path) -> None:
    """Layer by layer, for any query vectors: against the state of a model that has just read the
    document."""
    model, ids = make_model("llama", kind, dtype=torch.float64, sink_tokens=0), tokens(1, 39)
    bank = fill(tmp_path / "bank", model, [ids])
    here = memory_cache(model)
    read_in_pieces(model, ids, here)
    there = memory_cache(model, LongTermConfig(longterm_store=store), bank)
    read_in_pieces(model, tokens(1, 2), there)
    for attn, near, far in zip(mechanisms(model), states(here), states(there), strict=True):
        one = isinstance(attn, FastMemoryKeyedAttention)
        shape = (1, 5, 1, attn.index_size) if one else (1, 5, attn.num_heads, attn.head_dim)
        q = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        beyond = torch.full((1, 5), 39 + 6)  # every chunk of the document lies outside the window
        chunks, read = read_from(attn, near, q, beyond)
        banked, banked_read = read_from(attn, far, q, torch.ones(1, 5, dtype=torch.long))
        assert far.banked == 13
        assert torch.equal(banked, chunks)
        checks.close(banked_read, read)


@pytest.mark.parametrize("kind", MEMORIES)
def test_documents_follow_each_other(kind: str, tmp_path: Path) -> None:
    model = make_model("llama", kind)
    documents = [tokens(1, count, seed=count) for count in DOCUMENTS]
    bank = fill(tmp_path / "bank", model, documents)
    assert [d.chunks for d in bank.documents()] == [count // 3 for count in DOCUMENTS]
    alone = [fill(tmp_path / str(n), model, [ids]) for n, ids in enumerate(documents)]
    empty = [attn.initial_state(1) for attn in mechanisms(model)]
    parts = [one.layers(empty) for one in alone]
    for layer, whole in enumerate(bank.layers(empty)):
        assert whole.chunks == sum(count // 3 for count in DOCUMENTS)
        for name, values in whole.summaries.items():
            assert torch.equal(values, torch.cat([part[layer].summaries[name] for part in parts]))
        for name, records in whole.records.items():
            chunk = torch.randperm(whole.chunks, generator=torch.Generator().manual_seed(0))
            found = records.read(chunk * 0, chunk, chunk * 0)
            starts = [0, 9, 13, 26]
            for j, record in zip(chunk.tolist(), found, strict=True):
                number = next(n for n, (a, b) in enumerate(pairwise(starts)) if a <= j < b)
                own = torch.tensor([j - starts[number]])
                assert torch.equal(
                    record, parts[number][layer].records[name].read(own * 0, own, own * 0)[0]
                )


@pytest.mark.parametrize("kind", MEMORIES)
@torch.no_grad()
def test_what_is_said_changes_with_what_was_read(kind: str, tmp_path: Path) -> None:
    """And is the same in one call as token by token, for several rows, cropped and chosen."""
    model, ids = make_model("llama", kind, dtype=torch.float64), tokens(2, 20, seed=5)
    bank = fill(tmp_path / "bank", model, [tokens(1, 40)])
    whole = model(ids, past_key_values=memory_cache(model, DISK, bank)).logits
    assert not torch.allclose(whole, model(ids).logits)
    cache = memory_cache(model, DISK, bank)
    parts = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20)]
    checks.close(torch.cat(parts, 1), whole)
    cache.crop(-9)
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    checks.close(model(ids[[1, 0, 1], 11:], past_key_values=cache).logits, whole[[1, 0, 1], 11:])


def test_another_models_bank_is_refused(tmp_path: Path) -> None:
    ours, other = make_model("llama", "mka"), make_model("llama", "mka", top_k=1)
    fill(tmp_path / "bank", ours, [tokens(1, 20)])
    with pytest.raises(InputError, match=r"of the model [0-9a-f]{12}; this model is [0-9a-f]{12}"):
        Bank(tmp_path / "bank", fingerprint(other))
    with torch.no_grad():
        next(ours.parameters()).view(-1)[0] += 1
    with pytest.raises(InputError, match="banks are not interchangeable"):
        Bank.create(tmp_path / "bank", fingerprint(ours))


def test_a_document_knows_whose_it_is(tmp_path: Path) -> None:
    """One of another model's bank, and one under another identity: both are damaged, whatever their
    checksums say."""
    ours, other = make_model("llama", "mka"), make_model("llama", "mka", top_k=1)
    banks = [
        fill(tmp_path / name, model, [tokens(1, 20)])
        for name, model in (("ours", ours), ("other", other))
    ]
    (document,), (foreign,) = (bank.documents() for bank in banks)
    shutil.rmtree(document.folder)
    shutil.copytree(foreign.folder, document.folder)
    with pytest.raises(InputError, match="is damaged: it is of another model"):
        banks[0].documents()
    foreign.folder.rename(foreign.folder.with_name("0123456789abcdef"))
    with pytest.raises(
        InputError, match=rf"is damaged: it is {foreign.folder.name} under another name"
    ):
        banks[1].documents()


def test_what_a_layer_keeps(tmp_path: Path) -> None:
    for kind, names in (
        ("mka", {"k", "v", "chunk_mean", "far_mean", "chunk_place"}),
        ("fmka", {"chunk_mean", "index_key"}),
    ):
        for windowed in (True, False) if kind == "fmka" else (True,):
            state = mechanisms(make_model("llama", kind, windowed))[0].initial_state(1)
            assert set(kept_stores(state)) == names
    assert file_name(7, "k") == "007.k"
    assert (
        Pieces([], [], state_form())
        .read(torch.empty(0).long(), torch.empty(0).long(), torch.empty(0).long())
        .shape
    )


def state_form() -> Any:
    from mka.memory.store import RecordForm

    return RecordForm(1, 2, 3, torch.float32)
