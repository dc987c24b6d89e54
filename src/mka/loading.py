"""Saved models by folder or name, with their tokenizers; and new folders of models."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mka.data.hub import NOT_REACHED, first_line, hub_is_reachable
from mka.folders import check_saved
from mka.limits import InputError
from mka.models.weights import (  # mka.models registers our models with the Auto classes
    check_finite,
    check_loaded,
    check_precision,
    stop_at_nonfinite_logits,
)
from mka.storage import write_folder


def load(name: str) -> tuple[Any, Any]:
    """Model and tokenizer. Raises InputError for what is no saved model and for a name that cannot be reached."""
    here = is_here(name)
    return load_from(AutoModelForCausalLM, name, here), load_from(AutoTokenizer, name, here)


def new_folder(name: str) -> Path:
    """The whole path of a folder to write a model to. Raises InputError where something is there already."""
    folder = Path(name).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output is {name!r}; it is there and not empty; give another folder")
    return folder


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write both, with checksums; whatever goes wrong, nothing is there under the folder's name."""

    def fill(building: Path) -> dict[str, Any]:
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        return {}

    write_folder(folder, fill)


def load_model(name: str) -> Any:
    """The model alone: one of a task without text has no tokenizer."""
    return load_from(AutoModelForCausalLM, name, is_here(name))


def is_here(name: str) -> bool:
    """Whether the name is a folder, of a model that is as it was saved; otherwise the hub must answer."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"model is {name!r}; a folder without config.json is no saved model")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"model is {name!r}; it is a file; give the folder of a saved model")
    if not folder.is_dir() and not hub_is_reachable():
        raise InputError(f"model is {name!r}; {NOT_REACHED}; give the folder of a saved model")
    check_saved(folder)
    return folder.is_dir()


def load_from(source: Any, name: str, here: bool) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or an installed deepspeed warns that it had to guess
    logging.set_verbosity_error()  # its report on the weights is in the loading info
    logging.disable_progress_bar()
    is_model = source is AutoModelForCausalLM
    report = {"output_loading_info": True, "ignore_mismatched_sizes": True} if is_model else {}
    try:
        loaded = source.from_pretrained(name, local_files_only=here, trust_remote_code=False, **report)
    except InputError:
        raise
    except Exception as error:  # a download or a foreign file can fail in every way that its libraries know
        raise InputError(f"model is {name!r}; it cannot be loaded: {first_line(error)}") from error
    if not is_model:
        return loaded
    model, info = loaded
    return checked(model.eval(), info, name, here)


def checked(model: Any, info: dict[str, Any], name: str, here: bool) -> Any:
    """The model on its device, if it is the one that was saved, and from now on if its logits are numbers.

    Weights that config.json rounds are said on stderr. Raises InputError.
    """
    if hasattr(model, "peft_config"):  # the loading info is the adapter's, and a bank would not know its settings
        raise InputError(
            f"model is {name!r}; it holds an adapter; save it merged: PeftModel.merge_and_unload().save_pretrained(...)"
        )
    check_loaded(model, info, name)
    folder = Path(name) if here else downloaded_to(name)
    if folder is not None and (line := check_precision(model, folder)):
        print(f"mka: {line}", file=sys.stderr)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_finite(model, name)
    stop_at_nonfinite_logits(model, name)
    return model


def downloaded_to(name: str) -> Path | None:
    """The folder of a model of the hub on this machine."""
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None
