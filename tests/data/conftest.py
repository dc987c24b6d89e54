"""Small corpora, and caches that are never the user's."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mka.data import Corpus

WORDS = [
    "attend",
    "memory",
    "key",
    "value",
    "naïve",
    "façade",
    "記憶",
    "注意",
    "🎉",
    "👩‍👩‍👧",
    "(x == y):",
    "return\n   ",
]


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))


def some_text(seed: int, words: int = 200) -> str:
    """Words in several scripts, a line end after every eighth."""
    choose = random.Random(seed)
    return "".join(choose.choice(WORDS) + ("\n" if i % 8 == 7 else " ") for i in range(words))


@pytest.fixture
def write_texts(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of so many text files."""

    def write(count: int, folder: str = "texts", words: int = 200) -> Path:
        for number in range(count):
            path = tmp_path / folder / f"part{number % 3}" / f"{number:03d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(some_text(number, words).encode())
        return tmp_path / folder

    return write


@pytest.fixture(scope="session")
def small_corpus() -> Corpus:
    documents = {
        "train": [(f"train{n}", some_text(n, 2000)) for n in range(6)],
        "validation": [(f"validation{n}", some_text(100 + n)) for n in range(3)],
        "test": [(f"test{n}", some_text(200 + n)) for n in range(3)],
    }
    return Corpus("text", documents, "made by hand", 0, {"paths": "nowhere"})


@pytest.fixture
def refused() -> Callable[..., str]:
    """Call something that must raise InputError; returns its message, which must be one line."""
    from mka.errors import InputError

    def call(function: Callable[..., object], *args: object, **options: object) -> str:
        with pytest.raises(InputError) as caught:
            function(*args, **options)
        message = str(caught.value)
        assert message, "an error needs words"
        assert len(message.splitlines()) == 1, message
        return message

    return call
