"""Whether a model is what its class and its configuration say, so that its weights alone decide what it computes.

source -> without its wrappers -> beside a model of the same class and configuration, built without data:
the same modules, the same weights of the same shapes, nothing hooked on
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mka.limits import InputError
from mka.models.families import PREFIX, head_dim_of, rotary_of, rotates_by_layer
from mka.models.modeling import MODELS
from mka.models.weights import FLOATS, not_finite, others

CIRCUMSTANCES = frozenset(
    {
        *("training", "gradient_checkpointing", "layer_idx", "loss_type", "name_or_path"),
        *("p", "attention_dropout", "padding_idx"),  # in training
    }
)
"""Settings of a module that may differ between models of one configuration, and change no logit."""
PLAIN = (bool, int, float, str, type(None))
COMPILED = "_orig_mod"
"""What torch.compile puts before the names of what it wraps."""
TRUSTED = ("transformers", "accelerate", "mka")
"""Packages whose hooks watch a layer, or move its weights, and leave what it computes as it is."""
ADVICE = {
    "peft": "merge the adapter first: PeftModel.merge_and_unload() gives a plain model",
    "torch.nn.utils.prune": "make the pruning permanent first: torch.nn.utils.prune.remove(layer, name)",
    "torch.nn.utils.parametrize": "call torch.nn.utils.parametrize.remove_parametrizations(layer, name) first",
    "torch.nn.utils.weight_norm": "call torch.nn.utils.remove_weight_norm(layer) first",
    "torch.nn.utils.spectral_norm": "call torch.nn.utils.remove_spectral_norm(layer) first",
    "torch.distributed": "gather its weights in a model that is not sharded first",
}
"""What makes a layer plain again, by the package that changed it."""
OTHERWISE = "convert a model of plain layers, neither quantized nor replaced"


def unwrapped(model: Any) -> Any:
    """What torch.compile, DataParallel and DistributedDataParallel wrap."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(model, nn.Module) and COMPILED in model._modules:
            model = model._modules[COMPILED]
        else:
            return model


def check_plain(model: Any) -> None:
    """Raises InputError, with what to do, where something other than the class and the weights has a say."""
    kind = MODELS[model.config.model_type.removeprefix(PREFIX)]
    allowed = (kind.__mro__[2], kind)  # transformers' class, and ours that is made of it
    if type(model) not in allowed:
        names = " or ".join(one.__name__ for one in allowed)
        raise InputError(f"model is a {full_name(type(model))}; it must be a {names}: {advice(origin(type(model)))}")
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
    """All modules by name, what is compiled without its wrapper."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield plain_name(name), unwrapped(module)


def plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != COMPILED)


def check_module(name: str, module: nn.Module | None, twin: nn.Module) -> None:
    if module is None:
        raise InputError(f"model has no {name}, which its config.json says it has; {OTHERWISE}")
    if type(module) is not type(twin):
        raise InputError(
            f"{name} is a {full_name(type(module))}, in a plain model a {full_name(type(twin))}; "
            f"{advice(origin(type(module)))}"
        )
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values(), vars(module).get("forward")]
    for hook in hooks:
        if hook is not None and not (place := origin(hook)).startswith(TRUSTED):
            how = "its forward is replaced" if hook is hooks[-1] else "a hook is called with it"
            raise InputError(f"{name or 'model'} computes more than its weights: {how}, by {place}; {advice(place)}")


def check_settings(name: str, module: nn.Module, twin: nn.Module) -> None:
    """Raises InputError for a number, a name or a switch of a module that is not what the configuration makes it."""
    for field, wanted in settings_of(twin):
        value = vars(module).get(field, wanted)
        if isinstance(value, PLAIN) and value != wanted:
            raise InputError(
                f"{name or 'model'}.{field} is {value!r}; by the model's config it is {wanted!r}: a new model is made "
                "of the config alone, so change it there too"
            )


def settings_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The numbers, names and switches of a module that have a say in what it computes."""
    for field, value in vars(module).items():
        if isinstance(value, PLAIN) and not field.startswith("_") and field not in CIRCUMSTANCES:
            yield field, value


def check_rotary(model: Any) -> None:
    """Raises InputError where a rotary embedding turns by other angles than the configuration says."""
    embedding = getattr(getattr(model, "model", None), "rotary_emb", None)
    if embedding is None:
        return
    config = model.config
    for layer in range(config.num_hidden_layers):
        name = f"{config.layer_types[layer]}_inv_freq" if rotates_by_layer(config) else "inv_freq"
        rotary, found = rotary_of(config, head_dim_of(config), layer), getattr(embedding, name).detach().cpu()
        # A model that was cast to bfloat16, and back even, has rounded angles.
        if not torch.allclose(found.float(), rotary.rates(torch.zeros(1)), rtol=2**-8, atol=0):
            raise InputError(
                f"model.rotary_emb.{name} is not what the model's config says (rope_parameters): a new model is made "
                "of the config alone, so change it there too"
            )


def check_weights(model: Any, wanted: dict[str, Tensor]) -> None:
    weights = {plain_name(name): value for name, value in model.state_dict().items()}
    if different := sorted(weights.keys() ^ wanted.keys()):
        where = "no weight of the model" if different[0] in wanted else "a weight of the model"
        by = "not by its configuration" if different[0] in weights else "by its configuration it should be"
        raise InputError(f"{different[0]} is {where}, {by}{others(different, 'such')}; {OTHERWISE}")
    for name, value in weights.items():
        if value.is_meta:
            raise InputError(f"{name} is offloaded (its device is meta); load the model without offloading")
        if type(value) not in (Tensor, nn.Parameter) or value.dtype not in FLOATS.values():
            raise InputError(f"{name} is a {full_name(type(value))} of {value.dtype}; {OTHERWISE}")
        if value.shape != wanted[name].shape:
            expected = tuple(wanted[name].shape)
            raise InputError(f"{name} is {tuple(value.shape)}; by the model's configuration it is {expected}")
        if torch.promote_types(value.dtype, model.dtype) != model.dtype:
            raise InputError(
                f"{name} is {value.dtype} in a model of {model.dtype} and would be rounded; give the model one dtype "
                f"first: model.to({value.dtype})"
            )
    if bad := [*not_finite(weights.items())]:
        raise InputError(f"{bad[0]} holds NaN or infinity{others(bad, 'weights do')}")


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def origin(thing: Any) -> str:
    """The module that a class, a function or a hook was written in."""
    while isinstance(thing, partial):
        thing = thing.func
    return getattr(thing, "__module__", None) or type(thing).__module__


def advice(place: str) -> str:
    return next((text for package, text in ADVICE.items() if place.startswith(package)), OTHERWISE)
