"""One training loop, its precision and its memory meter."""

from mka.training.loop import NonFiniteLoss, TrainingPlan, TrainingRun, train
from mka.training.memory import Peak, PeakMemory, keep_freed_memory
from mka.training.precision import Precision, choose_precision, has_bfloat16

__all__ = [
    "NonFiniteLoss",
    "Peak",
    "PeakMemory",
    "Precision",
    "TrainingPlan",
    "TrainingRun",
    "choose_precision",
    "has_bfloat16",
    "keep_freed_memory",
    "train",
]
