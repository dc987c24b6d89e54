"""Several documents in one row, as transformers packs them: each is read as if it stood alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

import checks
from checks_models import make_model, tokens
from mka.errors import InputError
from mka.models import memory_cache

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
KINDS = ("gqa", "mla", "mka", "fmka")
LENGTHS = (9, 1, 14, 7)


def texts() -> list[torch.Tensor]:
    return [tokens(1, length, seed=length) for length in LENGTHS]


def packed(**options: Any) -> dict[str, Any]:
    collator = DataCollatorWithFlattening(return_tensors="pt", **options)
    return collator([{"input_ids": ids[0].tolist()} for ids in texts()])


def alone(model: Any) -> torch.Tensor:
    return torch.cat([model(ids).logits for ids in texts()], dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_family_keeps_documents_apart(family: str, kind: str) -> None:
    model, batch = make_model(family, kind, dtype=torch.float64), packed()
    output = model(batch["input_ids"], position_ids=batch["position_ids"])
    checks.close(output.logits, alone(model))
    assert output.past_key_values is None


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_documents_by_the_arguments_of_flash_attention(kind: str) -> None:
    model = make_model("llama", kind, dtype=torch.float64)
    batch = packed(return_flash_attn_kwargs=True)
    assert "cu_seq_lens_q" in batch
    labels = batch.pop("labels")
    checks.close(model(**batch).logits, alone(model))
    del batch["position_ids"]
    checks.close(model(**batch).logits, alone(model))
    assert labels.shape == (1, sum(LENGTHS))


@pytest.mark.parametrize("kind", ["gqa", "mka"])
@torch.no_grad()
def test_documents_with_a_mask_in_two_rows(kind: str) -> None:
    """Left padding before two documents, and a row of one."""
    model, ids = make_model("llama", kind, dtype=torch.float64), tokens(2, 12)
    mask = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])
    places = torch.tensor([[1, 1, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4], list(range(12))])
    logits = model(ids, attention_mask=mask, position_ids=places).logits
    checks.close(logits[:1, 3:7], model(ids[:1, 3:7]).logits)
    checks.close(logits[:1, 7:], model(ids[:1, 7:]).logits)
    checks.close(logits[1:], model(ids[1:]).logits)


@pytest.mark.parametrize("kind", ["gqa", "mka"])
def test_inside_a_trainer(kind: str, tmp_path: Path) -> None:
    """Its loss is that of the documents, and so is the first step's gradient."""
    model = make_model("llama", kind, dtype=torch.float64)
    data: Any = [{"input_ids": ids[0].tolist()} for ids in texts()]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = DataCollatorWithFlattening(return_tensors="pt")
    trainer = Trainer(model, arguments, data_collator=collator, eval_dataset=data)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids in texts():
        losses = torch.nn.functional.cross_entropy(
            model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
        )
        total, count = total + losses, count + ids.shape[1] - 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx((total / count).item(), rel=1e-6)
    batch = packed()
    weights = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(total / count, weights, allow_unused=True, materialize_grads=True)
    ours = torch.autograd.grad(
        model(**batch).loss, weights, allow_unused=True, materialize_grads=True
    )
    for a, b in zip(ours, wanted, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)  # transformers computes the loss in float32


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradient_checkpoints_keep_them_apart_too(checkpoint: bool) -> None:
    from mka.models.versions import checkpoint_blocks

    model, batch = make_model("llama", "mka", dtype=torch.float64), packed()
    before = model(**batch).loss
    model.train()
    if checkpoint:
        checkpoint_blocks(model)
    loss = model(**batch).loss
    assert loss.item() == pytest.approx(before.item(), abs=1e-12)
    loss.backward()


@torch.no_grad()
def test_what_is_refused() -> None:
    model, batch = make_model("llama", "mka"), packed()
    ids, places = batch["input_ids"], batch["position_ids"]
    for more in ({"use_cache": True}, {"past_key_values": memory_cache(model)}):
        with pytest.raises(InputError, match="a cache continues one"):
            model(ids, position_ids=places, **more)
    ends = torch.tensor([0, 9, 10, 24, 31], dtype=torch.int32)
    wrong = {
        "in different places": {
            "cu_seq_lens_q": torch.tensor([0, 9, 11, 24, 31]),
            "position_ids": places,
        },
        "must rise from 0 to the tokens of one row, which are 31": {
            "cu_seq_lens_q": torch.tensor([0, 9, 30])
        },
        r"must rise from 0": {"cu_seq_lens_q": torch.tensor([0, 9, 9, 31])},
    }
    for message, arguments in wrong.items():
        with pytest.raises(InputError, match=message):
            model(input_ids=ids, **arguments)
    with pytest.raises(InputError, match="in 2 rows"):
        model(input_ids=ids.expand(2, -1), cu_seq_lens_q=ends)


@torch.no_grad()
def test_a_compiled_model_says_that_it_cannot() -> None:
    torch.compiler.reset()
    model, batch = make_model("llama", "gqa"), packed()
    compiled = torch.compile(model, backend="eager")
    one = torch.arange(sum(LENGTHS))[None]
    checks.close(
        compiled(batch["input_ids"], position_ids=one, use_cache=False).logits,
        model(batch["input_ids"]).logits,
    )
    with pytest.raises(RuntimeError, match="a compiled model cannot keep them apart"):
        compiled(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
