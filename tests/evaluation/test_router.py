"""mka eval router against routers whose answer is known."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memory_models import save_model, story
from mka import cli
from mka.evaluation import routing_of
from mka.memory.router import Router
from mka.models import mechanisms
from mka.models.loading import load

KINDS = ("mka", "fmka")
ROUTED: dict[str, Any] = {"mka": {"mix": "routed"}}
"""The mechanisms whose router gives weights."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    for number in range(9):
        (place / f"{number}.txt").write_text(story(number, 600))
    return place


def changed(folder: Path, kind: str, change: Callable[[Router], None]) -> Path:
    """A saved model whose routers were changed."""
    save_model(folder, kind, **ROUTED.get(kind, {}))
    model, _ = load(str(folder))
    with torch.no_grad():
        for attn in mechanisms(model):
            for module in attn.modules():
                if isinstance(module, Router):
                    change(module)
    model.save_pretrained(folder)
    return folder


def leaning(level: int) -> Callable[[Router], None]:
    def change(router: Router) -> None:
        router.output.weight.zero_()
        router.output.bias.copy_(torch.tensor([60.0 * (number == level) for number in range(3)]))

    return change


def even(router: Router) -> None:
    router.output.weight.zero_()
    router.output.bias.zero_()


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["eval", "router", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def found(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: object
) -> tuple[dict[str, Any], str]:
    output = tmp_path / "router.json"
    command = [
        "--model",
        folder,
        "--dataset",
        "text",
        "--text_path",
        text,
        "--split",
        "train",
        "--length",
        150,
    ]
    status, out, err = run(
        capsys, *command, "--rows", 3, "--batch_size", 2, "--output", output, *more
    )
    assert status == 0, err
    return json.loads(output.read_text()), out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_router_that_leans_on_one_level(
    kind: str, level: int, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = found(changed(tmp_path / "model", kind, leaning(level)), text, tmp_path, capsys)
    for number, layer in enumerate(rows["layers"]):
        if (
            level != 2
        ):  # at the first tokens there is no chunk to lean on, and the others share evenly
            assert layer["shares"][level] == pytest.approx(1, abs=1e-6)
            assert layer["entropy"] == pytest.approx(0, abs=1e-6)
            assert f"warning: layer {number} has collapsed onto L{level + 1}" in out
        assert layer["by_position"]["64"][level] == pytest.approx(1, abs=1e-6)
        assert sum(layer["shares"]) == pytest.approx(1, abs=1e-6)
    unused = [name for number, name in enumerate(("L1", "L2", "L3")) if number != level]
    if level != 2:
        assert all(abs(rows["knock_out"][name]["value"]) < 1e-6 for name in unused)
    assert abs(rows["knock_out"][f"L{level + 1}"]["value"]) > 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_even_router(
    kind: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = found(changed(tmp_path / "model", kind, even), text, tmp_path, capsys)
    for layer in rows["layers"]:
        assert layer["entropy"] == pytest.approx(1, abs=1e-5)
        assert layer["by_position"]["64"] == pytest.approx([1 / 3] * 3, abs=1e-5)
    assert "warning" not in out


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_without_a_choice_has_not_collapsed(
    kind: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model", kind, session_decay=None, top_k=0)
    rows, out = found(folder, text, tmp_path, capsys)
    assert [layer["entropy"] for layer in rows["layers"]] == [None] * len(rows["layers"])
    assert "no choice" in out
    assert "warning" not in out
    model, _ = load(str(folder))
    assert set(routing_of(model, [torch.arange(40).view(2, 20)])["entropy"]) == {None}


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_each_piece_and_of_each_token_of_the_first_row(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(str(save_model(tmp_path / "model", kind, std=1.0, **ROUTED.get(kind, {}))))
    ids = torch.randint(300, (3, 32), generator=torch.manual_seed(0))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = Router.weights

    def note(router: Router, q: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        mix = real(router, q, exists)
        seen.append((mix, exists.expand(mix.shape)))
        return mix

    monkeypatch.setattr(Router, "weights", note)
    found = routing_of(model, [ids[:2], ids[2:]], pieces=4)
    layers = len(mechanisms(model))
    for number, shares in enumerate(found["shares"]):
        mix, exists = (
            torch.cat(parts) for parts in zip(seen[number], seen[layers + number], strict=True)
        )
        for piece, share in enumerate(shares):
            span = slice(8 * piece, 8 * piece + 8)
            choice = exists[:, span].sum(-1) > 1
            assert share == pytest.approx(mix[:, span][choice].mean(0).tolist(), abs=1e-4)
    first_row = torch.stack([mix[0] for mix, _ in seen[:layers]]).mean(0)
    assert torch.tensor(found["served"]) == pytest.approx(first_row, abs=1e-4)
    assert found["edges"] == [0, 8, 16, 24, 32]


def biased(level: int, head: int) -> Callable[[Router], None]:
    def change(router: Router) -> None:
        router.output.weight.zero_()
        router.output.bias.copy_(torch.tensor([-60.0, -60.0, -60.0]).repeat(router.num_heads or 1))
        router.output.bias[::3] = 0
        router.output.bias[3 * head + level] = 60

    return change


@pytest.mark.parametrize(("level", "head"), [(1, 0), (2, 3)])
def test_the_mass_of_each_level_by_head(
    level: int, head: int, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of joint mka: one head leans on one level, the others read the window alone."""
    folder = save_model(tmp_path / "joint", "mka")
    model, _ = load(str(folder))
    with torch.no_grad():
        for attn in mechanisms(model):
            biased(level, head)(attn.get_submodule("router"))  # pyright: ignore[reportArgumentType]
    model.save_pretrained(folder)
    rows, out = found(folder, text, tmp_path, capsys)
    assert "by head" in out
    for layer in rows["layers"]:
        for number, mass in enumerate(layer["by_head"]):
            assert sum(mass) == pytest.approx(1, abs=1e-5)
            assert mass[0] == pytest.approx(0 if number == head else 1, abs=0.15)
        whole = np.mean(layer["by_head"], axis=0).tolist()
        assert layer["shares"] == pytest.approx(whole, abs=1e-5)
    assert abs(rows["knock_out"][f"L{level + 1}"]["value"]) > 1e-6
    assert abs(rows["knock_out"][f"L{4 - level}"]["value"]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_distances_and_time_constants(
    kind: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, _ = found(changed(tmp_path / "model", kind, even), text, tmp_path, capsys)
    model, _ = load(str(tmp_path / "model"))
    for attn, layer in zip(mechanisms(model), rows["layers"], strict=True):
        session: Any = attn.session
        constants = -1 / np.log(torch.sigmoid(session.decay_logit.detach().double()).numpy())
        assert layer["time_constants"] == pytest.approx(
            np.quantile(constants, [0.1, 0.5, 0.9]).tolist(), rel=1e-6
        )
        median, far = layer["distance"]
        assert (attn.local_window or 0) <= median <= far < 150


def test_a_model_without_a_router(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "mha", "mha")
    status, _, err = run(
        capsys, "--model", tmp_path / "mha", "--dataset", "text", "--text_path", text
    )
    assert status == 2
    assert "the model has no router; mka and fmka have one" in err
    assert len(err.splitlines()) == 1


def test_too_little_text(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "mka", "mka")
    command = [
        "--model",
        tmp_path / "mka",
        "--dataset",
        "text",
        "--text_path",
        text,
        "--rows",
        100000,
    ]
    status, _, err = run(capsys, *command)
    assert status == 2
    assert "rows is 100000" in err


@pytest.mark.parametrize(("option", "least"), [("length", 2), ("rows", 1), ("batch_size", 1)])
def test_bad_numbers(option: str, least: int, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--model", "none", f"--{option}", 0)
    assert status == 2
    assert f"{option} is 0; it must be at least {least}" in err
