#!/usr/bin/env bash
#
# Creates the project's environment in .venv, next to this script, and prints which device it found.
#
#     ./setup.sh                      # with python3
#     PYTHON=python3.12 ./setup.sh    # with another interpreter
#
# If nothing has changed, running it again takes only a moment. It updates .venv if pyproject.toml or
# constraints.txt has changed, and recreates it if it is broken, incomplete, moved, or for another interpreter.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

runs() { "$@" >/dev/null 2>&1; }

# Prints four lines: version, whether it is new enough, where its library is, and how to start it outside a .venv.
describe_python() {
    "$1" -c '
import os, sys
print(".".join(map(str, sys.version_info[:3])))
print("new" if sys.version_info >= (3, 10) else "old")
print(os.path.realpath(sys.base_prefix))
print(sys.executable if sys.prefix == sys.base_prefix else os.path.realpath(sys.executable))
'
}

# Prints the last line of the output. Fails if a package that the project needs is missing, or lacks a file.
describe_device() {
    .venv/bin/python -W ignore -c '
import os, re, sys
from importlib import metadata

for requirement in metadata.requires("mka"):
    if "extra ==" in requirement and "dev" not in requirement.partition("extra ==")[2]:
        continue  # an extra that is not installed here
    metadata.distribution(re.match(r"[\w.-]+", requirement)[0])
for package in metadata.distributions():
    record = package.read_text("RECORD")
    if record is None and package.read_text("METADATA") is not None:
        sys.exit(f"error: {package.name} is only partly installed")
    for line in (record or "").splitlines():
        file = line.rsplit(",", 2)[0].strip("\"")
        if not file.endswith(".pyc") and not os.path.exists(package.locate_file(file)):
            sys.exit(f"error: {package.name} lacks the file {file}")

import torch

if torch.cuda.is_available():
    count = torch.cuda.device_count()
    device = "CUDA, " + torch.cuda.get_device_name() + (f" and {count - 1} more" if count > 1 else "")
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
else:
    count = torch.get_num_threads()
    device = f"CPU, {count} thread" + ("s" if count > 1 else "")
    features = torch.cpu.get_capabilities()
    bfloat16 = any(features.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
print(f"Ready: {device}, bfloat16", "yes" if bfloat16 else "no")
'
}

# --- The interpreter: $PYTHON, else the one .venv was made with, else python3.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -n ${PYTHON:-} ]] || runs "$python" -c "" || python=python3
advice="install Python 3.10 or newer, or name one: PYTHON=/path/to/python ./setup.sh"
facts=$(describe_python "$python" 2>/dev/null) || fail "'$python' does not run; $advice"
{ read -r version && read -r age && read -r library && read -r base_python; } <<<"$facts"
[[ $age == new ]] || fail "'$python' is Python $version; $advice"
cd "$root"

# --- Only one setup at a time. The lock is on this script, and is released when the process that holds it ends.

if runs command -v flock; then
    exec 9<setup.sh
    flock --nonblock 9 || { echo "Waiting for another setup of this folder to finish ..." && flock 9; }
fi

# --- What .venv was made from: the stamp's first line has its folder and interpreter, the second a checksum of the files.

stamp=.venv/setup-stamp
made_with="$root, Python $version in $library"
made_from=$(cat pyproject.toml constraints.txt setup.sh | cksum)
old_with="" old_from=""
if [[ -f $stamp ]]; then
    { read -r old_with && read -r old_from; } <"$stamp" || true
fi

if [[ $old_with == "$made_with" && "$old_from" == "$made_from" ]]; then
    if line=$(describe_device 2>/dev/null); then
        echo "$line"
        exit 0
    fi
    echo "Something is missing from .venv."
    old_with=damaged
fi

# An environment that was made by hand is used if it is for this interpreter.
worth_keeping() {
    if [[ -f $stamp ]]; then
        [[ $old_with == "$made_with" ]] || return 1
    else
        [[ $(describe_python .venv/bin/python 2>/dev/null) == "$facts" ]] || return 1
    fi
    runs .venv/bin/python -m pip --version
}

if worth_keeping; then
    echo "unfinished" >"$stamp"
else
    runs "$base_python" -c "import ensurepip, venv" ||
        fail "Python $version has no venv module; on Debian and Ubuntu: apt install python3-venv"
    echo "Creating .venv with Python $version ..."
    rm -rf .venv && mkdir .venv
    echo "unfinished" >"$stamp" # until everything is installed, so that an interrupted setup starts again
    "$base_python" -m venv .venv
fi

# If pip fails by itself (for example without a network), what it has installed is complete, and the next run continues from there.
trap 'exit 130' INT TERM
install() {
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt "$@" ||
        { rm -f "$stamp" && exit 1; }
}

torch=$(grep '^torch==' constraints.txt)
echo "Installing torch ${torch#*==} (the largest part; the first time this can take minutes) ..."
install "$torch"
echo "Installing mka and everything else it needs ..."
install -e ".[dev]"

line=$(describe_device)
printf '%s\n' "$made_with" "$made_from" >"$stamp"
echo "$line"
