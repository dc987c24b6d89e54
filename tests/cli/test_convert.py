"""mka convert: a pretrained model as a folder that everything loads, all of it or nothing."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)

import mka.models.loading
from checks_models import BACKBONES, LLAMA, shake
from memory_models import story
from mka import cli
from mka.cli.text import ConvertConfig, run_convert
from mka.data import load_tokenizer
from mka.models import convert, mechanisms
from mka.models.account import own_nbytes


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of transformers' own, with a tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = load_tokenizer("bpe", [story(seed) for seed in range(9)], 300)
    sizes: dict[str, Any] = LLAMA | {"vocab_size": tokenizer.vocab_size}
    shake(LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=tokenizer.eos_id))).save_pretrained(
        folder
    )
    tokenizer.save(folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["convert", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


SMALL = ("--local_window", 8, "--chunk_size", 4, "--top_k", 3)


def test_what_is_written_is_what_convert_makes(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new"
    status, out, err = run(
        capsys, "--model", pretrained, "--output", output, *SMALL, "--memory_layers", 2
    )
    assert (status, err) == (0, "")
    source = AutoModelForCausalLM.from_pretrained(pretrained)
    wanted = convert(source, "mka", local_window=8, chunk_size=4, top_k=3, memory_layers=2).eval()
    made = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = torch.randint(1, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(made(ids).logits, wanted(ids).logits)
    assert AutoTokenizer.from_pretrained(output)("the cat").input_ids
    kept = sum(p.numel() for p in source.parameters())
    added = sum(p.numel() for p in made.parameters()) - kept
    assert f"kept: {kept:,} parameters; added: {added:,}" in out
    assert "2 layers, 1 of them with a memory; window 8, sinks 4" in out
    nbytes = sum(attn.state_nbytes(1, 1024) for attn in mechanisms(made))
    assert f"{nbytes / 2**20:,.1f} MiB" in next(
        line for line in out.splitlines() if line.startswith("   1,024")
    )
    assert (
        cli.main(
            ["generate", "--model", str(output), "--prompt", "the cat", "--max_new_tokens", "3"]
        )
        == 0
    )
    assert cli.main(["verify", str(output)]) == 0


def test_the_models_own_cache_is_that_of_its_own_heads_and_windows(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against transformers' cache, which is asked for what it holds."""
    gemma = AutoModelForCausalLM.from_config(BACKBONES["gemma3"])
    llama = AutoModelForCausalLM.from_pretrained(pretrained)
    for model, tokens in ((gemma, 5), (gemma, 40), (llama, 40)):
        cache: Any = DynamicCache(config=model.config)
        model(torch.ones(1, tokens, dtype=torch.long), past_key_values=cache)
        held = sum(2 * layer.keys.numel() * 4 for layer in cache.layers)
        if (
            model is gemma and tokens == 40
        ):  # a sliding layer of transformers keeps one token less than its window
            held += 2 * 2 * 12 * 4
        assert own_nbytes(model, tokens) == held
    output = tmp_path / "mqa"
    _, out, _ = run(capsys, "--model", pretrained, "--output", output, "--attention_type", "mqa")
    assert out.splitlines()[3].split()[1:3] == [
        *f"{own_nbytes(llama, 1024) / 2**20:,.1f} MiB".split()
    ]
    again = AutoModelForCausalLM.from_pretrained(output)
    assert own_nbytes(again, 100) == sum(attn.state_nbytes(1, 100) for attn in mechanisms(again))


def test_the_dtype_that_is_asked_for(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new"
    output.mkdir()  # an empty folder is as good as none
    assert (
        run(capsys, "--model", pretrained, "--output", output, *SMALL, "--dtype", "bfloat16")[0]
        == 0
    )
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((output / "config.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attention_type", "mkaa"), "unknown attention_type 'mkaa'; .*nearest: 'mka'"),
        (("--attention_type", "mla"), "unknown attention_type 'mla'"),
        (("--local_window", 4, "--sink_tokens", 4), "sink_tokens is 4; local_window is 4"),
        (
            ("--local_window", "None", "--sink_tokens", 2),
            "sink_tokens is 2; there is no local_window",
        ),
        (
            ("--memory_layers", 3),
            "memory_layers is 3; allowed: 'all', every n-th layer by a number from 1 to 2",
        ),
        (("--memory_layers", 0, 2), "memory_layers is .0, 2.; allowed"),
        (("--attention_type", "gqa", "--memory_layers", 1), "this gqa has no memory"),
        (("--chunk_size", 0), "chunk_size is 0; it must be at least 1"),
        (("--mix", "jont"), "mix is 'jont'; allowed: joint, routed"),
        (("--model", "nowhere.gguf"), "there is no such file"),
    ],
)
def test_what_is_refused(
    arguments: tuple[object, ...],
    message: str,
    pretrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("--model", pretrained, "--output", tmp_path / "new", *arguments)
    status, out, err = run(capsys, *command)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_there_is_left_alone(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    status, _, err = run(capsys, "--model", pretrained, "--output", tmp_path, *SMALL)
    assert status == 2
    assert "it exists and is not empty" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_gguf_needs_its_package_and_must_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"no model")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        mka.models.loading.importlib.util,
        "find_spec",
        lambda name: None if name == "gguf" else real(name),
    )
    _, _, err = run(capsys, "--model", path, "--output", tmp_path / "new")
    assert "the package gguf is needed: pip install gguf" in err
    monkeypatch.setattr(
        mka.models.loading.importlib.util,
        "find_spec",
        lambda name: object() if name == "gguf" else real(name),
    )
    status, _, err = run(capsys, "--model", path, "--output", tmp_path / "new")
    assert status == 2
    assert "transformers cannot read it" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_killed_while_it_writes_nothing_is_there(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", fail)
    config = ConvertConfig(
        model=str(pretrained), output=str(tmp_path / "new"), local_window=8, chunk_size=4, top_k=3
    )
    with pytest.raises(KeyboardInterrupt):
        run_convert(config)
    assert not (tmp_path / "new").exists()
