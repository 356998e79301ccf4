"""The main job and the benchmark, small: what they write is complete, and their parts are right."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import cuda_graph
import digits
import digits_report
import pytest
import torch
from cases import BACKENDS

from bench import curvature, kernels, memory, models, overhead

# raised inside a dependency of curvlinops
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

EXAMPLE = Path(digits.__file__)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    paths = {name: folder / name for name in ("report.html", "figures.json", "picture.png", "table.md")}
    arguments = ["--seeds", "7,", "--epochs", "1", "--threads", "1", "--report", str(paths["report.html"])]
    arguments += ["--json", str(paths["figures.json"]), "--picture", str(paths["picture.png"])]
    arguments += ["--markdown", str(paths["table.md"]), "--methods", "SGD,GAM,GAM share .25,ExactGAM+SAM"]
    with pytest.MonkeyPatch.context() as patch:  # to be shown a report, a tenth of the images will do
        patch.setattr(digits, "TRAIN_IMAGES", 100)
        assert digits.main(arguments) == 0
    return paths


class Links(html.parser.HTMLParser):
    """Collects tags, and whatever would be fetched."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]


def test_the_report_is_one_self_contained_file(outputs):
    text = outputs["report.html"].read_text(encoding="utf-8")
    parser = Links()
    parser.feed(text)
    assert parser.tags.count("img") == 4
    assert all(link.startswith("data:image/png;base64,") for link in parser.fetched)
    title = "SGD, GAM, GAM share .25 and ExactGAM+SAM on handwritten"
    words = ("λmax", "R0", "R1", "trace", "rho_prime = 0.05", "ascent_share = 0.25", "seeds 7.", "ms/step")
    for word in (title, *words, "Against SGD, GAM has", "gradients per step"):
        assert word in text


def test_the_figures_hold_every_run_and_the_summary(outputs):
    figures = json.loads(outputs["figures.json"].read_text(encoding="utf-8"))
    assert [(r["method"], r["gradients"]) for r in figures["summary"]] == [
        ("SGD", 1.0),
        ("GAM", 4.0),
        ("GAM share .25", 1.75),
        ("ExactGAM+SAM", 3.0),
    ]
    assert figures["summary"][0]["cost"] == 1.0
    assert len(figures["runs"]) == 4
    for run in figures["runs"]:
        assert len(run["train_loss"]) == len(run["test_accuracy"]) == 1
        assert len(run["step_ms"]) == 1
        assert len(run["loss_slice"]) == len(run["gradient_norm_slice"]) == len(run["offsets"]) == 31
        assert 0 < run["r0"] <= run["r1"]
        assert 0 < run["lambda_max"] <= max(run["eigenvalues"])
        assert run["trace"] > run["lambda_max"]
        assert len(run["eigenvalues"]) == len(run["density"])
        assert run["offsets"][15] == 0.0
        assert run["loss_slice"][15] == pytest.approx(run["train_loss"][-1], rel=1e-4)
    assert "--methods 'SGD,GAM,GAM share .25,ExactGAM+SAM'" in figures["command"]


def test_the_summary_is_mean_and_standard_deviation_over_seeds():
    results = [
        digits.Result("SGD", seed, train_loss=[1.0], test_accuracy=[accuracy], step_ms=[2.0], r0=0.1, r1=0.2 * seed)
        for seed, accuracy in ((1, 90.0), (2, 92.0), (3, 94.0))
    ]
    (row,) = digits.summarise(results, digits.METHODS[:1])
    assert (row["accuracy_mean"], row["accuracy_std"]) == (92.0, 2.0)
    assert row["r1"] == pytest.approx(0.4)
    assert digits_report.cells(row)[2] == "92.00 ± 2.00"


def test_the_picture_is_a_png(outputs):
    assert outputs["picture.png"].read_bytes().startswith(b"\x89PNG")


def test_the_data_are_the_setting_of_the_readme():
    data = digits.load_digits(0.3)
    clean = digits.load_digits(0.0)
    assert data.train_x.shape == (1000, 1, 14, 14)
    assert data.test_x.shape == (4000, 1, 14, 14)
    assert torch.equal(data.test_y, clean.test_y)
    changed = int((data.train_y != clean.train_y).sum())
    assert 240 <= changed <= 300  # 300 replaced, a tenth of them by what they were


def test_methods_start_from_the_same_weights_and_see_the_same_batches():
    setting = digits.Setting(epochs=1)
    data = digits.load_digits(0.3)
    trainers = [digits.Trainer(method, 5, setting, data) for method in digits.METHODS]
    for trainer in trainers[1:]:
        for p, q in zip(trainers[0].model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(p, q)
    orders = {tuple(torch.randperm(1000, generator=trainer.batches).tolist()) for trainer in trainers}
    assert len(orders) == 1


def test_the_table_for_the_documentation_has_a_row_a_method(outputs):
    names = ("SGD", "GAM", "GAM share .25", "ExactGAM+SAM")
    lines = outputs["table.md"].read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == ["method", "---", *names]
    assert len({line.count("|") for line in table}) == 1
    assert any("python examples/digits.py" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1,x"], "must be integers separated by commas, got '1,x'"),
        (["--seeds", "1,1"], "must be different and not negative"),
        (["--epochs", "0"], "must be at least 1, got 0"),
        (
            ["--methods", "SGD,Adam"],
            "must be of SGD, SAM, GAM, GAM share .25, ExactGAM, ExactGAM+SAM, or all, got Adam",
        ),
        (["--methods", "SGD,SGD"], "must be different, got 'SGD,SGD'"),
        (["--methods", "GAM,SAM"], "must begin with SGD, which costs are compared with, got 'GAM,SAM'"),
        (["--report", "nowhere/at/all.html"], "the folder of nowhere/at/all.html does not exist"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        digits.parse(arguments)
    assert message in capsys.readouterr().err


def test_help_explains_every_option():
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--help"], capture_output=True, text=True, check=True, timeout=120
    )
    outputs = ("--report", "--json", "--picture", "--markdown")
    for option in ("--quick", "--seeds", "--methods", "--epochs", "--threads", "--backend", *outputs):
        assert re.search(rf"^  {option}\b.*(\n {{6,}})?\S", done.stdout, re.MULTILINE), option


def test_a_missing_package_is_one_sentence():
    program = (
        "import sys, runpy; sys.modules['mlxtend'] = None; sys.argv = ['digits.py'];"
        f"sys.path.insert(0, {str(EXAMPLE.parent)!r}); runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install 'gam-fast[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_benchmark_of_steps_runs(tmp_path, capsys):
    assert overhead.main(["--quick", "--repeats", "7", "--json", str(tmp_path / "figures.json")]) == 0
    rows = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["torch", "Base", "SAM", "GSAM", "GAM"]
    assert [row["floor"] for row in rows] == [1.0, 1.0, 2.0, 2.6, 5.4]
    with pytest.raises(SystemExit, match="2"):
        overhead.main(["--repeats", "3"])
    assert "must be at least 7" in capsys.readouterr().err


def test_the_benchmark_of_primitives_runs(tmp_path, capsys):
    files = ["--json", str(tmp_path / "figures.json"), "--png", str(tmp_path / "figures.png")]
    names = ",".join(BACKENDS)
    assert kernels.main(["--quick", "--repeats", "7", "--models", "small", "--backends", names, *files]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    rows = figures["primitives"]["small"]
    assert {row["backend"] for row in rows} == {"torch", *BACKENDS}
    assert all(row["ms"] > 0 and row["gb_per_s"] > 0 for row in rows)
    assert next(row["to_copy"] for row in rows if row["primitive"] == "copy") == pytest.approx(1.0)
    # the six primitives of a step of GAM with SGD move 27 N less one norm, and one of them twice
    units = {row["primitive"]: row["units"] for row in rows if row["backend"] == "eager"}
    step = ("norm g0", "back up, move", "norm g1 − g0", "move from start", "norm g0", "move, fold", "inner products")
    assert sum(units[name] for name in (*step, "restore, SGD of 3")) == 27
    assert (tmp_path / "figures.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--backends", "fast"])
    assert "--backends must be of eager, native, triton, compile, got fast" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        kernels.main(["--backend", "triton"])
    assert "--backends triton needs --device cuda" in capsys.readouterr().err


def test_the_benchmark_of_second_derivatives_runs(tmp_path, capsys):
    options = ["--models", "mlp", "--batch", "4", "--repeats", "7", "--json", str(tmp_path / "figures.json")]
    assert curvature.main(options) == 0
    rows = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["rows"]
    assert [row["what"] for row in rows] == ["gradient", *curvature.PRODUCTS, *curvature.METHODS]
    assert rows[0]["gradients"] == 1.0
    assert all(row["ms"] > 0 for row in rows)
    assert all(row["memory"] > 1 for row in rows[3:])  # the gradient at least
    with pytest.raises(SystemExit, match="2"):
        curvature.main(["--models", "alexnet"])
    assert "--models must be of mlp, resnet18, transformer, got alexnet" in capsys.readouterr().err


@pytest.mark.parametrize("name", curvature.MODELS)
def test_both_ways_to_a_hessian_vector_product_agree(name):
    task = curvature.Task(name, 2, "cpu")
    for a, b in zip(*(task.product(way) for way in curvature.PRODUCTS), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
def test_gam_takes_three_sizes_of_the_model_more_than_sgd(tmp_path, monkeypatch, capsys):
    """At 100 million parameters: what a smaller model takes is lost in the pages of the allocator."""
    for name in memory.ALLOCATOR:
        monkeypatch.setenv(name, "unset")  # to be put back
    monkeypatch.setattr(memory, "LARGE", [case for case in memory.LARGE if case.method in ("torch", "GAM")])
    assert memory.main(["--quick", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    torch_alone, gam = (row["peak"] for row in figures["rows"])
    assert 2.0 < torch_alone < 2.6
    assert torch_alone + 2.9 < gam < torch_alone + 3.05
    monkeypatch.setattr(memory, "in_a_process", lambda measure, case, *size: {"torch": 2.0, "GAM": 5.1}[case.method])
    assert memory.main(["--quick"]) == 1
    assert "GAM: more than 3 sizes above torch's own optimizer" in capsys.readouterr().out


@pytest.mark.parametrize("case", memory.DEEP, ids=lambda case: case.name)
def test_every_row_of_the_memory_table_trains(case):
    small = dataclasses.replace(case, batch=16, width=16, layers=2)
    assert memory.peak(small, "SGD", "cpu", 1, "auto") >= 0.0


def test_the_example_of_a_cuda_graph_runs_or_says_what_it_needs(capsys):
    assert cuda_graph.main() == 0
    assert ("loss" if torch.cuda.is_available() else "needs a CUDA GPU") in capsys.readouterr().out


def test_the_plain_training_script_learns(capsys):
    import train

    assert train.main(epochs=2) > 0.7
    assert "epoch 1: test accuracy" in capsys.readouterr().out


def test_the_models_of_the_benchmarks():
    shapes = models.resnet50()
    assert (len(shapes), models.numel(shapes)) == (161, 25_557_032)
    shapes = models.vit_small()
    assert (len(shapes), models.numel(shapes)) == (152, 22_050_664)
    assert len(models.small()) == 300
    assert models.numel(models.single()) == 100_000_000
