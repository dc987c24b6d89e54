"""One training loop for any number of ranks, with precision, checkpoints and memory
measurement."""

from mka.moved import former
from mka.training.checkpoint import Checkpoint, Checkpoints
from mka.training.deepspeed_config import deepspeed_settings
from mka.training.interruption import Interrupted
from mka.training.loop import TrainingPlan, TrainingRun, train
from mka.training.memory import Peak, PeakMemory, keep_freed_memory
from mka.training.minimize import (
    answers_and_text_loss,
    answers_loss,
    answers_right,
    minimize,
    train_on_answers,
)
from mka.training.nonfinite import NonFiniteLoss
from mka.training.precision import Precision, choose_precision, has_bfloat16
from mka.training.step_memory import (
    OutOfMemory,
    StepMemory,
    activation_bytes,
    advice,
    is_out_of_memory,
)
from mka.training.teacher import Teacher

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Interrupted",
    "NonFiniteLoss",
    "OutOfMemory",
    "Peak",
    "PeakMemory",
    "Precision",
    "StepMemory",
    "Teacher",
    "TrainingPlan",
    "TrainingRun",
    "activation_bytes",
    "advice",
    "answers_and_text_loss",
    "answers_loss",
    "answers_right",
    "choose_precision",
    "deepspeed_settings",
    "has_bfloat16",
    "is_out_of_memory",
    "keep_freed_memory",
    "minimize",
    "train",
    "train_on_answers",
]

__getattr__ = former("mka.training", {"minimise": "minimize"})
