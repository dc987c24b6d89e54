"""RULER's synthetic tasks (arXiv 2404.06654) as lm-eval makes and scores them, without a network.

Those among essays and those over question-answering sets are left out: their texts are on a hub. lm-eval makes 500
prompts of a task and length, whatever number of them is asked.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mka.commands import RulerConfig
from mka.limits import InputError
from mka.loading import load
from mka.storage import write_atomically

PACKAGES = ("lm_eval", "nltk", "wonderwords")
ANSWER_TOKENS = 128
"""Tokens of the longest answer that a task asks for."""


def score_ruler(config: RulerConfig, say: Callable[[str], None]) -> None:
    """Print a row a task and length. Raises InputError for a missing package, a model that cannot be loaded or is too
    short, and a task that cannot be made with its tokenizer."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"eval ruler needs the package {missing[0]}; pip install 'mka[ruler]'")
    model, tokenizer = load(config.model)
    positions = model.config.max_position_embeddings if hasattr(model.config, "n_positions") else None
    if positions is not None and positions < max(config.lengths):
        raise InputError(f"lengths holds {max(config.lengths)}; {config.model} has learned {positions:,} positions")
    say(f"{'task':<18} {'tokens':>7}  {'accuracy':>8}")
    lines = []
    with offline():
        for task in config.tasks:
            for length in config.lengths:
                accuracy = ask(config, model, tokenizer, task, length)
                say(f"{task:<18} {length:>7,}  {accuracy:>8.3f}  ({config.samples} prompts)")
                row = {"model": config.model, "task": task, "tokens": length, "accuracy": accuracy}
                lines.append(json.dumps(row | {"samples": config.samples}))
    if config.output is not None:
        write_atomically(Path(config.output), "\n".join(lines) + "\n")


def ask(config: RulerConfig, model: Any, tokenizer: Any, task: str, length: int) -> float:
    """The share of the answers that a task wants, found in what the model wrote, over its first prompts."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    evaluate: Any = evaluator.simple_evaluate
    make: Any = HFLM
    asked = make(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=length + ANSWER_TOKENS)
    made_for = {"tokenizer": config.model, "max_seq_lengths": [length]}
    try:
        found = evaluate(asked, tasks=[task], limit=config.samples, metadata=made_for, bootstrap_iters=0)
    except InputError:
        raise
    except (ZeroDivisionError, IndexError, ValueError) as error:
        raise InputError(
            f"tasks holds {task!r}; it cannot be made of {length:,} tokens of this tokenizer ({error}): "
            "another length or task"
        ) from error
    return float(found["results"][task][f"{length},none"])


@contextmanager
def offline() -> Iterator[None]:
    """No hub is asked; and nltk finds the folder of a sentence splitter, which is for the essays alone."""
    import nltk

    before = dict(os.environ)
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizers" / "punkt_tab").mkdir(parents=True)
        nltk.data.path.append(folder)
        try:
            yield
        finally:
            nltk.data.path.remove(folder)
            os.environ.clear()
            os.environ.update(before)
