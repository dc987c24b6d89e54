"""Training and evaluation: a tiny model and its data, and the checks that the negative tests turn
red."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from checks import TOLERANCE
from mka.data import TextTokenizer, TokenizedCorpus, TokenSplit, evaluation_batches
from mka.distributed import Ranks
from mka.errors import InputError
from mka.evaluation import held_out_loss
from mka.experiments import benchmark
from mka.experiments.comparison import Comparison
from mka.models import build_model, gpt2_config, next_token_loss
from mka.record.config import BenchmarkConfig
from mka.storage import remove
from mka.training import Checkpoint, Checkpoints, Precision, TrainingPlan, TrainingRun, train
from mka.training.memory import PeakMemory

VOCAB, LENGTH = 64, 16
CPU = torch.device("cpu")
FLOAT32 = Precision("float32", "cpu")
MEBIBYTE = 2**20
OPTIONS = {kind: {"local_window": 6, "chunk_size": 2, "top_k": 2} for kind in ("mka", "fmka")}
"""With which every parameter of a tiny model has a gradient."""


def tiny_model(kind: str = "mha", seed: int = 0, **options: Any) -> GPT2LMHeadModel:
    config = gpt2_config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
    )
    return build_model(config, kind, seed, **options)


def batch_at(step: int, size: int = 8) -> Tensor:
    """Rows that count upwards from a random token, so that there is something to learn."""
    start = torch.randint(VOCAB, (size, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(LENGTH + 1)) % VOCAB


def plan(**changes: Any) -> TrainingPlan:
    values = {
        "batch_at": batch_at,
        "steps": 6,
        "accumulation": 1,
        "learning_rate": 3e-3,
        "precision": FLOAT32,
    }
    return TrainingPlan(**values | changes)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def held_out_split(num_tokens: int, low: int = 0, high: int = VOCAB, seed: int = 0) -> TokenSplit:
    """Tokens and byte counts made up from a seed."""
    draw = np.random.default_rng(seed)
    token_bytes = draw.integers(1, 9, num_tokens, dtype=np.uint32)
    return TokenSplit(draw.integers(low, high, num_tokens, dtype=np.uint16), token_bytes)


def assert_loss_is_of_the_text_alone(model: nn.Module, split: TokenSplit) -> None:
    """held_out_loss over the evaluation batches is the mean over the split's own tokens, each
    predicted once."""
    held = held_out_loss(model, evaluation_batches(split, LENGTH, 3), CPU)
    nats, count, num_bytes = 0.0, 0, 0
    ids = torch.from_numpy(split.ids.astype(np.int64))
    assert split.token_bytes is not None
    for start in range(0, len(ids) - LENGTH, LENGTH):
        with torch.no_grad():
            odds = model(ids[None, start : start + LENGTH]).logits[0].double().log_softmax(-1)
        for t in range(LENGTH):
            nats -= odds[t, ids[start + t + 1]].item()
            num_bytes += int(split.token_bytes[start + t + 1])
            count += 1
    tolerance = TOLERANCE[torch.float32]
    assert held.tokens == count
    assert abs(held.loss / (nats / count) - 1) <= tolerance, (
        f"loss is {held.loss}, that of the text {nats / count}"
    )
    assert abs(held.perplexity / math.exp(nats / count) - 1) <= tolerance * held.loss
    assert abs(held.bits_per_byte / (nats / math.log(2) / num_bytes) - 1) <= tolerance


class Recording(nn.Module):
    """Remembers which tokens it was shown; a uniform guess."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def forward(self, tokens: Tensor, use_cache: bool = False) -> Any:
        self.seen |= set(tokens.unique().tolist())
        return type("Output", (), {"logits": torch.zeros(*tokens.shape, VOCAB)})


# Each split has ids of its own, so that a token says which one it came from.
SPLITS = {"train": range(0, 20), "validation": range(20, 40), "test": range(40, 60)}


def comparison() -> Comparison:
    config = BenchmarkConfig(
        attention_type=("mha",), sequence_length=LENGTH, batch_size=2, max_steps=1
    ).resolved()
    splits = {name: held_out_split(200, ids.start, ids.stop) for name, ids in SPLITS.items()}
    tokenizer = TextTokenizer(Tokenizer(BPE()), 0, "made by hand")
    return Comparison(
        config=config,
        corpus=TokenizedCorpus(tokenizer, splits, "", {}),
        ranks=Ranks(),
        precision=FLOAT32,
        description={"global_batch_size": config.batch_size},
        environment={},
        folder=Path("nowhere"),
        console=Console(quiet=True),
    )


def assert_evaluates_on_validation(max_tokens: int | None = None) -> None:
    """What the benchmark shows a model when it evaluates comes from the validation split alone."""
    model = Recording()
    benchmark.evaluate(comparison(), model, max_tokens)
    assert model.seen
    for name, ids in SPLITS.items():
        assert name == "validation" or not model.seen & set(ids), (
            f"evaluation read the {name} split"
        )


def assert_earlier_memory_does_not_show() -> None:
    """A mechanism that needs a little is measured after one that needed much; what is needed
    meanwhile does show."""
    much = torch.ones(256 * MEBIBYTE, dtype=torch.uint8)
    del much
    memory = PeakMemory(CPU)
    little = torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
    del little
    allocated = memory.peak().allocated
    assert allocated is not None
    assert 60 * MEBIBYTE < allocated < 128 * MEBIBYTE, f"{allocated / MEBIBYTE:.0f} MiB for 64"


def some_checkpoint(step: int, size: int = 40, num_losses: int = 3) -> Checkpoint:
    """Made up from its step, with the numbers that a careless file format would lose."""
    generator = torch.Generator().manual_seed(step)
    awkward = torch.tensor([-0.0, math.nan, math.inf, -math.inf, 1e-45, 3.4028235e38, 1 / 3])
    weights = {
        "wte": torch.randn(size, 3, generator=generator).T,
        "awkward": awkward,
        "scalar": torch.tensor(0.1),
    }
    moments = {
        f"{name}.exp_avg": torch.randn(values.shape, generator=generator)
        for name, values in weights.items()
    }
    run = {
        "losses": [0.1 + 0.2, 1e-310, *[step / 7] * (num_losses - 2)],
        "curve": [{"step": 0, "train_loss": None}],
        "seconds": 1 / 3,
    }
    scaler = {"scale": 2.0**40, "_growth_tracker": 1999}
    return Checkpoint(step, weights, moments, {"run": run, "engine": {"scaler": scaler}})


def assert_same_checkpoint(a: Checkpoint | None, b: Checkpoint) -> None:
    """Bit for bit: NaN and the sign of zero included."""
    assert a is not None
    assert a.step == b.step
    for ours, theirs in ((a.weights, b.weights), (a.optimizer, b.optimizer)):
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            assert (values.dtype, values.shape) == (theirs[name].dtype, theirs[name].shape)
            assert values.numpy().tobytes() == theirs[name].numpy().tobytes(), name
    assert json.dumps(a.progress, sort_keys=True) == json.dumps(b.progress, sort_keys=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut": cut,
    "lengthened": lengthen,
    "emptied": empty,
    "flipped": flip_a_bit,
    "removed": Path.unlink,
}
CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json")


def assert_damage_is_noticed(folder: Path, name: str, damage: str) -> None:
    """The newest checkpoint is passed over, and named with its file; the one before it is used."""
    checkpoints, said = Checkpoints(folder, {"seed": 0}), []
    for step in (3, 6):
        checkpoints.save(some_checkpoint(step))
    DAMAGES[damage](folder / "step-00000006" / name)
    assert_same_checkpoint(checkpoints.newest(said.append), some_checkpoint(3))
    assert len(said) == 1, "nothing was said"
    assert said[0].startswith(f"checkpoint {folder / 'step-00000006'} is skipped: {name} ")


def assert_exports_the_step(place: Path) -> None:
    """Whether the checkpoint of a step is gone, or another one stands under its name: its weights
    are not exported, nor others in their place; going on does not take it either."""
    checkpoints, path, said = (
        Checkpoints(place / "mha-seed0", {"seed": 0}),
        place / "model.safetensors",
        [],
    )
    for step in (3, 6):
        checkpoints.save(some_checkpoint(step))
    remove(checkpoints.folder / "step-00000006")
    with pytest.raises(
        InputError, match=r"step-00000006 cannot be kept: manifest\.json cannot be read"
    ):
        checkpoints.export_weights(6, path)
    (checkpoints.folder / "step-00000003").rename(checkpoints.folder / "step-00000006")
    with pytest.raises(InputError, match="step-00000006 cannot be kept: it is of step 3"):
        checkpoints.export_weights(6, path)
    assert not path.exists()
    assert checkpoints.newest(said.append) is None
    assert said == [
        f"checkpoint {checkpoints.folder / 'step-00000006'} is skipped: it is of step 3"
    ]


@dataclass(frozen=True)
class Trained:
    """What must not depend on an interruption. `rest`: losses, curve and counts, without what a
    clock measured."""

    weights: dict[str, Tensor]
    rest: dict[str, Any]


def trained(
    kind: str,
    plan: TrainingPlan,
    checkpoints: Checkpoints | None = None,
    on_step: Callable[[TrainingRun], None] = lambda run: None,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """A tiny model after such a training; its held-out loss is that of rows it is not trained
    on."""
    model = tiny_model(kind, **OPTIONS.get(kind, {}))

    def look() -> float:
        model.eval()
        with torch.no_grad(), plan.precision.autocast():
            return next_token_loss(model, batch_at(999)).item()

    run = train(model, plan, look, on_step, checkpoints, say)
    rest = asdict(run)
    rest["curve"] = [point | {"seconds": None} for point in rest["curve"]]
    return Trained(weights_of(model), rest | {"seconds": None})


class PowerCut(Exception):
    """Ends a training from outside of it."""


def stopping_after(step: int) -> Callable[[TrainingRun], None]:
    def on_step(run: TrainingRun) -> None:
        if len(run.losses) == step:
            raise PowerCut

    return on_step


def assert_goes_on_as_if_nothing_had_been(
    folder: Path, kind: str, plan: TrainingPlan, stops: Sequence[int], whole: Trained | None = None
) -> None:
    """Interrupted after each of `stops` and started again, a training ends with the same bytes."""
    whole = whole or trained(kind, plan)
    for stop in stops:
        with pytest.raises(PowerCut):
            trained(kind, plan, Checkpoints(folder, {"kind": kind}), stopping_after(stop))
    ended = trained(kind, plan, Checkpoints(folder, {"kind": kind}))
    assert_same_bytes(ended.weights, whole.weights)
    assert ended.rest == whole.rest
