"""What a run was made with: its configuration and its environments, in Markdown."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mka.record.results import Result, flat
from mka.report.summary import shown_name

# Said elsewhere in the report (the rows, the seeds), or where the folder was.
NOT_LISTED = ("attention_type", "seeds", "output_dir")


def configuration(rows: Sequence[Result]) -> str:
    """A table of settings; where mechanisms differ in one, each value with those that
    have it."""
    lines = [f"| {escape(name)} | {escape(value)} |\n" for name, (value,) in setting_rows([rows])]
    return "| Setting | Value |\n| :-- | :-- |\n" + "".join(lines)


def setting_rows(runs: Sequence[Sequence[Result]]) -> list[tuple[str, list[str]]]:
    """The name of every setting, and what it is in each run."""
    settings = [
        [
            (shown_name(row.attention_type, row.variant), flat(row.config) | counts(row))
            for row in rows
        ]
        for rows in runs
    ]
    keys = dict.fromkeys(
        key for run in settings for _, values in run for key in values if key not in NOT_LISTED
    )
    return [(key, [value_of(key, run) for run in settings]) for key in keys]


def counts(row: Result) -> dict[str, Any]:
    """What a run counted; steps skipped (by float16's loss scaling) only where there
    were any."""
    skipped = {"skipped steps": row.skipped_steps} if row.skipped_steps else {}
    return {"tokens trained on": row.train_tokens, "tokens evaluated": row.eval_tokens, **skipped}


def value_of(key: str, settings: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """The value that all have, or each with those that have it; a mechanism without
    that setting is passed over."""
    names: dict[str, list[str]] = {}
    pairs = list(settings)
    having = [(name, shown(values[key])) for name, values in pairs if key in values]
    for name, value in having:
        names.setdefault(value, []).append(name)
    if len(names) == 1 and len(having) == len(pairs):
        return having[0][1]
    return "; ".join(
        f"{value} ({', '.join(dict.fromkeys(those))})" for value, those in names.items()
    )


def shown(value: Any) -> str:
    """A setting in words: yes, no, none, lists with commas."""
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def environments(rows: Iterable[Result]) -> str:
    """Each distinct environment, with the mechanisms that ran in it."""
    groups: dict[str, list[Result]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.environment, sort_keys=True, default=str), []).append(row)
    texts = []
    for group in groups.values():
        names = dict.fromkeys(shown_name(row.attention_type, row.variant) for row in group)
        values = "".join(
            f"- {key}: {shown(value)}\n" for key, value in flat(group[0].environment).items()
        )
        texts.append(f"{', '.join(names)}:\n\n" + (values or "- not recorded\n"))
    return "\n".join(texts)


def escape(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
