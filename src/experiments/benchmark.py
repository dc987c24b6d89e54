"""The original command's path: python src/experiments/benchmark.py [options]; the same
as `mka bench [options]`."""

import sys

try:
    from mka.cli import bench
except ModuleNotFoundError as missing:
    sys.exit(f"{missing}; run ./setup.sh once, then use .venv/bin/python or activate .venv")

if __name__ == "__main__":
    sys.exit(bench())
