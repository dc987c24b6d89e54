"""A teacher's loss is KL(teacher || model), whatever the pieces, and trains the model alone."""

from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

import checks_training as tiny
import mka.training.teacher
from checks import TOLERANCE
from mka.training import Teacher

IDS = torch.randint(0, 50, (2, 13), generator=torch.Generator().manual_seed(0))


def pair() -> tuple[Any, Any]:
    models = []
    for seed in range(2):
        model = tiny.tiny_model("mka").double().eval()
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        models.append(model)
    return models[0], models[1]


@pytest.mark.parametrize("piece", [5, 24, 512])
def test_it_is_the_divergence_of_what_is_predicted(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mka.training.teacher, "PIECE", piece)
    model, other = pair()
    loss = Teacher(other)(model, IDS)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad is None for p in other.parameters())
    model.zero_grad()
    with torch.no_grad():
        wanted = other(IDS[:, :-1]).logits.flatten(0, 1)
    logits = model(IDS[:, :-1]).logits.flatten(0, 1)
    plain = kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    plain.backward()
    tolerance = TOLERANCE[torch.float32]  # probabilities are float32
    torch.testing.assert_close(loss.double(), plain, atol=tolerance, rtol=tolerance)
    assert found
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(
                found[name], p.grad, atol=tolerance, rtol=tolerance, msg=name
            )


def test_a_model_has_nothing_to_learn_of_itself() -> None:
    model, _ = pair()
    assert Teacher(pair()[0])(model, IDS).item() == pytest.approx(0, abs=1e-6)
