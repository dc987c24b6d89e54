"""Saved models by folder or name, with their tokenizers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import mka.models  # noqa: F401  (registers our models with the Auto classes)
from mka.config import InputError
from mka.data.hub import NOT_REACHED, first_line, hub_is_reachable
from mka.folders import check_saved


def load(name: str) -> tuple[Any, Any]:
    """Model and tokenizer. Raises InputError for what is no saved model and for a name that cannot be reached."""
    here = is_here(name)
    return load_from(AutoModelForCausalLM, name, here), load_from(AutoTokenizer, name, here)


def load_model(name: str) -> Any:
    """The model alone: one of a task without text has no tokenizer."""
    return load_from(AutoModelForCausalLM, name, is_here(name))


def is_here(name: str) -> bool:
    """Whether the name is a folder, of a model that is as it was saved; otherwise the hub must answer."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"model is {name!r}; a folder without config.json is no saved model")
    if not folder.is_dir() and not hub_is_reachable():
        raise InputError(f"model is {name!r}; {NOT_REACHED}; give the folder of a saved model")
    check_saved(folder)
    return folder.is_dir()


def load_from(source: Any, name: str, here: bool) -> Any:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        loaded = source.from_pretrained(name, local_files_only=here, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # a download or a foreign file can fail in every way that its libraries know
        raise InputError(f"model is {name!r}; it cannot be loaded: {first_line(error)}") from error
    if source is not AutoModelForCausalLM:
        return loaded
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")
