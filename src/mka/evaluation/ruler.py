"""RULER's synthetic tasks (arXiv 2404.06654), generated and scored by lm-eval without a
network.

The tasks that use essays or question-answering datasets are left out, because their
texts are on a hub. lm-eval generates 500 prompts per task and length, however many of
them are used.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mka.errors import InputError

PACKAGES = ("lm_eval", "nltk", "wonderwords")
ANSWER_TOKENS = 128
"""Tokens in the longest answer that a task asks for."""


@dataclass(frozen=True)
class RulerScore:
    """The score for one task at one length.

    Attributes:
        task: the task's name in lm-eval.
        tokens: the length of a prompt, in tokens.
        accuracy: the share of the expected answers that are in what the model wrote.
        samples: the number of prompts.
    """

    task: str
    tokens: int
    accuracy: float
    samples: int


def check_packages() -> None:
    """Raise InputError, naming the package, if a required package is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"eval ruler needs the package {missing[0]}; pip install 'mka[ruler]'")


def ruler_scores(
    model: Any,
    tokenizer: Any,
    name: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int = 10,
) -> Iterator[RulerScore]:
    """Run RULER's tasks; yields one score per task and length, each as soon as it is
    known.

    Args:
        model: a causal language model of transformers.
        tokenizer: the model's tokenizer.
        name: the model's folder or its name on the hub, from which lm-eval reads the
            tokenizer again.
        tasks: names of tasks in lm-eval.
        lengths: lengths of the prompts, in tokens.
        samples: prompts per task and length.

    Raises InputError for a missing package, for a length beyond the model's learned
    positions, and for a task that cannot be generated with its tokenizer.
    """
    check_packages()
    # Only models with learned positions, such as GPT-2, have this attribute and a hard
    # limit.
    positions = (
        model.config.max_position_embeddings if hasattr(model.config, "n_positions") else None
    )
    if positions is not None and positions < max(lengths):
        raise InputError(
            f"lengths holds {max(lengths)}; {name} has learned {positions:,} positions"
        )
    with offline():
        for task in tasks:
            for length in lengths:
                accuracy = ask(model, tokenizer, name, task, length, samples)
                yield RulerScore(task, length, accuracy, samples)


def ask(model: Any, tokenizer: Any, name: str, task: str, length: int, samples: int) -> float:
    """The share of the expected answers in what the model wrote, for the first
    `samples` prompts.

    Raises InputError if the task cannot be generated at this length with this
    tokenizer.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    # Typed as Any, because lm-eval's own types are incomplete.
    evaluate: Any = evaluator.simple_evaluate
    make: Any = HFLM
    asked = make(
        pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=length + ANSWER_TOKENS
    )
    made_for = {"tokenizer": name, "max_seq_lengths": [length]}
    try:
        found = evaluate(asked, tasks=[task], limit=samples, metadata=made_for, bootstrap_iters=0)
    except InputError:
        # A ValueError too, but one that already has a message for the user.
        raise
    except (ZeroDivisionError, IndexError, ValueError) as error:
        raise InputError(
            f"tasks holds {task!r}; it cannot be generated with {length:,} tokens of this "
            f"tokenizer ({error}): use another length or task"
        ) from error
    return float(found["results"][task][f"{length},none"])


@contextmanager
def offline() -> Iterator[None]:
    """Within the block, no package may use the network."""
    import nltk

    before = dict(os.environ)
    os.environ.update(
        {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    )
    # lm-eval downloads nltk's sentence splitter unless its folder exists; only the
    # essays, which are left out, would use it. So an empty folder is enough.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizers" / "punkt_tab").mkdir(parents=True)
        nltk.data.path.append(folder)
        try:
            yield
        finally:
            nltk.data.path.remove(folder)
            os.environ.clear()
            os.environ.update(before)
