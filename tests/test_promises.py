"""Every sentence that docs/promises.md quotes is still said, and every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = [
    line.strip("| \n").split(" | ")
    for line in (ROOT / "docs/promises.md").read_text().splitlines()
    if line.startswith("| ") and "`test_" in line
]


@pytest.fixture(scope="module")
def said() -> str:
    pages = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "promises.md"]
    texts = [ROOT / "README.md", *pages, *sorted((ROOT / "gam_fast").rglob("*.py"))]
    return " ".join(" ".join(path.read_text().split()) for path in texts)


@pytest.mark.parametrize(("promise", "tests"), ROWS, ids=[promise[:40] for promise, _ in ROWS])
def test_a_promise_is_made_in_these_words_and_held_by_tests_that_exist(promise: str, tests: str, said: str) -> None:
    assert promise in said
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
    assert named
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {name}"


def test_the_page_lists_promises() -> None:
    assert len(ROWS) > 40
