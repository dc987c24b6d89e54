"""WikiText through the real `datasets` code, out of a folder laid out like the repository on the
hub."""

from pathlib import Path

import pytest

from mka.data import hub, load_corpus, wikitext
from mka.data.wikitext import articles

ROWS = {
    "train": [
        "",
        " = First = \n",
        "",
        " Text one . \n",
        " = = Section = = \n",
        " More é 漢 . \n",
        "",
        " = Second = \n",
        " Two . \n",
    ],
    "validation": ["", " = Third <unk> = \n", " Three . \n"],
    "test": ["", " = Fourth = \n", " a = b = c \n", ""],
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    folder = tmp_path / "wikitext"
    configurations = ""
    for name in wikitext.CONFIGURATIONS.values():
        (folder / name).mkdir(parents=True)
        configurations += f"- config_name: {name}\n  data_files:\n"
        for split, rows in ROWS.items():
            text = [row.replace("First", name) for row in rows]
            datasets.Dataset.from_dict({"text": text}).to_parquet(
                folder / name / f"{split}-00000-of-00001.parquet"
            )
            configurations += f"  - split: {split}\n    path: {name}/{split}-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n", encoding="utf-8")
    return folder


def test_rows_become_articles(repository: Path) -> None:
    corpus = load_corpus("wikitext2", wikitext_source=str(repository))
    assert corpus.documents == {
        "train": [
            (
                "00001 wikitext-2-raw-v1",
                " = wikitext-2-raw-v1 = \n Text one . \n = = Section = = \n More é 漢 . \n",
            ),
            ("00002 Second", " = Second = \n Two . \n"),
        ],
        "validation": [("00001 Third <unk>", " = Third <unk> = \n Three . \n")],
        "test": [("00001 Fourth", " = Fourth = \n a = b = c \n")],
    }
    assert corpus.name == "wikitext2"
    assert corpus.split_rule == "the dataset's own splits"
    assert corpus.origin == {"source": "wikitext"}


def test_the_larger_one_has_its_own_configuration(repository: Path) -> None:
    corpus = load_corpus("wikitext103", wikitext_source=str(repository))
    assert corpus.documents["train"][0][0] == "00001 wikitext-103-raw-v1"


def test_a_folder_of_something_else(tmp_path: Path, repository: Path, refused) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(load_corpus, "wikitext2", wikitext_source=str(tmp_path / "empty"))
    assert "wikitext2" in message


def test_text_before_the_first_heading_is_kept() -> None:
    assert articles([" Loose . \n", " = Title = \n", " Text . \n"]) == [
        ("00000 ", " Loose . \n"),
        ("00001 Title", " = Title = \n Text . \n"),
    ]
    assert articles([]) == []


@pytest.mark.parametrize("dataset", ["wikitext2", "wikitext103"])
def test_unreachable_hub(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(wikitext, "hub_is_reachable", lambda: False)
    offline = datasets.config.HF_HUB_OFFLINE
    message = refused(load_corpus, dataset)
    assert dataset in message
    assert "the hub cannot be reached" in message
    assert "--dataset stdlib" in message
    assert "--dataset text --text_path FILE" in message
    assert offline == datasets.config.HF_HUB_OFFLINE


class Session:
    """An HTTP client that answers, or fails, at once."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def head(self, url: str, timeout: float) -> None:
        assert url.startswith("http")
        assert timeout <= 10
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("error", "reachable"), [(None, True), (OSError("no route"), False), (ValueError(), False)]
)
def test_one_probe_decides(
    error: Exception | None, reachable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.utils

    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: Session(error))
    assert hub.hub_is_reachable() is reachable


def test_first_line_of_any_error() -> None:
    assert hub.first_line(ValueError("\n one:\n two")) == "one"
    assert hub.first_line(ValueError()) == "ValueError"
