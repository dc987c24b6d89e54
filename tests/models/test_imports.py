"""What an import brings with it: nothing heavy for the package, no transformers below the
models."""

import subprocess
import sys

import pytest

REPORT = (
    "import sys; print(*sorted(sys.modules.keys() & {'torch', 'transformers', 'datasets', "
    "'matplotlib', 'numpy'}))"
)


@pytest.mark.parametrize(
    ("statement", "loaded"),
    [
        ("import mka", set()),
        ("import mka.record.config, mka.record.results, mka.memory.options", set()),
        ("import mka.attention.naive, mka.memory.router, mka.ops.scan", {"torch", "numpy"}),
    ],
)
def test_an_import_loads_no_more_than_it_needs(statement: str, loaded: set[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"{statement}; {REPORT}"], capture_output=True, text=True, check=True
    )
    assert set(found.stdout.split()) <= loaded
    assert not found.stderr
