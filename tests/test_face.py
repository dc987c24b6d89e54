"""The Python face: lazy, the same functions that the commands call; and names that have moved."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import mka
from memory_models import save_model, story
from mka import cli, moved
from mka.attention import ATTENTION_TYPES, options_of
from mka.audit import Finding
from mka.cli.text import ConvertConfig
from mka.data import load_corpus
from mka.evaluation import Perplexity
from mka.memory import options
from mka.models.loading import load
from mka.record.config import BenchmarkConfig
from mka.record.mechanisms import MECHANISMS


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the packages a fresh interpreter has imported after the code."""
    found = f"[name for name in {names!r} if name in sys.modules]"
    code += f"\nimport json, sys; print(json.dumps({found}))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


HEAVY = ("torch", "transformers", "altair", "vl_convert", "matplotlib", "rich")


def test_importing_loads_nothing() -> None:
    assert loaded("import mka", (*HEAVY, "numpy", "tyro")) == []


@pytest.mark.parametrize("command", ["--help", "bench --help", "memory --help", "eval nothing"])
def test_a_command_that_only_answers_loads_nothing(command: str) -> None:
    code = f"from mka.cli import main\ntry: main({command.split()!r})\nexcept SystemExit: pass"
    assert loaded(code, HEAVY) == []


def test_every_public_name_is_there_and_found_by_dir() -> None:
    assert set(mka.__all__) == set(mka.FACE) <= set(dir(mka))
    assert all(getattr(mka, name) is not None for name in mka.__all__)
    assert mka.build_attention("mha", hidden_size=8, num_heads=2).num_heads == 2
    with pytest.raises(AttributeError, match="has no attribute 'bild_attention'"):
        importlib.import_module("mka").__getattr__("bild_attention")


def test_a_leak_test_in_python() -> None:
    findings = [
        *mka.audit.audit_module(mka.build_attention("mka", hidden_size=16, num_heads=2), 16)
    ]
    assert all(isinstance(finding, Finding) for finding in findings)
    assert {finding.result for finding in findings} <= {"pass", "note"}
    assert len(findings) == 7
    with pytest.raises(ValueError, match="hidden_size is None; give the width"):
        next(mka.audit.audit_module(torch.nn.Linear(2, 2)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "mka", "mka")
    (folder / "text").mkdir()
    for number in range(4):
        (folder / "text" / f"{number}.txt").write_text(story(number, 300))
    return folder


def test_perplexity_of_tokens_is_what_the_command_prints(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--dataset", "text", "--text_path", str(saved / "text"), "--split", "train"]
    output = saved / "found.json"
    words = ["eval", "perplexity", "--model", str(saved / "mka"), *where, "--output", str(output)]
    assert cli.main([*words, "--max_length", "64"]) == 0
    found = json.loads(output.read_text())
    model, tokenizer = load(str(saved / "mka"))
    corpus = load_corpus("text", (str(saved / "text"),))
    texts = [text for _, text in corpus.documents["train"]]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    scores = mka.evaluate.perplexity(model, ids, begin=tokenizer.eos_token_id, max_length=64)
    assert isinstance(scores, Perplexity)
    assert scores.loss.value == pytest.approx(found["loss"]["value"], rel=1e-6)
    assert int(scores.tokens.sum()) == found["tokens"]
    with pytest.raises(ValueError, match="words and bytes are not known of token ids"):
        _ = scores.bits_per_byte


def test_one_row_several_rows_and_lists_are_scored_alike(saved: Path) -> None:
    model, _ = load(str(saved / "mka"))
    rows = torch.randint(0, model.config.vocab_size, (2, 20), generator=torch.manual_seed(0))
    forms: list[Any] = [rows, [*rows], rows.tolist()]
    first, *others = (mka.evaluate.perplexity(model, form).nats.tolist() for form in forms)
    assert all(other == pytest.approx(first, rel=1e-6) for other in others)
    assert mka.evaluate.perplexity(model, rows[0]).nats.tolist() == pytest.approx(
        first[:1], rel=1e-6
    )
    assert mka.evaluate.perplexity(model, rows[0]).tokens.tolist() == [19]  # the first is only read


def test_a_model_in_training_is_scored_as_in_evaluation_and_goes_on_training(saved: Path) -> None:
    model, _ = load(str(saved / "mka"))
    rows = torch.randint(0, model.config.vocab_size, (1, 30), generator=torch.manual_seed(0))
    wanted = mka.evaluate.perplexity(model, rows).loss.value
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert mka.evaluate.perplexity(model.train(), rows).loss.value == pytest.approx(
        wanted, rel=1e-6
    )
    assert model.training


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "tokens is empty"), ([[1, 2], [3]], "document 1 has 1 tokens; there is nothing")],
)
def test_nothing_to_score_is_one_line(saved: Path, tokens: Any, message: str) -> None:
    model, _ = load(str(saved / "mka"))
    with pytest.raises(ValueError, match=message):
        mka.evaluate.perplexity(model, tokens)


@pytest.mark.parametrize("old", moved.MOVED)
def test_a_name_that_moved_is_found_and_says_so(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} is mka"):
        found = importlib.import_module(old)
    places = [importlib.import_module(name) for name in moved.MOVED[old]]
    if len(places) == 1 and old not in moved.RENAMED:
        assert found is places[0]  # what is patched under the old name is patched
    for place in places:
        for name in vars(place):
            assert name.startswith("__") or hasattr(found, name)
    for before, now in moved.RENAMED.get(old, {}).items():
        assert getattr(found, before) is getattr(found, now)
    with pytest.raises(AttributeError):
        _ = found.no_such_name


def test_names_that_documents_gave_are_importable() -> None:
    code = (
        "from mka.config import LongTermConfig, BenchmarkConfig\n"
        "from mka.limits import InputError, check_memory\n"
        "from mka.folders import claimed\nfrom mka.statistics import paired\n"
        "from mka.results import read_results\nfrom mka.loading import load"
    )
    command = [sys.executable, "-W", "default", "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in ended.stderr.splitlines() if "DeprecationWarning" in line]
    assert len(lines) == 6


DEFAULTS = {
    "local_window": options.LOCAL_WINDOW,
    "mix": options.MIX,
    "chunk_size": options.CHUNK_SIZE,
    "top_k": options.TOP_K,
    "longterm_positions": options.POSITIONS,
    "session_decay": options.SESSION_DECAY,
    "session_stride": options.SESSION_STRIDE,
    "session_slots": options.SESSION_SLOTS,
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_is_written_once(name: str) -> None:
    """Of mechanisms, of the benchmark's flags and of what is converted."""
    for kind, row in MECHANISMS.items():
        if row.has_memory and name in options_of(kind):
            assert options_of(kind)[name] == DEFAULTS[name], kind
    if name != "local_window":  # there "auto" is what each mechanism has
        assert getattr(BenchmarkConfig(), name) == DEFAULTS[name]
    if name not in ("local_window", "chunk_size", "top_k"):  # a pretrained model reads more
        assert getattr(ConvertConfig(model="a", output="b"), name) == DEFAULTS[name]


@pytest.mark.parametrize("kind", MECHANISMS)
def test_a_row_is_true_of_its_class(kind: str) -> None:
    row, mechanism = MECHANISMS[kind], ATTENTION_TYPES[kind]
    from mka.attention.grouped import GroupedAttention, MemoryAttention

    known = inspect.signature(mechanism).parameters
    flags = {"num_groups": "num_kv_heads"}
    for flag in row.flags:
        assert flag == "memory_layers" or flags.get(flag, flag) in known, flag
    assert row.is_convertible == issubclass(mechanism, GroupedAttention)
    assert row.has_memory == issubclass(mechanism, MemoryAttention)


def test_the_mechanisms_do_not_import_each_other() -> None:
    modules = {row.class_path.partition(":")[0] for row in MECHANISMS.values()}
    for name in modules:
        source = inspect.getsource(importlib.import_module(name))
        assert not [other for other in modules - {name} if other in source], name


def test_a_user_sees_where_an_old_name_is_imported(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("from mka.config import PRESETS\n")
    command = [sys.executable, str(tmp_path / "old.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{tmp_path / 'old.py'}:1: DeprecationWarning: mka.config is" in ended.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_old_module_of_several_is_the_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    old: Any = importlib.import_module("mka.config")
    import mka.record.config as new

    assert {"PRESETS", "LongTermConfig", "MECHANISMS"} <= set(dir(old))
    presets = new.PRESETS
    assert {"PRESETS", "LongTermConfig", "MECHANISMS"} <= set(old.__all__)
    assert old.PRESETS is presets
    monkeypatch.setattr(old, "PRESETS", {})
    assert new.PRESETS == {}
    monkeypatch.undo()
    assert new.PRESETS is presets
    with mock.patch("mka.config.PRESETS", {}):
        assert new.PRESETS == {}
    assert new.PRESETS is presets


@pytest.mark.parametrize(
    ("package", "old", "now"),
    [("mka.training", "minimise", "minimize"), ("mka.report", "summarise", "summarize")],
)
def test_a_function_that_has_another_spelling(package: str, old: str, now: str) -> None:
    module = importlib.import_module(package)
    with pytest.warns(DeprecationWarning, match=f"{package}.{old} is {now} now"):
        assert getattr(module, old) is getattr(module, now)
    with pytest.raises(AttributeError):
        _ = module.no_such_name


WRONG_TOKENS: list[tuple[Any, str]] = [
    (torch.tensor([1.0, 2.0, 3.0]), "give token ids"),
    ([1.5, 2.5], "give token ids"),
    ([True, False], "give token ids"),
    ("text", "give lists of token ids"),
    (["text"], "give lists of token ids"),
    (torch.zeros(1, 2, 3, dtype=torch.long), "give token ids"),
    ([1, 2, 10**6], "the model has"),
    ([-1, 2], "the model has"),
    ([[1, 2], [[3]]], "give token ids"),
    (5, "give lists of token ids"),
]


@pytest.mark.parametrize(("tokens", "message"), WRONG_TOKENS)
def test_what_is_no_tokens_is_one_line(saved: Path, tokens: Any, message: str) -> None:
    model, _ = load(str(saved / "mka"))
    with pytest.raises(ValueError, match=message) as caught:
        mka.evaluate.perplexity(model, tokens)
    assert "\n" not in str(caught.value)


def test_arrays_and_lists_of_them_are_tokens_too(saved: Path) -> None:
    import numpy as np

    model, _ = load(str(saved / "mka"))
    wanted = mka.evaluate.perplexity(model, [1, 2, 3, 4]).nats
    forms = (np.array([1, 2, 3, 4]), [*np.array([1, 2, 3, 4])], [*torch.tensor([1, 2, 3, 4])])
    for tokens in forms:
        assert mka.evaluate.perplexity(model, tokens).nats == pytest.approx(wanted)


def test_scores_of_other_documents_are_not_compared(saved: Path) -> None:
    model, tokenizer = load(str(saved / "mka"))
    scored = [
        mka.evaluate.text_perplexity(model, tokenizer, texts)
        for texts in (["def f(x):", "return x"], ["def f(x):"], ["def g(x, y):", "return"])
    ]
    scored[0].minus(scored[0])
    for other in scored[1:]:
        with pytest.raises(ValueError, match="scored on different documents"):
            scored[0].minus(other)
    with pytest.raises(ValueError, match="documents is one text"):
        mka.evaluate.text_perplexity(model, tokenizer, "def f(x):")
    with pytest.raises(ValueError, match="max_tokens is 0"):
        mka.evaluate.text_perplexity(model, tokenizer, ["def"], max_tokens=0)


@pytest.mark.parametrize(
    "options",
    [{"tokens": 1}, {"tokens": 2.5}, {"seed": -1}, {"hidden_size": -1}, {"dtype": "float64"}],
)
def test_an_audit_of_wrong_numbers_is_one_line(options: dict[str, Any]) -> None:
    attn = mka.build_attention("mha", hidden_size=8, num_heads=2)
    given: dict[str, Any] = {"hidden_size": 8} | options
    with pytest.raises(ValueError, match=f"{next(iter(options))} is "):
        list(mka.audit.audit_module(attn, **given))
    with pytest.raises(ValueError, match="module is a str"):
        list(mka.audit.audit_module("x", 8))  # pyright: ignore[reportArgumentType]
