"""Killed at any instant, the same command given again ends with the same bytes."""

import random

import pytest

from resume.child import Instant, Moment
from resume.runs import Case

STEPS, SAVE_STEPS = 12, 3
BOTH: list[Moment] = ["before", "after"]
ALL: list[Moment] = ["before", "within", "after"]
CHECKPOINT, BENCHMARK = "mka.training.checkpoint", "mka.experiments.benchmark"
PLACES: dict[str, list[tuple[str, list[Moment]]]] = {
    "between steps": [
        ("mka.training.loop.take_step", BOTH),
        (f"{BENCHMARK}.evaluate", BOTH),
        ("mka.training.loop.take_step", ["before"]),
        ("mka.training.loop.take_step", ["after"]),
    ],
    "in a save": [
        (f"{CHECKPOINT}.save_file", ["within"]),
        (f"{CHECKPOINT}.save_file", BOTH),
        (f"{CHECKPOINT}.write_json", ALL),
        (f"{CHECKPOINT}.remove", BOTH),
        ("mka.storage.sync_file", BOTH),
        ("mka.storage.os.replace", BOTH),
        ("mka.storage.sync_folder", BOTH),
    ],
    "between two mechanisms": [
        (f"{CHECKPOINT}.Checkpoints.clear", BOTH),
        (f"{BENCHMARK}.make_model", BOTH),
        ("mka.report.result_lines", BOTH),
    ],
    "while a result is written": [
        ("mka.record.results.write_all", ["within"]),
        (f"{CHECKPOINT}.Checkpoints.export_weights", BOTH),
        (f"{BENCHMARK}.write_curve", ALL),
        (f"{BENCHMARK}.append_result", BOTH),
    ],
    "in the corpus build": [
        ("mka.data.tokens.write_split", ["within"]),
        ("mka.data.tokens.bytes_of_tokens", BOTH),
    ],
}


def drawn() -> list[tuple[str, str, Moment, float]]:
    """Twenty instants: what is going on, the function, when, and the how-manieth of its calls as a
    fraction."""
    draw = random.Random(20)
    places = [
        (what, function, moments) for what, places in PLACES.items() for function, moments in places
    ]
    return [
        (what, function, draw.choice(moments), draw.random()) for what, function, moments in places
    ]


def parameters() -> list[object]:
    """The first of each kind belongs to the quick tests."""
    kinds: set[str] = set()
    found = []
    for what, *instant in drawn():
        found.append(
            pytest.param(*instant, id=what, marks=[pytest.mark.slow] if what in kinds else [])
        )
        kinds.add(what)
    return found


def instant_of(
    whole: Case, function: str, moment: Moment, fraction: float, most: float = 1.0
) -> Instant:
    """One of the calls that the uninterrupted run made, or one of the first `most` of them."""
    calls = int(whole.calls()[function] * most)
    return Instant(function, 1 + int(fraction * calls), moment)


def test_there_are_twenty_instants_of_all_kinds() -> None:
    assert len(drawn()) == 20
    assert len({what for what, *_ in drawn()}) == len(PLACES)


@pytest.mark.parametrize(("function", "moment", "fraction"), parameters())
def test_killed_once(
    whole: Case, case: Case, function: str, moment: Moment, fraction: float
) -> None:
    killed = case.start(instant_of(whole, function, moment, fraction))
    assert killed.struck, killed.printed
    assert case.altered() == []
    case.go_on()
    assert case.outcome() == whole.outcome()
    assert case.altered() == []


MANIFESTS: list[tuple[str, list[Moment]]] = [
    ("mka.record.folders.write_atomically", ALL),
    ("mka.record.folders.write_manifest", ALL),
    ("mka.storage.replace_folder", BOTH),
]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))]
)
def test_killed_around_a_manifest(whole: Case, case: Case, seed: int) -> None:
    """Before, within and after every kind of write: nothing that is whole looks altered, and the
    command goes on."""
    draw = random.Random(seed)
    function, moments = MANIFESTS[seed % len(MANIFESTS)]
    killed = case.start(instant_of(whole, function, draw.choice(moments), draw.random()))
    assert killed.struck, killed.printed
    assert case.altered() == []
    assert "warning" not in case.go_on().printed
    assert case.outcome() == whole.outcome()
    assert case.altered() == []
    assert case.left_over() == set()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_twice(whole: Case, case: Case, seed: int) -> None:
    """Both times within the first third of what there is to do, so that the second is certain to be
    reached."""
    draw = random.Random(seed)
    for places in draw.sample(
        [PLACES["between steps"], PLACES["in a save"], PLACES["in a save"]], 2
    ):
        function, moments = draw.choice(places)
        killed = case.start(
            instant_of(whole, function, draw.choice(moments), draw.random(), most=1 / 3)
        )
        assert killed.struck, killed.printed
    case.go_on()
    assert case.outcome() == whole.outcome()


@pytest.mark.parametrize(
    "instant",
    [
        pytest.param(
            Instant(f"{CHECKPOINT}.Checkpoints.clear", 1), id="before its checkpoints are cleared"
        ),
        pytest.param(
            Instant("mka.experiments.folder.write_json", 1, "within"), id="in config.json"
        ),
        pytest.param(
            Instant(f"{BENCHMARK}.write_curve", 1, "within"),
            id="in a curve",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Instant(f"{CHECKPOINT}.save_file", 3, "within"), id="in a save", marks=pytest.mark.slow
        ),
        pytest.param(
            Instant(f"{CHECKPOINT}.remove", 7), id="while they are cleared", marks=pytest.mark.slow
        ),
    ],
)
def test_nothing_is_left_over(case: Case, instant: Instant) -> None:
    """Checkpoints are large: those of a finished training have to go, whenever it was killed."""
    assert case.start(instant).struck
    case.go_on()
    assert case.left_over() == set()


def test_no_more_than_the_steps_since_the_last_checkpoint_are_done_again(
    whole: Case, case: Case
) -> None:
    """Also when killed twice in a row, in both mechanisms."""
    assert whole.calls()["mka.training.loop.take_step"] == 2 * STEPS
    assert case.start(Instant("mka.training.loop.take_step", 8)).struck
    assert case.checkpoints("mha") == [3, 6]
    assert case.start(Instant("mka.training.loop.take_step", 6 + 5, "after")).struck
    assert case.checkpoints("fmka") == [3]
    assert "Resuming after step 3 of 12" in case.go_on().printed
    assert case.calls()["mka.training.loop.take_step"] == STEPS - SAVE_STEPS
    assert case.outcome() == whole.outcome()
