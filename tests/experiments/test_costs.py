"""What is observed on the trained models: costs by length, routers, once and no more than
needed."""

import json
from pathlib import Path

import pytest
import torch

from mka.attention import build_attention
from mka.errors import InputError
from mka.record.config import BenchmarkConfig, attention_options
from mka.record.results import read_costs, read_routing
from tiny_runs import TINY, Place

SHORT = ("--local_window", "8", "--chunk_size", "4")


def run(place: Place, *kinds: str) -> Path:
    assert place.bench(*SHORT, "--attention_type", *kinds).status == 0
    return place.folder / "run"


def test_costs_are_those_of_the_mechanism(place: Place) -> None:
    costs = read_costs(run(place, "mqa", "mka"))
    assert [(cost.name, cost.tokens) for cost in costs] == [
        (kind, TINY.sequence_length * count)
        for count in (1, 2, 4, 8, 16)
        for kind in ("mqa", "mka")
    ]
    config = BenchmarkConfig(local_window=8, chunk_size=4)
    for cost in costs:
        attn = build_attention(
            cost.name,
            hidden_size=TINY.hidden_size,
            num_heads=TINY.num_attention_heads,
            bias=True,
            **attention_options(cost.name, config),
        )
        assert cost.flops_per_token == attn.flops_per_token(cost.tokens)
        assert cost.state_bytes < 4 * TINY.hidden_size * 2 * cost.tokens + 4000
        assert cost.milliseconds > 0


def test_the_time_of_a_layer_is_the_median_of_its_turns(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter((3.0, 9.0, 2.0) * 5)
    monkeypatch.setattr("mka.experiments.costs.seconds", lambda *_: next(turns))
    assert [cost.milliseconds for cost in read_costs(run(place, "mqa"))] == [3000] * 5


def test_shares_are_a_distribution_over_layers_pieces_and_tokens(place: Place) -> None:
    folder = run(place, "mka", "fmka", "mha")
    assert read_routing(folder, "mha", 0) is None
    for kind in ("mka", "fmka"):
        routing = read_routing(folder, kind, 0)
        assert routing is not None
        assert routing.edges == list(range(0, TINY.sequence_length + 1, 2))
        assert len(routing.shares) == len(routing.entropy) == TINY.num_hidden_layers
        assert all(len(layer) == len(routing.edges) - 1 for layer in routing.shares)
        assert all(
            sum(shares) == pytest.approx(1, abs=2e-4)
            for layer in routing.shares
            for shares in layer
        )
        assert len(routing.text) == len(routing.served) == TINY.sequence_length
        assert all(sum(shares) == pytest.approx(1, abs=2e-4) for shares in routing.served)
        assert any(text.strip() for text in routing.text)
        assert routing.served[0][0] == pytest.approx(1 if kind == "mka" else routing.served[0][0])


def test_finished_models_are_not_loaded_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(place, "mka", "mha")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def never(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr("mka.experiments.costs.load", never)
    run(place, "mka", "mha")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_mechanism_that_is_added_is_measured_with_all_others(place: Place) -> None:
    run(place, "mka")
    costs = read_costs(run(place, "mqa"))
    assert {cost.name for cost in costs} == {"mka", "mqa"}


def test_results_are_complete_where_memory_is_too_small_for_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("mka.experiments.costs.measure", full)
    ended = place.bench("--attention_type", "mqa")
    assert ended.status == 0
    assert "Out of memory while measuring costs and routers; all results were saved" in ended.out
    assert [row["attention_type"] for row in place.rows()] == ["mqa"]
    assert not (place.folder / "run" / "costs.jsonl").exists()


def test_damaged_files_are_one_line(place: Place) -> None:
    folder = run(place, "mka")
    (folder / "manifest.json").unlink()  # or their checksums would speak first
    (folder / "costs.jsonl").write_text('{"name": "mka"}\n')
    with pytest.raises(InputError, match=r"costs\.jsonl is damaged"):
        read_costs(folder)
    (folder / "routing" / "mka-seed0.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match=r"mka-seed0\.json is damaged"):
        read_routing(folder, "mka", 0)
