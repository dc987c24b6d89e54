"""mka audit: check whether reported numbers can be trusted."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from mka.cli.output import JsonLines, check_output
from mka.errors import check_at_least

if TYPE_CHECKING:  # torch takes seconds to load
    from mka.audit import Finding


@dataclass(frozen=True, kw_only=True)
class AuditModuleConfig:
    """Test a PyTorch attention module for leaks, and whether decoding matches a full
    pass.

    A leak is an output that depends on future tokens, on padding or on other rows. Exit
    status 1 if there is one.
    """

    module: tyro.conf.Positional[str]
    """The module to test, as package.module:Class, or as a function that makes one; the
    current folder is searched too."""
    hidden_size: int
    """Model width, passed to the class as hidden_size, embed_dim, d_model, dim, n_embd
    or embedding_dim."""
    num_heads: int | None = None
    """Number of heads, passed to the class as num_heads, num_attention_heads, n_heads,
    n_head, nhead or heads; None: not passed."""
    options: tuple[str, ...] = ()
    """Arguments for the class, as NAME=VALUE with the value in JSON: --options
    bias=false local_window=null."""
    call: tuple[str, ...] = ()
    """Arguments for forward, as NAME=VALUE with the value in JSON: --call
    is_causal=true."""
    tokens: int = 32
    """Tokens per row of the input."""
    dtype: Literal["float64", "float32"] = "float64"
    """Data type of weights and inputs: float64 or float32."""
    seed: int = 0
    """Random seed for weights and inputs."""

    def __post_init__(self) -> None:
        check_at_least("hidden_size", self.hidden_size, 1)
        check_at_least("num_heads", self.num_heads, 1)
        check_at_least("tokens", self.tokens, 2)
        check_at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class AuditOriginalConfig:
    """Measure what each defect of the original protocol does to its "perplexity"."""

    max_steps: int = 600
    """Optimizer steps in each of the ten trainings."""
    sequence_length: int = 512
    """Tokens per row of text; the original pads shorter rows to this length."""
    dataset: str = "stdlib"
    """Text for the second table: stdlib, wikitext2, wikitext103 or text (the files of
    text_path); the first table uses uniform random tokens."""
    text_path: tuple[str, ...] = ()
    """Files or folders to read; needs --dataset text."""
    seed: int = 0
    """Random seed for weights and rows."""
    output: str | None = None
    """Also write one JSON line per table row to this file."""

    def __post_init__(self) -> None:
        check_at_least("max_steps", self.max_steps, 1)
        check_at_least("sequence_length", self.sequence_length, 2)
        check_at_least("seed", self.seed, 0)
        check_output("output", self.output)


def run_module(config: AuditModuleConfig) -> int:
    """Print a table of the checks, each as soon as it is known; returns 1 if there is a
    leak."""
    import torch

    from mka.audit import audit_module, build_foreign

    # float64 by default, so that no rounding error is mistaken for a leak.
    dtype = getattr(torch, config.dtype)
    module = build_foreign(
        config.module,
        config.hidden_size,
        config.num_heads,
        config.options,
        config.call,
        config.seed,
        dtype,
    )
    print(
        f"{config.module}: {config.tokens} random tokens of {config.hidden_size}, "
        f"{config.dtype}, seed {config.seed}"
    )
    print(f"{'check':<10} {'result':<6}  largest violation")
    failed = []
    # Rows are flushed one by one: a check of a large module takes seconds.
    for finding in audit_module(module, tokens=config.tokens, seed=config.seed, dtype=dtype):
        print(line(finding), flush=True)
        failed += [finding.check] if finding.result == "FAIL" else []
    print(f"leaks: {', '.join(failed)}" if failed else "no leak found")
    return int(bool(failed))


def line(finding: "Finding") -> str:
    """One row of the table: the check, its result, and where the largest violation
    is."""
    begin = f"{finding.check:<10} {finding.result:<6}"
    if finding.result == "n/a":
        return f"{begin}  {finding.reason}"
    # What the second number of the pair counts depends on the check.
    words = {"batch": "row", "decoding": "the call from token"}
    at = ""
    if finding.pair:
        source = words.get(finding.check, "token")
        at = f"  output {finding.pair[0]} from {source} {finding.pair[1]}"
    why = finding.reason and f"  ({finding.reason})"
    return f"{begin}  {finding.violation:.1e}{at}{why}"


def run_original(config: AuditOriginalConfig) -> int:
    """Print both tables, each row as soon as it is known; returns 0."""
    from mka.audit import original_scores
    from mka.audit.original import SYMBOLS

    output = JsonLines(config.output)
    # A loss below this floor proves that a protocol is wrong, whatever the model.
    floor = f"ln {SYMBOLS} = {math.log(SYMBOLS):.3f}"
    titles = {
        "uniform": (
            f"Independent uniform tokens from {SYMBOLS} symbols: no causal model can go "
            f"below {floor}"
        ),
        config.dataset: (
            f"\n{config.dataset}, {config.sequence_length} tokens per row: the defects one by one"
        ),
    }
    scores = original_scores(
        config.dataset,
        config.text_path,
        max_steps=config.max_steps,
        sequence_length=config.sequence_length,
        seed=config.seed,
    )
    for score in scores:
        # A table begins with the first score of its data; the title is taken out, so
        # once.
        if title := titles.pop(score.data, None):
            print(title)
            print(f"{'protocol':<32} {'loss':>8} " + '"perplexity"')
        print(f"{score.protocol:<32} {score.loss:>8.3f} {score.perplexity:>12.2f}", flush=True)
        row = {
            "data": score.data,
            "protocol": score.protocol,
            "loss": score.loss,
            "perplexity": score.perplexity,
        }
        output.add(row | {"steps": config.max_steps, "seed": config.seed})
    return 0
