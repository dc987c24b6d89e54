"""The blocks of a model keep one cache: a call is read by all of them, or nobody goes on with it
unawares."""

from pathlib import Path
from typing import Any

import pytest
import torch

import checks
import disks
from checks_models import make_model, tokens
from mka.errors import InputError
from mka.memory.bank import Bank
from mka.memory.options import LongTermConfig
from mka.models import fingerprint, mechanisms, memory_cache, read_in_pieces, states

MEMORIES = ("mka", "fmka")
every_memory = pytest.mark.parametrize("kind", MEMORIES)


def lengths(cache: Any) -> set[int]:
    return {length for state in states(cache) for length in state.lengths}


def bytes_of(model: Any, num_tokens: int) -> int:
    """What the stores of all blocks take for one row."""
    config = LongTermConfig(longterm_store="host")
    kept = [
        state
        for attn in mechanisms(model)
        for state in [attn.initial_state(1, longterm=where(config))]
    ]
    return sum(
        records.form.chunks(num_tokens // state.entries[name].every) * records.form.chunk_bytes
        for state in kept
        for name, records in state.stores.items()
    )


def where(config: LongTermConfig) -> Any:
    from mka.memory.places import LongTerm

    return LongTerm.of(config)


@every_memory
@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_budget_that_ends_in_the_middle_of_a_call(kind: str, store: Any, rows: int) -> None:
    """There is room for the first block alone: nothing is written, and a shorter call goes on."""
    model, ids = make_model("llama", kind, dtype=torch.float64), tokens(rows, 40)
    enough, more = bytes_of(model, 24), bytes_of(model, 40) - bytes_of(model, 24)
    config = LongTermConfig(longterm_store=store, longterm_gib=rows * (enough + 0.6 * more) / 2**30)
    cache = memory_cache(model, config)
    parts = [model(ids[:, :20], past_key_values=cache).logits]
    with pytest.raises(InputError, match=r"longterm_gib is .*; the long-term store holds"):
        model(ids[:, 20:], past_key_values=cache)
    assert lengths(cache) == {20}
    assert cache.get_seq_length() == 20
    parts.append(model(ids[:, 20:24], past_key_values=cache).logits)
    checks.close(torch.cat(parts, 1), model(ids[:, :24], use_cache=False).logits)


@every_memory
@torch.no_grad()
def test_a_budget_that_ends_in_the_first_call(kind: str) -> None:
    model, ids = make_model("llama", kind, dtype=torch.float64), tokens(1, 40)
    config = LongTermConfig(longterm_store="host", longterm_gib=0.6 * bytes_of(model, 40) / 2**30)
    cache = memory_cache(model, config)
    with pytest.raises(InputError, match="longterm_gib"):
        model(ids, past_key_values=cache)
    assert lengths(cache) == {0}
    checks.close(
        model(ids[:, :9], past_key_values=cache).logits, model(ids[:, :9], use_cache=False).logits
    )


@pytest.mark.parametrize("name", ["mka", "fmka"])
@torch.no_grad()
def test_a_disk_that_fills_up_in_the_middle(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = make_model("llama", name, dtype=torch.float64), tokens(1, 40)
    cache = memory_cache(
        model, LongTermConfig(longterm_store="disk", longterm_folder=str(tmp_path))
    )
    parts = [model(ids[:, :20], past_key_values=cache).logits]
    with monkeypatch.context() as patch:
        disks.full_after(patch, 1)  # room for the first of the files that grow, in the first block
        with pytest.raises(InputError, match="cannot hold the long-term store"):
            model(ids[:, 20:], past_key_values=cache)
    assert lengths(cache) == {20}
    parts.append(model(ids[:, 20:], past_key_values=cache).logits)
    checks.close(torch.cat(parts, 1), model(ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["mha", "gqa", "mla", *MEMORIES])
@pytest.mark.parametrize("seen", [0, 12])
@torch.no_grad()
def test_a_torn_cache_is_refused(kind: str, seen: int) -> None:
    """A call that ended between two blocks, by whatever error: going on would be silently wrong."""
    model, ids = make_model("llama", kind), tokens(2, 20)
    cache = memory_cache(model)
    if seen:
        model(ids[:, :seen], past_key_values=cache)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[0].mlp.register_forward_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, seen:], past_key_values=cache)
    hook.remove()
    for _ in range(2):
        with pytest.raises(
            InputError, match=rf"is torn.* layer 0 had seen 2\d tokens and layer 1 had seen {seen};"
        ):
            model(ids[:, :3], past_key_values=cache)


@pytest.mark.parametrize("kind", ["mha", "mla", *MEMORIES])
@torch.no_grad()
def test_an_error_in_the_last_block(kind: str) -> None:
    """All blocks have counted the call then, and the last one has not read it."""
    model, ids = make_model("llama", kind), tokens(2, 20)
    cache = memory_cache(model)
    model(ids[:, :12], past_key_values=cache)

    def interrupted(*_: Any) -> None:
        raise MemoryError

    hook = mechanisms(model)[-1].get_submodule("o_proj").register_forward_pre_hook(interrupted)
    with pytest.raises(MemoryError):
        model(ids[:, 12:], past_key_values=cache)
    hook.remove()
    with pytest.raises(InputError, match="is torn"):
        model(ids[:, 12:], past_key_values=cache)


@pytest.mark.parametrize("kind", ["mha", "mla", *MEMORIES])
@torch.no_grad()
def test_a_mask_that_takes_back_what_was_read(kind: str) -> None:
    """As after a batch of which one row ended early: the padding behind it was read as tokens."""
    model, ids = make_model("llama", kind), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :3] = 0
    cache = memory_cache(model)
    model(ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
    model(ids[:, 12:14], attention_mask=mask[:, :14], past_key_values=cache)
    mask[0, 10:12] = 0
    with pytest.raises(InputError, match="column 10 of row 0 is padding; it was read as a token"):
        model(ids[:, 14:], attention_mask=mask, past_key_values=cache)
    mask[0, 10:12] = 1
    model(ids[:, 14:], attention_mask=mask, past_key_values=cache)


@every_memory
@torch.no_grad()
def test_a_cache_that_is_cropped_and_chosen_is_not_torn(kind: str) -> None:
    model, ids = make_model("llama", kind, dtype=torch.float64), tokens(3, 30)
    mask = torch.arange(30) >= torch.tensor([[0], [7], [13]])
    cache = memory_cache(model, LongTermConfig(longterm_store="host"))
    model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
    cache.crop(-5)
    cache.batch_select_indices(torch.tensor([2, 0, 0]))
    chosen, kept = ids[[2, 0, 0]], mask[[2, 0, 0]]
    rest = model(chosen[:, 15:], attention_mask=kept, past_key_values=cache).logits
    checks.close(rest, model(chosen, attention_mask=kept, use_cache=False).logits[:, 15:])


@every_memory
@torch.no_grad()
def test_a_bank_is_read_in_the_dtype_that_it_was_written_in(kind: str, tmp_path: Path) -> None:
    """The keys of a bfloat16 model stay bfloat16 in its bank, and are read so."""
    model, ids = make_model("llama", kind, dtype=torch.bfloat16), tokens(1, 40)
    bank = Bank.create(tmp_path / "bank", fingerprint(model))
    cache = memory_cache(model, LongTermConfig(longterm_store="disk"))
    read_in_pieces(model, ids, cache)
    with bank.writing():
        bank.add("d", "d", 40, states(cache))
    far = memory_cache(model, LongTermConfig(longterm_store="disk"), bank)
    read_in_pieces(model, tokens(1, 2), far)
    for ours, theirs in zip(states(cache), states(far), strict=True):
        chunk = torch.arange(12)
        for store in ours.stores:
            assert torch.equal(
                ours.records(store).read(chunk * 0, chunk, chunk * 0),
                theirs.records(store).read(chunk * 0, chunk, chunk * 0),
            )
