"""One training loop on any number of ranks, its precision, its checkpoints and its memory meter."""

from mka.training.checkpoint import Checkpoint, Checkpoints
from mka.training.deepspeed_config import deepspeed_settings
from mka.training.interruption import Interrupted
from mka.training.loop import TrainingPlan, TrainingRun, train
from mka.training.memory import Peak, PeakMemory, keep_freed_memory
from mka.training.nonfinite import NonFiniteLoss
from mka.training.precision import Precision, choose_precision, has_bfloat16

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Interrupted",
    "NonFiniteLoss",
    "Peak",
    "PeakMemory",
    "Precision",
    "TrainingPlan",
    "TrainingRun",
    "choose_precision",
    "deepspeed_settings",
    "has_bfloat16",
    "keep_freed_memory",
    "train",
]
