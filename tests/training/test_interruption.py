"""SIGTERM and Ctrl-C: the step is finished and saved before the training stops; a second Ctrl-C
does not wait."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import checks_training as tiny
from mka.training import Checkpoints, Interrupted, TrainingRun, train
from mka.training.interruption import stop_request

STEPS = 6


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[Any]]:
    """Those of this test alone; a training has to leave them as they were."""

    def terminated(number: int, frame: object) -> None:
        raise AssertionError("SIGTERM came through")

    before = [
        signal.signal(signal.SIGTERM, terminated),
        signal.signal(signal.SIGINT, signal.default_int_handler),
    ]
    ours = [terminated, signal.default_int_handler]
    yield ours
    assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == ours
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
        signal.signal(number, handler)


def striking(step: int, *numbers: int) -> Callable[[TrainingRun], None]:
    """Signals to this process, one after another, when so many steps are taken."""

    def on_step(run: TrainingRun) -> None:
        if len(run.losses) == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return on_step


def interrupted(
    checkpoints: Checkpoints | None, step: int, *numbers: int, save_steps: int = 0
) -> Interrupted:
    with pytest.raises(Interrupted) as caught:
        tiny.trained(
            "mha",
            tiny.plan(steps=STEPS, save_steps=save_steps),
            checkpoints,
            striking(step, *numbers),
        )
    return caught.value


@pytest.mark.parametrize("save_steps", [0, 1, 2, 100])
@pytest.mark.parametrize("step", [1, 2, STEPS - 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_step_under_way_is_finished_and_saved(
    tmp_path: Path, number: int, step: int, save_steps: int
) -> None:
    """A signal between two steps is heard in the next one."""
    checkpoints = Checkpoints(tmp_path / "c", {"kind": "mha"})
    stop = interrupted(checkpoints, step, number, save_steps=save_steps)
    assert stop.signal_number == number
    assert str(stop) == f"after step {step + 1} of {STEPS}"
    assert checkpoints.steps()[0] == step + 1
    plan = tiny.plan(steps=STEPS, save_steps=save_steps)
    tiny.assert_goes_on_as_if_nothing_had_been(checkpoints.folder, "mha", plan, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_a_step_is_that_steps(tmp_path: Path, number: int) -> None:
    checkpoints, passes = Checkpoints(tmp_path / "c", {"kind": "mha"}), []
    model = tiny.tiny_model()

    def strike(module: nn.Module, args: object) -> None:
        passes.append(module.training)
        if len(passes) == 3:
            os.kill(os.getpid(), number)

    model.register_forward_pre_hook(strike)
    with pytest.raises(Interrupted, match=f"^after step 3 of {STEPS}$"):
        train(model, tiny.plan(steps=STEPS), lambda: 0.0, checkpoints=checkpoints)
    assert checkpoints.steps() == [3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_step_is_not_lost(tmp_path: Path, number: int) -> None:
    """It came when the training was as good as over, but what comes after it was to stop too."""
    checkpoints = Checkpoints(tmp_path / "c", {"kind": "mha"})
    assert interrupted(checkpoints, STEPS, number).signal_number == number
    assert checkpoints.steps() == [STEPS]


def test_without_checkpoints_it_stops_too() -> None:
    assert interrupted(None, 2, signal.SIGTERM).signal_number == signal.SIGTERM


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)]
)
def test_a_second_ctrl_c_does_not_wait(tmp_path: Path, numbers: Sequence[int]) -> None:
    checkpoints = Checkpoints(tmp_path / "c", {"kind": "mha"})
    with pytest.raises(KeyboardInterrupt) as caught:
        tiny.trained("mha", tiny.plan(steps=STEPS), checkpoints, striking(2, *numbers))
    assert type(caught.value) is KeyboardInterrupt
    assert checkpoints.steps() == []


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGTERM)]
)
def test_sigterm_after_a_signal_changes_nothing(tmp_path: Path, numbers: Sequence[int]) -> None:
    checkpoints = Checkpoints(tmp_path / "c", {"kind": "mha"})
    assert interrupted(checkpoints, 2, *numbers).signal_number == numbers[0]
    assert checkpoints.steps() == [3]


def test_a_training_that_nothing_happened_to_leaves_the_handlers_alone() -> None:
    tiny.trained("mha", tiny.plan(steps=2))


def test_handlers_are_put_back_after_an_error() -> None:
    with pytest.raises(tiny.PowerCut):
        tiny.trained("mha", tiny.plan(steps=STEPS), None, tiny.stopping_after(2))


def test_in_another_thread_there_are_no_signals_to_catch(handlers: list[Any]) -> None:
    seen: list[Any] = []

    def work() -> None:
        with stop_request() as request:
            seen.extend(
                [
                    request.got(signal.SIGINT),
                    signal.getsignal(signal.SIGTERM),
                    signal.getsignal(signal.SIGINT),
                ]
            )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, *handlers]
