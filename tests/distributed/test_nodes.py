"""Two machines, for real: two network namespaces joined by a cable, each with an address of its
own."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import COMMANDS, Launch
from mka.record.results import read_results

COMMAND = Path(__file__).parent / "command.py"
ADDRESSES = ("10.213.7.1", "10.213.7.2")
CARD = "mka0"
"""What either machine calls its end of the cable."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """The names of the two namespaces; skips, saying why, where they may not be made."""
    names = (f"mka{os.getpid()}a", f"mka{os.getpid()}b")
    cable = (f"v{os.getpid()}a", f"v{os.getpid()}b")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
            for name, end, address in zip(names, cable, ADDRESSES, strict=True):
                ip("link", "set", end, "netns", name, "name", CARD)
                ip("-n", name, "addr", "add", f"{address}/24", "dev", CARD)
                ip("-n", name, "link", "set", CARD, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", b"").decode().strip() or error
            pytest.skip(f"network namespaces are not permitted here: {said}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(
            ["ip", "link", "del", cable[0]], check=False, capture_output=True
        )  # not yet in a namespace


def test_two_machines_train_one_model(
    machines: tuple[str, str], tmp_path: Path, corpus: Path
) -> None:
    options = [
        "--preset",
        "tiny",
        "--dataset",
        "text",
        "--text_path",
        corpus,
        "--attention_type",
        "fmka",
    ]
    options += ["--max_steps", 4, "--output_dir", "run"]
    commands = [
        [
            *(
                "ip",
                "netns",
                "exec",
                name,
                COMMANDS / "torchrun",
                "--nnodes=2",
                f"--node_rank={rank}",
            ),
            *(
                "--nproc_per_node=1",
                f"--master_addr={ADDRESSES[0]}",
                "--master_port=29500",
                COMMAND,
                *options,
            ),
        ]
        for rank, name in enumerate(machines)
    ]
    # The machines have no name server; gloo is told which card to use, as docs/training.md says.
    environment = {"GLOO_SOCKET_IFNAME": CARD, "RES_OPTIONS": "timeout:1 attempts:1"}
    first, second = Launch(tmp_path, environment=environment).run_together(commands)
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "Ranks      2 on 2 machine(s), ddp" in first.out
    assert second.out == ""
    (row,) = read_results(tmp_path / "run")
    launch = row.environment["launch"]
    assert (launch["world_size"], launch["machines"], launch["started_by"]) == (2, 2, "torchrun")
