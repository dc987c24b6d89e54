"""mka audit module: correct modules pass, each planted leak turns its own checks red; mka audit
original."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from mka import cli
from mka.attention import ATTENTION_TYPES
from mka.audit import original

LEAKY = "leaky_modules"


@pytest.fixture(autouse=True)
def leaky_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(__file__).parents[1] / "evaluation" / "leaky_modules.py"
    spec = importlib.util.spec_from_file_location(LEAKY, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, LEAKY, module)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["audit", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def results(out: str) -> dict[str, str]:
    rows = re.findall(r"^(\w+) +(pass|FAIL|note|n/a)  (.*)$", out, re.MULTILINE)
    return {check: result for check, result, _ in rows}


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_our_mechanisms_pass(kind: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = ATTENTION_TYPES[kind]
    options = {"gqa": ["num_kv_heads=1"], "mla": []}.get(kind, ["local_window=5"])
    options = [*options, "chunk_size=3"] if "mka" in kind else options
    status, out, _ = run(
        capsys, "module", f"{module.__module__}:{module.__name__}", "--hidden_size", 16,
        "--num_heads", 2, "--tokens", 20, "--dtype", dtype,
        *(["--options", *options] if options else []),
    )  # fmt: skip
    assert status == 0, out
    found = results(out)
    assert list(found) == ["gradient", "future", "NaN", "prefix", "padding", "batch", "decoding"]
    assert set(found.values()) <= {"pass", "note"}
    assert [check for check, result in found.items() if result == "note"] in ([], ["NaN"])
    assert out.splitlines()[-1] == "no leak found"


LEAKS = {
    "Causal": set(),
    "NoMask": {"gradient", "future", "prefix", "decoding"},
    "OneTooFar": {"gradient", "future", "prefix", "decoding"},
    "DetachedMean": {"future", "prefix", "padding"},
    "SmallMask": {"future"},
    "ScaledByLength": {"prefix"},
    "MaskIgnored": {"padding"},
    "BatchMean": {"batch"},
    "ForgetsItsState": {"decoding"},
}


@pytest.mark.parametrize("name", LEAKS)
def test_each_leak_turns_its_checks_red(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "module", f"{LEAKY}:{name}", "--hidden_size", 8, "--tokens", 12)
    failed = {check for check, result in results(out).items() if result == "FAIL"}
    assert failed == LEAKS[name], out
    assert status == bool(LEAKS[name])


@pytest.mark.parametrize(("name", "decoding"), [("of_gpt2", "pass"), ("CacheWrittenLate", "FAIL")])
def test_a_cache_of_transformers(
    name: str, decoding: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["module", f"{LEAKY}:{name}", "--hidden_size", 8, "--num_heads", 2, "--tokens", 12]
    call = ["--call", "attention_mask=null"] if name == "of_gpt2" else []
    status, out, err = run(capsys, *command, *call)
    found = results(out)
    assert found["decoding"] == decoding, out + err
    assert [check for check, result in found.items() if result == "FAIL"] == ["decoding"] * (
        decoding == "FAIL"
    )
    assert status == (decoding == "FAIL")


def test_the_pair_is_that_of_the_leak(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "module", f"{LEAKY}:OneTooFar", "--hidden_size", 8, "--tokens", 12)
    for output, source in re.findall(
        r"^(?:gradient|future) +FAIL .* output (\d+) from token (\d+)", out, re.MULTILINE
    ):
        assert int(source) == int(output) + 1


def test_torchs_own_attention_leaks_without_a_mask(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "module",
        "torch.nn:MultiheadAttention",
        "--hidden_size",
        8,
        "--num_heads",
        2,
        "--tokens",
        6,
    ]
    status, out, _ = run(capsys, *command, "--options", "batch_first=true")
    assert status == 1
    assert results(out)["padding"] == "pass"


BAD = {
    "module nothing --hidden_size 8": "module is 'nothing'; give package.module:Class",
    "module no.such:Thing --hidden_size 8": "no.such cannot be imported",
    "module torch.nn:Nothing --hidden_size 8": "torch.nn has no class or function 'Nothing'",
    "module torch.nn:Linear --hidden_size 8": "cannot be built without arguments: TypeError",
    "module torch.nn:Identity --hidden_size 8 --num_heads 2": (
        "num_heads is 2; torch.nn:Identity takes none of"
    ),
    "module torch.nn:Identity --hidden_size 0": "hidden_size is 0; it must be at least 1",
    "module torch.nn:Identity --hidden_size 8 --tokens 1": "tokens is 1; it must be at least 2",
    (
        "module torch.nn:Identity --hidden_size 8 --options bias"
    ): "options holds 'bias'; give NAME=VALUE",
    f"module {LEAKY}:NeedsMore --hidden_size 8": (
        "forward of NeedsMore needs 'rope'; give it by --call rope=VALUE"
    ),
    (
        f"module {LEAKY}:NeedsMore --hidden_size 8 --call x=1 rope=2"
    ): "forward of NeedsMore failed: TypeError",
    f"module {LEAKY}:Random --hidden_size 8": "two calls with one input differ",
    f"module {LEAKY}:Halves --hidden_size 8": (
        "forward of Halves gives (3, 32, 4) for an input of (3, 32, 8)"
    ),
    f"module {LEAKY}:not_a_module --hidden_size 8": "makes a str; it must be a torch.nn.Module",
    "module torch.nn:Identity --hidden_size 8 --dtype float16": "float16",
    "original --max_steps 0": "max_steps is 0; it must be at least 1",
    "original --dataset novel": "unknown dataset 'novel'",
    "original --sequence_length 1": "sequence_length is 1; it must be at least 2",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *command.split())
    assert status == 2
    assert BAD[command] in err
    assert len(err.splitlines()) == 1
    assert "no leak" not in out


def test_a_leak_goes_below_the_floor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four symbols in short rows: what takes minutes at 64 takes seconds here."""
    monkeypatch.setattr(original, "SYMBOLS", 4)
    monkeypatch.setattr(original, "UNIFORM_LENGTH", 8)
    config = original.Training(max_steps=300)
    loss = {
        protocol.name: original.on_uniform(protocol, config) for protocol in original.ON_UNIFORM
    }
    floor = math.log(4)
    assert loss["right"] > floor - 0.01
    assert loss["no causal mask"] < floor / 2
    assert loss["whole row mean"] < floor - 0.05


def test_original_prints_every_protocol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text(
            "\n\n".join(f"line {n} of {number} says so\nand so on" for n in range(200))
        )
    output = tmp_path / "audit.jsonl"
    command = [
        "original",
        "--max_steps",
        2,
        "--sequence_length",
        32,
        "--dataset",
        "text",
        "--text_path",
        text,
    ]
    status, out, _ = run(capsys, *command, "--output", output)
    assert status == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    names = ["right", "no causal mask", "whole row mean"]
    everything = [*names, "padding scored", "evaluated on train", "all four: the original"]
    assert [row["protocol"] for row in rows] == [
        *names,
        "no causal mask, whole row mean",
        *everything,
    ]
    assert all(row["perplexity"] == math.exp(row["loss"]) for row in rows)
    assert all(f"{row['loss']:.3f}" in out for row in rows)
    assert "ln 64 = 4.159" in out


def test_padding_is_filled_up_and_cut() -> None:
    rows = original.padded([original.np.array([1, 2]), original.np.arange(9)], 4, 7)
    assert rows.tolist() == [[1, 2, 7, 7, 7], [0, 1, 2, 3, 4]]


def test_packed_rows_are_one_stream() -> None:
    rows = original.packed([original.np.array([1, 2]), original.np.array([3, 4, 5])], 2, 7)
    assert rows.tolist() == [[1, 2, 7], [3, 4, 5]]


@pytest.mark.parametrize("protocol", original.ON_TEXT, ids=lambda protocol: protocol.name)
def test_what_is_trained_on_and_what_is_scored(
    protocol: original.Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows themselves: filled up or packed, of the validation split or of those that were
    trained on."""
    seen: dict[str, set[tuple[int, ...]]] = {}

    def rows_of(batches: list[Any]) -> set[tuple[int, ...]]:
        return {tuple(row) for batch in batches for row in batch.tolist()}

    def train_model(_protocol: Any, _size: int, _length: int, rows: Any, config: Any) -> None:
        seen["train"] = rows_of([rows(step) for step in range(config.max_steps)])

    def mean_loss(_model: Any, batches: list[Any]) -> float:
        seen["scored"] = rows_of(batches)
        return 0.0

    monkeypatch.setattr(original, "train_model", train_model)
    monkeypatch.setattr(original, "mean_loss", mean_loss)
    draws = original.np.random.default_rng(0)
    data = {
        split: [draws.integers(1, 99, 5) for _ in range(200)] for split in ("train", "validation")
    }
    original.on_text(protocol, original.Training(max_steps=5, sequence_length=12), data, 0)
    for rows in seen.values():
        assert all((row[5:] == (0,) * 8) == protocol.padding_scored for row in rows)
    assert (seen["scored"] <= seen["train"]) == protocol.evaluated_on_train
    assert protocol.evaluated_on_train or not seen["scored"] & seen["train"]
