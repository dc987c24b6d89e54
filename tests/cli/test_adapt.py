"""mka adapt: what is trained and what is not, the same bytes after an interruption, and nothing
half-written."""

import importlib.util
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import mka.experiments.adapting
from checks_models import GEMMA, LLAMA, shake
from memory_models import story
from mka import cli
from mka.data import load_tokenizer
from mka.experiments.adapting import PROJECTIONS
from mka.models import convert, mechanisms
from mka.models.weights import PRETRAINED
from mka.training import Teacher

LENGTH = 48
SMALL = ("--sequence_length", LENGTH, "--max_steps", 4, "--save_steps", 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders pretrained, mka, fmka and gemma3 (a memory in its second layer), and a text."""
    place = tmp_path_factory.mktemp("adapt")
    (place / "text.txt").write_text("\n".join(story(seed) for seed in range(40)), encoding="utf-8")
    tokenizer = load_tokenizer("bpe", [story(seed) for seed in range(9)], 300)
    sizes: dict[str, Any] = LLAMA | {"vocab_size": tokenizer.vocab_size}
    model = shake(LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=tokenizer.eos_id)))
    models = {"pretrained": model}
    for kind in ("mka", "fmka"):
        models[kind] = convert(model, kind, local_window=8, chunk_size=4, top_k=2)
    gemma: dict[str, Any] = (
        LLAMA | GEMMA | {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}
    )
    mixed = shake(AutoModelForCausalLM.from_config(Gemma3TextConfig(**gemma)))
    models["gemma3"] = convert(mixed, "mka", local_window=9, sink_tokens=3, chunk_size=4, top_k=2)
    for name, made in models.items():
        made.save_pretrained(place / name)
        tokenizer.save(place / name)
    return place


def run(
    capsys: pytest.CaptureFixture[str], place: Path, *arguments: object
) -> tuple[int, str, str]:
    """`mka adapt` on the text; a later --model or --text_path takes the place of an earlier one."""
    capsys.readouterr()
    status = cli.main(
        ["adapt", "--text_path", str(place / "text.txt"), *map(str, SMALL), *map(str, arguments)]
    )
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def changed(before: Path, after: Path) -> set[str]:
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    return {name for name, value in old.items() if not torch.equal(value, new[name])}


def after_attention(name: str) -> str:
    return name.partition(".attention.")[2]


@pytest.mark.parametrize("kind", ["mka", "fmka", "gemma3"])
def test_memories_alone_are_trained(
    kind: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new"
    status, out, err = run(capsys, place, "--model", place / kind, "--output", output)
    assert (status, err) == (0, "")
    names = changed(place / kind, output)
    assert "router" in {after_attention(name).partition(".")[0] for name in names}
    assert not [
        name
        for name in names
        if ".attention." not in name or after_attention(name).startswith(PRETRAINED)
    ]
    assert AutoTokenizer.from_pretrained(output)("the cat").input_ids
    count = sum(
        p.numel()
        for layer in mechanisms(AutoModelForCausalLM.from_pretrained(output))
        for name, p in layer.named_parameters()
        if not name.startswith(PRETRAINED)
    )
    assert f"trained: {count:,} parameters of memories, 0 of LoRA" in out
    for line in (
        r"full attention \d\.\d{4}, window and sinks",
        r"before \d\.\d{4} nats",
        r"after  \d\.\d{4} nats",
    ):
        assert re.search(line, out), out
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["new"]
    assert cli.main(["verify", str(output)]) == 0
    assert (
        cli.main(
            ["generate", "--model", str(output), "--prompt", "the cat", "--max_new_tokens", "3"]
        )
        == 0
    )


def test_lora_changes_the_projections_and_is_merged(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new"
    status, out, err = run(
        capsys, place, "--model", place / "mka", "--output", output, "--lora_r", 2
    )
    assert (status, err) == (0, "")
    names = changed(place / "mka", output)
    assert {after_attention(name).partition(".")[0] for name in names} >= {"router", *PROJECTIONS}
    assert not [name for name in names if ".attention." not in name]
    assert not re.search(r" 0 of LoRA", out)
    assert not (output / "adapter_config.json").exists()


@pytest.mark.parametrize("more", [(), ("--lora_r", 2)])
def test_interrupted_it_goes_on_to_the_same_weights(
    more: tuple[object, ...],
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("--model", place / "mka", *more, "--output")
    assert run(capsys, place, *command, tmp_path / "whole")[0] == 0
    ask, asked = Teacher.__call__, []

    def stop_in_the_third(self: Teacher, *args: Any) -> Tensor:
        asked.append(1)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return ask(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "__call__", stop_in_the_third)
        status, _, err = run(capsys, place, *command, tmp_path / "parts")
    assert status == 130
    assert "after step 3 of 4; run the same command again to resume" in err
    assert not (tmp_path / "parts").exists()
    status, _, err = run(capsys, place, *command, tmp_path / "parts", "--learning_rate", 1e-2)
    assert status == 2
    assert "is of another run: learning_rate is 0.0005 there, 0.01 here" in err
    status, out, _ = run(capsys, place, *command, tmp_path / "parts")
    assert status == 0
    assert "Resuming after step 3 of 4" in out
    assert not changed(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts.checkpoints").exists()


def test_the_text_itself_can_be_what_is_learned(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Teacher, "__call__", None)
    command = (
        "--model",
        place / "mka",
        "--output",
        tmp_path / "new",
        "--objective",
        "text",
        "--lora_r",
        4,
    )
    status, out, _ = run(
        capsys, place, *command, "--max_steps", 12, "--learning_rate", 3e-3, "--batch_size", 2
    )
    assert status == 0
    [before], [after] = (re.findall(rf"{word} +(\d\.\d+)", out) for word in ("before", "after"))
    assert float(after) < float(before)


def test_the_baselines_are_of_the_layer_with_a_memory(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    real = mka.experiments.adapting.convert
    monkeypatch.setattr(
        mka.experiments.adapting,
        "convert",
        lambda *args, **kw: made.append(kw) or real(*args, **kw),
    )
    command = ("--model", place / "gemma3", "--output", tmp_path / "new", "--max_steps", 1)
    assert run(capsys, place, *command)[0] == 0
    assert made == [
        {"num_kv_heads": 2, "sink_tokens": 3, "local_window": 9},
        {"num_kv_heads": 2, "sink_tokens": 0, "local_window": None},
    ]


def test_a_folder_may_be_called_as_a_tokenizer_is(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "mka", tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, place, "--model", "gpt2", "--output", "new", "--max_steps", 1)[0] == 0
    small = AutoModelForCausalLM.from_pretrained("gpt2")
    small.resize_token_embeddings(99)
    small.save_pretrained("small")
    AutoTokenizer.from_pretrained(place / "mka").save_pretrained("small")
    status, _, err = run(capsys, place, "--model", "small", "--output", "newer")
    assert status == 2
    said = r"model is 'small'; its tokenizer has \d+ tokens, but the model knows only 99"
    assert re.search(said, err)


def test_a_text_in_which_no_range_is_used_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mka.experiments.adapting.Task, "loss", lambda *_: 2.0)
    _, out, _ = run(
        capsys, place, "--model", place / "mka", "--output", tmp_path / "new", "--max_steps", 1
    )
    assert "2.0000 nats per token (full attention is no better than the window on this text)" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--model", "pretrained"),
            "its attention is llama, which has no memories; add them first: mka convert",
        ),
        (("--model", "nowhere"), "model is 'nowhere'"),
        (("--sequence_length", 12), "sequence_length is 12; it must be above .* together, 12"),
        (("--text_path", "nowhere.txt"), "nowhere.txt"),
        (("--lora_r", 0), "lora_r is 0; it must be at least 1"),
        (("--learning_rate", "nan"), "learning_rate is nan; it must be above 0"),
        (("--max_steps", 0), "max_steps is 0; it must be at least 1"),
        (("--batch_size", 0), "batch_size is 0; it must be at least 1"),
        (("--objective", "techer"), "objective is .techer."),
        (("--sequence_length", 10**6), "one block needs"),
        (("--output", ""), "output is .*; give a value, or leave --output out"),
    ],
)
def test_what_is_refused(
    arguments: tuple[object, ...],
    message: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    status, out, err = run(
        capsys, place, "--model", place / "mka", "--output", tmp_path / "new", *arguments
    )
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert not (tmp_path / "new").exists()


def test_a_window_that_is_not_there_a_full_folder_and_a_missing_package(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(
        AutoModelForCausalLM.from_pretrained(place / "pretrained"),
        "fmka",
        chunk_size=4,
        local_window=None,
    )
    whole.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(place / "mka").save_pretrained(tmp_path / "whole")
    _, _, err = run(capsys, place, "--model", tmp_path / "whole", "--output", tmp_path / "new")
    assert "it has no local_window, so its memories are never needed" in err
    _, _, err = run(capsys, place, "--model", place / "mka", "--output", tmp_path / "whole")
    assert "it exists and is not empty" in err
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else real(name)
    )
    _, _, err = run(
        capsys, place, "--model", place / "mka", "--output", tmp_path / "new", "--lora_r", 2
    )
    assert "lora_r is 2; LoRA needs the package peft: pip install peft" in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run(capsys, place, "--model", place / "mka", "--output", tmp_path / "new")
    assert status == 2
    assert "WORLD_SIZE is 2" in err
