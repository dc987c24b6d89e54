"""mka generate and mka chat: a saved folder in, text out, one cache for all turns."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from checks_models import LLAMA, shake
from mka import cli
from mka.cli.text import GenerateConfig
from mka.data import load_tokenizer
from mka.models import build_model, generation, states
from mka.models.loading import load
from mka.record.config import GenerationOptions

TEXT = "the cat sat on the mat and looked at the dog; the dog looked at the cat. " * 20
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned nothing, with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = load_tokenizer("bpe", [TEXT], 300)
    sizes: dict[str, Any] = LLAMA | {"vocab_size": tokenizer.vocab_size}
    config = LlamaConfig(**sizes, eos_token_id=tokenizer.eos_id)
    options: dict[str, Any] = {"local_window": 6, "chunk_size": 3, "top_k": 2}
    shake(build_model(config, "fmka", **options)).save_pretrained(path)
    tokenizer.save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def uncached(folder: Path, row: list[int], new_tokens: int) -> list[int]:
    """The tokens that follow: greedy, one by one, without a cache."""
    model, start = AutoModelForCausalLM.from_pretrained(folder).eval(), len(row)
    for _ in range(new_tokens):
        row = [*row, int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax())]
    return row[start:]


def test_generate_streams_what_decoding_without_a_cache_gives(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "the cat sat on"
    (tmp_path / "prompt.txt").write_text(prompt)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = tokenizer.decode(uncached(folder, tokenizer(prompt).input_ids, 9)) + "\n"
    capsys.readouterr()
    for given in (("--prompt", prompt), ("--prompt_file", tmp_path / "prompt.txt")):
        options = ("--model", folder, *given, "--max_new_tokens", 9)
        assert run(capsys, "generate", *options) == (0, wanted, "")
        assert run(capsys, "generate", *options, "--prefill_chunk_size", 2) == (0, wanted, "")


def test_draws_depend_on_the_seed_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "generate",
        "--model",
        folder,
        "--prompt",
        "the cat",
        "--max_new_tokens",
        12,
        "--temperature",
        5.0,
    )
    first, again, other = (run(capsys, *options, "--seed", seed)[1] for seed in (3, 3, 4))
    assert first == again != other


def test_show_memory_says_what_is_held_and_what_the_router_chose(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = run(
        capsys,
        "generate",
        "--model",
        folder,
        "--prompt",
        TEXT[:60],
        "--max_new_tokens",
        5,
        "--show_memory",
    )
    line = out.splitlines()[-1]
    assert status == 0
    tokens = (
        len(AutoTokenizer.from_pretrained(folder)(TEXT[:60]).input_ids) + 4
    )  # the last one was not read yet
    assert line.startswith(f"[{tokens} tokens seen, 0.0")
    assert "in 2 layers" in line
    shares = [
        float(word.strip(",]"))
        for word in line.split()
        if word.startswith("0.") and word[-1] in ",]"
    ]
    assert sum(shares) == pytest.approx(1, abs=0.02)
    assert len(shares) == 3


def test_chat_reads_each_turn_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = ["the cat", "", "and the dog"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(turns) + "\n"))
    read: list[int] = []
    real = generation.Conversation.go_on

    def go_on(conversation: Any, ids: list[int], **options: Any) -> str:
        read.append(len(ids))
        return real(conversation, ids, **options)

    monkeypatch.setattr(generation.Conversation, "go_on", go_on)
    status, out, _ = run(capsys, "chat", "--model", folder, "--max_new_tokens", 6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert status == 0
    first, _, second = (tokenizer(turn).input_ids for turn in turns)
    assert read == [len(first), len(second)]
    answer = uncached(folder, first, 6)
    answers = [answer, uncached(folder, first + answer + second, 6)]
    assert out == "".join(tokenizer.decode(ids) + "\n" for ids in answers)


def test_a_template_is_used_and_only_what_is_new_is_read(folder: Path) -> None:
    model, tokenizer = load(str(folder))
    tokenizer.chat_template = TEMPLATE
    conversation = generation.Conversation(model, tokenizer, GenerationOptions(max_new_tokens=5))
    for turn in ("the cat", "the dog", "the mat"):
        conversation.tell(turn)
        held = states(conversation.cache)[0].num_tokens.item()
        assert held == conversation.row.shape[1] - 1
    afresh = generation.Conversation(model, tokenizer, GenerationOptions(max_new_tokens=5))
    afresh.messages = conversation.messages[:-2]
    assert afresh.tell("the mat") == conversation.messages[-1]["content"]


def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text("{}")
    cases = {
        ("--model", folder, "--prompt", ""): "the prompt is empty",
        ("--model", folder): "give one of --prompt and --prompt_file",
        (
            "--model",
            folder,
            "--prompt",
            "x",
            "--prompt_file",
            "y",
        ): "give one of --prompt and --prompt_file",
        ("--model", folder, "--prompt_file", tmp_path / "none.txt"): "none.txt",
        ("--model", tmp_path / "empty", "--prompt", "x"): "config.json is not a saved model",
        (
            "--model",
            tmp_path / "strange" / "config.json",
            "--prompt",
            "x",
        ): "it is a file; give the folder",
        ("--model", tmp_path / "strange", "--prompt", "x"): "it cannot be loaded",
        (
            "--model",
            tmp_path / "nowhere",
            "--prompt",
            "x",
        ): "the hub cannot be reached|cannot be loaded",
        (
            "--model",
            folder,
            "--prompt",
            "x",
            "--temperature",
            "-1",
        ): "temperature is -1.0; it must be 0, or at least 0.001",
        ("--model", folder, "--prompt", "x", "--temprature", "1"): "nearest: --temperature",
        (
            "--model",
            folder,
            "--prompt",
            "x",
            "--max_new_tokens",
            "0",
        ): "max_new_tokens is 0; it must be at least 1",
    }
    for arguments, message in cases.items():
        status, out, err = run(capsys, "generate", *arguments)
        assert (status, out) == (2, ""), arguments
        assert err.count("\n") == 1
        assert any(part in err for part in message.split("|")), err


def test_both_or_none_of_the_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="give one of"):
        GenerateConfig(model="x")
