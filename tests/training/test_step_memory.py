"""What a step keeps in memory, and the advice when it does not fit."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import checks_training as tiny
from mka.models import build_model, checkpoint_blocks, gpt2_config
from mka.training.step_memory import StepMemory, activation_bytes, advice, is_out_of_memory
from tiny_runs import write_corpus

MIB = 2**20


def test_activations_are_what_autograd_keeps() -> None:
    """A model whose saved tensors can be counted by hand: two linear layers and a softmax
    cross-entropy."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(64, 8)
            self.head = torch.nn.Linear(8, 64, bias=False)

        def forward(self, tokens: torch.Tensor, use_cache: bool = False) -> object:
            return type("Output", (), {"logits": self.head(self.embed(tokens))})

    length = 16
    tokens = 8 * (length + 1)  # int64, one storage for inputs and targets
    hidden, log_odds, total_weight = 4 * length * 8, 4 * length * 64, 4
    assert (
        activation_bytes(Model(), length, nullcontext())
        == tokens + hidden + log_odds + total_weight
    )


@pytest.mark.parametrize("kind", ["mha", "mla", "fmka"])
def test_checkpointing_keeps_less(kind: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build_model(
        gpt2_config(vocab_size=64, max_position_embeddings=tiny.LENGTH, **sizes), kind
    )
    everything = activation_bytes(model, tiny.LENGTH, nullcontext())
    checkpoint_blocks(model)
    model.train()
    assert activation_bytes(model, tiny.LENGTH, nullcontext()) < 0.7 * everything


def test_what_is_shared_by_whom() -> None:
    model = torch.nn.Linear(100, 10, bias=False)
    sizes = {
        strategy: StepMemory.of(model, 7, 3, strategy, 4)
        for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp")
    }
    assert sizes["ddp"] == StepMemory(weights=4000, gradients=4000, optimizer=8000, activations=21)
    assert sizes["zero1"] == StepMemory(
        weights=4000, gradients=4000, optimizer=2000, activations=21
    )
    assert sizes["zero2"] == StepMemory(
        weights=4000, gradients=1000, optimizer=2000, activations=21
    )
    assert (
        sizes["zero3"]
        == sizes["fsdp"]
        == StepMemory(weights=1000, gradients=1000, optimizer=2000, activations=21)
    )


@pytest.mark.parametrize(
    ("rows", "parts", "expected"),
    [
        (8, 1, (4, 2)),
        (8, 3, (6, 4)),
        (3, 1, (1, 3)),
        (3, 2, (2, 3)),
        (7, 2, (2, 7)),
        (5, 4, (4, 5)),
    ],
)
def test_the_next_smaller_part_keeps_the_global_batch(
    rows: int, parts: int, expected: tuple[int, int]
) -> None:
    memory = StepMemory(weights=MIB, gradients=MIB, optimizer=2 * MIB, activations=3 * 2**30)
    line = advice(RuntimeError("you tried to allocate 2097152 bytes."), memory, rows, parts)
    assert line == (
        "out of memory (asked for 2.0 MiB more): weights 1.0 MiB, gradients 1.0 MiB, AdamW "
        "2.0 MiB, activations "
        f"3.00 GiB for {rows} rows; try --batch_size {expected[0]} "
        f"--gradient_accumulation_steps {expected[1]}, which "
        "keeps the global batch"
    )
    assert expected[0] * expected[1] == rows * parts


def test_a_single_row_cannot_be_cut() -> None:
    memory = StepMemory(weights=MIB, gradients=MIB, optimizer=2 * MIB, activations=MIB)
    line = advice(MemoryError(), memory, 1, 8)
    assert line.endswith(
        "activations 1.0 MiB for 1 row; try --gradient_checkpointing or a shorter --sequence_length"
    )


def test_which_errors_are_of_memory() -> None:
    assert is_out_of_memory(
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    )
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)


LIMITED = """
import resource, sys
from mka import cli
import mka.experiments
status = open("/proc/self/statm").read().split()
limit = int(status[0]) * 4096 + 700 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(cli.bench())
"""


def test_a_training_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
    """A real process whose address space is limited."""
    text = write_corpus(tmp_path / "text")
    command = [
        sys.executable,
        "-c",
        LIMITED,
        "--dataset",
        "text",
        "--text_path",
        text,
        "--attention_type",
        "mha",
    ]
    command += [
        "--sequence_length",
        "128",
        "--batch_size",
        "192",
        "--max_steps",
        "1",
        "--output_dir",
        "run",
    ]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PATH": ""}
    ended = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert ended.returncode == 1, ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("mka: mha, seed 0: out of memory (asked for ")
    assert "activations" in line
    assert line.endswith(
        "; try --batch_size 96 --gradient_accumulation_steps 2, which keeps the global batch"
    )
    assert not (tmp_path / "run" / "results.jsonl").exists()
