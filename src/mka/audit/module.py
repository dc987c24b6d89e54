"""Tests of an attention module by its outputs: does it read only the past, its own row,
and tokens?

gradient    d y_t / d x_s = 0 for every s > t
future      other finite values after t, huge ones included, do not change y_t (a
            detached average has no gradient, and a mask of -1e9 is not always enough)
NaN         NaN after t leaves y_t finite. If not, something is masked by a product (0 *
            NaN = NaN), as in most attention modules: noted, but not a leak while no
            finite value comes through
prefix      the first t tokens alone give the same y_1 .. y_t (statistics of the whole
            row, or its length, would change them)
padding     the values at padding do not change the outputs of tokens
batch       a row alone gives the same outputs as among others
decoding    token by token, with the module's own state, gives the same outputs as one
            call
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mka.audit.foreign import ForeignModule
from mka.errors import InputError, check_whole

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest difference that passes, by dtype, in units of the larger of 1 and the largest
output; gradients must be exactly zero."""
ROWS = 3
"""Rows of the random input."""
HUGE = 1e6
"""Factor that makes a token huge."""
Result = Literal["pass", "FAIL", "note", "n/a"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        check: its name.
        result: pass, FAIL, note (not a leak, but worth knowing) or n/a (not
            applicable).
        violation: the largest difference, in the units of TOLERANCE, or the largest
            gradient. Default: 0.
        pair: at the largest violation, the output token, and the token or row that it
            should not depend on. Default: None, no violation.
        reason: why the result is a note or n/a. Default: none.
    """

    check: str
    result: Result
    violation: float = 0.0
    pair: tuple[int, int] | None = None
    reason: str = ""


class Worst:
    """The largest violation so far; NaN counts as infinite."""

    def __init__(self) -> None:
        self.violation, self.pair = 0.0, None

    def note(self, violation: float, output: int, source: int) -> None:
        """Keep a violation, at these token indices, if it is larger than those
        before."""
        # A comparison with NaN is always False, so that NaN would pass unnoticed.
        violation = math.inf if math.isnan(violation) else violation
        if violation > self.violation:
            self.violation, self.pair = violation, (output, source)

    def finding(
        self, check: str, tolerance: float, otherwise: Result = "FAIL", reason: str = ""
    ) -> Finding:
        """The finding of a check: pass within the tolerance, else `otherwise` for this
        reason."""
        if self.violation <= tolerance:
            return Finding(check, "pass", self.violation, self.pair)
        return Finding(check, otherwise, self.violation, self.pair, reason)


def audit_module(
    module: nn.Module | ForeignModule,
    hidden_size: int | None = None,
    *,
    tokens: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Iterator[Finding]:
    """Check an attention module; yields each finding as soon as it is known.

    Args:
        module: y = module(x), x and y (B, T, C), or a tuple that begins with y; what
            else it takes is found by its signature (`mka.audit.foreign`). An nn.Module
            is changed: it is put into evaluation mode and into `dtype`.
        hidden_size: C, its width. Default: None, which only a ForeignModule allows, as
            it knows it.
        tokens: T, the length of the random rows. Default: 32.
        seed: random seed for the rows. Default: 0.
        dtype: float64, or float32 with wider tolerances. Default: float64.

    Raises ValueError for a module that fails, draws random numbers, or returns what is
    not finite.
    """
    check_whole("tokens", tokens, 2)
    check_whole("seed", seed, 0)
    check_whole("hidden_size", hidden_size, 1)
    if dtype not in (torch.float64, torch.float32):
        raise InputError(f"dtype is {dtype}; allowed: torch.float64, torch.float32")
    if not isinstance(module, nn.Module | ForeignModule):
        raise InputError(f"module is a {type(module).__name__}; give a torch.nn.Module")
    if not isinstance(module, ForeignModule):
        if hidden_size is None:
            raise InputError("hidden_size is None; give the width of the module's input")
        module = ForeignModule(module.to(dtype).eval(), hidden_size)
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float64 and then rounded, so that both dtypes see the same rows.
    x = torch.randn(ROWS, tokens, module.hidden_size, generator=generator, dtype=torch.float64).to(
        dtype
    )
    # All checks compare outputs of two calls, so equal calls must have equal outputs.
    with torch.no_grad():
        y = module(x)
        again = module(x)
    if not torch.equal(y.nan_to_num(), again.nan_to_num()):
        raise InputError(
            "two calls with one input differ; the audit needs a module that draws nothing in "
            "eval mode"
        )
    if not y.isfinite().all():
        raise InputError(
            "the output for random tokens is not finite; nothing can be compared with it"
        )
    yield gradient(module, x)
    with torch.no_grad():
        alone = module(x[:1])
        for check in (future, nan, prefix):
            yield check(module, x[:1], alone)
        for check in (padding, batch, decoding):
            yield check(module, x, y)


def units(y: Tensor) -> Tensor:
    """The unit of differences, (): the larger of 1 and the largest output."""
    return y.abs().max().clamp(min=1)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference at each token, (..., T, C) -> (..., T), in units of the
    outputs b."""
    return (a - b).abs().amax(-1) / units(b)


def gradient(module: ForeignModule, x: Tensor) -> Finding:
    """Check that the gradient of each output with respect to later inputs is exactly
    zero."""
    x, worst = x[:1].clone().requires_grad_(), Worst()
    y = module(x)
    if not y.requires_grad:
        return Finding("gradient", "n/a", reason="the output has no gradient")
    # A random direction: in the sum of all channels, contributions could cancel.
    direction = torch.randn(
        y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(y.dtype)
    # The last output has no later input.
    for t in range(x.shape[1] - 1):
        (grad,) = torch.autograd.grad(
            (y * direction)[0, t].sum(), x, retain_graph=True, materialize_grads=True
        )
        leaked = grad[0, t + 1 :].abs().amax(-1)
        source = int(leaked.argmax())
        worst.note(leaked[source].item(), t, t + 1 + source)
    return worst.finding("gradient", 0.0)


def disturbed(
    module: ForeignModule, x: Tensor, y: Tensor, disturb: Callable[[Tensor], Tensor], worst: Worst
) -> None:
    """Note in `worst` how outputs before s change with the token at s, for every s.

    Args:
        module: the module.
        x, y: (1, T, C), a row and its outputs.
        disturb: makes another token (1, C) of the one at s.
        worst: gets the violations.
    """
    for s in range(1, x.shape[1]):
        changed = x.clone()
        changed[:, s] = disturb(changed[:, s])
        moved = difference(module(changed)[0, :s], y[0, :s])
        # An output that has become NaN has moved as far as it can.
        moved = moved.masked_fill(moved.isnan(), math.inf)
        output = int(moved.argmax())
        worst.note(moved[output].item(), output, s)


def future(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    """Check that finite changes of a token do not reach earlier outputs."""
    worst = Worst()
    # A moderate change, and one so large that it outweighs masks of a finite number.
    for disturb in (lambda token: 10 - 3 * token, lambda token: HUGE * token):
        disturbed(module, x, y, disturb, worst)
    return worst.finding("future", TOLERANCE[y.dtype])


def nan(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    """Check whether NaN at a token leaves earlier outputs unchanged; a note if it does
    not."""
    worst = Worst()
    disturbed(module, x, y, lambda token: torch.full_like(token, math.nan), worst)
    return worst.finding("NaN", TOLERANCE[y.dtype], "note", "masked by a product: 0 * NaN")


def prefix(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    """Check that the outputs of the first t tokens alone equal those within the whole
    row."""
    worst = Worst()
    for t in range(1, x.shape[1]):
        moved = difference(module(x[:, :t])[0], y[0, :t])
        output = int(moved.argmax())
        worst.note(moved[output].item(), output, t)
    return worst.finding("prefix", TOLERANCE[y.dtype])


def padding(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    """Check that values at padding do not change the outputs of tokens.

    Three columns are padding, at the left of the first row and at the right of the
    second.
    """
    if module.mask is None:
        return Finding(
            "padding", "n/a", reason="forward takes no valid, attention_mask or key_padding_mask"
        )
    width, worst = min(3, x.shape[1] - 1), Worst()
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    valid[0, :width], valid[1, -width:] = False, False
    once = module(x, valid)
    for row in (0, 1):
        # One padding column at a time, so that the finding can name it.
        for place in (~valid[row]).nonzero().flatten().tolist():
            changed = x.clone()
            changed[row, place] = 10 - 3 * x[row, place]
            moved = difference(module(changed, valid)[row], once[row]).masked_fill(~valid[row], 0)
            output = int(moved.argmax())
            worst.note(moved[output].item(), output, place)
    return worst.finding("padding", TOLERANCE[y.dtype])


def batch(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    """Check that a row alone has the same outputs as in a batch; the pair's second
    number is the row."""
    worst = Worst()
    for row in range(len(x)):
        moved = difference(module(x[row : row + 1])[0], y[row])
        output = int(moved.argmax())
        worst.note(moved[output].item(), output, row)
    return worst.finding("batch", TOLERANCE[y.dtype])


def decoding(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    """Check that decoding, token by token and in pieces of three, has the outputs of
    one call; the pair's second number is the first token of the piece."""
    if module.cache is None:
        return Finding(
            "decoding",
            "n/a",
            reason="no initial_state and forward(..., state=...), no cache of transformers",
        )
    worst = Worst()
    for piece in module.pieces:
        state = module.initial_state(len(x))
        for start in range(0, x.shape[1], piece):
            part, state = module.decode(x[:, start : start + piece], state)
            moved = difference(part, y[:, start : start + piece]).amax(0)
            output = int(moved.argmax())
            worst.note(moved[output].item(), start + output, start)
    return worst.finding("decoding", TOLERANCE[y.dtype])
