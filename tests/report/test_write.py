"""The report of a run folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mka.errors import InputError
from mka.record.mechanisms import MECHANISMS
from mka.record.results import Result, RunFolder, append_result, read_results
from mka.report import write_report

MakeResult = Callable[..., Result]
FillFolder = Callable[..., Path]


def report(folder: Path) -> str:
    return write_report(folder)[0].read_text(encoding="utf-8")


def append_all(folder: Path, *results: Result) -> Path:
    folder.mkdir(exist_ok=True)
    for result in results:
        append_result(folder, result)
    return folder


def test_paths_and_parts(fill_folder: FillFolder) -> None:
    folder = fill_folder()
    paths = write_report(folder)
    assert [str(path.relative_to(folder)) for path in paths] == [
        "table.md",
        "figures/loss_tokens.svg",
        "figures/loss_time.svg",
        "figures/perplexity_cache.svg",
    ]
    text = paths[0].read_text(encoding="utf-8")
    assert text.startswith(
        "# Attention mechanisms compared on stdlib, preset quick\n\nEach mechanism with one "
        "seed (0).\n"
    )
    assert all(f"- {kind.upper()}: {row.title}\n" in text for kind, row in MECHANISMS.items())
    assert all(f"(figures/{path.name})" in text for path in paths[1:])
    for note in ("only runs with", "across tokenizers", "above the one before training"):
        assert note in text
    for note in (
        "bytes that decoding keeps per token, in bfloat16",
        "last tenth of the steps",
        "may be noise",
    ):
        assert note in text


def test_configuration_is_listed_flat_without_what_says_where(fill_folder: FillFolder) -> None:
    text = report(fill_folder())
    for line in (
        "| data.fingerprint | ab12 |",
        "| model.hidden_size | 256 |",
        "| text_path | none |",
    ):
        assert line in text
    assert "| tokens trained on | 245760 |" in text
    assert "somewhere" not in text
    assert "skipped" not in text


def test_settings_that_differ_name_their_mechanisms(
    tmp_path: Path, make_result: MakeResult
) -> None:
    rows = [
        make_result("mha", config={"model": {"intermediate_size": 1024}, "bf16": True}),
        make_result("mqa", config={"model": {"intermediate_size": 1024}, "bf16": True}),
        make_result(
            "mka", config={"model": {"intermediate_size": 1000}, "bf16": True}, skipped_steps=2
        ),
    ]
    text = report(append_all(tmp_path, *rows))
    assert "| model.intermediate_size | 1024 (MHA, MQA); 1000 (MKA) |" in text
    assert "| bf16 | yes |" in text
    assert "| skipped steps | 2 (MKA) |" in text


def test_each_environment_is_listed_with_its_mechanisms(
    tmp_path: Path, make_result: MakeResult
) -> None:
    rows = [
        make_result("mka", environment={"device": "cuda", "cores": 8}),
        make_result("mha", environment={"device": "cpu"}),
        make_result("mla", environment={"cores": 8, "device": "cuda"}),
        make_result("fmka", environment={}),
    ]
    text = report(append_all(tmp_path, *rows))
    assert "MHA:\n\n- device: cpu\n\nMLA, MKA:\n\n- cores: 8\n- device: cuda\n" in text
    assert text.endswith("FMKA:\n\n- not recorded\n")


def test_missing_configuration_is_tolerated(tmp_path: Path, make_result: MakeResult) -> None:
    text = report(append_all(tmp_path, make_result(config={}, environment={})))
    assert text.startswith("# Attention mechanisms compared\n")


def test_a_bar_in_a_setting_does_not_break_the_table(
    tmp_path: Path, make_result: MakeResult
) -> None:
    text = report(append_all(tmp_path, make_result(config={"text_path": ["a|b", "c\nd"]})))
    assert "| text_path | a\\|b, c d |" in text


def test_seeds_are_named_by_mechanism_where_they_differ(
    tmp_path: Path, make_result: MakeResult
) -> None:
    rows = [
        make_result("mha", 0),
        make_result("mqa", 0),
        make_result("mha", 1),
        make_result("mqa", 1),
    ]
    assert "Each mechanism with 2 seeds (0, 1).\n" in report(append_all(tmp_path, *rows))
    assert "MHA, MQA: 2 seeds (0, 1); MKA: one seed (5).\n" in report(
        append_all(tmp_path, make_result("mka", 5))
    )


def test_the_same_results_give_the_same_bytes(fill_folder: FillFolder) -> None:
    """In this process, in another folder and in a process with another hash seed and time zone."""
    one, other = fill_folder("one", seeds=(0, 1)), fill_folder("other", seeds=(0, 1))
    before = [path.read_bytes() for path in write_report(one)]
    assert [path.read_bytes() for path in write_report(one)] == before
    code = (
        "from pathlib import Path; from mka.report import write_report; "
        f"write_report(Path({str(other)!r}))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert [(other / path.relative_to(one)).read_bytes() for path in write_report(one)] == before


def test_a_report_needs_no_torch(fill_folder: FillFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from mka.report import write_report\n"
        f"write_report(Path({str(fill_folder())!r}))\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_the_order_of_the_lines_does_not_matter_to_the_numbers(fill_folder: FillFolder) -> None:
    folder = fill_folder(seeds=(0, 1))
    before = report(folder)
    lines = RunFolder(folder).results.read_text(encoding="utf-8").splitlines(keepends=True)
    RunFolder(folder).results.write_text("".join(reversed(lines)), encoding="utf-8")
    assert report(folder) == before


def test_nothing_but_the_report_is_left_behind(fill_folder: FillFolder) -> None:
    folder = fill_folder()
    before = {path for path in folder.rglob("*") if path.is_file()}
    written = set(write_report(folder))
    assert {path for path in folder.rglob("*") if path.is_file()} == before | written


def test_a_torn_last_line_is_passed_over(fill_folder: FillFolder) -> None:
    folder = fill_folder()
    with RunFolder(folder).results.open("a", encoding="utf-8") as file:
        file.write('{"attention_type": "mk')
    before = len(read_results(folder))
    assert before == len(MECHANISMS)
    assert "| FMKA |" in report(folder)


def test_no_folder_and_no_results_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    RunFolder(tmp_path).results.write_text('{"torn', encoding="utf-8")
    with pytest.raises(InputError, match="no finished result"):
        write_report(tmp_path)
    assert not (tmp_path / "table.md").exists()


def test_an_unknown_mechanism_stops_before_anything_is_written(
    tmp_path: Path, make_result: MakeResult
) -> None:
    append_all(tmp_path, make_result("mha"), make_result("linear"))
    with pytest.raises(InputError, match="unknown attention_type 'linear'"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
