"""The comparison of cheap ascents, small: its tasks, its figures from known runs, its files and its errors."""

import itertools
import json
import sys

import pytest

from bench.data import DataError
from experiments import census, front, pareto, pareto_page, radius, runs, tasks
from experiments.runs import CONTENDERS, Contender, Run

# raised inside a dependency of curvlinops


def test_the_front_is_what_no_other_beats():
    points = {"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (2.0, 6.0), "d": (3.0, 6.0), "e": (1.0, 4.0), "f": (4.0, 7.0)}
    assert front.front(points, higher=True) == ["a", "c", "f"]
    assert front.front(points, higher=False) == ["e"]
    assert front.front({"b": (2.0, 1.0), "a": (1.0, 3.0), "c": (3.0, 2.0)}, higher=False) == ["a", "b"]


def test_contenders_are_called_by_what_they_spare_and_timed_by_the_medians_of_both_kinds():
    assert Contender("SAM", 0.5, 2).name == "SAM .5 /2"
    assert Contender("GAM", interval=4).name == "GAM /4"
    assert runs.mean_step({1: [1.0, 2.0, 90.0], 4: [8.0]}) == (3 * 2.0 + 8.0) / 4
    assert {*front.needed(), *(name for pair in pareto_page.PAIRS for name in pair)} <= CONTENDERS.keys()


def run(contender: str, seed: int, gradients: float, accuracy: float, lambda_max: float, step_ms: float) -> Run:
    return Run("digits", contender, seed, gradients, accuracy, 0.5, lambda_max, lambda_max / 100, step_ms)


def known(close_ms: float = 3.6, seeds: tuple[int, ...] = (0, 1)) -> dict[str, front.Row]:
    """Rows of runs, made up."""
    table = [
        *(run("base", seed, 1.0, 87.0, 140.0, 2.0) for seed in seeds),
        *(run("SAM", seed, 2.0, 91.0 + seed, 30.0, 4.0) for seed in seeds),
        *(run("GAM", seed, 4.0, 92.0 + seed, 20.0, 8.0) for seed in seeds),
        *(run(front.CHEAP, seed, 1.5, 91.5 + seed, 24.0, 3.0) for seed in seeds),
        *(run(front.CLOSE, seed, 1.75, 92.0, 22.0, close_ms + seed) for seed in seeds),
    ]
    contenders = [CONTENDERS[name] for name in front.needed()]
    return {row["contender"]: row for row in front.rows(table, contenders, {"SAM": {"rho": 0.1}}, {1.0: 1.5, 0.5: 1.0})}


def test_figures_are_those_of_their_definitions():
    rows = known()
    close = rows[front.CLOSE]
    assert (close["accuracy"], close["accuracy_std"]) == (92.0, 0.0)
    assert rows["GAM"]["accuracy_std"] == pytest.approx(0.5**0.5)
    assert close["to_sam"] == 0.5  # of 1.0 and 0.0
    assert close["to_sam_error"] == pytest.approx(0.5)
    assert rows["SAM"]["to_sam"] is None
    assert close["step_ms"] == pytest.approx(4.1)
    assert close["cost"] == pytest.approx(4.1 / 2)
    assert close["excess"] == pytest.approx(4.1 / 2 / 1.75)
    # three passes of a millisecond at every second step, beside the step of the base, of two
    assert close["small_batches"] == pytest.approx(3.5 / 2 / 1.75)
    assert close["rest"] == pytest.approx(4.1 / 3.5)
    assert rows["SAM"]["settings"] == {"rho": 0.1}
    assert (close["r1"], close["r1_std"]) == (0.22, 0.0)
    alone = known(seeds=(0,))["base"]
    assert alone["accuracy_std"] is alone["r1_std"] is None  # one seed has no deviation


def test_names_are_learnt_and_their_minimum_is_measured():
    trainer = runs.Trainer(CONTENDERS["GAM .25"], tasks.names().quick(40), 1)
    trainer.epoch()
    found = trainer.run()
    assert found.gradients == pytest.approx(1.75)
    assert min(found.lambda_max, found.r1, found.loss) > 0


def test_missing_packages_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "names", None)
    with pytest.raises(SystemExit, match="2"):
        pareto.main(["--quick", "--task", "names"])
    assert "error: --task: the names of the census are in the package names" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "digits", None)
    with pytest.raises(DataError, match=r"pip install 'gam-fast\[demo\]'"):
        tasks.digits()
    (tmp_path / "names.py").touch()  # another package of that name
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "names")
    with pytest.raises(DataError, match=r"not the one of the census .* pip install names==0.3.0"):
        census.lists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "faces"], "--task must be of digits, names, clean, got faces"),
        (["--seeds", "1,x"], "must be integers with commas between, got 1,x"),
        (["--seeds", "1,1"], "must be different, not negative"),
        (["--contenders", "SAM,base"], "--contenders must begin with base"),
        (["--contenders", "base,GAM .3"], "--contenders must be of base, SAM"),
        (["--check", "--quick"], "--check: a quick run has nothing to be checked"),
        (["--check", "--contenders", "base,SAM"], "of the contenders base, SAM, GAM, GAM .5 /3, GAM .5 /2"),
        (["--read", "nowhere.json"], "--read: nowhere.json holds no figures of this benchmark"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        pareto.main(arguments)
    assert message in capsys.readouterr().err


def test_it_runs_writes_its_page_and_shows_figures_of_before_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pareto, "QUICK", 24)
    files = {name: tmp_path / f"figures.{name}" for name in ("json", "pictures", "markdown")}
    paths = [f"--{name}={path}" for name, path in files.items()]
    assert pareto.main(["--quick", "--task", "digits", "--contenders", ",".join(front.needed()), *paths]) == 0
    figures = json.loads(files["json"].read_text(encoding="utf-8"))
    (task,) = figures["tasks"]
    gradients = {row["contender"]: row["gradients"] for row in task["rows"]}
    # of four steps one is a third
    assert gradients == pytest.approx({"base": 1.0, "SAM": 2.0, "GAM": 4.0, "GAM .5 /3": 1.375, "GAM .5 /2": 1.75})
    for row in task["rows"]:
        assert 0 <= row["accuracy"] <= 100
        assert min(row["lambda_max"], row["r1"], row["step_ms"]) > 0
        assert row["accuracy_std"] is None
    assert task["rows"][0]["cost"] == 1.0
    assert [one["share"] for one in task["gradient_ms"]] == [1.0, 0.5]
    assert len(figures["runs"]) == 5
    assert {"processor", "cores", "torch", "threads", "gam_fast"} <= figures.keys()
    text = files["markdown"].read_text(encoding="utf-8")
    advice = f"`{front.CLOSE}` against `GAM`"
    for words in ("A quick run: its figures mean nothing", "## digits", "## Which to take", advice):
        assert words in text
    drawn = {path.name for path in tmp_path.glob("*.png") if path.read_bytes().startswith(b"\x89PNG")}
    assert drawn == {"figures.pictures_digits_accuracy.png", "figures.pictures_digits_lambda_max.png"}
    assert "](../pareto_digits_lambda_max.png)" in text

    capsys.readouterr()
    again = tmp_path / "again.md"
    status = pareto.main(["--read", str(files["json"]), "--markdown", str(again), "--check"])
    assert again.read_text(encoding="utf-8") == text
    said = capsys.readouterr().out
    assert said.count("MISSED") + said.count("met   ") == 3
    assert status == int("MISSED" in said)

    task["name"] = "names"  # without the digits there is nothing to be checked
    files["json"].write_text(json.dumps(figures), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        pareto.main(["--read", str(files["json"]), "--check"])
    assert "figures.json has no 'SAM' on the digits" in capsys.readouterr().err


def test_radii_are_compared_and_shown_again(tmp_path, capsys):
    path, drawn = tmp_path / "radius.json", tmp_path / "radius.png"
    assert radius.main(["--quick", "--seeds", "3", "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["method"], row["rho"]) for row in rows] == [
        ("base", None),
        *((method, rho) for method in ("SAM", "GAM") for rho in radius.RADII[:2]),
    ]
    assert len({row["loss"][0] for row in rows}) == 5
    first = capsys.readouterr().out
    assert radius.main(["--read", str(path), "--picture", str(drawn)]) == 0
    assert capsys.readouterr().out == first
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_radii_are_compared_after_one_change_at_a_time(tmp_path, capsys):
    path = tmp_path / "changes.json"
    assert radius.main(["--changes", "--quick", "--seeds", "3,4", "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    names = list(radius.changed(tasks.digits()))
    assert [(row["task"], row["rho"]) for row in rows] == list(itertools.product(names, [None, 0.025, 0.05]))
    base, _, last = rows[-3:]
    (gain,) = radius.gains([base, last]).rows
    assert gain["rho 0.05"] == f"{sum(last['accuracy']) / 2 - sum(base['accuracy']) / 2:+.2f}"
    first = capsys.readouterr().out
    assert radius.main(["--read", str(path)]) == 0
    assert capsys.readouterr().out == first


def test_radii_are_compared_on_a_text(tmp_path, capsys):
    text, path = tmp_path / "text.txt", tmp_path / "text.json"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40, encoding="utf-8")
    assert radius.main(["--text", str(text), "--quick", "--seeds", "100,101", "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [(row["method"], row["rho"]) for row in rows] == [
        ("AdamW", None),
        *(("SAM", rho) for rho in radius.TEXT_RADII),
    ]
    base, sam, *_ = (sum(row["held_loss"]) / 2 for row in rows)
    (gain,) = radius.gains(rows).rows
    assert gain["rho 0.05"] == f"{base - sam:+.3f}"
    first = capsys.readouterr().out
    assert radius.main(["--read", str(path)]) == 0
    assert capsys.readouterr().out == first
