"""The comparison of cheap ascents, small: its tasks, its figures from known runs, its files and its errors."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from matplotlib.figure import Figure

from bench.data import DataError
from experiments import census, front, pareto, pareto_page, pareto_report, runs, tasks
from experiments.runs import CONTENDERS, Contender, Run

# raised inside a dependency of curvlinops
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def test_the_front_is_what_no_other_beats():
    points = {"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (2.0, 6.0), "d": (3.0, 6.0), "e": (1.0, 4.0), "f": (4.0, 7.0)}
    assert front.front(points, higher=True) == ["a", "c", "f"]
    assert front.front(points, higher=False) == ["e"]
    assert front.front({"b": (2.0, 1.0), "a": (1.0, 3.0), "c": (3.0, 2.0)}, higher=False) == ["a", "b"]


def test_contenders_are_called_by_what_they_spare():
    assert Contender("GAM").name == "GAM"
    assert Contender("GAM", 0.25).name == "GAM .25"
    assert Contender("SAM", 0.5, 2).name == "SAM .5 /2"
    assert Contender("GAM", interval=4).name == "GAM /4"
    assert Contender("GAM", interval=4).ascents == 0.75
    assert {"base", "SAM", "GAM", front.CHEAP, front.CLOSE} <= CONTENDERS.keys()
    assert {*front.needed()} <= CONTENDERS.keys()


def test_the_mean_step_is_that_of_the_medians_of_both_kinds():
    assert runs.mean_step({1: [1.0, 2.0, 90.0], 4: [8.0]}) == (3 * 2.0 + 8.0) / 4
    assert runs.mean_step({2: [3.0]}) == 3.0


def small() -> tasks.Task:
    return tasks.names().quick(40)


@pytest.mark.parametrize(
    ("contender", "gradients"),
    [
        (Contender("base"), 1.0),
        (Contender("SAM"), 2.0),
        (Contender("GAM"), 4.0),
        (Contender("SAM", 0.5), 1.5),
        (Contender("GAM", 0.1), 1.3),
        (Contender("GAM", interval=4), 1.75),  # (3 · 1 + 4) / 4
        (Contender("GAM", 0.5, interval=2), 1.75),  # (1 + 2.5) / 2
    ],
    ids=lambda value: value.name if isinstance(value, Contender) else "",
)
def test_gradients_are_counted_by_the_share_of_the_batch(contender, gradients):
    task = small()
    trainer = runs.Trainer(contender, task, 3)
    seen = []
    trainer.model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    trainer.epoch()
    assert trainer.shares / 4 == pytest.approx(gradients)
    assert sum(seen) / 40 == pytest.approx(gradients)
    assert 1 + contender.ascents * contender.share == pytest.approx(gradients)
    assert sum(len(own) for own in trainer.seconds.values()) == 4


def test_contenders_of_a_seed_begin_alike_and_see_the_same_batches():
    task = small()
    trainers = [runs.Trainer(CONTENDERS[name], task, 5) for name in ("base", "GAM .25 /2")]
    for p, q in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(p, q)
    for trainer in trainers:
        trainer.epoch()
    assert torch.equal(*(trainer.batches.get_state() for trainer in trainers))
    assert trainers[1].optimizer.param_groups[0]["lr"] == 0.0  # at the end of the cosine


def run(contender: str, seed: int, gradients: float, accuracy: float, lambda_max: float, step_ms: float) -> Run:
    return Run("digits", contender, seed, gradients, accuracy, 0.5, lambda_max, lambda_max / 100, step_ms)


def known(close_ms: float = 3.6) -> list[front.Row]:
    """Rows of runs from two seeds, made up."""
    table = [
        *(run("base", seed, 1.0, 87.0, 140.0, 2.0) for seed in (0, 1)),
        *(run("SAM", seed, 2.0, 91.0 + seed, 30.0, 4.0) for seed in (0, 1)),
        *(run("GAM", seed, 4.0, 92.0 + seed, 20.0, 8.0) for seed in (0, 1)),
        *(run(front.CHEAP, seed, 1.5, 91.5 + seed, 24.0, 3.0) for seed in (0, 1)),
        *(run(front.CLOSE, seed, 1.75, 92.0, 22.0, close_ms + seed) for seed in (0, 1)),
    ]
    alone = {1.0: 1.5, 0.5: 1.0}
    return front.rows(table, [CONTENDERS[name] for name in front.needed()], {"SAM": {"rho": 0.1}}, alone)


def test_figures_are_those_of_their_definitions():
    rows = {row["contender"]: row for row in known()}
    close = rows[front.CLOSE]
    assert close["accuracy"] == 92.0
    assert close["accuracy_std"] == 0.0
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
    assert close["excess"] == pytest.approx(close["small_batches"] * close["rest"])
    assert rows["SAM"]["settings"] == {"rho": 0.1}
    assert (close["r1"], close["r1_std"]) == (0.22, 0.0)


def test_one_seed_has_no_deviation():
    (row,) = front.rows([run("base", 0, 1.0, 87.0, 140.0, 2.0)], [CONTENDERS["base"]], {}, {1.0: 1.5})
    assert row["accuracy_std"] is row["r1_std"] is row["to_sam"] is None
    assert (row["cost"], row["excess"]) == (1.0, 1.0)


def test_criteria_are_met_or_missed():
    assert [criterion.is_met for criterion in front.check(known(3.0))] == [True, True, True]
    slow = front.check(known(5.0))
    assert [criterion.is_met for criterion in slow] == [True, True, False]
    assert f"{front.CLOSE} takes 1.57 times as long" in slow[-1].found
    rows = known()
    for row in rows:
        if row["contender"] == front.CLOSE:
            row["lambda_max"] = 26.1
        if row["contender"] == front.CHEAP:
            row["accuracy"] = 91.4
    assert [criterion.is_met for criterion in front.check(rows)][:2] == [False, False]


def test_a_difference_is_called_chance_within_two_errors():
    assert pareto_page.words(0.3, 0.1) == "+0.30 ± 0.10 points in accuracy"
    assert pareto_page.words(-0.2, 0.1).endswith("no more than chance")
    assert "one seed" in pareto_page.words(0.3, None)


def test_names_are_in_one_class_and_end_with_their_end():
    classes = census.lists()
    assert sum(map(len, classes)) == len({name for own in classes for name in own})
    assert classes[0][:2] == ["LINDA", "BARBARA"]  # Mary and Patricia are men's names, too
    assert classes[2][0] == "SMITH"
    assert len(classes[2]) == census.SURNAMES
    assert census.encode("ABZ") == [1, 2, 26, 27] + [0] * 10
    x, y = census.names()
    again, _ = census.names()
    assert torch.equal(x, again)
    assert x.shape == (len(y), census.LENGTH)
    assert torch.equal((x == census.END).sum(1), torch.ones(len(y), dtype=torch.int64))


def test_what_fills_up_a_name_has_no_effect_and_the_reader_has_second_derivatives():
    model = census.Reader().double()
    x = torch.tensor([census.encode("ANNA")])
    longer = x.clone()
    longer[0, 5:] = 3
    torch.testing.assert_close(model(x), model(longer), rtol=0, atol=0)
    params = list(model.blocks.parameters())
    grads = torch.autograd.grad(model(x).square().sum(), params, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in grads), params)
    assert all(grad.isfinite().all() for grad in second)


def test_the_digits_are_those_of_the_demo():
    noisy, clean = tasks.digits(), tasks.clean()
    assert int((noisy.data.train_y != clean.data.train_y).sum()) > 200
    assert (noisy.name, clean.name) == ("digits", "clean")
    assert noisy.settings("GAM", 1.0)["alpha"] == noisy.settings("GAM", 0.25)["alpha"] == 0.3
    assert noisy.settings("GAM", 0.15)["alpha"] < 0.3
    assert noisy.settings("GAM", 0.25, 2)["rho"] > noisy.settings("GAM", 0.25)["rho"]
    assert noisy.settings("base", 1.0) == {}


def test_seeds_of_the_settings_are_not_reported():
    reported = {*map(int, pareto.SEEDS.split(","))}
    for make in tasks.TASKS.values():
        assert reported.isdisjoint(make().chosen_on)


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "names", None)
    with pytest.raises(DataError, match="pip install names"):
        census.lists()
    with pytest.raises(SystemExit, match="2"):
        pareto.main(["--quick", "--task", "names"])
    assert "error: --task: the names of the census are in the package names" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "digits", None)
    with pytest.raises(DataError, match=r"pip install 'gam-fast\[demo\]'"):
        tasks.digits()


def test_another_package_of_that_name_is_told_apart(monkeypatch, tmp_path):
    (tmp_path / "names.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "names", raising=False)
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
        (["--threads", "0"], "must be an integer of at least 1, got 0"),
        (["--json", "nowhere/at/all.json"], "the folder of nowhere/at/all.json does not exist"),
        (["--check", "--quick"], "--check: a quick run has nothing to be checked"),
        (["--check", "--seeds", "0,1,2,3"], "--check needs --task digits, at least 5 seeds"),
        (["--check", "--task", "names"], "--check needs --task digits"),
        (["--check", "--contenders", "base,SAM"], "of the contenders base, SAM, GAM, GAM .5 /3, GAM .5 /2"),
        (["--read", "nowhere.json"], "--read: nowhere.json holds no figures of this benchmark"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        pareto.main(arguments)
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pareto")
    files = {name: folder / f"figures.{name}" for name in ("json", "png", "markdown")}
    paths = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    contenders = ",".join((*front.needed(), "GAM .25"))
    assert pareto.main(["--quick", "--task", "digits", "--contenders", contenders, *paths]) == 0
    return files


def test_every_contender_has_its_row(outputs):
    figures = json.loads(outputs["json"].read_text(encoding="utf-8"))
    assert figures["quick"]
    assert [task["name"] for task in figures["tasks"]] == ["digits"]
    for task in figures["tasks"]:
        gradients = {row["contender"]: row["gradients"] for row in task["rows"]}
        assert gradients == pytest.approx(
            # of four steps one is a third
            {"base": 1.0, "SAM": 2.0, "GAM": 4.0, "GAM .5 /3": 1.375, "GAM .5 /2": 1.75, "GAM .25": 1.75}
        )
        for row in task["rows"]:
            assert 0 <= row["accuracy"] <= 100
            assert row["lambda_max"] > 0
            assert row["r1"] > 0
            assert row["step_ms"] > 0
            assert row["accuracy_std"] is None
        assert task["rows"][0]["cost"] == 1.0
        assert [one["share"] for one in task["gradient_ms"]] == [1.0, 0.5, 0.25]
    assert len(figures["runs"]) == 6
    assert {"processor", "cores", "torch", "threads", "gam_fast"} <= figures.keys()


def test_the_page_has_tables_and_advice(outputs):
    text = outputs["markdown"].read_text(encoding="utf-8")
    assert "A quick run: its figures mean nothing" in text
    for words in ("## digits", "## Which to take", "`GAM .25` against `GAM`", "python -m experiments.pareto"):
        assert words in text
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("installed", [True, False])
def test_labels_of_near_points_keep_off_each_other(installed, monkeypatch):
    if not installed:
        monkeypatch.setitem(sys.modules, "adjustText", None)
    axis = Figure(figsize=(5, 4)).subplots()
    shared = {"method": "GAM", "accuracy_std": 0.3}
    names = ["GAM .25", "GAM .5 /2", "GAM .33 /2", "GAM /4"]
    rows = [{"contender": name, "ms": 1.5 + 0.01 * i, "accuracy": 92.0, **shared} for i, name in enumerate(names)]
    axis.set(xlim=(1, 4), ylim=(90, 94))
    texts = pareto_report._label(axis, rows, "ms", "accuracy")
    assert [text.get_text().strip() for text in texts] == [".25", ".5 /2", ".33 /2", "/4"]
    boxes = [text.get_window_extent() for text in texts]
    crossing = [a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert any(crossing) is not installed
    if not installed:  # they stand at their points, which is what is there without it
        assert [text.get_position() for text in texts] == [(row["ms"], row["accuracy"]) for row in rows]


def test_figures_of_before_are_shown_again_and_checked(outputs, tmp_path, capsys):
    again = tmp_path / "again.md"
    status = pareto.main(["--read", str(outputs["json"]), "--markdown", str(again), "--check"])
    assert again.read_bytes() == outputs["markdown"].read_bytes()
    said = capsys.readouterr().out
    assert said.count("MISSED") + said.count("met   ") == 3
    assert status == int("MISSED" in said)


def test_figures_without_the_digits_cannot_be_checked(outputs, tmp_path, capsys):
    figures = json.loads(outputs["json"].read_text(encoding="utf-8"))
    figures["tasks"][0]["name"] = "names"
    (tmp_path / "other.json").write_text(json.dumps(figures), encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        pareto.main(["--read", str(tmp_path / "other.json"), "--check"])
    assert "other.json has no 'SAM' on the digits" in capsys.readouterr().err


def test_names_are_learnt_and_their_minimum_is_measured():
    trainer = runs.Trainer(CONTENDERS["GAM .25"], tasks.names().quick(40), 1)
    trainer.epoch()
    found = trainer.run()
    assert found.gradients == pytest.approx(1.75)
    assert found.lambda_max > 0
    assert found.r1 > 0
    assert found.loss > 0
