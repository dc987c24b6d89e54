"""Mixed precision: autocast over float32 weights, with loss scaling for float16.

The weights themselves are never cast.
"""

from dataclasses import dataclass
from typing import Literal

import torch

PrecisionName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Precision:
    """The data type that autocast computes in, on one type of device; float32: no
    autocast."""

    name: PrecisionName
    device_type: str

    def autocast(self) -> torch.autocast:
        """A context in which this precision computes."""
        dtype = getattr(torch, self.name)
        return torch.autocast(
            self.device_type, dtype=dtype, enabled=self.name != "float32", cache_enabled=True
        )

    def scaler(self) -> torch.amp.GradScaler:
        """Dynamic loss scaling for float16; in other precisions it changes nothing."""
        # Small gradients would become 0 in float16, whose exponents do not reach as
        # far.
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "float16")


def choose_precision(device: torch.device, fp16: bool = False, bf16: bool = False) -> Precision:
    """The precision asked for; by default bfloat16 where the processor has it, else
    float32."""
    if fp16:
        return Precision("float16", device.type)
    return Precision("bfloat16" if bf16 or has_bfloat16(device) else "float32", device.type)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the processor computes in bfloat16 itself, without emulation."""
    # Emulated bfloat16 is slower than float32.
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
