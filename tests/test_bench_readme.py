"""The figures of docs/performance.md are those of bench/results."""

from __future__ import annotations

import json
import shutil

import pytest

from bench import readme


def test_the_page_has_the_figures_of_the_results_and_a_place_for_every_table():
    assert readme.main(["--check"]) == 0
    text = (readme.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert [place["name"] for place in readme.MARKED.finditer(text)] == list(readme.TABLES)


@pytest.fixture
def copies(tmp_path):
    """The page and its results, to be changed."""
    results = shutil.copytree(readme.ROOT / "bench" / "results", tmp_path / "results")
    path = shutil.copy(readme.ROOT / "docs" / "performance.md", tmp_path / "performance.md")
    return path, results, ["--page", str(path), "--results", str(results)]


def test_a_changed_result_is_found_and_written_and_nothing_else(copies, capsys):
    path, results, options = copies
    before = path.read_text(encoding="utf-8")
    figures = json.loads((results / "overhead_cpu.json").read_text(encoding="utf-8"))
    gam = next(row for row in figures["rows"] if row["method"] == "GAM")
    gam["ms"], gam["ratio"] = 54.321, 3.1415
    (results / "overhead_cpu.json").write_text(json.dumps(figures), encoding="utf-8")
    assert readme.main([*options, "--check"]) == 1
    assert "run python -m bench.readme" in capsys.readouterr().out
    assert path.read_text(encoding="utf-8") == before
    assert readme.main(options) == 0
    after = path.read_text(encoding="utf-8")
    (changed,) = [b for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert changed.startswith("| `GAM` | 54.3 | 3.14 | 5.40 |")
    assert readme.main([*options, "--check"]) == 0


def test_errors_name_the_place_and_the_file(copies, capsys):
    path, results, options = copies
    (results / "growth_cpu.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        readme.main(options)
    found = capsys.readouterr().err
    assert f"python -m bench.growth --json {results / 'growth_cpu.json'} writes it" in " ".join(found.split())
    path.write_text("<!-- bench:speed -->\n\n<!-- /bench -->\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        readme.main(options)
    assert "bench:speed is no table: it must be of overhead, throughput, growth" in capsys.readouterr().err
    path.unlink()
    with pytest.raises(SystemExit, match="2"):
        readme.main(options)
    assert "--page: " in capsys.readouterr().err
