"""Arms of fmka: one mix of the memories a token, one for each channel, and a gated average in keys and values.

    python benchmarks/fmka_gates.py
    python benchmarks/fmka_gates.py --seeds 0 --max_steps 200

The quick preset (5 M parameters, the standard library), trained as `mka bench` trains it; a line of JSON for each arm
and seed, with the held-out loss, and at the end the differences to fmka by seed. The arms:

    fmka        lambda_t = softmax(r_t) over the levels, one for all channels
    channel     lambda_t,c = softmax(r_t + b_c): with a learned bias of every level for every channel
    average     as fmka; and k~_t = g k~_t-1 + (1 - g) k_t, v~ as well, g = sigmoid(Wg x_t) for every channel of k and v
                (in the manner of RAT+, arXiv 2602.18196)
"""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from mka.attention.fmka import FastMemoryKeyedAttention
from mka.config import PRESETS
from mka.data import BlockBatches, evaluation_batches, load_corpus, prepare_tokens
from mka.evaluation import held_out_loss
from mka.memory.local import token_index
from mka.memory.router import LOCAL, LONG_TERM, NUM_LEVELS, SESSION
from mka.memory.state import State
from mka.models import build_model, mechanisms, next_token_loss, preset_config
from mka.training import choose_precision, minimise


class ChannelGated(FastMemoryKeyedAttention):
    """A bias of every level for every channel."""

    channel_bias: nn.Parameter

    def fuse(self, x: Tensor, weights: Tensor, state: State | None) -> Tensor:
        mix = (weights.unsqueeze(-1).clamp(min=1e-9).log() + self.channel_bias).softmax(-2)
        parts = [mix[..., LOCAL, :] * x]
        if self.session is not None:
            parts.append(mix[..., SESSION, :] * self.session(x, state))
        if self.top_k and (r := self.read_long_term(x, state)) is not None:
            parts.append(mix[..., LONG_TERM, :] * r)
        return torch.stack(parts).sum(0).to(x.dtype)


class Averaged(FastMemoryKeyedAttention):
    """A gated average over keys, and over values, token after token."""

    average_gate: nn.Linear

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        q, t = self.queries(x), token_index(x, state)
        f = self.fuse(x, self.weights_at(q, t, 0, state), state)
        gates = self.average_gate(x).float().sigmoid().unflatten(-1, (2, self.num_kv_heads, -1))
        k, v = (gated(y, gate) for y, gate in zip((self.keys(f), self.values(f)), gates.unbind(2), strict=True))
        return self.o_proj(self.read_local(q, k, v, positions, state).values.flatten(2))


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """a_t = g_t a_t-1 + (1 - g_t) x_t over the tokens of x (B, T, G, D), by doubling steps."""
    decay, total, step = gate, (1 - gate) * x.float(), 1
    while step < x.shape[1]:
        before = nn.functional.pad(total[:, :-step], (0, 0, 0, 0, step, 0))
        total = total + decay * before
        decay = decay * nn.functional.pad(decay[:, :-step], (0, 0, 0, 0, step, 0))
        step *= 2
    return total.to(x.dtype)


def change(layer: Any, arm: str) -> None:
    if arm == "channel":
        layer.__class__ = ChannelGated
        layer.channel_bias = nn.Parameter(torch.zeros(NUM_LEVELS, layer.hidden_size))
    elif arm == "average":
        layer.__class__ = Averaged
        layer.average_gate = nn.Linear(layer.hidden_size, 2 * layer.kv_size)
        nn.init.zeros_(layer.average_gate.weight)
        nn.init.constant_(layer.average_gate.bias, -3.0)  # it starts next to fmka, as the memories do


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    arms: tuple[str, ...] = ("fmka", "channel", "average")
    seeds: tuple[int, ...] = (0, 1, 2)
    max_steps: int = 100
    threads: int = 2


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    preset = PRESETS["quick"]
    corpus = prepare_tokens(load_corpus("stdlib"), preset.tokenizer, preset.vocab_size)
    precision = choose_precision(torch.device("cpu"))
    found: dict[str, list[float]] = {arm: [] for arm in options.arms}
    for seed in options.seeds:
        batches = BlockBatches(corpus.splits["train"].ids, preset.sequence_length, preset.batch_size, seed)
        for arm in options.arms:
            config = preset_config(preset, corpus.tokenizer.eos_id)
            model = build_model(config, "fmka", seed)
            torch.manual_seed(seed)
            for layer in mechanisms(model):
                change(layer, arm)

            def loss_at(step: int, model: Any = model, batches: BlockBatches = batches) -> Tensor:
                with precision.autocast():
                    return next_token_loss(model, batches.at(step))

            minimise(model, loss_at, options.max_steps, preset.learning_rate)
            held_out = partial(evaluation_batches, corpus.splits["validation"], preset.sequence_length)
            rows = held_out(preset.batch_size, preset.eval_tokens)
            loss = held_out_loss(model, rows, torch.device("cpu"), precision.autocast()).loss
            found[arm].append(loss)
            print(
                json.dumps({"arm": arm, "seed": seed, "steps": options.max_steps, "loss": round(loss, 4)}), flush=True
            )
    for arm in options.arms[1:]:
        differences = [a - b for a, b in zip(found[arm], found[options.arms[0]], strict=True)]
        print(json.dumps({"arm": arm, f"minus {options.arms[0]}": [round(x, 4) for x in differences]}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
