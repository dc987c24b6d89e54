"""Banks that lead elsewhere or are larger than they say, and banks of many documents."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checks_models import make_model, tokens
from mka import cli
from mka.errors import InputError
from mka.memory.bank import Bank
from mka.memory.options import LongTermConfig
from mka.models import CACHE_ARGUMENT, fingerprint, memory_cache, states
from mka.storage import manifest_text, read_manifest


@torch.no_grad()
def filled(folder: Path, documents: int, model: Any) -> Bank:
    """A bank of documents of 20 random tokens."""
    bank = Bank.create(folder, fingerprint(model))
    with bank.writing():
        for number in range(documents):
            cache = memory_cache(model, LongTermConfig(longterm_store="host"))
            model(tokens(1, 20, seed=number), use_cache=True, **{CACHE_ARGUMENT: cache})
            bank.add(f"text {number}", f"text {number}", 20, states(cache))
    return bank


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", "mka", True, torch.float32)


def test_removing_a_link_leaves_what_it_leads_to(
    tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = filled(tmp_path / "bank", 1, model)
    outside = tmp_path / "outside"
    shutil.copytree(bank.documents()[0].folder, outside)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    (bank.folder / "documents" / outside.name).symlink_to(outside)
    with pytest.raises(InputError, match="its document outside is damaged: it is a link"):
        bank.documents()
    assert cli.main(["memory", "verify", "--bank", str(bank.folder)]) == 1
    assert cli.main(["memory", "remove", "outside", "--bank", str(bank.folder)]) == 0
    capsys.readouterr()
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    assert len(bank.documents()) == 1


@pytest.mark.parametrize("chunks", [0, 1, 10**12])
def test_a_document_has_as_many_chunks_as_its_files(
    tmp_path: Path, model: Any, chunks: int
) -> None:
    bank = filled(tmp_path / "bank", 1, model)
    document = bank.documents()[0].folder
    content = read_manifest(document)
    assert content["details"]["chunks"] != chunks
    content["details"]["chunks"] = chunks
    (document / "manifest.json").write_text(manifest_text(content))
    with pytest.raises(InputError, match=f"which are not {chunks:,} chunks; remove it"):
        memory_cache(model, bank=Bank(bank.folder, fingerprint(model)))


LIMITED = """
import resource, sys
import torch
sys.path.insert(0, sys.argv[2])
from checks_models import make_model, tokens
from mka.memory.bank import Bank
from mka.models import CACHE_ARGUMENT, fingerprint, memory_cache
model = make_model("llama", "mka", True, torch.float32)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
cache = memory_cache(model, bank=Bank(sys.argv[1], fingerprint(model)))
with torch.no_grad():
    print(model(tokens(1, 9), use_cache=True, **{CACHE_ARGUMENT: cache}).logits.sum().item())
"""


def test_a_bank_of_many_documents_keeps_no_file_open(tmp_path: Path, model: Any) -> None:
    """200 files and more of the bank, with room for 64."""
    bank = filled(tmp_path / "bank", 30, model)
    assert sum(1 for _ in (bank.folder / "documents").rglob("0*")) > 100
    command = [sys.executable, "-c", LIMITED, str(bank.folder), str(Path(__file__).parent.parent)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    cache = memory_cache(model, bank=Bank(bank.folder, fingerprint(model)))
    with torch.no_grad():
        wanted = model(tokens(1, 9), use_cache=True, **{CACHE_ARGUMENT: cache}).logits.sum()
    assert float(ended.stdout.splitlines()[-1]) == pytest.approx(wanted.item(), rel=1e-5)
