"""The pages: their examples run, one after the other, links lead somewhere, and promises have tests that exist."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = re.compile(r"(<!-- not run: [^\n]* -->\n\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROMISES = [
    line.strip("| \n").split(" | ")
    for line in (ROOT / "docs/promises.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and "`test_" in line
]
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)")


def names():
    """Return the names that a reader has: a model, its loss, and a loader of 8 batches."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    loader = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(8)]
    found = {"torch": torch, "model": model, "criterion": nn.CrossEntropyLoss(), "loader": loader, "epochs": 2}
    exec("import gam_fast; optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)", found)
    return found | dict(zip("xy", loader[0], strict=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run_in_turn(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # examples write checkpoints
    namespace = names()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lr_scheduler.step|.*Agg.*")
        for left_out, example in EXAMPLE.findall(page.read_text(encoding="utf-8")):
            if not left_out:
                exec(compile(example, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs/results").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    prose = re.sub(r"```.*?```|^\|.*?$|^#.*?$|^!.*?$", ".", text, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    for sentence in re.split(r"[.:?!]\s", prose):
        assert len(sentence.split()) <= 25, sentence


@pytest.fixture(scope="module")
def said():
    pages = [page for page in PAGES if page.name != "promises.md"] + sorted((ROOT / "gam_fast").rglob("*.py"))
    return " ".join(" ".join(page.read_text(encoding="utf-8").split()) for page in pages)


@pytest.mark.parametrize(("promise", "tests"), PROMISES, ids=[promise[:40] for promise, _ in PROMISES])
def test_a_promise_is_made_in_these_words_and_held_by_tests_that_exist(promise, tests, said):
    assert promise in said
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
    assert named
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file} has no {name}"


def test_the_page_lists_promises():
    assert len(PROMISES) > 40
