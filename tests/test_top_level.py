"""The files at the top say what is true: the licence, the citation, the way to contribute."""

from __future__ import annotations

import hashlib
import re

import pytest
from support.paths import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text()
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # of its full text
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]


def of_project(key: str) -> str:
    (value,) = re.findall(rf'^{key} = "(.*)"', PROJECT, re.M)
    return value


def test_the_licence_is_the_full_text_of_the_one_that_is_named():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE
    assert of_project("license") == "Apache-2.0"
    assert "as the repository" in (ROOT / "weights" / "embedded" / "README.md").read_text()


def test_the_citation_is_of_this_version():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    for line in (
        f"version: {of_project('version')}",
        f"license: {of_project('license')}",
        "cff-version: 1.2.0",
    ):
        assert line in lines
    assert f"## {of_project('version')}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    gone = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert links and not gone


def test_what_contributing_names_is_there():
    names = re.findall(
        r"`([\w./]+\.(?:py|toml)|tests/\w+)`", (ROOT / "CONTRIBUTING.md").read_text()
    )
    assert len(names) > 6
    assert not [name for name in names if "NAME" not in name and not (ROOT / name).exists()]


def test_contributing_gives_the_commands_of_ci():
    page, ci = (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in ("ruff check .", "ruff format --check .", "mypy", "python -m pytest -q"):
        assert command in page and f"\n{command}\n" in ci
