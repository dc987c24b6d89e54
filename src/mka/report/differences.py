"""Each mechanism against mha on the same held-out blocks: the difference, its interval, and the verdict from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mka.config import ATTENTION_TITLES
from mka.results import Result
from mka.statistics import Estimate, paired, verdict

BASELINE = "mha"


@dataclass(frozen=True)
class Difference:
    """Eval loss minus the baseline's, nats per token, over `seeds` seeds that both have and `blocks` blocks."""

    attention_type: str
    estimate: Estimate
    seeds: int
    blocks: int

    @property
    def interval(self) -> str:
        low, high = self.estimate.low, self.estimate.high
        return "none" if np.isnan(low) else f"{low:+.4f} to {high:+.4f}"

    def line(self) -> str:
        name, base = self.attention_type.upper(), BASELINE.upper()
        alone = "" if self.seeds > 1 else " (of these two trainings: one seed)"
        difference = f"{self.estimate.value:+.4f} nats per token ({self.interval})"
        return f"{name} - {base}: {difference}, {verdict(self.estimate)}{alone}"


def differences(rows: Sequence[Result]) -> list[Difference]:
    """In the order of ATTENTION_TITLES; nothing without mha, or for results that keep no blocks."""
    by_key = {row.key: np.asarray(row.eval_block_losses) for row in rows if row.eval_block_losses}
    found = []
    for kind in ATTENTION_TITLES:
        pairs = [(losses, by_key.get((BASELINE, seed))) for (name, seed), losses in by_key.items() if name == kind]
        same = [ours - theirs for ours, theirs in pairs if theirs is not None and ours.shape == theirs.shape]
        if same and kind != BASELINE:
            found.append(Difference(kind, paired(np.stack(same)), len(same), same[0].shape[0]))
    return found


def differences_table(found: Sequence[Difference]) -> str:
    """Markdown; nothing for nothing."""
    if not found:
        return ""
    base = BASELINE.upper()
    rows = [[f"Against {base}", f"Eval loss - {base}'s", "95 % interval", ""], [":--", "--:", "--:", ":--"]]
    for row in found:
        shown = [row.attention_type.upper(), f"{row.estimate.value:+.4f}", row.interval, verdict(row.estimate)]
        rows.append(shown)
    seeds = max(row.seeds for row in found)
    over = f"{found[0].blocks:,} held-out blocks" + (f" and {seeds} seeds" if seeds > 1 else "")
    alone = "" if seeds > 1 else " With one seed it says nothing of other seeds."
    note = f"Nats per token, block by block; a bootstrap over {over}.{alone}\n"
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + "\n" + note
