"""The documents name what there is: tests, files, and links that lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md", ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
)


def names_in(file: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_tests_that_a_document_names_are_there(document):
    """`test_file.py::test_name`, `::test_name` after it, or `test_name` alone; `...` stands for a part of a name."""
    text = document.read_text(encoding="utf-8")
    files = {path.name: names_in(path) for path in (ROOT / "tests").glob("test_*.py")}
    every = set().union(*files.values())
    assert set(re.findall(r"`(?:tests/)?(test_\w+\.py)", text)) <= files.keys()
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)::(test_\w+)`", text):
        assert name in files[file], (file, name)
    for name in re.findall(r"`(?:::)?(test_\w+)(?:\[\w+\])?`", text):
        assert name in every or f"{name}.py" in files, name
    for part in re.findall(r"`\.\.\.(_\w+)`", text):
        assert any(part in name for name in every), part


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []
