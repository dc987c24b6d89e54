"""Every Python block of the README and of docs/ runs as it stands, those of a page one after the
other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_runs import BENCHMARK_SCRIPT

ROOT = BENCHMARK_SCRIPT.parent.parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if BLOCK.search(page.read_text("utf-8"))
]


def test_pages_are_found() -> None:
    assert {page.name for page in PAGES} >= {"README.md", "models.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_run(page: Path, tmp_path: Path) -> None:
    script = "\n".join(BLOCK.findall(page.read_text("utf-8")))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
