"""Where mixed precision ends: averages, router and retrieval scores are computed in
float32 or better."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """bfloat16 and float16 become float32; float32 and float64 stay."""
    return x.to(wide(x.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that `upcast` gives: float64 stays, every other dtype becomes
    float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which the arithmetic keeps the dtype of its inputs."""
    return torch.autocast(device_type=x.device.type, enabled=False)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: run the function, whose first argument is a tensor, under
    `no_autocast`."""

    # wraps() keeps the signature, from which torch.library infers the schema of a
    # custom operator.
    @wraps(function)
    def wide_function(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # The kind of device is that of the first tensor: autocast is switched per kind.
        with no_autocast(x):
            return function(x, *args, **kwargs)

    return wide_function
