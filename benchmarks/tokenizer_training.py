"""Training the tokenizer "bpe" on one line, and encoding it: seconds and peak memory by its length.

    python benchmarks/tokenizer_training.py                              20 MB of each kind of text
    python benchmarks/tokenizer_training.py letter genome --megabytes 20 200

Each text is a file of one line, which is read and tokenized as by `mka bench --dataset text
--text_path FILE`, in a process of its own, with an empty cache. Prints one line of JSON per text:
the seconds of reading it, of training on all of it, and of `prepare_tokens` (hashing, training on
90 % and encoding), and the peak resident memory of the process (Linux).
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from mka.data import load_corpus, load_tokenizer, prepare_tokens

VOCAB_SIZE = 8192
SYLLABLES = ("ka", "re", "mi", "so", "tu", "ne", "lo", "vi", "an", "er")
IDEOGRAPHS = "".join(map(chr, range(0x4E00, 0x5E00)))


def some_words(choose: random.Random, length: int) -> str:
    """Words of one to four syllables, some 11,000 different ones, with a space after each."""
    words = ("".join(choose.choices(SYLLABLES, k=1 + n % 4)) for n in range(length // 6))
    return " ".join(words)


KINDS: dict[str, Callable[[random.Random, int], str]] = {
    "letter": lambda choose, length: "a" * length,
    "genome": lambda choose, length: "".join(choose.choices("ACGT", k=length)),
    "ideographs": lambda choose, length: "".join(choose.choices(IDEOGRAPHS, k=length // 3)),
    "words": some_words,
}


def main() -> None:
    """Measure each text in a process of its own, or the one that such a process was given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[20])
    parser.add_argument("--file", type=Path, help="the text of one such process")
    given = parser.parse_args()
    if given.file:
        print(json.dumps(measured(given.file)))
        return
    for kind in given.kinds or KINDS:
        for megabytes in given.megabytes:
            with TemporaryDirectory() as folder:
                file = Path(folder) / "one_line.txt"
                choose = random.Random(0)  # noqa: S311
                file.write_text(KINDS[kind](choose, megabytes * 10**6), encoding="utf-8")
                command = [sys.executable, __file__, "--file", str(file)]
                output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout  # noqa: S603
            print(json.dumps({"text": kind, "MB": megabytes} | json.loads(output)), flush=True)


def measured(file: Path) -> dict[str, float]:
    """Seconds and peak memory of reading a file and of making its tokens."""
    start = time.perf_counter()
    corpus = load_corpus("text", [str(file)])
    read = time.perf_counter()
    texts = (text for split in corpus.documents.values() for _, text in split)
    load_tokenizer("bpe", texts, VOCAB_SIZE)
    trained = time.perf_counter()
    tokens = prepare_tokens(corpus, "bpe", VOCAB_SIZE, file.parent / "cache")
    made = time.perf_counter()
    return {
        "read_s": round(read - start, 1),
        "train_s": round(trained - read, 1),
        "prepare_tokens_s": round(made - trained, 1),
        "tokens": sum(len(split.ids) for split in tokens.splits.values()),
        "peak_GB": round(peak_memory() / 1e9, 2),
    }


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes; on Linux."""
    # Not that of getrusage, which begins with the peak of the process that started this one.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
