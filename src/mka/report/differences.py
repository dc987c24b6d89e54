"""Each mechanism against mha, and each variant against its mechanism as it is, on the
same held-out blocks.

The difference, its interval, and the verdict that follows from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mka.record.intervals import Estimate, paired, verdict
from mka.record.results import Result
from mka.report.summary import shown_name

BASELINE = "mha"


@dataclass(frozen=True)
class Difference:
    """Eval loss of `name` minus the baseline's, nats per token, over the seeds that
    both have.

    blocks: the number of held-out blocks behind the estimate."""

    name: str
    baseline: str
    estimate: Estimate
    seeds: int
    blocks: int

    @property
    def interval(self) -> str:
        """The 95 % interval in words, or "none"."""
        return (
            f"{self.estimate.low:+.4f} to {self.estimate.high:+.4f}"
            if self.estimate.has_interval
            else "none"
        )

    def line(self) -> str:
        """The difference, its interval and the verdict, as one line."""
        alone = "" if self.seeds > 1 else " (single seed)"
        difference = f"{self.estimate.value:+.4f} nats per token ({self.interval})"
        return f"{self.name} - {self.baseline}: {difference}, {verdict(self.estimate)}{alone}"


def differences(rows: Sequence[Result]) -> list[Difference]:
    """One per mechanism and variant, in the order of the rows; nothing where there is
    no baseline, or for results that keep no blocks."""
    by_arm: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for row in rows:
        if row.eval_block_losses:
            by_arm.setdefault((row.attention_type, row.variant), {})[row.seed] = np.asarray(
                row.eval_block_losses
            )
    found = []
    for (kind, variant), losses in by_arm.items():
        baseline = (kind, "") if variant and (kind, "") in by_arm else (BASELINE, "")
        theirs = by_arm.get(baseline, {})
        pairs = [(ours, theirs[seed]) for seed, ours in losses.items() if seed in theirs]
        same = [ours - other for ours, other in pairs if ours.shape == other.shape]
        if same and baseline != (kind, variant):
            sizes = len(same), same[0].shape[0]
            found.append(
                Difference(
                    shown_name(kind, variant), shown_name(*baseline), paired(np.stack(same)), *sizes
                )
            )
    return found


def differences_table(found: Sequence[Difference]) -> str:
    """Markdown; nothing for nothing."""
    if not found:
        return ""
    rows = [
        ["", "against", "Eval loss vs. baseline", "95 % interval", ""],
        [":--", ":--", "--:", "--:", ":--"],
    ]
    rows += [
        [d.name, d.baseline, f"{d.estimate.value:+.4f}", d.interval, verdict(d.estimate)]
        for d in found
    ]
    seeds = max(row.seeds for row in found)
    over = f"{found[0].blocks:,} held-out blocks" + (f" and {seeds} seeds" if seeds > 1 else "")
    alone = (
        "" if seeds > 1 else " With one seed, it does not cover variation between training runs."
    )
    note = f"Nats per token, block by block; a bootstrap over {over}.{alone}\n"
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n" + note
