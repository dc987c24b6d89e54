"""The page and its Markdown: what stands in them, for good and for bad results."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest

from mka import cli
from mka.record.mechanisms import MECHANISMS
from mka.record.results import (
    CurvePoint,
    Result,
    RunFolder,
    append_result,
    write_curve,
    write_routing,
)
from mka.report import read_runs, write_pages
from mka.report.warnings import warnings

MakeResult = Callable[..., Result]
FillFolder = Callable[..., Path]
GOLDEN = Path(__file__).parent / "golden"
VOID = {"meta", "link", "br", "path", "rect", "line", "polyline"}


def pages(*folders: Path) -> tuple[str, str]:
    html, markdown = folders[0].parent / "page.html", folders[0].parent / "page.md"
    assert write_pages(read_runs(folders), html, markdown) == [html, markdown]
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


class Balanced(HTMLParser):
    """Raises for a tag that closes another than the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_whole(html: str) -> None:
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids)), "an id stands once"
    assert not re.search(
        r"(src|href)=\"(?!#|data:)|url\(\s*[\"']?http|https?://(?!www\.w3\.org)", html
    ), "self-contained"
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


def test_golden(full_folder: FillFolder) -> None:
    """The same results give these bytes. After a change that is meant, look at the new pages and
    copy them there."""
    folder = full_folder(kinds=("mha", "mka"), seeds=(0, 1))
    for name, made in zip(("page.html", "page.md"), pages(folder), strict=True):
        assert made == (GOLDEN / name).read_text(encoding="utf-8"), (
            f"compare {folder.parent / name} with {GOLDEN / name}"
        )


def test_every_part_is_there_and_the_page_stands_alone(full_folder: FillFolder) -> None:
    html, markdown = pages(full_folder(seeds=(0, 1)))
    check_whole(html)
    for kind in MECHANISMS:
        assert f'<th scope="row">{kind.upper()}</th>' in html
        assert f"| {kind.upper()} |" in markdown
    for text in (
        "Loss against tokens",
        "Loss against training time",
        "Quality against the size of the cache",
    ):
        assert text in html
        assert text in markdown
    for text in (
        "Time against the length of a row",
        "Memory against the length of a row",
        "Run details",
        "All settings",
    ):
        assert text in html
        assert text in markdown
    assert html.count('<div class="chart heat"') == 2
    assert html.count('<pre class="passage"') == 2
    assert "mka bench --seeds 0 1" in html


def test_every_figure_has_a_text_alternative(full_folder: FillFolder) -> None:
    html, _ = pages(full_folder())
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    assert len(figures) == 7
    for figure in figures:
        assert re.search(
            r'<div class="chart[^"]*" tabindex="0" role="group" aria-label="\w', figure
        )
        assert re.search(r'<path aria-label="[^"]+: [^"]+"', figure), "a mark has its words"
        assert "as a table</summary>" in figure
        assert "<table>" in figure


def test_text_of_a_passage_cannot_break_the_page(full_folder: FillFolder) -> None:
    html, _ = pages(full_folder(kinds=("mka",)))
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert "x &amp; y" in html


def test_the_same_results_give_the_same_bytes(full_folder: FillFolder) -> None:
    folder = full_folder()
    assert pages(folder) == pages(folder)


def test_a_seed_trained_twice_stands_once_with_its_last_figures(full_folder: FillFolder) -> None:
    folder = full_folder(kinds=("mha", "mka"))
    once = pages(folder)
    lines = RunFolder(folder).results.read_text(encoding="utf-8").splitlines()
    earlier = unsigned(lines[0], eval_loss=math.nan)
    RunFolder(folder).results.write_text("\n".join([earlier, *lines]) + "\n", encoding="utf-8")
    said = "results.jsonl has the result of mha-seed0 in lines 1 and 2: the last one counts."
    html, markdown = pages(folder)
    assert said in html
    assert markdown.replace(f"- {said}\n", "") == once[1]


def unsigned(line: str, **changes: float) -> str:
    """A result with other figures, as it was before lines had checksums."""
    row = json.loads(line)
    del row["checksum"]
    return json.dumps(row | {"schema_version": 3} | changes)


def test_several_runs_stand_side_by_side(full_folder: FillFolder, fill_folder: FillFolder) -> None:
    ours, theirs = (
        full_folder("ours"),
        fill_folder("theirs", kinds=("mha", "mka"), config={"max_steps": 7}),
    )
    html, markdown = pages(ours, theirs)
    check_whole(html)
    for text in ("MKA · ours", "MKA · theirs", "MQA · ours"):
        assert text in html
        assert text in markdown
    assert "The runs differ in max_steps: their losses do not compare." in html
    assert '<tr class="differs"><th scope="row">max_steps</th>' in html
    assert "| | ours | theirs |" in markdown
    assert "mka bench --attention_type mha mka --max_steps 7" in markdown


def test_looks_of_runs_of_other_lengths_stand_under_their_own_tokens(
    fill_folder: FillFolder, make_result: MakeResult, tmp_path: Path
) -> None:
    ours, theirs = fill_folder("ours", kinds=("mha",)), fill_folder("theirs", kinds=("mha",))
    points = [
        CurvePoint(step=n, tokens=100 * n, seconds=n, train_loss=9.0, eval_loss=9.0 - n)
        for n in (1, 2)
    ]
    write_curve(theirs, "mha", 0, points)
    _, markdown = pages(ours, theirs)
    table = markdown.partition("### Loss against tokens")[2].partition("###")[0]
    headings, _, mine, other = [
        row.split(" | ") for row in table.splitlines() if row.startswith("|")
    ]
    assert headings[1:3] == ["100", "200"]
    assert mine[1:3] == ["", ""]
    assert other[1:3] == ["8.0000", "7.0000"]
    assert set(other[3:]) <= {"", " |"}
    table = markdown.partition("### Loss against training time")[2].partition("###")[0]
    assert "| MHA · theirs | 8.0000 (1.0 s) | 7.0000 (2.0 s) |" in table


def test_names_are_text_and_not_markup(full_folder: FillFolder) -> None:
    html, _ = pages(full_folder("ours"), full_folder("""a "b"<b> & 'c'"""))
    check_whole(html)
    assert "<b>" not in html
    words = re.findall(r'<path aria-label="([^"]*)"', html)
    assert sum("a &quot;b&quot;&lt;b&gt; &amp; 'c'" in label for label in words) > 20


def test_variants_have_their_own_marks(full_folder: FillFolder, make_result: MakeResult) -> None:
    folder = full_folder(kinds=("mha",))
    append_result(folder, make_result("mha", variant="w128", eval_loss=5.5))
    html, _ = pages(folder)
    check_whole(html)
    assert "MHA w128" in html
    assert re.search(
        r'aria-label="MHA w128: [^>]*fill="var\(--ground\)" stroke="var\(--mha\)"', html
    )


def test_a_study_is_named_in_its_command(tmp_path: Path, make_result: MakeResult) -> None:
    for kind, variant in (("mka", ""), ("mka", "decay0.9"), ("fmka", ""), ("fmka", "decay0.9")):
        config = {"preset": "quick", "max_steps": 250, "match": "none", "bf16": True}
        for seed in (0, 1):
            append_result(tmp_path, make_result(kind, seed, variant=variant, config=config))
    assert "| command | mka bench --study decay --bf16 |" in pages(tmp_path)[1]


@pytest.mark.parametrize(
    ("arms", "command"),
    [
        (
            {"mka": ["", "w64", "K8"]},
            "--study window --attention_type mka && mka bench --study top_k --attention_type mka",
        ),
        ({"mka": [""], "fmka": ["", "no-L2"]}, "--study levels"),
        (
            {"mha": ["", "w128"]},
            "--study small --attention_type mha --match none --max_steps 250 --seeds 0",
        ),
        ({"mha": [""], "mka": [""]}, "--attention_type mha mka --max_steps 250 --seeds 0 1"),
    ],
)
def test_a_command_makes_the_variants_too(
    tmp_path: Path, make_result: MakeResult, arms: dict[str, list[str]], command: str
) -> None:
    seeds = (0,) if command.endswith("--seeds 0") else (0, 1)
    for kind, variants in arms.items():
        for variant, seed in product(variants, seeds):
            config = {"preset": "quick", "max_steps": 250, "match": "none"}
            append_result(tmp_path, make_result(kind, seed, variant=variant, config=config))
    assert f"| command | mka bench {command} |" in pages(tmp_path)[1]


def test_only_results_are_needed(tmp_path: Path, make_result: MakeResult) -> None:
    append_result(tmp_path, make_result("mka"))
    html, markdown = pages(tmp_path)
    check_whole(html)
    assert "Quality against" in html
    assert "Routers" not in html + markdown
    assert "Loss against" not in html + markdown


def test_figures_that_are_not_numbers_are_shown_and_said(full_folder: FillFolder) -> None:
    folder = full_folder()
    lines = RunFolder(folder).results.read_text(encoding="utf-8").splitlines()
    row = unsigned(lines[4], eval_loss=math.nan, perplexity=math.inf)
    RunFolder(folder).results.write_text(
        "\n".join([*lines[:4], row, *lines[5:]]) + "\n", encoding="utf-8"
    )
    curve = RunFolder(folder).curve("mka", 0).read_text(encoding="utf-8").splitlines()
    curve[-1] = json.dumps(json.loads(curve[-1]) | {"eval_loss": math.nan})
    RunFolder(folder).curve("mka", 0).write_text("\n".join(curve) + "\n", encoding="utf-8")
    assert cli.main(["report", str(folder)]) == 0
    html, markdown = pages(folder)
    check_whole(html)
    assert "MKA, seed 0: eval_loss and perplexity are NaN or infinite; shown unchanged." in html
    assert re.search(r"\| MKA \|[^\n]*\| nan \|[^\n]*\| inf \|", markdown)
    assert "NaN" not in "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.search(r'(?:x|y|x1|y1|points|transform)="[^"]*(nan|inf)', html)


def test_a_line_cut_in_the_middle_is_passed_over_and_said(
    full_folder: FillFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = full_folder(kinds=("mha", "mka"))
    whole = RunFolder(folder).results.read_bytes()
    RunFolder(folder).results.write_bytes(whole[: len(whole) - 40])
    assert cli.main(["report", str(folder)]) == 0
    assert "results.jsonl is cut in line 2: that line was skipped\n" in capsys.readouterr().err
    html, _ = pages(folder)
    assert "results.jsonl is cut in line 2: that line was skipped." in html
    assert '<th scope="row">MHA</th>' in html
    assert '<th scope="row">MKA</th>' not in html


def test_warnings(full_folder: FillFolder, make_result: MakeResult, tmp_path: Path) -> None:
    folder = full_folder(kinds=("mka",))
    (run,) = read_runs([folder])
    assert warnings([run]) == [
        "One seed: the intervals cover variation in text, not between training runs."
    ]
    routing = run.routings[0]
    lone = [[[0.0, 1.0, 0.0]] * 3] * 2
    values = vars(routing) | {"shares": lone, "entropy": [0.5, 0.01]}
    write_routing(folder, type(routing)(**values))
    environment = {"commit": "abc+"}
    append_result(folder, make_result("mqa", 1, busy_cores=1.25, environment=environment))
    append_result(folder, make_result("mha", 1, environment=environment))
    append_result(
        folder, make_result("gqa", 1, environment={"commit": "abc+"}, eval_block_losses=[4.0, 5.0])
    )
    (run,) = read_runs([folder])
    text = "\n".join(warnings([run]))
    assert "The router of MKA has collapsed onto L2: seed 0 in layer 1." in text
    assert "during 1 of 4 trainings, other processes used up to 1.2 cores" in text
    assert "Ran with local changes: abc+." in text
    assert "Ran with 2 commits: None, abc+." in text


def test_a_warning_where_there_is_no_verdict(
    full_folder: FillFolder, make_result: MakeResult
) -> None:
    folder = full_folder(kinds=("mha",), seeds=(0,))
    losses = make_result("mha").eval_block_losses
    spoilt = make_result("gqa", eval_block_losses=[*losses[1:], math.nan], eval_loss=math.nan)
    (run,) = read_runs([folder])
    rows = [*run.rows, spoilt, make_result("mqa", eval_block_losses=losses)]
    text = "\n".join(warnings([replace(run, rows=rows)]))
    assert (
        "No verdict, as one held-out block or a loss that is not a number has no interval: GQA "
        "and MHA." in text
    )
    assert "Not distinguishable, the interval holds 0: MQA and MHA." in text


def test_collapsed_routers_are_named_once_and_a_router_without_a_choice_is_none(
    full_folder: FillFolder, tmp_path: Path
) -> None:
    folder = full_folder(kinds=("mka",), seeds=(0, 1, 2))
    (run,) = read_runs([folder])
    for routing, entropy in zip(
        run.routings, ([0.01, 0.02], [0.5, 0.04], [None, None]), strict=True
    ):
        lone = [[[1.0, 0.0, 0.0]] * 3] * 2
        write_routing(folder, type(routing)(**vars(routing) | {"shares": lone, "entropy": entropy}))
    (run,) = read_runs([folder])
    said = [text for text in warnings([run]) if "router" in text]
    assert said == [
        "The router of MKA has collapsed onto L1: seed 0 in layer 0 and 1; seed 1 in layer 1."
    ]
    assert "no choice |" in pages(folder)[1]


def test_the_commands_answers(
    full_folder: FillFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ours, theirs = full_folder("ours"), full_folder("theirs")
    html = tmp_path / "out" / "page.html"
    assert cli.main(["report", str(ours), str(theirs), "--html", str(html)]) == 0
    assert f"Page     {html}" in capsys.readouterr().out
    assert html.is_file()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "{ours} {theirs}",
            "2 folders are given without a page; add --html FILE or --markdown FILE",
        ),
        ("{ours} {ours} --html {page}", "mka: {ours} is given twice; give each folder once"),
        (
            "{ours} {empty} --html {page}",
            "mka: {empty} holds no results.jsonl; give the folder of a `mka bench` run",
        ),
        ("{ours} {nowhere} --html {page}", "mka: {nowhere} does not exist"),
        (
            "{ours} {other} --html {page}",
            "line 1 is not a result of schema version 1 to 4; it says 9",
        ),
        ("{ours} --html {empty}", "it is a folder; give the name of a file"),
        ("--html {page}", "folders"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    full_folder: FillFolder,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: str,
    line: str,
) -> None:
    names = {
        name: tmp_path / name for name in ("ours", "theirs", "empty", "nowhere", "other", "page")
    }
    for name in ("ours", "theirs"):
        full_folder(name, kinds=("mha",))
    for name in ("empty", "other"):
        names[name].mkdir()
    (names["other"] / "results.jsonl").write_text('{"schema_version": 9}\n')
    assert cli.main(["report", *words.format(**names).split()]) == 2
    error = capsys.readouterr().err
    assert line.format(**names) in error
    assert error.count("\n") == 1
    assert not names["page"].exists()
