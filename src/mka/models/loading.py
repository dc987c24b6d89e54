"""Saved models with their tokenizers, by folder, name on the hub or GGUF file; and
saving them."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mka.data.hub import NOT_REACHED, first_line, hub_is_reachable
from mka.errors import InputError, check_utf8
from mka.models.weights import (  # mka.models registers our models with the Auto classes
    check_finite,
    check_loaded,
    check_precision,
    stop_at_nonfinite_logits,
)
from mka.record.folders import check_saved
from mka.storage import write_folder


def load(name: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a folder, or of a name on the hub.

    Raises InputError if it is not a saved model, if it is damaged or not finite, and if
    the hub cannot be reached.
    """
    here = is_here(name)
    return load_from(AutoModelForCausalLM, name, here), load_from(AutoTokenizer, name, here)


def load_gguf(name: str, dtype: str = "bfloat16") -> tuple[Any, Any]:
    """The model and the tokenizer of a .gguf file, with weights dequantized to `dtype`.

    Raises ValueError if the file or the package gguf is missing, and if transformers
    cannot read the file.
    """
    path = Path(name)
    if not path.is_file():
        raise InputError(f"model is {name!r}; there is no such file")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            f"model is {name!r}; to read it the package gguf is needed: pip install gguf"
        )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
        )
        return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # A foreign file can fail in any way that the libraries reading it can fail.
    except Exception as error:
        raise InputError(
            f"model is {name!r}; transformers cannot read it: {first_line(error)}"
        ) from error


def new_folder(name: str) -> Path:
    """The absolute path of a folder to write a model to. Raises InputError unless it is
    empty or does not exist."""
    folder = Path(name).resolve()
    # The libraries that write weights and tokenizers take no other names.
    check_utf8("output", str(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output is {name!r}; it exists and is not empty; choose another folder")
    return folder


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer with checksums; on any error the folder does not
    exist."""

    def fill(building: Path) -> dict[str, Any]:
        """Write the files; there are no details in addition to their checksums."""
        model.save_pretrained(building)
        tokenizer.save_pretrained(building)
        return {}

    write_folder(folder, fill)


def load_model(name: str) -> Any:
    """The model alone, for tasks without text. Raises InputError as `load` does."""
    return load_from(AutoModelForCausalLM, name, is_here(name))


def is_here(name: str) -> bool:
    """Whether the name is a folder; if not, it is a name on the hub.

    Raises InputError for a folder or file that is not a saved model, for a folder that
    has changed since it was saved, and for a name if the hub cannot be reached.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"model is {name!r}; a folder without config.json is not a saved model")
    if folder.exists() and not folder.is_dir():
        raise InputError(
            f"model is {name!r}; it is a file; give the folder of a saved model (mka convert also "
            "takes a .gguf file)"
        )
    if not folder.is_dir() and not hub_is_reachable():
        raise InputError(f"model is {name!r}; {NOT_REACHED}; give the folder of a saved model")
    check_saved(folder)
    return folder.is_dir()


def load_from(source: Any, name: str, here: bool) -> Any:
    """A model or tokenizer, by the class of transformers that `source` is.

    Args:
        source: AutoModelForCausalLM or AutoTokenizer.
        name: a folder or a name on the hub.
        here: whether it is a folder (`is_here`), so that nothing is downloaded.

    Raises InputError if it cannot be loaded, or is not what was saved.
    """
    # Otherwise an installed deepspeed warns that it had to guess.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # What transformers would print about the weights is in its loading info.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    is_model = source is AutoModelForCausalLM
    # Weights of another shape are let through here, so that check_loaded can name them.
    report = {"output_loading_info": True, "ignore_mismatched_sizes": True} if is_model else {}
    try:
        loaded = source.from_pretrained(
            name, local_files_only=here, trust_remote_code=False, **report
        )
    # Our own messages say already what is wrong.
    except InputError:
        raise
    # A download or a foreign file can fail in any way that the libraries behind it can
    # fail.
    except Exception as error:
        raise InputError(f"model is {name!r}; it cannot be loaded: {first_line(error)}") from error
    if not is_model:
        return loaded
    model, info = loaded
    return checked(model.eval(), info, name, here)


def checked(model: Any, info: dict[str, Any], name: str, here: bool) -> Any:
    """A loaded model on its device, once it is known to be the one that was saved.

    Args:
        model: the model.
        info: transformers' loading info: which weights were missing, left over or did
            not fit.
        name: what was loaded, for messages.
        here: whether the name is a folder.

    Weights that were rounded to the dtype of config.json are reported on stderr. Raises
    InputError for weights that are missing, left over, of another shape or not finite,
    and for an adapter; the model that is returned raises it for logits that are not
    finite.
    """
    # The loading info would be the adapter's, and a bank's fingerprint would miss its
    # settings.
    if hasattr(model, "peft_config"):
        raise InputError(
            f"model is {name!r}; it holds an adapter; save it merged: "
            "PeftModel.merge_and_unload().save_pretrained(...)"
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
    """The folder in which a model of the hub is on this machine; None if it is not."""
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None
