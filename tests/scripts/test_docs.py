"""The pages that people read lead where they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "profiles").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_page_is_listed_in_its_index() -> None:
    for folder, pattern in (("docs", "*.md"), ("docs/notes", "*.md"), ("profiles", "*/README.md")):
        index = (ROOT / folder / "README.md").read_text()
        pages = [page.relative_to(ROOT / folder).as_posix() for page in (ROOT / folder).glob(pattern)]
        assert [page for page in pages if f"({page})" not in index and page != "README.md"] == []


def test_every_record_is_named_in_its_study() -> None:
    for record in (ROOT / "profiles").glob("*/*.json"):
        assert record.name in (record.parent / "README.md").read_text(), record
