"""Read a DeepSpeed file, and check it against what the benchmark decides itself.

DeepSpeed is not imported here.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mka.errors import InputError
from mka.storage import read_regular

DEFAULT: dict[str, Any] = {"zero_optimization": {"stage": 2}}
# Stage 0 is plain data parallelism, which is --strategy ddp here.
STAGES = (1, 2, 3)
LARGEST = 2**24
"""Bytes of a settings file."""
DECIDED = {
    "train_batch_size": "--batch_size, --gradient_accumulation_steps and the number of ranks",
    "train_micro_batch_size_per_gpu": "--batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "one recipe for all mechanisms",
    "optimizer": "one recipe for all mechanisms",
    "scheduler": "one recipe for all mechanisms",
    "fp16": "--fp16",
    "bf16": "--bf16",
    "torch_autocast": "--fp16 and --bf16",
    "amp": "--fp16 and --bf16",
}
"""Keys that a file must omit, set to "auto" or disable, and what sets them instead."""


def deepspeed_settings(path: str | None) -> dict[str, Any]:
    """The settings in a DeepSpeed file, without the keys in DECIDED; path None: the
    default.

    Raises InputError if the package is not installed, if the file is missing or is not
    a JSON object, and, naming the key, if a setting contradicts what is decided
    elsewhere.
    """
    # Only looked for, not imported: importing it takes seconds and needs a launcher.
    if find_spec("deepspeed") is None:
        raise InputError("--deepspeed needs the package deepspeed; pip install 'mka[deepspeed]'")
    settings = DEFAULT if path is None else read_json(path)
    for key, instead in DECIDED.items():
        value = settings.get(key, "auto")
        if value != "auto" and not (isinstance(value, dict) and value.get("enabled") is False):
            raise InputError(
                f"{key} in {path} is {json.dumps(value)}; it is set by {instead}: leave it out "
                'or "auto"'
            )
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    # In Python True equals 1, so JSON's true would pass for stage 1.
    if stage not in STAGES or isinstance(stage, bool):
        raise InputError(
            f"zero_optimization.stage in {path} is {json.dumps(stage)}; allowed: 1, 2, 3"
        )
    return {key: value for key, value in settings.items() if key not in DECIDED}


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError if there is none."""
    try:
        settings = json.loads(read_regular(Path(path), LARGEST))
    except OSError as error:
        raise InputError(
            f"deepspeed_config is {path!r}, which cannot be read: {error.strerror}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"deepspeed_config is {path!r}, which is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"deepspeed_config is {path!r}, which is not a JSON object")
    return settings
