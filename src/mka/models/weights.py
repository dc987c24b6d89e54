"""Whether a loaded model is the one that was saved: no weight is missing, left over, of
another shape, rounded, or not finite."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mka.errors import InputError
from mka.models.adapter import AttentionAdapter

CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of the names of constants that older files of transformers have among the
weights."""
PRETRAINED = ("q_proj.", "k_proj.", "v_proj.", "o_proj.", "q_norm.", "k_norm.", "sink_logits")
"""Beginnings of the names of weights that a mechanism has in common with a pretrained
attention; its others belong to router and memories."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of plain weights by safetensors' names; others belong to a quantized model."""


def check_loaded(
    model: nn.Module, info: Mapping[str, Any], where: object, shapes: bool = True
) -> None:
    """Raises InputError if weights were missing when a model was loaded, or left over.

    Args:
        model: the model.
        info: transformers' loading info.
        where: what was loaded, for messages.
        shapes: whether a weight of another shape, which transformers initializes again,
            is an error too. Default: True.
    """
    if shapes and (found := sorted(info["mismatched_keys"])):
        name, saved, wanted = found[0]
        raise InputError(
            f"{name} is {tuple(saved)} in the folder and {tuple(wanted)} in the model; the "
            "options in config.json are not those of the weights"
            f"{others(found, 'weights do not fit')}"
        )
    # In the model's order, so that the first to be named is the first that a reader
    # looks for.
    missing = [name for name in model.state_dict() if name in info["missing_keys"]]
    missing += sorted(set(info["missing_keys"]) - set(missing))
    left = [name for name in sorted(info["unexpected_keys"]) if not name.endswith(CONSTANTS)]
    if missing:
        taken = (
            f"; they hold {left[0]}, which the model does not have{others(left, 'such')}"
            if left
            else ""
        )
        raise InputError(
            f"{missing[0]} is missing from the weights of "
            f"{str(where)!r}{others(missing, 'are missing')}{taken}"
            f"{to_convert(model, missing, left)}"
        )
    if left:
        raise InputError(
            f"{left[0]} is among the weights of {str(where)!r} and not in the "
            f"model{others(left, 'such')}; its config.json describes another model"
        )


def others(names: Sequence[Any], what: str) -> str:
    """ " (3 such)" for a list of three names; nothing for a single one."""
    return f" ({len(names)} {what})" if len(names) > 1 else ""


def to_convert(model: nn.Module, missing: Iterable[str], left: Sequence[str]) -> str:
    """The advice to convert, if the weights appear to be those of a pretrained model;
    else "".

    Args:
        model: a model with mechanisms.
        missing: names of weights that it has and the file lacks.
        left: names of weights that the file has and it lacks.
    """
    places = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, AttentionAdapter)
    )
    inside = [
        name.partition(".attention.")[2] for name in missing if places and name.startswith(places)
    ]
    # Either all that is missing is what mechanisms have in addition, or the attention
    # has other names, as in GPT-2.
    new = all(name and not name.startswith(PRETRAINED) for name in inside)
    replaced = bool(left) and all(name.startswith(places) for name in left)
    if len(inside) < len([*missing]) or not (new or replaced):
        return ""
    return (
        "; to give a pretrained model this attention, load it as it is and call mka.models.convert"
    )


def check_finite(model: nn.Module, where: object) -> None:
    """Raises InputError for a weight that holds NaN or infinity."""
    if found := [*not_finite(model.state_dict().items())]:
        raise InputError(
            f"{found[0]} of {str(where)!r} holds NaN or infinity{others(found, 'weights do')}"
        )


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """The names of weights that hold NaN or infinity."""
    for name, weight in weights:
        if not weight.is_floating_point() or weight.is_meta or not weight.numel():
            continue
        # Narrower formats than these have no minimum and maximum in torch.
        readable = weight.detach() if weight.dtype in FLOATS.values() else weight.detach().float()
        # If one element is NaN, both extremes are NaN: one pass over the weight is
        # enough.
        extremes = torch.stack(readable.aminmax())
        if not bool(extremes.isfinite().all()):
            yield name


def check_precision(model: Any, folder: Path) -> str | None:
    """A line that reports weights that were rounded when they were loaded from a
    folder's safetensors; None if none were, and for a quantized model.

    Raises InputError for a weight that is stored in another kind of number than
    floating point.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return None
    weights, rounded = dict(model.named_parameters()), []
    for name, stored in stored_dtypes(folder).items():
        # A file may name a weight differently than the model; then the model's dtype
        # counts.
        used = weights[name].dtype if name in weights else model.dtype
        if stored not in FLOATS:
            if name in weights and weights[name].is_floating_point():
                allowed = ", ".join(FLOATS)
                raise InputError(
                    f"{name} of {str(folder)!r} is stored as {stored}; allowed: {allowed}"
                )
        elif torch.promote_types(FLOATS[stored], used) != used:
            rounded.append((name, FLOATS[stored], used))
    if not rounded:
        return None
    name, stored, used = rounded[0]
    saved, read = (str(dtype).removeprefix("torch.") for dtype in (stored, used))
    return (
        f"{name} of {str(folder)!r} is stored in {saved} and was rounded to the {read} of "
        f"config.json{others(rounded, 'weights were')}; to read all of it, set dtype there to "
        f"{saved}"
    )


def stored_dtypes(folder: Path) -> dict[str, str]:
    """The dtype of each weight, by its name, in a folder's safetensors; empty for other
    formats."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not files[0].is_file():
        shards = (
            json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            if index.is_file()
            else ()
        )
        files = [folder / shard for shard in sorted(set(shards))]
    found = {}
    for path in files:
        # Headers are enough: the weights themselves may be large.
        with safe_open(path, framework="pt") as file:
            # Not a dict: it cannot be iterated over itself.
            names = file.keys()
            found |= {name: file.get_slice(name).get_dtype() for name in names}
    return found


def stop_at_nonfinite_logits(model: nn.Module, where: object) -> None:
    """Make the model raise InputError, outside training, if its logits are NaN,
    infinite, or -inf for all tokens.

    `where`: what was loaded, for the message. A training checks its own losses.
    """

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        """Check the output of one call."""
        if module.training:
            return
        logits = output.logits if hasattr(output, "logits") else output[0]
        # A single logit of -inf only rules a token out, as some models do: the maximum
        # tells.
        if not bool(logits.amax(-1).isfinite().all()):
            raise InputError(
                f"model is {str(where)!r}; its weights are finite and its logits are not (NaN "
                "or infinity): they overflow, or config.json does not belong to these weights"
            )

    model.register_forward_hook(look)
