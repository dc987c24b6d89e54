"""Mixed precision: what is chosen, that weights stay float32, and that an overflowing float16 step
changes nothing."""

import pytest
import torch

import checks_training as tiny
from mka.attention import ATTENTION_TYPES
from mka.distributed import Ranks
from mka.training import Precision, choose_precision, train
from mka.training.engine import TorchEngine
from mka.training.precision import PrecisionName

FLOAT16 = Precision("float16", "cpu")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_master_weights_stay_float32_and_the_loss_falls(kind: str, name: PrecisionName) -> None:
    model = tiny.tiny_model(kind)
    run = train(
        model,
        tiny.plan(steps=12, precision=Precision(name, "cpu"), learning_rate=6e-3),
        lambda: 0.0,
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert run.losses[-1] < run.losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_products_are_computed_in_half_precision(name: PrecisionName, dtype: torch.dtype) -> None:
    with Precision(name, "cpu").autocast():
        assert tiny.tiny_model()(tiny.batch_at(0)[:, :-1]).logits.dtype == dtype


def test_only_float16_is_scaled() -> None:
    assert FLOAT16.scaler().is_enabled()
    assert not Precision("bfloat16", "cpu").scaler().is_enabled()
    assert not tiny.FLOAT32.scaler().is_enabled()


class Overflowing(Precision):
    """A first scale at which every gradient overflows, and a second one at which none does."""

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-50)


def test_an_overflowing_step_is_counted_and_changes_nothing() -> None:
    model, seen = tiny.tiny_model(), []
    start = tiny.weights_of(model)
    plan = tiny.plan(steps=3, precision=Overflowing("float16", "cpu"))
    run = train(
        model,
        plan,
        lambda: 0.0,
        lambda run: seen.append((run.skipped_steps, tiny.weights_of(model))),
    )
    assert [skipped for skipped, _ in seen] == [1, 1, 1]
    assert run.skipped_steps == 1
    tiny.assert_same_bytes(seen[0][1], start)
    assert not torch.equal(seen[1][1]["transformer.wte.weight"], start["transformer.wte.weight"])


def test_after_an_overflow_the_optimizer_is_as_if_nothing_had_been() -> None:
    def one_good_step(after_an_overflow: bool) -> dict[str, torch.Tensor]:
        model, skipped = tiny.tiny_model(), []
        engine = TorchEngine(model, 1e-2, tiny.FLOAT32, Ranks())
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, backoff_factor=0.5)
        if after_an_overflow:
            engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11, backoff_factor=0.5)
        for overflow in [True, False] if after_an_overflow else [False]:
            engine.gradients([tiny.batch_at(0)])
            if overflow:
                parameter = model.get_parameter("transformer.wpe.weight")
                assert parameter.grad is not None
                parameter.grad[3] = torch.inf
            skipped.append(engine.step(1e-2))
        assert skipped == ([True, False] if after_an_overflow else [False])
        return tiny.weights_of(model)

    tiny.assert_same_bytes(one_good_step(True), one_good_step(False))


@pytest.mark.parametrize("capability", ["amx_bf16", "avx512_bf16", "bf16"])
def test_bfloat16_is_the_default_where_the_processor_has_it(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert choose_precision(tiny.CPU) == Precision("bfloat16", "cpu")


@pytest.mark.parametrize(
    "capabilities", [{}, {"avx512_bf16": False, "avx2": True, "amx_fp16": True}]
)
def test_float32_is_the_default_elsewhere(
    capabilities: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision(tiny.CPU) == Precision("float32", "cpu")
    assert choose_precision(tiny.CPU, bf16=True) == Precision("bfloat16", "cpu")
    assert choose_precision(tiny.CPU, fp16=True) == Precision("float16", "cpu")


@pytest.mark.parametrize(("native", "name"), [(True, "bfloat16"), (False, "float32")])
def test_cuda_is_asked_for_bfloat16_of_its_own(
    native: bool, name: PrecisionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation
    )
    assert choose_precision(torch.device("cuda")) == Precision(name, "cuda")
