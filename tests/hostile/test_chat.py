"""A conversation does not end by itself: answers that are spelled differently the next time, models
without positions left, templates that fail, bytes that are not UTF-8."""

import io
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, LlamaConfig

from checks_models import LLAMA, shake
from mka import cli
from mka.data import load_tokenizer
from mka.errors import InputError
from mka.models import build_model, generation
from mka.models.generation import Conversation
from mka.models.loading import load
from mka.record.config import GenerationOptions

TEXT = "the cat sat on the mat and looked at the dog; the dog looked at the cat. " * 20
TRIMMED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHORTENED = TRIMMED.replace("m.content | trim", "m.content[:1]")
"""A template that changes old answers, as those do that take thoughts out."""
POSITIONS = 48


def saved(path: Path, kind: str, *, backbone: str = "llama", **options: Any) -> Path:
    tokenizer = load_tokenizer("bpe", [TEXT], 300)
    sizes: dict[str, Any] = LLAMA | {"vocab_size": tokenizer.vocab_size}
    config: Any = LlamaConfig(**sizes)
    if backbone == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}
        config = GPT2Config(vocab_size=tokenizer.vocab_size, **sizes)
    config.eos_token_id = config.bos_token_id = tokenizer.eos_id
    shake(build_model(config, kind, **options)).save_pretrained(path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(
        tmp_path_factory.mktemp("saved") / "model", "mka", local_window=6, chunk_size=3, top_k=2
    )


def conversation(folder: Path, template: str | None, **options: Any) -> Conversation:
    model, tokenizer = load(str(folder))
    tokenizer.chat_template = template
    return Conversation(model, tokenizer, GenerationOptions(**options))


class Reads:
    """How many tokens each turn read, and the rows that were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        real = Conversation.go_on

        def go_on(self_: Conversation, ids: list[int], **options: Any) -> str:
            self.counts.append(len(ids))
            return real(self_, ids, **options)

        monkeypatch.setattr(Conversation, "go_on", go_on)
        # So that every answer has all of its tokens.
        monkeypatch.setattr(Conversation, "ends", lambda _: [10**6])


@pytest.mark.parametrize("kind", ["mka", "fmka", "gqa", "plain gqa"])
def test_the_tokens_of_an_answer_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """100 drawn tokens are more than a bounded cache takes back, and the template trims them."""
    options: dict[str, Any] = {} if kind == "plain gqa" else {"local_window": 6}
    talk = conversation(
        saved(tmp_path / "model", kind.removeprefix("plain "), **options),
        TRIMMED,
        max_new_tokens=100,
        temperature=1.0,
    )
    reads, rows = Reads(monkeypatch), []
    for turn in ("the cat", "the dog", "the mat"):
        talk.tell(turn)
        rows.append(talk.row[0].tolist())
    # Each row continues the one before, and only the new turn is read.
    for before, after in pairwise(rows):
        assert after[: len(before)] == before
    assert max(reads.counts[1:]) < 40


def test_a_row_that_cannot_be_taken_back_is_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = conversation(folder, SHORTENED, max_new_tokens=100, temperature=1.0)
    reads = Reads(monkeypatch)
    talk.tell("the cat")
    talk.tell("the dog")
    whole = talk.render(talk.messages[:-1])
    assert talk.rendered == whole
    ids = talk.ids_of(whole)
    assert reads.counts[1] == len(ids), "all of it"
    assert talk.row[0, : len(ids)].tolist() == ids


@pytest.mark.parametrize("template", [None, TRIMMED])
def test_a_model_without_positions_left_forgets_the_oldest_turns(
    tmp_path: Path, template: str | None
) -> None:
    talk = conversation(
        saved(tmp_path / "model", "mka", backbone="gpt2", local_window=6),
        template,
        max_new_tokens=10,
    )
    for number in range(8):
        talk.tell("the cat sat on the mat")
        assert talk.row.shape[1] <= POSITIONS, number
    assert talk.dropped >= 2
    # What it says now is what a new conversation with the same turns says.
    last = talk.row[0].tolist()
    again = talk.model.generate(
        torch.tensor([last[:-10]]), max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert again[0].tolist() == last


def test_a_turn_that_is_too_long_by_itself_changes_nothing(tmp_path: Path) -> None:
    talk = conversation(
        saved(tmp_path / "model", "mka", backbone="gpt2", local_window=6), None, max_new_tokens=10
    )
    talk.tell("the cat")
    turns = [list(turn) for turn in talk.turns]
    with pytest.raises(InputError, match="48 positions"):
        talk.tell(TEXT)
    assert talk.turns == turns
    first = conversation(Path(talk.model.name_or_path), None, max_new_tokens=10)
    first.tell("the cat")
    assert talk.tell("the dog") == first.tell("the dog")


def test_an_answer_is_shorter_where_positions_end(tmp_path: Path) -> None:
    talk = conversation(
        saved(tmp_path / "model", "mha", backbone="gpt2"), None, max_new_tokens=POSITIONS
    )
    talk.tell("the cat sat")
    assert talk.row.shape[1] == POSITIONS


FAILING = {
    "raises": ("{{ raise_exception('only two roles') }}", "only two roles"),
    "no syntax": ("{% if %}", "Expected an expression"),
    "unknown filter": ("{{ messages | no_such_filter }}", "no_such_filter"),
    "no end": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "more than 1,000,000 lines",
    ),
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "type": ("{{ messages + 1 }}", "list"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_one_line(folder: Path, name: str) -> None:
    template, message = FAILING[name]
    talk, trace = conversation(folder, template, max_new_tokens=3), sys.gettrace()
    with pytest.raises(InputError, match=f"chat template of the model fails: .*{message}"):
        talk.tell("the cat")
    assert (talk.messages, sys.gettrace()) == ([], trace)
    talk.tokenizer.chat_template = TRIMMED
    talk.tell("the cat")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


class Bytes(io.TextIOWrapper):
    """Standard input that holds these bytes, and is no terminal."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="utf-8")


def chat(
    folder: Path, stdin: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", stdin)
    capsys.readouterr()
    status = cli.main(["chat", "--model", str(folder), "--max_new_tokens", "3"])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_turn_that_is_not_utf8_is_skipped_and_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, alone, _ = chat(folder, Bytes(b"the cat\nthe mat\n"), capsys, monkeypatch)
    status, out, err = chat(
        folder, Bytes(b"\xef\xbb\xbfthe cat\nun caf\xe9\n\nthe mat"), capsys, monkeypatch
    )
    assert (status, out) == (0, alone)
    assert err == "mka: the turn is not UTF-8 (byte 6); it was skipped\n"


def test_turns_that_all_fail_are_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, err = chat(folder, Bytes(b"\xe9\n\xe9\n"), capsys, monkeypatch)
    assert status == 2
    assert err.count("mka: ") == 2


def test_closed_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = chat(folder, None, capsys, monkeypatch)
    assert (status, out) == (2, "")
    assert err == "mka: the standard input is closed; give the turns there\n"


def test_turns_that_are_dropped_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = saved(tmp_path / "model", "mka", backbone="gpt2", local_window=6)
    status, _, err = chat(small, Bytes(b"the cat sat on the mat\n" * 9), capsys, monkeypatch)
    assert status == 0
    assert "mka: no positions left: dropped the oldest 1 turn(s)" in err


def test_all_end_tokens_of_the_model_end_an_answer(folder: Path) -> None:
    talk = conversation(folder, None, max_new_tokens=20)
    ids = talk.ids_of("the cat", is_first=True)
    free = talk.model.generate(
        torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(ids) :].tolist()
    end = free[5]
    talk.model.generation_config = GenerationConfig(eos_token_id=[0, end])
    talk.go_on(ids)
    assert talk.row[0, len(ids) :].tolist() == free[: free.index(end) + 1]


class Marked:
    """A tokenizer that begins a text with its token 0, as Llama's does."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.chat_template = tokenizer, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        found = self.tokenizer(text, add_special_tokens=False)
        found["input_ids"] = [0] * add_special_tokens + found["input_ids"]
        return found


def test_the_first_token_of_a_text_is_there_once(folder: Path) -> None:
    model, tokenizer = load(str(folder))
    talk = Conversation(model, Marked(tokenizer), GenerationOptions(max_new_tokens=3))
    talk.tell("the cat")
    assert talk.turns[0][0] == 0
    talk.tell("the dog")
    assert talk.turns[1][0] != 0


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"un caf\xe9", r"is not UTF-8 \(byte 6\)"),
        ("un café".encode("utf-16"), "holds NUL bytes"),
        (b"", "is blank"),
    ],
)
def test_a_prompt_file_that_is_not_text_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], raw: bytes, message: str
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(raw)
    status = cli.main(["generate", "--model", str(folder), "--prompt_file", str(path)])
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith(f"mka: prompt_file {str(path)!r} ")
    assert len(err.splitlines()) == 1
    assert re.search(message, err)


def test_a_prompt_file_may_begin_with_a_mark(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, raw in (("plain", b"the cat"), ("marked", b"\xef\xbb\xbfthe cat")):
        (tmp_path / name).write_bytes(raw)
    answers = []
    for name in ("plain", "marked"):
        capsys.readouterr()
        options = ["--max_new_tokens", "4", "--prompt_file", str(tmp_path / name)]
        assert cli.main(["generate", "--model", str(folder), *options]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_lines_of_code_by_another_name_are_not_counted() -> None:
    def work() -> int:
        return sum(number for number in range(1000))

    with generation.few_lines("<elsewhere>", 5):
        assert work() == 499500
    with pytest.raises(InputError, match="more than 5 lines"), generation.few_lines(__file__, 5):
        work()
