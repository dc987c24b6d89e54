"""What the launches of these tests share."""

import os
from pathlib import Path

import pytest

from launch import OneLaunchForMany
from mka.storage import locked
from tiny_runs import write_corpus


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> OneLaunchForMany:
    """Jobs started once for all workers of this test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "launches"
    folder.mkdir(exist_ok=True)
    return OneLaunchForMany(folder)


@pytest.fixture(scope="session")
def corpus(launched: OneLaunchForMany) -> Path:
    """Under one name for all workers: it is part of a run's identity."""
    path = launched.folder / "corpus.txt"
    with locked(path.with_suffix(".lock")):
        return path if path.is_file() else write_corpus(path)
