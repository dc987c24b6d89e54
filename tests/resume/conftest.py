"""The uninterrupted runs that all others are compared with, made once by each worker."""

from dataclasses import replace
from pathlib import Path

import pytest

from resume.runs import Case, start_fork_server
from tiny_runs import write_corpus


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run on one rank that nothing happened to."""
    start_fork_server()
    home = tmp_path_factory.mktemp("whole")
    case = Case(home / "one", write_corpus(home / "corpus.txt"))
    case.go_on()
    return case


@pytest.fixture(scope="session")
def whole_on_two(whole: Case) -> Case:
    """The same on two ranks, with twice the rows a step."""
    case = replace(whole, home=whole.home.parent / "two", ranks=2)
    case.go_on()
    return case


@pytest.fixture
def case(whole: Case, tmp_path: Path) -> Case:
    return replace(whole, home=tmp_path / "case")


@pytest.fixture
def case_on_two(whole_on_two: Case, tmp_path: Path) -> Case:
    return replace(whole_on_two, home=tmp_path / "case")
