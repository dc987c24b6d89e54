"""Text from a model: streamed, and over several turns with one cache.

Each turn reads only what is new of the conversation, on top of the cache.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, TextStreamer

from mka.attention.grouped import MemoryAttention, Watched
from mka.data.hub import first_line
from mka.errors import InputError, check_utf8
from mka.memory.bank import Bank
from mka.memory.options import LEVEL_WORDS
from mka.memory.search import Retrieved
from mka.models.cache import memory_cache, states
from mka.models.families import position_limit
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


TEMPLATE_LINES = 1_000_000
"""Lines of its own code that a chat template may run in one rendering; real ones run
some dozens per message."""


@contextmanager
def few_lines(file_name: str, most: int) -> Iterator[None]:
    """Within the block, code of this file name may run at most this many lines; the
    next one raises InputError."""
    # Counted rather than timed, so that a template ends in the same place on every
    # machine.
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        """Count the lines of frames of that name; others run untraced."""
        nonlocal count
        if frame.f_code.co_filename != file_name:
            return None
        count += event == "line"
        if count > most:
            raise InputError(f"it runs more than {most:,} lines")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Conversation:
    """A row of tokens and its cache: each turn is read on top of what was read before.

    Args:
        model, tokenizer: any causal language model of transformers, and its tokenizer.
        options: tokens per answer, sampling, bank and where the long-term memory is
            kept. Default: None, `GenerationOptions()`.
        streamer: receives the tokens as they are generated. Default: None, nobody does.

    Raises ValueError for a bank of another model, and for a bank or a longterm other
    than the default if the model retrieves nothing.
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
        self.turns: list[list[int]] = []
        self.rendered = ""
        self.dropped = 0
        self.bank = Bank(options.bank, fingerprint(model)) if options.bank is not None else None
        self.forget()
        # Once per conversation: seeding each turn would repeat the same draws.
        torch.manual_seed(options.seed)

    def forget(self) -> None:
        """Start the row again, with an empty cache; the next turn reads everything."""
        self.row = torch.zeros(1, 0, dtype=torch.long)
        longterm = self.options.longterm
        # Otherwise `generate` makes the cache, which is then right for any model of
        # transformers.
        special = longterm.is_special or self.bank is not None
        self.cache: Any = memory_cache(self.model, longterm, self.bank) if special else None

    def tell(self, text: str) -> str:
        """Continue the conversation with `text`; returns the answer.

        The text is a user's message if the tokenizer has a chat template, and plain
        text if not. If the model has no positions for the whole conversation, its
        oldest turns are dropped, and counted in `dropped`. Raises InputError, with the
        conversation as it was before, for a template that fails and for a text that is
        too long by itself.
        """
        if self.tokenizer.chat_template is None:
            return self.tell_text(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = self.render(messages)
        ids, dropped = self.new_ids(rendered), 0
        # A question is dropped together with its answer.
        while self.is_too_long(ids) and len(messages) > 1:
            messages, dropped = messages[2:], dropped + 1
            self.forget()
            rendered = self.render(messages)
            ids = self.ids_of(rendered)
        answer = self.go_on(ids, **self.room_for(ids))
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.rendered, self.dropped = rendered, self.dropped + dropped
        return answer

    def tell_text(self, text: str) -> str:
        """Continue the row with a text as it is; returns the answer."""
        ids, dropped = self.ids_of(text, is_first=not self.turns), 0
        while self.turns[dropped:] and self.is_too_long(ids, self.turns[dropped:]):
            dropped += 1
        if dropped:
            self.forget()
        # A row that was started again needs the turns that are left.
        new = ids if self.row.shape[1] else [*chain(*self.turns[dropped:]), *ids]
        start = self.row.shape[1] + len(new) - len(ids)
        answer = self.go_on(new, **self.room_for(new))
        self.turns = [*self.turns[dropped:], self.row[0, start:].tolist()]
        self.dropped += dropped
        return answer

    def render(self, messages: list[dict[str, str]]) -> str:
        """The messages as the chat template writes them, with the beginning of an
        answer. Raises InputError for a template that fails or does not end."""
        try:
            with few_lines("<template>", TEMPLATE_LINES):
                return self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=False
                )
        # A template is a program of whoever published the model.
        except Exception as error:
            reason = str(error) if isinstance(error, InputError) else first_line(error)
            raise InputError(f"the chat template of the model fails: {reason}") from error

    def ids_of(self, text: str, *, is_first: bool = False) -> list[int]:
        """The token ids of a text; `is_first`: with the special tokens that the
        tokenizer puts around a text. Raises InputError for text that is not UTF-8."""
        check_utf8("the text", text)
        return self.tokenizer(text, add_special_tokens=is_first).input_ids

    def new_ids(self, rendered: str) -> list[int]:
        """The token ids that are new in the rendered conversation.

        The tokens of the last answer are kept as they were drawn, although the template
        may trim it and the tokenizer may spell it differently. If the template changes
        more than that, tokens are taken back from the cache; if the cache does not go
        back that far, the whole row is read again.
        """
        answer = self.messages[-1]["content"] if self.messages else ""
        for shown in (answer, answer.rstrip(), answer.strip()):
            before = self.rendered + shown
            if self.row.shape[1] and rendered.startswith(before):
                ids = self.ids_of(rendered[len(before) :])
                # The answer may have ended with the token that the template ends it with.
                same = ids[:1] == self.row[0, -1:].tolist() and ids[0] in self.ends()
                return ids[same:]
        ids = self.ids_of(rendered)
        try:
            return self.keep(ids)
        except (ValueError, NotImplementedError):
            self.forget()
            return ids

    def keep(self, ids: list[int]) -> list[int]:
        """The token ids that are new in `ids`, a row that continues the one read so
        far.

        Tokens at the end of that row that differ are taken back from the cache. Raises
        ValueError if they are further back than the cache allows.
        """
        held = self.row[0].tolist()
        same = next(
            (n for n, pair in enumerate(zip(held, ids, strict=False)) if pair[0] != pair[1]), None
        )
        same = min(len(held), len(ids)) if same is None else same
        if self.cache is not None and (surplus := self.cache.get_seq_length() - same) > 0:
            self.cache.crop(-surplus)
        self.row = self.row[:, :same]
        return ids[same:]

    def is_too_long(self, ids: list[int], turns: Sequence[list[int]] = ()) -> bool:
        """Whether the model has no positions for the row with `ids` and an answer; with
        `turns`, for a row of these instead."""
        limit = position_limit(self.model)
        row = sum(map(len, turns)) if turns else self.row.shape[1]
        return limit is not None and row + len(ids) + self.options.max_new_tokens > limit

    def room_for(self, ids: list[int]) -> dict[str, int]:
        """An option of `go_on`: a shorter answer, if the positions left after `ids` are
        fewer than it may have."""
        limit = position_limit(self.model)
        left = 0 if limit is None else limit - self.row.shape[1] - len(ids)
        return {"max_new_tokens": left} if 0 < left < self.options.max_new_tokens else {}

    def ends(self) -> list[int]:
        """The ids of all tokens that end an answer: the model's and the tokenizer's."""
        config = getattr(self.model, "generation_config", None)
        theirs = getattr(config, "eos_token_id", None)
        found = [*(theirs if isinstance(theirs, list) else [theirs]), self.tokenizer.eos_token_id]
        return [*dict.fromkeys(token for token in found if token is not None)]

    def go_on(self, ids: list[int], **options: Any) -> str:
        """Read these token ids, and return the answer to them.

        options: of transformers' GenerationConfig, in place of those of the
            conversation.

        Raises InputError if there is nothing to read, and if the model cannot read a
        row this long; after an error the row has to be read again (`forget`).
        """
        if not ids and not self.row.shape[1]:
            raise InputError("the prompt is empty; give a text of at least one token")
        whole = torch.cat([self.row, torch.tensor([ids], dtype=torch.long)], dim=1)
        heat, ends = self.options.temperature, self.ends()
        usual: dict[str, Any] = {"max_new_tokens": self.options.max_new_tokens, "do_sample": False}
        drawn = {"do_sample": True, "temperature": heat} if heat else {}
        # One row needs no padding, but transformers asks for the token anyway.
        settings = GenerationConfig(
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            return_dict_in_generate=True,
            **(usual | drawn | options),
        )
        # The whole row is passed; `generate` skips what the cache has seen of it.
        row = whole.to(self.model.device)
        try:
            given = self.model.generate(
                row,
                attention_mask=torch.ones_like(row),
                generation_config=settings,
                streamer=self.streamer,
                **{CACHE_ARGUMENT: self.cache},
            )
        except BaseException:
            # The cache may have read a part of the row.
            self.forget()
            raise
        self.row, self.cache = given.sequences.cpu(), cache_of(given)
        return self.tokenizer.decode(given.sequences[0, whole.shape[1] :], skip_special_tokens=True)

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
