"""What ran: the command, the data, the machine, the versions and the configuration, from
what the results say of themselves."""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from mka.errors import printable
from mka.memory.options import LOCAL_WINDOW
from mka.record.config import PRESETS, BenchmarkConfig
from mka.record.mechanisms import MECHANISMS
from mka.record.results import Result, flat
from mka.record.studies import STUDIES
from mka.report.runs import Run
from mka.report.summary import shown_name

ENVIRONMENT = (
    *("commit", "mka", "python", "torch", "transformers"),
    *("processor", "cores", "threads", "device", "precision"),
)
"""What is named of the environment; the rest is in the folder."""
NOT_LISTED = ("attention_type", "seeds", "output_dir")
"""Shown elsewhere in the report (the rows, the seeds), or where the folder was."""
SHOWN_OTHERWISE = ("attention_type", "study", "seeds", "output_dir")
"""Not an option of the command shown: it is its subject, or is in every command."""
PRESET_VALUES = ("tokenizer", "sequence_length", "batch_size", "learning_rate", "max_steps")


def command_of(run: Run) -> str:
    """`mka bench` with the options that are not the preset's or the study's own, once
    for each study that the rows are of; settings that were not recorded, such as how
    the ranks were started, are not in it."""
    studies = studies_of({row.name for row in run.rows})
    return " && ".join(shlex.join(words_of(run, study)) for study in studies or [None])


def studies_of(arms: set[str]) -> list[str]:
    """Those that train these arms and no others, if there is one; otherwise those whose
    variants are among them."""
    names = {name: {arm.name for arm in study.arms} for name, study in STUDIES.items()}
    variants = {arm.name for study in STUDIES.values() for arm in study.arms if arm.variant}
    exact = [name for name, found in names.items() if found == arms]
    return exact[:1] or [name for name, found in names.items() if found & arms & variants]


def words_of(run: Run, study: str | None) -> list[str]:
    """The words of the command that makes such a run; with `study`, one that names
    it."""
    config: dict[str, Any] = {
        name: value for row in reversed(run.rows) for name, value in row.config.items()
    }
    kinds, seeds = (
        list(dict.fromkeys(row.attention_type for row in run.rows)),
        sorted({row.seed for row in run.rows}),
    )
    usual: dict[str, Any] = {field.name: field.default for field in fields(BenchmarkConfig)} | {
        "match": "none"
    }
    preset = PRESETS.get(str(config.get("preset", usual["preset"])))
    usual |= {name: getattr(preset, name) for name in PRESET_VALUES if preset is not None}
    usual_kinds, usual_seeds = set(MECHANISMS), (0,)
    if not any(
        "local_window" in row.config
        for row in run.rows
        if not MECHANISMS[row.attention_type].has_memory
    ):
        usual["local_window"] = LOCAL_WINDOW  # as "auto" has it
    words = ["mka", "bench"]
    if study is not None:
        words += ["--study", study]
        usual |= {name: getattr(STUDIES[study], name) for name in ("max_steps", "match")}
        usual_kinds, usual_seeds = (
            {arm.attention_type for arm in STUDIES[study].arms},
            STUDIES[study].seeds,
        )
    if usual_kinds - set(kinds):
        words += ["--attention_type", *(kind for kind in kinds if kind in usual_kinds)]
    for name, value in config.items():
        if name in usual and name not in SHOWN_OTHERWISE and plain(value) != plain(usual[name]):
            words += option(name, value)
    of_mka = [row.config for row in run.rows if "session_stride" in row.config]
    if any("mix" not in config for config in of_mka):
        words += ["--mix", "routed", "--sink_tokens", "0"]  # made before there was another
    if tuple(seeds) != usual_seeds:
        words += option("seeds", seeds)
    return words


def plain(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def option(name: str, value: Any) -> Iterable[str]:
    """A flag and its value, as words of a command."""
    if value is True:
        return [f"--{name}"]
    if value is False:
        return []
    return [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]


def fact_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Names, and a value for each run."""
    facts: dict[str, Callable[[Result], Any]] = {
        "seeds": lambda row: row.seed,
        "tokens trained on": lambda row: f"{row.train_tokens:,}",
        "tokens evaluated": lambda row: f"{row.eval_tokens:,}",
        "hash of the data": lambda row: flat(row.config).get("data.corpus_fingerprint"),
    }
    facts |= {name: lambda row, name=name: row.environment.get(name) for name in ENVIRONMENT}
    rows = [(name, [each_once(map(of, run.rows)) for run in runs]) for name, of in facts.items()]
    return [("command", [command_of(run) for run in runs]), *rows]


def each_once(values: Iterable[Any]) -> str:
    """The distinct values, in words, in their order."""
    return ", ".join(
        dict.fromkeys("not recorded" if value is None else str(value) for value in values)
    )


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
    that setting is skipped."""
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
            f"- {escape(key)}: {escape(shown(value))}\n"
            for key, value in flat(group[0].environment).items()
        )
        texts.append(f"{', '.join(names)}:\n\n" + (values or "- not recorded\n"))
    return "\n".join(texts)


def escape(text: str) -> str:
    """Text for a line or a table's cell of Markdown, in which it commands nothing: no
    tag, link, code, cell or line."""
    line = " ".join(text.split()).replace("\\", "\\\\")
    for mark in ("|", "`", "]("):
        line = line.replace(mark, f"\\{mark}")
    return printable(line.replace("<", "&lt;"))
