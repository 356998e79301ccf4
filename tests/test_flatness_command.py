"""python -m gam_fast.flatness, and the example of two minima."""

import json
import math
import re
import subprocess
import sys

import digits
import landscape
import one_step
import pytest
import torch
import two_minima
from torch import nn

from gam_fast import flatness
from gam_fast.flatness.__main__ import main

FACTORY = """
import torch
from torch import nn
from gam_fast import flatness

def build(seed=0, batches=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    data = [(torch.randn(16, 5), torch.randint(3, (16,))) for _ in range(batches)]
    return model, nn.CrossEntropyLoss(), data

def shuffled():
    model, loss_fn, data = build()
    data = [(torch.randn(5), k % 3) for k in range(48)]
    generator = torch.Generator().manual_seed(1)
    return model, loss_fn, torch.utils.data.DataLoader(data, 16, shuffle=True, generator=generator)

def closure():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    return flatness.Loss.from_closure(lambda: weight.square().sum(), [weight])

def wrong():
    return 3

def once():
    model, loss_fn, data = build()
    return model, loss_fn, iter(data)

def broken():
    raise RuntimeError("in the factory")

number = 3
"""


@pytest.fixture
def factory(tmp_path):
    (tmp_path / "factory.py").write_text(FACTORY, encoding="utf-8")
    yield tmp_path / "factory.py"
    sys.modules.pop("factory", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def test_it_prints_a_table_and_writes_the_figures_and_a_picture(factory, tmp_path, capsys):
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    options = {"eigenvalues": 2, "trace_samples": 7, "density_steps": 12, "max_iterations": 20, "seed": 3}
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    given += ["--rho", "0.05,0.1", "--per-group", "--quiet", "--json", str(figures), "--png", str(picture)]
    assert main([f"{factory}:build", "--arguments", '{"batches": 2}', *given]) == 0
    out, err = capsys.readouterr()
    assert not err  # no progress
    for word in ("R0, ρ = 0.05", "R1, ρ = 0.1", "λ2", "trace", "spectrum", "gradient norm"):
        assert word in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = json.loads(figures.read_text(encoding="utf-8"))
    assert list(written["measures"]) == ["all", "0", "1", "3"]  # tanh has no parameters
    module = sys.modules["factory"]
    model, loss_fn, data = module.build(batches=2)
    loss = flatness.Loss(model, loss_fn, data, seed=3)
    expected = flatness.measure(loss, (0.05, 0.1), **options).as_dict()
    assert written["measures"]["all"] == json.loads(json.dumps(expected))
    assert written["measures"]["0"]["parameters"] == 48


def test_the_first_batches_of_a_loader_with_a_generator_of_its_own(factory, capsys):
    given = [f"{factory}:shuffled", "--batches", "2", "--mode", "frozen", "--quiet", "--max-iterations", "2"]
    found = []
    for _ in range(2):
        assert main(given) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]


def test_a_checkpoint_is_loaded(factory, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    torch.save({"epoch": 3, "model": model.state_dict()}, tmp_path / "last.pt")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save(nn.Linear(5, 3).state_dict(), tmp_path / "other.pt")
    base = [f"{factory}:build", "--trace-samples", "0", "--eigenvalues", "0", "--quiet", "--json", str(figures)]
    for name, key in (("last.pt", ["--key", "model"]), ("plain.pt", [])):
        assert main([*base, "--checkpoint", str(tmp_path / name), *key, "--batches", "2", "--mode", "frozen"]) == 0
        found = json.loads(figures.read_text(encoding="utf-8"))["measures"]["all"]
        assert found["loss"] == pytest.approx(math.log(3), rel=1e-6)  # of equal probabilities
        assert found["hessian_eigenvalues"] is None
        assert found["hessian_trace"] is None
    capsys.readouterr()
    for options, message in (
        (["--checkpoint", str(tmp_path / "last.pt"), "--key", "net"], "has no entry 'net'; it has epoch, model"),
        (["--checkpoint", str(tmp_path / "last.pt")], "in its entry 'model': add --key model"),
        (["--checkpoint", str(tmp_path / "other.pt")], "Missing key"),
        (["--checkpoint", str(tmp_path / "none.pt")], "No such file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*base, *options])
        assert message in capsys.readouterr().err


def test_a_factory_may_return_a_loss(factory, tmp_path, capsys):
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    options = ["--eigenvalues", "0", "--rho", "0.5", "--json", str(figures), "--png", str(picture)]
    assert main([f"{factory}:closure", *options]) == 0
    found = json.loads(figures.read_text(encoding="utf-8"))["measures"]["all"]
    # |w|² with |w| = √5: R0 = 2 ρ √5 + ρ², R1 = ρ 2 (√5 + ρ)
    assert found["zeroth_order_flatness"][0]["value"] == pytest.approx(5**0.5 + 0.25, rel=1e-5)
    assert found["first_order_flatness"][0]["value"] == pytest.approx(5**0.5 + 0.5, rel=1e-5)
    assert found["hessian_trace"] == {"value": 4.0, "error": 0.0, "products": 2}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "ascent in the ball" in capsys.readouterr().err  # the progress


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}"], "must be module:function or file.py:function"),
        (["{}:missing"], "has no function missing"),
        (["{}:number"], "has no function number"),
        (["{}:wrong"], r"must return \(model, loss_fn, data\) or a gam_fast.flatness.Loss, got int"),
        (["nowhere.py:build"], "there is no file nowhere.py"),
        (["no_such_module:build"], "no_such_module cannot be imported"),
        (["{}:closure", "--batches", "2"], "are settled where the factory returns a Loss"),
        (["{}:closure", "--checkpoint", "x.pt"], "--checkpoint needs a model"),
        (["{}:build", "--rho", "x"], "must be numbers with commas between, got 'x'"),
        (["{}:build", "--rho", "-1"], "must not be negative, got '-1'"),
        (["{}:build", "--restarts", "0"], "must be at least 1, got 0"),
        (["{}:build", "--trace-samples", "1"], "must be at least 2, got 1"),
        (["{}:build", "--tolerance", "0"], "must be positive, got '0'"),
        (["{}:build", "--tolerance", "x"], "must be a number, got 'x'"),
        (["{}:build", "--arguments", '{{"seeds": 1}}'], "unexpected keyword argument 'seeds'"),
        (["{}:build", "--device", "nowhere"], "--device nowhere cannot be used"),
        (["{}:build", "--checkpoint", "{}"], "is not a checkpoint that holds weights only"),
        (["{}:once"], "data can be read once only"),
        (["{}:build", "--restarts", "x"], "must be a whole number, got 'x'"),
        (["{}:build", "--arguments", "{{"], "must be JSON"),
        (["{}:build", "--arguments", "[1]"], "must be a JSON object"),
        (["{}:build", "--json", "nowhere/at/all.json"], "the folder of nowhere/at/all.json does not exist"),
    ],
)
def test_bad_arguments_are_named(factory, arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([argument.format(factory) for argument in arguments])
    assert re.search(message, capsys.readouterr().err)


def test_an_error_in_the_factory_keeps_its_traceback(factory):
    with pytest.raises(RuntimeError, match="in the factory"):
        main([f"{factory}:broken"])


@pytest.mark.parametrize("missing", ["rich.table", "tqdm", "scipy.sparse.linalg", "matplotlib"])
def test_a_missing_package_is_missed_before_anything_is_measured(factory, monkeypatch, missing, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("gam_fast.flatness.__main__.measure", lambda *_, **__: pytest.fail("measured already"))
    with pytest.raises(SystemExit):
        main([f"{factory}:build", "--png", "picture.png"])
    assert "pip install --no-build-isolation '.[flatness]' torch==" in capsys.readouterr().err


def test_it_runs_as_a_module_without_a_warning():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "gam_fast.flatness", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "--per-group" in done.stdout


@pytest.mark.parametrize("minimum", two_minima.MINIMA, ids=lambda minimum: minimum.name)
def test_two_minima_have_the_same_zeroth_and_different_first_order_flatness(minimum):
    zeroth, first, _, around = two_minima.measure(minimum)
    assert zeroth == pytest.approx(two_minima.HEIGHT, rel=1e-6)
    assert first == pytest.approx(minimum.first_order, rel=1e-6)
    inside = [size for t, size in zip(around.offsets, around.gradient_norm, strict=True) if abs(t) <= two_minima.RHO]
    assert max(inside) == pytest.approx(minimum.first_order, rel=2e-2)


def test_the_example_of_one_step_is_at_the_points_that_it_names(tmp_path, capsys):
    assert one_step.main(["--picture", str(tmp_path / "picture.png")]) == 0
    assert "after the step" in capsys.readouterr().out
    hessian, theta = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64), torch.tensor(one_step.START).double()

    def unit(v):
        return v / v.norm()

    path = one_step.step(*one_step.METHODS["GAM: four"])
    g0 = hessian @ theta
    second = theta + one_step.RHO_PRIME * unit(g0)
    third = theta + one_step.RHO * unit(hessian @ (second - theta))
    fourth = third + one_step.RHO_PRIME * unit(hessian @ third)
    for point, gradient, wanted in zip(path.points, path.gradients, (theta, second, third, fourth), strict=True):
        torch.testing.assert_close(point, wanted, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(gradient, hessian @ wanted, rtol=1e-6, atol=1e-6)


def test_the_example_of_two_minima_prints_and_draws(tmp_path, capsys):
    assert two_minima.main(["--picture", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"wide +1.000 +2.000 .*\nnarrow +1.000 +3.033", capsys.readouterr().out)


def test_the_landscape_of_the_digits_is_drawn(tmp_path, monkeypatch):
    images, labels = digits.mnist_data()
    monkeypatch.setattr(digits, "mnist_data", lambda: (images[:200], labels[:200]))
    monkeypatch.setattr(digits, "TRAIN_IMAGES", 40)
    monkeypatch.setattr(landscape, "METHODS", ("SGD", "GAM"))
    paths = [tmp_path / "slices.png", tmp_path / "surfaces.png"]
    options = [f"--slices={paths[0]}", f"--surfaces={paths[1]}", "--epochs=1", "--points=3"]
    assert landscape.main(options) == 0
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
