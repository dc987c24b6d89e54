"""The commands of `mka audit`: what each takes from its command line."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mka.limits import check_at_least


@dataclass(frozen=True, kw_only=True)
class AuditModuleConfig:
    """Whether a PyTorch attention module leaks from the future, padding or other rows, and decodes as it reads.

    Exit status 1 on a leak.
    """

    module: tyro.conf.Positional[str]
    """package.module:Class, or a function that makes a module; the current folder is searched too."""
    hidden_size: int
    """Numbers of a token, given to the class as hidden_size, embed_dim, d_model, dim, n_embd or embedding_dim."""
    num_heads: int | None = None
    """Given to the class as num_heads, num_attention_heads, n_heads, n_head, nhead or heads."""
    options: tuple[str, ...] = ()
    """NAME=VALUE for the class, the value as JSON: --options bias=false local_window=null."""
    call: tuple[str, ...] = ()
    """NAME=VALUE for forward: --call is_causal=true."""
    tokens: int = 32
    """Tokens of a row."""
    dtype: Literal["float64", "float32"] = "float64"
    """Of weights and inputs."""
    seed: int = 0
    """Of weights and inputs."""

    def __post_init__(self) -> None:
        check_at_least("hidden_size", self.hidden_size, 1)
        check_at_least("num_heads", self.num_heads, 1)
        check_at_least("tokens", self.tokens, 2)
        check_at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class AuditOriginalConfig:
    """The original's protocol beside the right one: what each of its defects does to a "perplexity"."""

    max_steps: int = 600
    """Optimiser steps of each of the ten trainings."""
    sequence_length: int = 512
    """Tokens of a row of text, which the original fills up with padding."""
    dataset: str = "stdlib"
    """The text; uniform random tokens come first."""
    text_path: tuple[str, ...] = ()
    """Files or folders, with --dataset text."""
    seed: int = 0
    """Of weights and rows."""
    output: str | None = None
    """Also write a JSON line for each row of the tables to this file."""

    def __post_init__(self) -> None:
        check_at_least("max_steps", self.max_steps, 1)
        check_at_least("sequence_length", self.sequence_length, 2)
        check_at_least("seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Whether figures can be trusted."""

    task: (
        Annotated[AuditOriginalConfig, tyro.conf.subcommand("original")]
        | Annotated[AuditModuleConfig, tyro.conf.subcommand("module")]
    )
