"""Weights made up, dropped or no numbers, banks of other models, verdicts from nothing: planted,
and found."""

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from cli import test_bank_names
from mka.memory.bank import Bank, Document
from mka.models import modeling, plain, reading
from mka.record import intervals
from models import test_fingerprint, test_plain, test_weights

conversion = importlib.import_module(
    "mka.models.convert"
)  # the package's name for it is the function
Plant = Callable[[pytest.MonkeyPatch], None]
RED = (AssertionError, ValueError, pytest.fail.Exception)


def missing_weights_are_made_up(patch: pytest.MonkeyPatch) -> None:
    for module in ("mka.models.modeling", "mka.models.loading"):
        patch.setattr(f"{module}.check_loaded", lambda *_, **__: None)


def weights_that_are_left_over_are_passed_over(patch: pytest.MonkeyPatch) -> None:
    real = modeling.check_loaded

    def partly(model: Any, info: Mapping[str, Any], *more: Any, **given: Any) -> None:
        real(model, {**info, "unexpected_keys": set()}, *more, **given)

    for module in ("mka.models.modeling", "mka.models.loading"):
        patch.setattr(f"{module}.check_loaded", partly)


def weights_are_rounded_silently(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("mka.models.loading.check_precision", lambda *_: None)


def logits_are_taken_as_they_are(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("mka.models.loading.stop_at_nonfinite_logits", lambda *_: None)


def a_key_is_dropped(patch: pytest.MonkeyPatch) -> None:
    """load_state_dict(strict=False), of whatever has another name."""

    def loose(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        for name in [*source.keys() & target.keys()][1:]:
            target[name].copy_(source[name])

    patch.setattr(conversion, "copy_weights", loose)


def wrapped_names_are_not_known(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plain, "COMPILED", "_other")
    patch.setattr(conversion, "check_same_names", lambda *_: None)


def layers_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(plain, "check_module", lambda *_: None)


def three_fields_of_the_configuration(patch: pytest.MonkeyPatch) -> None:
    known = ("model_type", "attention_type", "attention_options")
    patch.setattr(
        reading, "deciding", lambda config: {name: getattr(config, name, None) for name in known}
    )


def what_is_set_for_generation_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        reading, "IRRELEVANT", frozenset({"_name_or_path", "architectures", "transformers_version"})
    )


def the_first_of_a_name_is_removed(patch: pytest.MonkeyPatch) -> None:
    real = Bank.remove

    def first(bank: Bank, wanted: str) -> Path:
        found = [
            folder.name
            for folder, details, _ in bank.checked()
            if details and details["name"] == wanted
        ]
        return real(bank, found[0] if found else wanted)

    patch.setattr(Bank, "remove", first)


def the_older_goes_before_the_new_one_is_in(patch: pytest.MonkeyPatch) -> None:
    real = Bank.add

    def hasty(bank: Bank, name: str, *more: Any) -> Document:
        for document in bank.documents():
            if document.name == name:
                bank.remove(document.identity)
        return real(bank, name, *more)

    patch.setattr(Bank, "add", hasty)


def no_interval_holds_zero(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(intervals.Estimate, "has_interval", property(lambda _estimate: True))


def kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A bank with the old notes, made anew: the module's fixtures without their cache."""
    place = tmp_path / "place"
    place.mkdir(parents=True)
    test_bank_names.save_model(place / "model", "mka")
    test_bank_names.said(
        capsys,
        test_bank_names.add(place, test_bank_names.write(place, "notes.txt", test_bank_names.OLD)),
    )
    return place


Check = Callable[[Path, pytest.CaptureFixture[str]], None]
BY_COMMAND = test_weights.by_command
DEFECTS: list[tuple[Plant, Check]] = [
    (
        missing_weights_are_made_up,
        lambda path, _: test_weights.test_a_missing_weight_is_named_and_counted(
            "router", BY_COMMAND, path
        ),
    ),
    (
        weights_that_are_left_over_are_passed_over,
        lambda path, _: test_weights.test_a_model_that_is_not_ours_is_held_to_the_same(path),
    ),
    (
        weights_are_rounded_silently,
        lambda path, said: test_weights.test_weights_that_the_configuration_rounds_are_said(
            "float32", "bfloat16", True, path, said
        ),
    ),
    (
        logits_are_taken_as_they_are,
        lambda path, _: test_weights.test_finite_weights_that_give_logits_that_are_no_numbers(path),
    ),
    (
        a_key_is_dropped,
        lambda *_: test_plain.test_what_is_plain_within_is_converted_whole("as it is"),
    ),
    (
        wrapped_names_are_not_known,
        lambda *_: test_plain.test_what_is_plain_within_is_converted_whole("compiled"),
    ),
    (
        layers_are_not_looked_at,
        lambda *_: test_plain.test_what_is_not_plain_is_refused_in_one_line("hook"),
    ),
    (
        three_fields_of_the_configuration,
        lambda path, _: (
            test_fingerprint.test_the_same_weights_with_other_settings_are_another_model(
                "rms_norm_eps", path
            )
        ),
    ),
    (
        what_is_set_for_generation_counts,
        lambda path, _: (
            test_fingerprint.test_it_is_the_same_after_saving_and_whatever_is_set_for_generation(
                "llama", "mka", path
            )
        ),
    ),
    (
        the_first_of_a_name_is_removed,
        lambda path, said: test_bank_names.test_a_name_that_two_documents_have_is_not_enough(
            kept(path, said), said
        ),
    ),
    (
        the_older_goes_before_the_new_one_is_in,
        lambda path, said: nothing_is_replaced_on_a_full_disk(kept(path, said), said),
    ),
    (no_interval_holds_zero, lambda *_: verdict_of_one_document()),
]


def verdict_of_one_document() -> None:
    for losses in ([0.5], [0.5, math.nan]):
        assert (
            intervals.verdict(intervals.ratio(np.array(losses), np.ones(len(losses))))
            == "no verdict"
        )


def nothing_is_replaced_on_a_full_disk(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_bank_names.test_what_cannot_be_written_replaces_nothing(place, patch, capsys)


@pytest.mark.parametrize(("plant", "check"), DEFECTS, ids=[plant.__name__ for plant, _ in DEFECTS])
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
def test_the_models_turn_red(
    plant: Plant,
    check: Check,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    check(tmp_path / "before", capsys)
    plant(monkeypatch)
    with pytest.raises(RED):
        check(tmp_path / "after", capsys)
