"""What the models are really given: the same training text in the same order; to be judged on,
held-out text alone."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mka.data import BlockBatches, TokenizedCorpus, load_corpus, prepare_tokens
from mka.evaluation import held_out
from mka.experiments import benchmark
from mka.record.mechanisms import MECHANISMS
from mka.training import engine
from tiny_runs import TINY, Place


@dataclass
class Seen:
    """What one model was given: training batches, by optimizer step; and looks, each a list of
    (blocks, nats)."""

    model: nn.Module
    steps: list[list[Tensor]] = field(default_factory=lambda: [[]])
    looks: list[list[tuple[Tensor, float]]] = field(default_factory=list)

    @property
    def trained_on(self) -> Tensor:
        return torch.cat([part for step in self.steps for part in step])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Filled with one entry a model, in the order in which they ran."""
    models: list[Seen] = []
    loss, step, score = engine.next_token_loss, engine.TorchEngine.step, benchmark.held_out_loss
    make = engine.TorchEngine.__init__

    def of(model: nn.Module) -> Seen:
        if not models or models[-1].model is not model:
            models.append(Seen(model))
        return models[-1]

    def training_loss(model: nn.Module, blocks: Tensor, **options: Any) -> Tensor:
        of(model).steps[-1].append(blocks.clone())
        return loss(model, blocks, **options)

    def made(trainer: engine.TorchEngine, *args: Any) -> None:
        make(trainer, *args)
        assert trainer.objective is loss
        trainer.objective = training_loss

    def optimizer_step(trainer: engine.TorchEngine, learning_rate: float) -> bool:
        of(trainer.model).steps.append([])
        return step(trainer, learning_rate)

    def look(model: nn.Module, *rest: Any) -> Any:
        of(model).looks.append([])
        return score(model, *rest)

    def scored_loss(model: nn.Module, blocks: Tensor, **options: Any) -> Tensor:
        losses = loss(model, blocks, **options)
        of(model).looks[-1].append((blocks.clone(), losses.double().sum().item()))
        return losses

    monkeypatch.setattr(engine.TorchEngine, "__init__", made)
    monkeypatch.setattr(engine.TorchEngine, "step", optimizer_step)
    monkeypatch.setattr(benchmark, "held_out_loss", look)
    monkeypatch.setattr(held_out, "next_token_loss", scored_loss)
    return models


def tokens(place: Place) -> TokenizedCorpus:
    return prepare_tokens(load_corpus("text", [str(place.corpus)]), "bpe", TINY.vocab_size)


def blocks_of(place: Place, split: str) -> list[tuple[int, ...]]:
    ids, length = tokens(place).splits[split].ids, TINY.sequence_length
    return [
        tuple(map(int, ids[start : start + length + 1]))
        for start in range(0, len(ids) - length, length)
    ]


def as_tuples(blocks: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in blocks.tolist()]


def test_all_mechanisms_see_the_same_batches_in_the_same_order(
    place: Place, seen: list[Seen]
) -> None:
    assert place.bench().status == 0
    assert len(seen) == len(MECHANISMS)
    source = BlockBatches(
        tokens(place).splits["train"].ids, TINY.sequence_length, TINY.batch_size, seed=0
    )
    expected = torch.cat([source.at(step) for step in range(TINY.max_steps)])
    for model in seen:
        assert torch.equal(model.trained_on, expected)
    assert len({row["train_tokens"] for row in place.rows()}) == 1


def test_each_seed_has_an_order_of_its_own(place: Place, seen: list[Seen]) -> None:
    assert place.bench("--attention_type", "mha", "mka", "--seeds", 3, 4).status == 0
    mha_3, mka_3, mha_4, mka_4 = (model.trained_on for model in seen)
    assert torch.equal(mha_3, mka_3)
    assert torch.equal(mha_4, mka_4)
    assert not torch.equal(mha_3, mha_4)


def test_mechanisms_start_from_the_same_embeddings(
    place: Place, seen: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Tensor] = []
    train = benchmark.train

    def remember(model: nn.Module, *rest: Any, **options: Any) -> Any:
        starts.append(model.get_parameter("transformer.wte.weight").detach().clone())
        return train(model, *rest, **options)

    monkeypatch.setattr(benchmark, "train", remember)
    assert place.bench("--max_steps", 1, "--seeds", 7).status == 0
    assert len(starts) == len(MECHANISMS)
    assert all(torch.equal(start, starts[0]) for start in starts)


def test_an_optimizer_step_takes_batch_size_times_accumulation(
    place: Place, seen: list[Seen]
) -> None:
    assert (
        place.bench(
            "--attention_type", "mha", "--gradient_accumulation_steps", 3, output="parts"
        ).status
        == 0
    )
    assert place.bench("--attention_type", "mha", "--batch_size", 6, output="whole").status == 0
    parts, whole = seen
    *steps, rest = parts.steps
    assert len(steps) == TINY.max_steps
    assert not rest
    for step, whole_step in zip(steps, whole.steps, strict=False):
        assert [len(part) for part in step] == [TINY.batch_size] * 3
        assert torch.equal(torch.cat(step), torch.cat(whole_step))
    [row], [same] = place.rows("parts"), place.rows("whole")
    assert row["train_tokens"] == same["train_tokens"] == TINY.max_steps * 6 * TINY.sequence_length
    assert row["eval_loss"] == pytest.approx(same["eval_loss"], rel=1e-2)


def test_an_epoch_shows_every_block_of_the_train_split(place: Place, seen: list[Seen]) -> None:
    """Also those of a last step that the epoch does not fill: it goes on with the next epoch's
    first blocks."""
    blocks = blocks_of(place, "train")
    rows = next(rows for rows in range(40, 80) if len(blocks) % rows)
    assert place.bench("--attention_type", "mqa", "--batch_size", rows, "--epochs", 1).status == 0
    [model] = seen
    shown = as_tuples(model.trained_on)
    assert sorted(set(shown)) == sorted(set(blocks))
    assert len(shown) == rows * -(-len(blocks) // rows)
    assert sorted(shown[: len(blocks)]) == sorted(blocks), "once each, before any comes again"


def test_only_the_validation_split_is_evaluated(place: Place, seen: list[Seen]) -> None:
    assert place.bench("--attention_type", "mha", "fmka").status == 0
    validation, train = set(blocks_of(place, "validation")), set(blocks_of(place, "train"))
    assert not validation & train
    for model in seen:
        judged = {
            block for look in model.looks for blocks, _ in look for block in as_tuples(blocks)
        }
        assert judged == validation
        assert set(as_tuples(model.trained_on)) <= train


def test_the_rows_loss_is_over_all_of_the_eval_tokens(
    place: Place, seen: list[Seen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looks during training are shorter; the row's loss is none of them."""
    monkeypatch.setattr(benchmark, "LOOK_TOKENS", 2 * TINY.sequence_length)
    assert place.bench("--attention_type", "gqa").status == 0
    [model], [row] = seen, place.rows()
    sizes = [sum(len(blocks) for blocks, _ in look) * TINY.sequence_length for look in model.looks]
    assert sizes == [*[2 * TINY.sequence_length] * (len(sizes) - 1), TINY.eval_tokens]
    nats = sum(part for _, part in model.looks[-1])
    assert row["eval_loss"] == pytest.approx(nats / TINY.eval_tokens, rel=1e-12)
    assert row["eval_tokens"] == TINY.eval_tokens
    last_look = sum(part for _, part in model.looks[-2]) / (2 * TINY.sequence_length)
    assert row["eval_loss"] != pytest.approx(last_look, rel=1e-6)
