"""Whether an attention module keeps to the past, to its own row and to its tokens, as its outputs show.

gradient    d y_t / d x_s = 0 for every s > t
future      other finite values after t, huge ones included, leave y_t as it is (a detached average has no gradient, a
            mask of -1e9 is not always enough)
NaN         NaN after t leaves y_t finite; where it does not, something is masked by a product (0 * NaN = NaN), as in
            most attentions: noted, but no leak as long as no finite value comes through
prefix      the first t tokens alone give the same y_1 .. y_t (statistics of the whole row, its length)
padding     what stands at padding leaves the tokens' outputs as they are
batch       a row alone gives what it gives beside others
decoding    token by token, with the module's own state, gives what one call gives
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mka.audit_commands import AuditModuleConfig
from mka.evaluation.foreign import ForeignModule, build_foreign
from mka.limits import InputError

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Of differences, in units of the larger of 1 and the largest output; gradients must be exactly zero."""
ROWS = 3
HUGE = 1e6
Result = Literal["pass", "FAIL", "note", "n/a"]


@dataclass(frozen=True)
class Finding:
    """One check: pass, FAIL, note (no leak, but worth knowing) or n/a (`reason`: what the module lacks).

    `pair`: the output token, and the token (or row) it should not have seen, at the largest violation.
    """

    check: str
    result: Result
    violation: float = 0.0
    pair: tuple[int, int] | None = None
    reason: str = ""


class Worst:
    """The largest violation so far; a difference that is not a number is the largest there is."""

    def __init__(self) -> None:
        self.violation, self.pair = 0.0, None

    def note(self, violation: float, output: int, source: int) -> None:
        violation = math.inf if math.isnan(violation) else violation
        if violation > self.violation:
            self.violation, self.pair = violation, (output, source)

    def finding(self, check: str, tolerance: float, otherwise: Result = "FAIL", reason: str = "") -> Finding:
        if self.violation <= tolerance:
            return Finding(check, "pass", self.violation, self.pair)
        return Finding(check, otherwise, self.violation, self.pair, reason)


def audit_module(config: AuditModuleConfig, say: Callable[[str], None]) -> bool:
    """Print a table of the checks, each as soon as it is known; returns whether all passed."""
    dtype = getattr(torch, config.dtype)
    module = build_foreign(
        config.module, config.hidden_size, config.num_heads, config.options, config.call, config.seed, dtype
    )
    say(f"{config.module}: {config.tokens} random tokens of {config.hidden_size}, {config.dtype}, seed {config.seed}")
    say(f"{'check':<10} {'result':<6}  largest violation")
    failed = []
    for finding in audit(module, config.tokens, config.seed, dtype):
        say(line(finding))
        failed += [finding.check] if finding.result == "FAIL" else []
    say(f"leaks: {', '.join(failed)}" if failed else "no leak found")
    return not failed


def line(finding: Finding) -> str:
    """A row of the table."""
    begin = f"{finding.check:<10} {finding.result:<6}"
    if finding.result == "n/a":
        return f"{begin}  {finding.reason}"
    words = {"batch": "row", "decoding": "the call from token"}
    at = finding.pair and f"  output {finding.pair[0]} from {words.get(finding.check, 'token')} {finding.pair[1]}"
    why = finding.reason and f"  ({finding.reason})"
    return f"{begin}  {finding.violation:.1e}{at or ''}{why}"


def audit(module: ForeignModule, tokens: int, seed: int, dtype: torch.dtype) -> Iterator[Finding]:
    """Each finding as soon as it is known, for rows of `tokens` random tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, tokens, module.hidden_size, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        y = module(x)
        again = module(x)
    if not torch.equal(y.nan_to_num(), again.nan_to_num()):
        raise InputError("two calls with one input differ; the audit needs a module that draws nothing in eval mode")
    if not y.isfinite().all():
        raise InputError("the output for random tokens is not finite; nothing can be compared with it")
    yield gradient(module, x)
    with torch.no_grad():
        alone = module(x[:1])
        for check in (future, nan, prefix):
            yield check(module, x[:1], alone)
        for check in (padding, batch, decoding):
            yield check(module, x, y)


def units(y: Tensor) -> Tensor:
    return y.abs().max().clamp(min=1)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """(T,): the largest difference at each token of a row, in units of the outputs."""
    return (a - b).abs().amax(-1) / units(b)


def gradient(module: ForeignModule, x: Tensor) -> Finding:
    x, worst = x[:1].clone().requires_grad_(), Worst()
    y = module(x)
    if not y.requires_grad:
        return Finding("gradient", "n/a", reason="the output has no gradient")
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    for t in range(x.shape[1] - 1):
        (grad,) = torch.autograd.grad((y * direction)[0, t].sum(), x, retain_graph=True, materialize_grads=True)
        leaked = grad[0, t + 1 :].abs().amax(-1)
        source = int(leaked.argmax())
        worst.note(leaked[source].item(), t, t + 1 + source)
    return worst.finding("gradient", 0.0)


def disturbed(module: ForeignModule, x: Tensor, y: Tensor, disturb: Callable[[Tensor], Tensor], worst: Worst) -> None:
    """What outputs before s make of another token at s, for every s."""
    for s in range(1, x.shape[1]):
        changed = x.clone()
        changed[:, s] = disturb(changed[:, s])
        moved = difference(module(changed)[0, :s], y[0, :s])
        moved = moved.masked_fill(moved.isnan(), math.inf)
        output = int(moved.argmax())
        worst.note(moved[output].item(), output, s)


def future(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    worst = Worst()
    for disturb in (lambda token: 10 - 3 * token, lambda token: HUGE * token):
        disturbed(module, x, y, disturb, worst)
    return worst.finding("future", TOLERANCE[y.dtype])


def nan(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    worst = Worst()
    disturbed(module, x, y, lambda token: torch.full_like(token, math.nan), worst)
    return worst.finding("NaN", TOLERANCE[y.dtype], "note", "masked by a product: 0 * NaN")


def prefix(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    worst = Worst()
    for t in range(1, x.shape[1]):
        moved = difference(module(x[:, :t])[0], y[0, :t])
        output = int(moved.argmax())
        worst.note(moved[output].item(), output, t)
    return worst.finding("prefix", TOLERANCE[y.dtype])


def padding(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    """Three tokens of padding, at the left of the first row and at the right of the second."""
    if module.mask is None:
        return Finding("padding", "n/a", reason="forward takes no valid, attention_mask or key_padding_mask")
    width, worst = min(3, x.shape[1] - 1), Worst()
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    valid[0, :width], valid[1, -width:] = False, False
    once = module(x, valid)
    for row in (0, 1):
        for place in (~valid[row]).nonzero().flatten().tolist():
            changed = x.clone()
            changed[row, place] = 10 - 3 * x[row, place]
            moved = difference(module(changed, valid)[row], once[row]).masked_fill(~valid[row], 0)
            output = int(moved.argmax())
            worst.note(moved[output].item(), output, place)
    return worst.finding("padding", TOLERANCE[y.dtype])


def batch(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    """The second number of the pair is the row."""
    worst = Worst()
    for row in range(len(x)):
        moved = difference(module(x[row : row + 1])[0], y[row])
        output = int(moved.argmax())
        worst.note(moved[output].item(), output, row)
    return worst.finding("batch", TOLERANCE[y.dtype])


def decoding(module: ForeignModule, x: Tensor, y: Tensor) -> Finding:
    """Token by token, and in pieces of three. The second number of the pair is the first token of the call."""
    if module.cache is None:
        return Finding(
            "decoding", "n/a", reason="no initial_state and forward(..., state=...), no cache of transformers"
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
