"""Variants of fmka: one mix of the memories per token, one per channel, and gated averages.

    python benchmarks/fmka_gates.py
    python benchmarks/fmka_gates.py --seeds 0 --max_steps 200

The quick preset (5 M parameters, the standard library) is trained as `mka bench` trains it. Prints
one line of JSON per arm and seed with the held-out loss, and at the end the differences from fmka
by seed. The arms:

    fmka        lambda_t = softmax(r_t) over the levels, the same for all channels
    channel     lambda_t,c = softmax(r_t + b_c), with a learned bias per level and channel
    average     as fmka; in addition k~_t = g k~_t-1 + (1 - g) k_t, and v~ likewise, with
                g = sigmoid(Wg x_t) per channel of k and v (as in RAT+, arXiv 2602.18196)
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from mka.attention.fmka import FastMemoryKeyedAttention
from mka.data import BlockBatches, evaluation_batches, load_corpus, prepare_tokens
from mka.evaluation import held_out_loss
from mka.memory.local import token_index
from mka.memory.router import LOCAL, LONG_TERM, NUM_LEVELS, SESSION
from mka.memory.state import State
from mka.models import build_model, mechanisms, next_token_loss, preset_config
from mka.record.config import PRESETS
from mka.training import choose_precision, minimize


class ChannelGated(FastMemoryKeyedAttention):
    """fmka with a learned bias per level and channel."""

    channel_bias: nn.Parameter

    def fuse(self, x: Tensor, weights: Tensor, state: State | None) -> Tensor:
        """The levels of x (B, T, C), mixed per channel: (B, T, C)."""
        # The weights are a softmax already; the logarithm gives logits back, to add the bias to.
        mix = (weights.unsqueeze(-1).clamp(min=1e-9).log() + self.channel_bias).softmax(-2)
        parts = [mix[..., LOCAL, :] * x]
        if self.session is not None:
            parts.append(mix[..., SESSION, :] * self.session(x, state))
        if self.top_k and (r := self.read_long_term(x, state)) is not None:
            parts.append(mix[..., LONG_TERM, :] * r)
        return torch.stack(parts).sum(0).to(x.dtype)


class Averaged(FastMemoryKeyedAttention):
    """fmka with a gated running average over keys and over values."""

    average_gate: nn.Linear

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """The layer's output (B, T, C) for x (B, T, C); for whole rows only, without decoding."""
        q, t = self.queries(x), token_index(x, state)
        f = self.fuse(x, self.weights_at(q, t, 0, state), state)
        gates = self.average_gate(x).float().sigmoid().unflatten(-1, (2, self.num_kv_heads, -1))
        key_gates, value_gates = gates.unbind(2)
        k, v = gated(self.keys(f), key_gates), gated(self.values(f), value_gates)
        return self.o_proj(self.read_local(q, k, v, positions, state).values.flatten(2))


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """The running average a_t = g_t a_t-1 + (1 - g_t) x_t of x (B, T, G, D): (B, T, G, D)."""
    # By doubling steps: after each, `total` holds the average over twice as many tokens, and
    # `decay` the product of their gates.
    decay, total, step = gate, (1 - gate) * x.float(), 1
    while step < x.shape[1]:
        before = nn.functional.pad(total[:, :-step], (0, 0, 0, 0, step, 0))
        total = total + decay * before
        decay = decay * nn.functional.pad(decay[:, :-step], (0, 0, 0, 0, step, 0))
        step *= 2
    return total.to(x.dtype)


def change(layer: Any, arm: str) -> None:
    """Turn a layer of fmka into the layer of an arm, in place."""
    # Afterwards rather than when it is built, so that all arms share their initial weights.
    if arm == "channel":
        layer.__class__ = ChannelGated
        layer.channel_bias = nn.Parameter(torch.zeros(NUM_LEVELS, layer.hidden_size))
    elif arm == "average":
        layer.__class__ = Averaged
        layer.average_gate = nn.Linear(layer.hidden_size, 2 * layer.kv_size)
        # At first the gate does not depend on the token.
        nn.init.zeros_(layer.average_gate.weight)
        # Gates of nearly 0: at first it is almost fmka, as fmka is almost without memories.
        nn.init.constant_(layer.average_gate.bias, -3.0)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    arms: tuple[str, ...] = ("fmka", "channel", "average")
    """Arms to train: fmka, channel, average; the others are compared with the first one."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Random seeds, one training each per arm."""
    max_steps: int = 100
    """Optimizer steps per training."""
    threads: int = 2
    """Number of CPU threads."""


def main(options: Options) -> None:
    """Train all arms with all seeds, and print losses and differences."""
    torch.set_num_threads(options.threads)
    preset = PRESETS["quick"]
    corpus = prepare_tokens(load_corpus("stdlib"), preset.tokenizer, preset.vocab_size)
    precision = choose_precision(torch.device("cpu"))
    found: dict[str, list[float]] = {arm: [] for arm in options.arms}
    for seed in options.seeds:
        batches = BlockBatches(
            corpus.splits["train"].ids, preset.sequence_length, preset.batch_size, seed
        )
        for arm in options.arms:
            config = preset_config(preset, corpus.tokenizer.eos_id)
            model = build_model(config, "fmka", seed)
            # Seeded again for the parameters that an arm adds.
            torch.manual_seed(seed)
            for layer in mechanisms(model):
                change(layer, arm)

            # Defaults bind the model and batches of this turn of the loop.
            def loss_at(step: int, model: Any = model, batches: BlockBatches = batches) -> Tensor:
                """The training loss of a step."""
                with precision.autocast():
                    return next_token_loss(model, batches.at(step))

            minimize(model, loss_at, options.max_steps, preset.learning_rate)
            rows = evaluation_batches(
                corpus.splits["validation"],
                preset.sequence_length,
                preset.batch_size,
                preset.eval_tokens,
            )
            loss = held_out_loss(model, rows, torch.device("cpu"), precision.autocast()).loss
            found[arm].append(loss)
            line = {"arm": arm, "seed": seed, "steps": options.max_steps, "loss": round(loss, 4)}
            print(json.dumps(line), flush=True)
    # Seed by seed, because arms with the same seed have the same batches and initial weights.
    first = options.arms[0]
    for arm in options.arms[1:]:
        differences = [round(a - b, 4) for a, b in zip(found[arm], found[first], strict=True)]
        print(json.dumps({"arm": arm, f"minus {first}": differences}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
