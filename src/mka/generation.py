"""Text from a saved model: streamed, and over several turns with one cache.

read what is new of the conversation -> cache -> tokens, printed as they come
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, TextStreamer

from mka.attention.grouped import MemoryAttention, Watched
from mka.commands import GenerateConfig, ModelChoice
from mka.limits import InputError
from mka.loading import load
from mka.memory.bank import Bank
from mka.memory.search import Retrieved
from mka.models import CACHE_ARGUMENT, cache_of, fingerprint, memory_cache, states

LEVELS = ("local", "session", "long-term")


@dataclass
class RouterShares:
    """Mean weight of each memory level over layers and tokens."""

    sums: list[float] = field(default_factory=lambda: [0.0] * len(LEVELS))
    tokens: int = 0

    def add(self, weights: Tensor) -> None:
        """weights (B, T, M) of one layer."""
        flat = weights.detach().flatten(0, -2).double()
        self.sums = [old + new for old, new in zip(self.sums, flat.sum(0).tolist(), strict=True)]
        self.tokens += flat.shape[0]

    def __str__(self) -> str:
        if not self.tokens:
            return "no router"
        means = (f"{level} {total / self.tokens:.2f}" for level, total in zip(LEVELS, self.sums, strict=True))
        return f"router {', '.join(means)}"


@contextmanager
def watched_routers(model: nn.Module) -> Iterator[RouterShares]:
    """Inside, the weights of the memory levels are counted."""
    shares = RouterShares()

    def count(what: Watched | Retrieved) -> None:
        if isinstance(what, Watched):
            shares.add(what.weights.mean(2))

    layers = [module for module in model.modules() if isinstance(module, MemoryAttention)]
    try:
        for layer in layers:
            layer.watcher = count
        yield shares
    finally:
        for layer in layers:
            layer.watcher = None


class Conversation:
    """A row of tokens and the cache of it: what is said next is read on top of what was read before."""

    def __init__(self, model: Any, tokenizer: Any, choice: ModelChoice, streamer: TextStreamer | None = None) -> None:
        self.model, self.tokenizer, self.choice, self.streamer = model, tokenizer, choice, streamer
        self.messages: list[dict[str, str]] = []
        self.row = torch.zeros(1, 0, dtype=torch.long)
        self.bank = Bank(choice.bank, fingerprint(model)) if choice.bank is not None else None
        self.cache: Any = memory_cache(model, choice, self.bank) if choice.is_special or self.bank else None
        torch.manual_seed(choice.seed)

    def tell(self, text: str) -> str:
        """Say `text`, as a message where the tokenizer has a template for them; returns the answer."""
        if self.tokenizer.chat_template is None:
            return self.go_on(self.tokenizer(text, add_special_tokens=False).input_ids)
        self.messages.append({"role": "user", "content": text})
        whole = self.tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, return_dict=True)
        answer = self.go_on(self.keep(whole["input_ids"]))
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def keep(self, ids: list[int]) -> list[int]:
        """What is new of a row that goes on from this one; what differs at its end is taken back from the cache."""
        held = self.row[0].tolist()
        same = next((n for n, pair in enumerate(zip(held, ids, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(held), len(ids)) if same is None else same
        if self.cache is not None and (surplus := self.cache.get_seq_length() - same) > 0:
            self.cache.crop(-surplus)
        self.row = self.row[:, :same]
        return ids[same:]

    def go_on(self, ids: list[int], **options: Any) -> str:
        """Read these tokens and answer. Raises InputError for nothing to read, and for a row that is too long."""
        if not ids and not self.row.shape[1]:
            raise InputError("the prompt is empty; give a text of at least one token")
        self.row = torch.cat([self.row, torch.tensor([ids], dtype=torch.long)], dim=1)
        drawn = {"do_sample": True, "temperature": self.choice.temperature} if self.choice.temperature else {}
        settings = GenerationConfig(
            max_new_tokens=self.choice.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
            return_dict_in_generate=True,
            **({"do_sample": False} | drawn | options),
        )
        row = self.row.to(self.model.device)
        given = self.model.generate(
            row,
            attention_mask=torch.ones_like(row),
            generation_config=settings,
            streamer=self.streamer,
            **{CACHE_ARGUMENT: self.cache},
        )
        answer = given.sequences[0, self.row.shape[1] :]
        self.row, self.cache = given.sequences.cpu(), cache_of(given)
        return self.tokenizer.decode(answer, skip_special_tokens=True)

    def memory(self) -> str:
        """What the cache holds, in one line."""
        held = states(self.cache)
        if not held:
            return "the cache is transformers' own"
        tokens, size = int(held[0].num_tokens[0]), sum(state.nbytes for state in held)
        line = f"{tokens:,} tokens seen, {size / 2**20:.2f} MiB in {len(held)} layers ({size / tokens:,.0f} B/token)"
        if self.choice.longterm_store != "device":
            line += f", the long-term memory of it on {self.choice.longterm_store}"
        return f"{line}; bank: {max(state.banked for state in held):,} chunks" if self.bank else line


def generate(config: GenerateConfig, say: Callable[[str], None]) -> None:
    """Print the prompt's continuation as it comes; with `show_memory`, a line on the memory after it."""
    prompt = config.prompt if config.prompt_file is None else Path(config.prompt_file).read_text(encoding="utf-8")
    model, tokenizer = load(config.model)
    conversation = Conversation(model, tokenizer, config, TextStreamer(tokenizer, skip_prompt=True))
    chunked = {} if config.prefill_chunk_size is None else {"prefill_chunk_size": config.prefill_chunk_size}
    with watched_routers(model) as shares:
        conversation.go_on(tokenizer(prompt or "", add_special_tokens=False).input_ids, **chunked)
    if config.show_memory:
        say(f"[{conversation.memory()}; {shares}]")


def chat(config: ModelChoice, ask: Callable[[], str | None], say: Callable[[str], None]) -> None:
    """`ask` gives the next turn, None at the end; an empty turn is passed over."""
    model, tokenizer = load(config.model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    conversation = Conversation(model, tokenizer, config, streamer)
    while (text := ask()) is not None:
        if not text.strip():
            continue
        with watched_routers(model) as shares:
            conversation.tell(text)
        if config.show_memory:
            say(f"[{conversation.memory()}; {shares}]")
