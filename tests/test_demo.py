"""The main job and the benchmarks, small: what they write is complete, and their parts are right."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import cuda_graph
import digits
import pytest
import torch
import train
from cases import BACKENDS

from bench import curvature, kernels, memory, models, overhead

# raised inside a dependency of curvlinops
EXAMPLE = Path(digits.__file__)


def test_a_run_writes_its_report_figures_picture_and_table(tmp_path, monkeypatch):
    images, labels = digits.mnist_data()
    monkeypatch.setattr(digits, "mnist_data", lambda: (images[:200], labels[:200]))
    monkeypatch.setattr(digits, "TRAIN_IMAGES", 40)
    paths = {name: tmp_path / name for name in ("report", "json", "picture", "markdown")}
    names = ["SGD", "GAM share .25"]
    arguments = ["--seeds", "7,", "--epochs", "1", "--threads", "1", "--methods", ",".join(names)]
    assert digits.main([*arguments, *(f"--{name}={path}" for name, path in paths.items())]) == 0

    text = paths["report"].read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(links) == text.count("<img") == 4
    assert all(link.startswith("data:image/png;base64,") for link in links)  # it is one file
    words = ("λmax", "R0", "R1", "trace", "rho_prime = 0.05", "ascent_share = 0.25", "seeds 7.", "ms/step")
    for word in ("SGD and GAM share .25 on handwritten", *words, "gradients per step"):
        assert word in text
    assert paths["picture"].read_bytes().startswith(b"\x89PNG")

    figures = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert [(row["method"], row["gradients"]) for row in figures["summary"]] == [("SGD", 1.0), (names[1], 1.75)]
    assert figures["summary"][0]["cost"] == 1.0
    assert "--methods 'SGD,GAM share .25'" in figures["command"]
    for run in figures["runs"]:
        assert len(run["train_loss"]) == len(run["test_accuracy"]) == len(run["step_ms"]) == 1
        assert len(run["loss_slice"]) == len(run["gradient_norm_slice"]) == len(run["offsets"]) == 31
        assert 0 < run["r0"] <= run["r1"]
        assert 0 < run["lambda_max"] <= max(run["eigenvalues"])
        assert run["trace"] > run["lambda_max"]
        assert len(run["eigenvalues"]) == len(run["density"])
        assert run["offsets"][15] == 0.0
        assert run["loss_slice"][15] == pytest.approx(run["train_loss"][-1], rel=1e-4)

    table = [line for line in paths["markdown"].read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == ["method", "---", *names]
    assert len({line.count("|") for line in table}) == 1


def test_the_data_are_the_setting_of_the_readme_and_the_same_for_every_method():
    data, clean = digits.load_digits(0.3), digits.load_digits(0.0)
    assert data.train_x.shape == (1000, 1, 14, 14)
    assert data.test_x.shape == (4000, 1, 14, 14)
    assert torch.equal(data.test_y, clean.test_y)
    changed = int((data.train_y != clean.train_y).sum())
    assert 240 <= changed <= 300  # 300 replaced, a tenth of them by what they were
    first, *others = (digits.Trainer(method, 5, digits.Setting(epochs=1), data) for method in digits.METHODS)
    for trainer in others:
        assert torch.equal(trainer.batches.get_state(), first.batches.get_state())
        for p, q in zip(first.model.parameters(), trainer.model.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (digits, ["--seeds", "1,x"], "must be integers separated by commas, got '1,x'"),
        (digits, ["--seeds", "1,1"], "must be different and not negative"),
        (digits, ["--epochs", "0"], "must be at least 1, got 0"),
        (
            digits,
            ["--methods", "SGD,Adam"],
            "must be of SGD, SAM, GAM, GAM share .25, ExactGAM, ExactGAM+SAM, or all, got Ad",
        ),
        (digits, ["--methods", "SGD,SGD"], "must be different, got 'SGD,SGD'"),
        (digits, ["--methods", "GAM,SAM"], "must begin with SGD, which costs are compared with, got 'GAM,SAM'"),
        (digits, ["--report", "nowhere/at/all.html"], "the folder of nowhere/at/all.html does not exist"),
        (overhead, ["--repeats", "3"], "must be at least 7"),
        (kernels, ["--backends", "fast"], "--backends must be of eager, native, triton, compile, got fast"),
        (kernels, ["--backend", "triton"], "--backends triton needs --device cuda"),
        (curvature, ["--models", "alexnet"], "--models must be of mlp, resnet18, transformer, got alexnet"),
    ],
)
def test_bad_arguments_are_named(module, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        module.main(arguments)
    assert message in capsys.readouterr().err


def test_a_missing_package_is_one_sentence():
    program = (
        "import sys, runpy; sys.modules['mlxtend'] = None; sys.argv = ['digits.py'];"
        f"sys.path.insert(0, {str(EXAMPLE.parent)!r}); runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install 'gam-fast[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def rows_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def test_the_benchmark_of_steps_runs(tmp_path):
    assert overhead.main(["--quick", "--repeats", "7", "--json", str(tmp_path / "figures.json")]) == 0
    rows = rows_of(tmp_path / "figures.json")
    assert [row["method"] for row in rows] == ["torch", "Base", "SAM", "GSAM", "GAM"]
    assert [row["floor"] for row in rows] == [1.0, 1.0, 2.0, 2.6, 5.4]
    assert all(row["ms"] > 0 for row in rows)


def test_the_benchmark_of_primitives_runs(tmp_path):
    files = ["--json", str(tmp_path / "figures.json"), "--png", str(tmp_path / "figures.png")]
    names = ",".join(BACKENDS)
    assert kernels.main(["--quick", "--repeats", "7", "--models", "small", "--backends", names, *files]) == 0
    rows = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["primitives"]["small"]
    assert {row["backend"] for row in rows} == {"torch", *BACKENDS}
    assert all(row["ms"] > 0 and row["gb_per_s"] > 0 for row in rows)
    assert next(row["to_copy"] for row in rows if row["primitive"] == "copy") == pytest.approx(1.0)
    # the six primitives of a step of GAM with SGD move 27 N less one norm, and one of them twice
    units = {row["primitive"]: row["units"] for row in rows if row["backend"] == "eager"}
    step = ("norm g0", "back up, move", "norm g1 − g0", "move from start", "norm g0", "move, fold", "inner products")
    assert sum(units[name] for name in (*step, "restore, SGD of 3")) == 27
    assert (tmp_path / "figures.png").stat().st_size > 1000


def test_the_benchmark_of_second_derivatives_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(curvature, "in_a_process", lambda measure, *arguments: 2.0)
    options = ["--models", "mlp", "--batch", "4", "--repeats", "7", "--json", str(tmp_path / "figures.json")]
    assert curvature.main(options) == 0
    rows = rows_of(tmp_path / "figures.json")
    assert [row["what"] for row in rows] == ["gradient", *curvature.PRODUCTS, *curvature.METHODS]
    assert rows[0]["gradients"] == 1.0
    assert all(row["ms"] > 0 for row in rows)
    assert all(row["memory"] == 2.0 for row in rows[3:])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
def test_the_benchmark_of_memory_names_a_method_that_takes_too_much(tmp_path, monkeypatch, capsys):
    """Peaks are measured in test_throughput.py, and those of the engine in test_native.py."""
    found = {"torch": 2.0, "Base": 2.0, "SAM": 3.0, "GSAM": 4.0, "GAM": 5.0}
    monkeypatch.setattr(memory, "in_a_process", lambda measure, case, *setting: found[case.method])
    arguments = ["--quick", "--json", str(tmp_path / "figures.json")]
    assert memory.main(arguments) == 0
    assert {row["method"]: row["peak"] for row in rows_of(tmp_path / "figures.json")} == found
    found["GAM"] = 5.1
    assert memory.main(arguments) == 1
    assert "GAM: more than 3 sizes above torch's own optimizer" in capsys.readouterr().out


@pytest.mark.parametrize("case", memory.DEEP[-3:], ids=lambda case: case.name)
def test_a_row_of_the_memory_table_trains(case):
    assert memory.peak(dataclasses.replace(case, batch=16, width=16, layers=2), "SGD", "cpu", 1, "auto") >= 0.0


def test_the_example_of_a_cuda_graph_runs_or_says_what_it_needs(capsys):
    assert cuda_graph.main() == 0
    assert ("loss" if torch.cuda.is_available() else "needs a CUDA GPU") in capsys.readouterr().out


def test_the_plain_training_script_learns(capsys):
    assert train.main(epochs=2) > 0.7
    assert "epoch 1: test accuracy" in capsys.readouterr().out


def test_the_models_of_the_benchmarks():
    sizes = {name: (len(shapes()), models.numel(shapes())) for name, shapes in models.MODELS.items()}
    assert sizes == {
        "resnet50": (161, 25_557_032),
        "vit_small": (152, 22_050_664),
        "gpt2": (148, 124_439_808),
        "small": (300, 100 * (64 * 64 + 2 * 64)),
        "many": (10_000, 640_000),
        "single": (1, 100_000_000),
    }
