"""A number that is not finite is found in the layer where it arose, before it reaches a weight."""

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import checks_training as tiny
from checks_ranks import models_of
from mka.distributed import Ranks
from mka.training import Checkpoints, NonFiniteLoss, Precision, train
from mka.training.nonfinite import explain, first_nonfinite_layer
from thread_ranks import all_returned, on_ranks

LAYERS = [
    ("mha", "transformer.wte"),
    ("mha", "transformer.wpe"),
    ("mha", "transformer.h.0.ln_1"),
    ("mha", "transformer.h.1.attn.attention.v_proj"),
    ("mha", "transformer.h.1.attn.attention.o_proj"),
    ("mha", "transformer.h.0.mlp.c_fc"),
    ("mha", "transformer.h.1.mlp.c_proj"),
    ("mha", "transformer.ln_f"),
    ("mka", "transformer.h.1.attn.attention.q_proj"),
    ("mka", "transformer.h.0.attn.attention.router.hidden"),
    ("fmka", "transformer.h.0.attn.attention.k_proj"),
    ("fmka", "transformer.h.1.attn.attention.router.output"),
    ("fmka", "transformer.h.1.ln_2"),
]
HERE = "the first layer whose output is not finite is "


def planted(kind: str, layer: str, value: float, seed: int = 0) -> nn.Module:
    """A tiny model with one number of one layer spoilt; in an embedding, everything of one
    column."""
    model = tiny.tiny_model(kind, seed, **tiny.OPTIONS.get(kind, {}))
    weight = model.get_submodule(layer).get_parameter("weight")
    with torch.no_grad():
        if layer.endswith(("wte", "wpe")):
            weight[:, 0] = value
        else:
            weight.view(-1)[3] = value
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "layer"), LAYERS)
def test_the_first_layer_is_named_and_nothing_is_trained(
    kind: str, layer: str, value: float
) -> None:
    model = planted(kind, layer, value)
    before = {name: values.numpy().tobytes() for name, values in tiny.weights_of(model).items()}
    with pytest.raises(NonFiniteLoss) as stopped:
        train(model, tiny.plan(), lambda: 0.0)
    # An infinity times a product of its own sign may stay one, and that of another sign is nan.
    assert str(stopped.value) in {
        f"the loss at step 1 is {loss}; {HERE}{layer}; try a lower --learning_rate"
        for loss in ("nan", "inf")
    }
    assert {
        name: values.numpy().tobytes() for name, values in tiny.weights_of(model).items()
    } == before
    assert not any(module._forward_hooks for module in model.modules()), (
        "the hooks are taken away again"
    )


@pytest.mark.parametrize("part", [0, 1, 3])
def test_the_part_of_a_step_that_is_spoilt_is_the_one_looked_at(part: int) -> None:
    """One token alone has no finite embedding, and one part alone has that token."""
    model = tiny.tiny_model()

    def batch_at(step: int) -> Tensor:
        rows = tiny.batch_at(step).clamp(max=tiny.VOCAB - 2)
        rows[2 * part + 1, 5] = tiny.VOCAB - 1
        return rows

    with torch.no_grad():
        model.get_parameter("transformer.wte.weight")[tiny.VOCAB - 1] = math.nan
    # The head shares its weights with the embedding, so that the other parts are spoilt too, but at
    # the head.
    parts = batch_at(0).chunk(4)
    layers = [first_nonfinite_layer(model, tokens, nullcontext()) for tokens in parts]
    assert layers == ["transformer.wte" if number == part else "lm_head" for number in range(4)]
    losses = [torch.tensor(math.nan if number == part else 1.0) for number in range(4)]
    assert explain(model, parts, losses, nullcontext(), Ranks()) == f"{HERE}transformer.wte"


def test_what_overflows_in_float16_alone_is_found_under_float16() -> None:
    model = tiny.tiny_model()
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.weight").fill_(3e4)
    train(model, tiny.plan(steps=1), lambda: 0.0)
    model = tiny.tiny_model()
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.bias").fill_(7e4)
    layer = rf"^the loss at step 1 is (nan|inf); {HERE}transformer\.h\.1\.mlp\.c_fc; "
    with pytest.raises(NonFiniteLoss, match=layer):
        train(model, tiny.plan(precision=Precision("float16", "cpu")), lambda: 0.0)


@pytest.mark.parametrize("spoilt", [0, 1, 2])
def test_the_rank_is_named_where_there_are_several(spoilt: int) -> None:
    models = models_of(3)
    models[spoilt] = planted("mha", "transformer.h.0.mlp.c_fc", math.nan)

    def work(ranks: Ranks) -> str:
        model = models[ranks.rank]
        with pytest.raises(NonFiniteLoss) as stopped:
            train(
                model,
                tiny.plan(ranks=ranks, batch_at=lambda step: tiny.batch_at(step, 6)),
                lambda: 0.0,
            )
        return str(stopped.value)

    line = (
        f"the loss at step 1 is nan; {HERE}transformer.h.0.mlp.c_fc (rank {spoilt}); try a "
        "lower --learning_rate"
    )
    assert all_returned(on_ranks(3, work)) == [line] * 3


def test_the_checkpoint_before_it_stays_the_newest(tmp_path: Path) -> None:
    """A training that diverges at the fifth step leaves the weights of the fourth."""
    checkpoints, model = Checkpoints(tmp_path / "c", {}), tiny.tiny_model()

    def batch_at(step: int) -> Tensor:
        if step == 4:
            with torch.no_grad():
                model.get_parameter("transformer.ln_f.bias")[0] = math.nan
        return tiny.batch_at(step)

    with pytest.raises(NonFiniteLoss, match=r"^the loss at step 5 is nan; "):
        train(
            model, tiny.plan(batch_at=batch_at, save_steps=1), lambda: 0.0, checkpoints=checkpoints
        )
    found = checkpoints.newest(lambda line: None)
    assert found is not None
    assert found.step == 4
    assert all(values.isfinite().all() for values in found.weights.values())
