"""How cost grows: the fits, the limit of memory, and the benchmark as a whole, small."""

import json
import math

import pytest
import torch
from scipy.stats import linregress

from bench import growth, power_law, sweeps

QUICK = ["--quick", "--repeats", "7"]


def test_the_fit_has_the_slope_and_the_standard_error_of_a_regression_of_logarithms():
    x, y = [1.0, 2.0, 5.0, 9.0, 30.0], [2.0, 3.5, 11.0, 17.0, 70.0]
    law = power_law.fit(x, y, 0.0, 100.0)
    found = linregress([math.log(a) for a in x], [math.log(b) for b in y])
    assert (law.slope, law.error) == pytest.approx((found.slope, found.stderr))
    assert law(7.0) == pytest.approx(math.exp(found.intercept) * 7.0**found.slope)
    assert power_law.fit(x, y, 5.0, 10.0) is None  # of two points


SIZES = [10**5, 10**6, 10**7, 10**8]


def targets_of(per_tensor, plain, slope, resnet, sizes=SIZES):
    """The targets of sweeps that a full run could have measured."""
    found = []
    for name, low, high, times in (
        ("parameters", 1e6, 1e8, [("GAM eager", n, 1e-6 * n**slope) for n in sizes]),
        ("tensors", 100, 10_000, [("GAM eager", 10_000, 10 * per_tensor), ("plain GAM", 10_000, plain)]),
        ("threads", 1, 2, [("GAM eager", 2, resnet), ("plain GAM", 2, 1.0)]),
    ):
        sweep = sweeps.Sweep(name, "", low, high, [sweeps.Point(*time, 0.1) for time in times])
        found += growth.targets(sweep, sweeps.Setting(backend="eager"))
    return found


def test_the_targets_are_what_the_figures_say():
    assert [str(target).split(": ", 1)[1] for target in targets_of(1.5, 400.0, 1.02, 0.3)] == [
        "1.02, must be 0.95 to 1.05",
        "1.5, must be at most 2",
        "0.0375, must be at most 0.05",
        "0.3, must be at most 0.35",
    ]
    assert not any(target.met for target in targets_of(2.5, 40.0, 0.9, 0.4))
    target, *_ = targets_of(1.5, 400.0, 1.0, 0.3, SIZES[:3])  # more did not fit into the memory
    assert "1e+06 to 1e+08 parameters: not measured, must be 0.95 to 1.05: MISSED" in str(target)


def test_the_benchmark_runs(tmp_path, capsys):
    files = ["--json", str(tmp_path / "figures.json"), "--png", str(tmp_path / "figures.png")]
    assert growth.main([*QUICK, *files]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert [sweep["name"] for sweep in figures["sweeps"]] == ["parameters", "tensors", "threads"]
    labels = {sweeps.Setting().gam, "plain GAM", "torch SGD", "GAM eager"}
    for sweep in figures["sweeps"]:
        assert {point["label"] for point in sweep["points"]} == labels
        assert all(point["ms"] > 0 for point in sweep["points"])
        assert sweep["left_out"] == ""
        assert set(sweep["fits"]) == labels or sweep["name"] == "threads"
    assert set(figures["sweeps"][1]["us_each"]) == labels
    assert figures["targets"] == []
    assert figures["torch"] == torch.__version__
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    for word in ("slopes from 10,000 to 100,000", "µs, fitted", "µs, last", "ResNet-50"):
        assert word in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_benchmark_runs_on_a_gpu(capsys):
    assert growth.main([*QUICK, "--device", "cuda"]) == 0
    assert "tensors of 64 elements" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "layers"], "--sweep must be of parameters, tensors, threads, got layers"),
        (["--quick", "--check"], "--check is for the whole range on a CPU: leave out --quick and --device cuda"),
        (["--device", "cuda", "--sweep", "threads"], "--sweep threads needs --device cpu"),
        (["--device", "cuda", "--check"], "--check is for the whole range on a CPU"),
        (QUICK, "--sweep parameters reads the available memory from /proc"),
    ],
)
def test_bad_arguments_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if arguments is QUICK:
        monkeypatch.setattr(growth.sys, "platform", "darwin")
    with pytest.raises(SystemExit, match="2"):
        growth.main(arguments)
    assert message in capsys.readouterr().err
