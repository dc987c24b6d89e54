"""The articles of WikiText (arXiv 1609.07843), from the hub or a folder laid out like
it there."""

import re
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from mka.data.hub import NOT_REACHED, datasets_without_hub, first_line, hub_is_reachable
from mka.errors import InputError

WIKITEXT_SOURCE = "Salesforce/wikitext"
CONFIGURATIONS = {"wikitext2": "wikitext-2-raw-v1", "wikitext103": "wikitext-103-raw-v1"}
# A single = on each side: headings of sections have two or more.
TITLE = re.compile(r" = ([^=].*?) = \n?")
OFFLINE_WAY = "offline use --dataset stdlib, or --dataset text --text_path FILE"


def load_wikitext(dataset: str, source: str = WIKITEXT_SOURCE) -> dict[str, list[tuple[str, str]]]:
    """The articles of each split, as (number and title, text).

    Args:
        dataset: "wikitext2" or "wikitext103".
        source: a repository on the hub, or a folder laid out like it. Default:
            Salesforce/wikitext.

    Raises InputError if they cannot be loaded.
    """
    # Imported here: it takes seconds, and only this corpus needs it.
    import datasets

    reachable = Path(source).is_dir() or hub_is_reachable()
    try:
        with nullcontext() if reachable else datasets_without_hub():
            splits = datasets.load_dataset(source, CONFIGURATIONS[dataset])
        return {split: articles(splits[split]["text"]) for split in ("train", "validation", "test")}
    # A download can fail in any way that the libraries behind it can fail.
    except Exception as error:
        reason = first_line(error) if reachable else NOT_REACHED
        raise InputError(
            f"--dataset {dataset} cannot be loaded: {reason}; {OFFLINE_WAY}"
        ) from error


def articles(rows: Iterable[str]) -> list[tuple[str, str]]:
    """Lines of text joined into articles, as (number and title, text).

    An article begins at a top-level heading, " = Title = "; one without text is left
    out.
    """
    groups: list[tuple[str, list[str]]] = []
    for row in rows:
        heading = TITLE.fullmatch(row)
        if heading or not groups:
            groups.append((heading.group(1) if heading else "", []))
        groups[-1][1].append(row)
    # Numbers are given before empty articles are left out: they count headings of the
    # source.
    texts = [(title, "".join(lines)) for title, lines in groups]
    return [
        (f"{number:05d} {title}", text)
        for number, (title, text) in enumerate(texts)
        if text.strip()
    ]
