"""Whether a loaded model is the one that was saved: every weight is there, of its shape and precision, and a number."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mka.limits import InputError
from mka.models.adapter import AttentionAdapter

CONSTANTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of names under which older files of transformers keep constants beside the weights."""
PRETRAINED = ("q_proj.", "k_proj.", "v_proj.", "o_proj.", "q_norm.", "k_norm.", "sink_logits")
"""What a mechanism has in common with a pretrained attention; everything else of it is router and memories."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By safetensors' names; what is stored otherwise belongs to a quantized model."""


def check_loaded(model: nn.Module, info: Mapping[str, Any], where: object, shapes: bool = True) -> None:
    """Raises InputError where transformers' loading info has a weight that was made up, or one that was left out.

    `where`: what was loaded; `shapes`: whether one of another shape, which transformers draws anew, counts too.
    """
    if shapes and (found := sorted(info["mismatched_keys"])):
        name, saved, wanted = found[0]
        raise InputError(
            f"{name} is {tuple(saved)} in the folder and {tuple(wanted)} in the model; the options in "
            f"config.json are not those of the weights{others(found, 'weights do not fit')}"
        )
    missing = [name for name in model.state_dict() if name in info["missing_keys"]]
    missing += sorted(set(info["missing_keys"]) - set(missing))
    left = [name for name in sorted(info["unexpected_keys"]) if not name.endswith(CONSTANTS)]
    if missing:
        taken = f"; they hold {left[0]}, which the model does not have{others(left, 'such')}" if left else ""
        raise InputError(
            f"{missing[0]} is missing from the weights of {str(where)!r}{others(missing, 'are missing')}{taken}"
            f"{to_convert(model, missing, left)}"
        )
    if left:
        raise InputError(
            f"{left[0]} is among the weights of {str(where)!r} and not in the model{others(left, 'such')}; its "
            "config.json describes another model"
        )


def others(names: Sequence[Any], what: str) -> str:
    return f" ({len(names)} {what})" if len(names) > 1 else ""


def to_convert(model: nn.Module, missing: Iterable[str], left: Sequence[str]) -> str:
    """What to do with weights of a pretrained model: of ours, they lack what its attention does not have."""
    places = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, AttentionAdapter))
    inside = [name.partition(".attention.")[2] for name in missing if places and name.startswith(places)]
    new = all(name and not name.startswith(PRETRAINED) for name in inside)
    replaced = bool(left) and all(name.startswith(places) for name in left)
    if len(inside) < len([*missing]) or not (new or replaced):
        return ""
    return "; to give a pretrained model this attention, load it as it is and call mka.models.convert"


def check_finite(model: nn.Module, where: object) -> None:
    """Raises InputError for a weight that holds NaN or infinity."""
    if found := [*not_finite(model.state_dict().items())]:
        raise InputError(f"{found[0]} of {str(where)!r} holds NaN or infinity{others(found, 'weights do')}")


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """The names of those that hold NaN or infinity."""
    for name, weight in weights:
        if not weight.is_floating_point() or weight.is_meta or not weight.numel():
            continue
        readable = weight.detach() if weight.dtype in FLOATS.values() else weight.detach().float()
        extremes = torch.stack(readable.aminmax())  # NaN is both of them
        if not bool(extremes.isfinite().all()):
            yield name


def check_precision(model: Any, folder: Path) -> str | None:
    """A line on weights that were rounded when they were loaded from the safetensors of a folder; None: none was.

    Raises InputError for whole numbers where the model has floating ones. A quantized model is let pass.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return None
    weights, rounded = dict(model.named_parameters()), []
    for name, stored in stored_dtypes(folder).items():
        used = weights[name].dtype if name in weights else model.dtype
        if stored not in FLOATS:
            if name in weights and weights[name].is_floating_point():
                allowed = ", ".join(FLOATS)
                raise InputError(f"{name} of {str(folder)!r} is stored as {stored}; allowed: {allowed}")
        elif torch.promote_types(FLOATS[stored], used) != used:
            rounded.append((name, FLOATS[stored], used))
    if not rounded:
        return None
    name, stored, used = rounded[0]
    saved, read = (str(dtype).removeprefix("torch.") for dtype in (stored, used))
    return (
        f"{name} of {str(folder)!r} is stored in {saved} and was rounded to the {read} of config.json"
        f"{others(rounded, 'weights were')}; to read all of it, set dtype there to {saved}"
    )


def stored_dtypes(folder: Path) -> dict[str, str]:
    """The dtype of each weight, by the headers of the files that transformers reads; nothing for other formats."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not files[0].is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
        files = [folder / shard for shard in sorted(set(shards))]
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            names = file.keys()  # it is no dict, and cannot be gone through itself
            found |= {name: file.get_slice(name).get_dtype() for name in names}
    return found


def stop_at_nonfinite_logits(model: nn.Module, where: object) -> None:
    """From now on raises InputError where the model gives logits that nothing can be said of or drawn from. A training
    has its own eye on its losses.

    A logit of -inf rules a token out, as some models do; NaN, inf, or -inf for all tokens is no prediction.
    """

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if module.training:
            return
        logits = output.logits if hasattr(output, "logits") else output[0]
        if not bool(logits.amax(-1).isfinite().all()):
            raise InputError(
                f"model is {str(where)!r}; its weights are finite and its logits are not (NaN or infinity): they "
                "overflow, or config.json is not of these weights"
            )

    model.register_forward_hook(look)
