"""Text from a model: streamed, and over several turns with one cache.

Each turn reads only what is new of the conversation, on top of the cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, TextStreamer

from mka.attention.grouped import MemoryAttention, Watched
from mka.errors import InputError
from mka.memory.bank import Bank
from mka.memory.options import LEVEL_WORDS
from mka.memory.search import Retrieved
from mka.models.cache import memory_cache, states
from mka.models.reading import fingerprint
from mka.models.versions import CACHE_ARGUMENT, cache_of
from mka.record.config import GenerationOptions


@dataclass
class RouterShares:
    """The mean weight of each memory level, over layers and tokens.

    Args:
        sums: the sum of weights of each of the M levels. Default: zeros.
        tokens: how many weights were added per level. Default: 0.
    """

    sums: list[float] = field(default_factory=lambda: [0.0] * len(LEVEL_WORDS))
    tokens: int = 0

    def add(self, weights: Tensor) -> None:
        """Add the weights (B, T, M) of one layer."""
        flat = weights.detach().flatten(0, -2).double()
        self.sums = [old + new for old, new in zip(self.sums, flat.sum(0).tolist(), strict=True)]
        self.tokens += flat.shape[0]

    def __str__(self) -> str:
        if not self.tokens:
            return "no router"
        means = (
            f"{level} {total / self.tokens:.2f}"
            for level, total in zip(LEVEL_WORDS, self.sums, strict=True)
        )
        return f"router {', '.join(means)}"


@contextmanager
def watched_routers(model: nn.Module) -> Iterator[RouterShares]:
    """Inside, the model's forward passes add the weights of their memory levels to the
    result."""
    shares = RouterShares()

    def count(what: Watched | Retrieved) -> None:
        """Add the weights of a layer's heads; what is retrieved does not matter
        here."""
        if isinstance(what, Watched):
            # Where heads have weights of their own, their mean counts.
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
    """A row of tokens and its cache: each turn is read on top of what was read before.

    Args:
        model, tokenizer: any causal language model of transformers, and its tokenizer.
        options: tokens per answer, sampling, bank and where the long-term memory is
            kept. Default: None, `GenerationOptions()`.
        streamer: receives the tokens as they are generated. Default: None, nobody does.

    Raises ValueError for a bank of another model, and for a
    bank or a longterm other than the default if the model retrieves nothing.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        options: GenerationOptions | None = None,
        streamer: TextStreamer | None = None,
    ) -> None:
        self.model, self.tokenizer, self.streamer = model, tokenizer, streamer
        self.options = options = options or GenerationOptions()
        self.messages: list[dict[str, str]] = []
        self.row = torch.zeros(1, 0, dtype=torch.long)
        self.bank = Bank(options.bank, fingerprint(model)) if options.bank is not None else None
        # Otherwise `generate` makes the cache, which is then right for any model of
        # transformers.
        special = options.longterm.is_special or self.bank is not None
        self.cache: Any = memory_cache(model, options.longterm, self.bank) if special else None
        # Once per conversation: seeding each turn would repeat the same draws.
        torch.manual_seed(options.seed)

    def tell(self, text: str) -> str:
        """Continue the conversation with `text`; returns the answer.

        The text is a user's message if the tokenizer has a chat template, and plain
        text if not. Raises InputError as `go_on` does.
        """
        if self.tokenizer.chat_template is None:
            return self.go_on(self.tokenizer(text, add_special_tokens=False).input_ids)
        self.messages.append({"role": "user", "content": text})
        whole = self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_dict=True
        )
        answer = self.go_on(self.keep(whole["input_ids"]))
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def keep(self, ids: list[int]) -> list[int]:
        """The token ids that are new in `ids`, a row that continues the one read so
        far.

        Tokens at the end of that row that differ are taken back from the cache. Raises
        ValueError if they are further back than the cache allows.
        """
        # A template may write an answer differently than it was generated, as without
        # the newline at its end: what both rows have in common is kept.
        held = self.row[0].tolist()
        same = next(
            (n for n, pair in enumerate(zip(held, ids, strict=False)) if pair[0] != pair[1]), None
        )
        same = min(len(held), len(ids)) if same is None else same
        if self.cache is not None and (surplus := self.cache.get_seq_length() - same) > 0:
            self.cache.crop(-surplus)
        self.row = self.row[:, :same]
        return ids[same:]

    def go_on(self, ids: list[int], **options: Any) -> str:
        """Read these token ids, and return the answer to them.

        options: of transformers' GenerationConfig, in place of those of the
            conversation.

        Raises InputError if there is nothing to read, and if the model cannot read a
        row this long.
        """
        if not ids and not self.row.shape[1]:
            raise InputError("the prompt is empty; give a text of at least one token")
        self.row = torch.cat([self.row, torch.tensor([ids], dtype=torch.long)], dim=1)
        heat = self.options.temperature
        drawn = {"do_sample": True, "temperature": heat} if heat else {}
        # One row needs no padding, but transformers asks for the token anyway.
        settings = GenerationConfig(
            max_new_tokens=self.options.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
            return_dict_in_generate=True,
            **({"do_sample": False} | drawn | options),
        )
        # The whole row is passed; `generate` skips what the cache has seen of it.
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
        """What the cache holds, in one line: tokens, bytes, and chunks of a bank."""
        held = states(self.cache)
        if not held:
            return "plain transformers cache"
        # Any layer will do for the tokens: all have seen the same.
        tokens, size = int(held[0].num_tokens[0]), sum(state.nbytes for state in held)
        line = (
            f"{tokens:,} tokens seen, {size / 2**20:.2f} MiB in {len(held)} layers "
            f"({size / tokens:,.0f} B/token)"
        )
        if self.options.longterm.longterm_store != "device":
            line += f", long-term memory on {self.options.longterm.longterm_store}"
        return (
            f"{line}; bank: {max(state.banked for state in held):,} chunks" if self.bank else line
        )
