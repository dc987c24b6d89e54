"""Whether a model computes what its class, its configuration and its weights say, and
no more.

It is unwrapped, then compared with a model of the same class and configuration that is
built without data: the modules must be the same, with the same weights of the same
shapes, and no hooks.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mka.errors import InputError
from mka.models.families import PREFIX, head_dim_of, rotary_of, rotates_by_layer
from mka.models.modeling import MODELS
from mka.models.weights import FLOATS, not_finite, others

CIRCUMSTANCES = frozenset(
    {
        *("training", "gradient_checkpointing", "layer_idx", "loss_type", "name_or_path"),
        *("p", "attention_dropout", "padding_idx"),  # in training
    }
)
"""Settings of a module that may differ between models of one configuration without
changing a logit."""
PLAIN = (bool, int, float, str, type(None))
"""Types of the settings that are compared."""
COMPILED = "_orig_mod"
"""What torch.compile adds to the names of modules that it wraps."""
TRUSTED = ("transformers", "accelerate", "mka")
"""Packages whose hooks watch a layer or move its weights, but do not change what it
computes."""
ADVICE = {
    "peft": "merge the adapter first: PeftModel.merge_and_unload() gives a plain model",
    "torch.nn.utils.prune": (
        "make the pruning permanent first: torch.nn.utils.prune.remove(layer, name)"
    ),
    "torch.nn.utils.parametrize": (
        "call torch.nn.utils.parametrize.remove_parametrizations(layer, name) first"
    ),
    "torch.nn.utils.weight_norm": "call torch.nn.utils.remove_weight_norm(layer) first",
    "torch.nn.utils.spectral_norm": "call torch.nn.utils.remove_spectral_norm(layer) first",
    "torch.distributed": "gather its weights in a model that is not sharded first",
}
"""How to make a layer plain again, by the package that changed it."""
OTHERWISE = "convert a model of plain layers, neither quantized nor replaced"
"""The advice for any other package."""


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    # In a loop, since the wrappers can be nested in any order.
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(model, nn.Module) and COMPILED in model._modules:
            model = model._modules[COMPILED]
        else:
            return model


def check_plain(model: Any) -> None:
    """Raises InputError, saying what to do, if anything but the class, the
    configuration and the weights of a model decides what it computes."""
    kind = MODELS[model.config.model_type.removeprefix(PREFIX)]
    # transformers' class, and ours that is derived from it. Exactly these: a subclass
    # could override anything.
    allowed = (kind.__mro__[2], kind)
    if type(model) not in allowed:
        names = " or ".join(one.__name__ for one in allowed)
        raise InputError(
            f"model is a {full_name(type(model))}; it must be a {names}: "
            f"{advice(origin(type(model)))}"
        )
    # On the meta device: shapes and settings are compared, which takes no data.
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(model.config.to_dict()))
    found = dict(modules_of(model))
    for name, twin in modules_of(plain):
        check_module(name, found.get(name), twin)
    check_weights(model, dict(plain.state_dict()))
    for name, twin in modules_of(plain):
        check_settings(name, found[name], twin)
    check_rotary(model)


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with their plain names, compiled ones without their wrapper."""
    # A shared module under all of its names, as the twin has them.
    for name, module in model.named_modules(remove_duplicate=False):
        yield plain_name(name), unwrapped(module)


def plain_name(name: str) -> str:
    """The name of a weight or module without what torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def check_module(name: str, module: nn.Module | None, twin: nn.Module) -> None:
    """Raises InputError if a module is missing, hooked, or of another class than its
    `twin`."""
    if module is None:
        raise InputError(f"model has no {name}, which its config.json says it has; {OTHERWISE}")
    if type(module) is not type(twin):
        raise InputError(
            f"{name} is a {full_name(type(module))}, in a plain model a {full_name(type(twin))}; "
            f"{advice(origin(type(module)))}"
        )
    # A forward in the module's own attributes hides that of its class, as a hook would.
    hooks = [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        vars(module).get("forward"),
    ]
    for hook in hooks:
        if hook is not None and not (place := origin(hook)).startswith(TRUSTED):
            how = "its forward is replaced" if hook is hooks[-1] else "a hook is called with it"
            raise InputError(
                f"{name or 'model'} computes more than its weights: {how}, by {place}; "
                f"{advice(place)}"
            )


def check_settings(name: str, module: nn.Module, twin: nn.Module) -> None:
    """Raises InputError for a setting of a module that differs from that of its plain
    `twin`."""
    for field, wanted in settings_of(twin):
        value = vars(module).get(field, wanted)
        if isinstance(value, PLAIN) and value != wanted:
            raise InputError(
                f"{name or 'model'}.{field} is {value!r}; by the model's config it is "
                f"{wanted!r}: a new model is made of the config alone, so change it there too"
            )


def settings_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The numbers, names and switches of a module that decide what it computes."""
    # Names with an underscore are the bookkeeping of torch and transformers.
    for field, value in vars(module).items():
        if isinstance(value, PLAIN) and not field.startswith("_") and field not in CIRCUMSTANCES:
            yield field, value


def check_rotary(model: Any) -> None:
    """Raises InputError if a rotary embedding has other angles than the configuration
    describes."""
    embedding = getattr(getattr(model, "model", None), "rotary_emb", None)
    if embedding is None:
        return
    config = model.config
    for layer in range(config.num_hidden_layers):
        name = f"{config.layer_types[layer]}_inv_freq" if rotates_by_layer(config) else "inv_freq"
        rotary = rotary_of(config, head_dim_of(config), layer)
        found = getattr(embedding, name).detach().cpu()
        # A model that was ever cast to bfloat16 has rounded angles, even after casting
        # it back.
        if not torch.allclose(found.float(), rotary.rates(torch.zeros(1)), rtol=2**-8, atol=0):
            raise InputError(
                f"model.rotary_emb.{name} is not what the model's config says "
                "(rope_parameters): a new model is made of the config alone, so change it there too"
            )


def check_weights(model: Any, wanted: dict[str, Tensor]) -> None:
    """Raises InputError for weights that are missing, left over, offloaded, quantized,
    of another shape than in `wanted`, of a wider dtype than the model, or not
    finite."""
    weights = {plain_name(name): value for name, value in model.state_dict().items()}
    if different := sorted(weights.keys() ^ wanted.keys()):
        where = "not a weight of the model" if different[0] in wanted else "a weight of the model"
        by = (
            "not by its configuration"
            if different[0] in weights
            else "by its configuration it should be"
        )
        raise InputError(f"{different[0]} is {where}, {by}{others(different, 'such')}; {OTHERWISE}")
    for name, value in weights.items():
        if value.is_meta:
            raise InputError(
                f"{name} is offloaded (its device is meta); load the model without offloading"
            )
        if type(value) not in (Tensor, nn.Parameter) or value.dtype not in FLOATS.values():
            raise InputError(f"{name} is a {full_name(type(value))} of {value.dtype}; {OTHERWISE}")
        if value.shape != wanted[name].shape:
            expected = tuple(wanted[name].shape)
            raise InputError(
                f"{name} is {tuple(value.shape)}; by the model's configuration it is {expected}"
            )
        # A weight that is wider than the model's dtype would be rounded in the new
        # model.
        if torch.promote_types(value.dtype, model.dtype) != model.dtype:
            raise InputError(
                f"{name} is {value.dtype} in a model of {model.dtype} and would be rounded; "
                f"give the model one dtype first: model.to({value.dtype})"
            )
    if bad := [*not_finite(weights.items())]:
        raise InputError(f"{bad[0]} holds NaN or infinity{others(bad, 'weights do')}")


def full_name(kind: type) -> str:
    """The name of a class with its module, for messages."""
    return f"{kind.__module__}.{kind.__qualname__}"


def origin(thing: Any) -> str:
    """The name of the module that defines a class, a function or a hook."""
    # What matters of a partial is who wrote the function inside.
    while isinstance(thing, partial):
        thing = thing.func
    return getattr(thing, "__module__", None) or type(thing).__module__


def advice(place: str) -> str:
    """What to do about a foreign part, by the package it comes from."""
    return next((text for package, text in ADVICE.items() if place.startswith(package)), OTHERWISE)
