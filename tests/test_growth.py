"""How cost grows: the fits, the limit of memory, and the benchmark as a whole, small."""

from __future__ import annotations

import argparse
import gc
import json
import math

import pytest
import torch

from bench import contenders, growth, memory, models, power_law, sweeps
from bench.peers import PEERS

QUICK = ["--quick", "--repeats", "7"]


def test_the_fit_recovers_a_slope_and_its_error():
    """Over many draws of noise, the slopes scatter as much as their standard errors say, around the true one."""
    x = [10**k for k in range(2, 9)]
    noise = 0.05 * torch.randn(400, len(x), dtype=torch.float64)
    laws = [
        power_law.fit(x, [3e-4 * n**0.8 * math.exp(e) for n, e in zip(x, row, strict=True)], 1e3, 1e8)
        for row in noise.tolist()
    ]
    slopes = torch.tensor([law.slope for law in laws])
    errors = torch.tensor([law.error for law in laws])
    assert (laws[0].low, laws[0].high) == (1e3, 1e8)
    assert slopes.mean().item() == pytest.approx(0.8, abs=4 * slopes.std().item() / 20)
    assert slopes.std().item() == pytest.approx(errors.square().mean().sqrt().item(), rel=0.2)
    assert laws[0](1e5) == pytest.approx(3.0, rel=0.2)


def test_the_standard_error_is_that_of_the_normal_equations():
    x, y = [1.0, 2.0, 5.0, 9.0, 30.0], [2.0, 3.5, 11.0, 17.0, 70.0]
    law = power_law.fit(x, y, 0.0, 100.0)
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mean = sum(u) / 5
    square = sum((a - mean) ** 2 for a in u)
    slope = sum((a - mean) * b for a, b in zip(u, v, strict=True)) / square
    constant = sum(v) / 5 - slope * mean
    residual = sum((b - constant - slope * a) ** 2 for a, b in zip(u, v, strict=True))
    assert law.slope == pytest.approx(slope)
    assert law.error == pytest.approx((residual / 3 / square) ** 0.5)


def test_what_lies_outside_the_range_has_no_part_in_a_fit():
    x = [1.0, 10.0, 100.0, 1000.0]
    law = power_law.fit(x, [77.0, 10.0, 100.0, 1000.0], 10.0, 1000.0)
    assert law.slope == pytest.approx(1.0)
    assert power_law.fit(x, x, 100.0, 1000.0) is None


def test_the_cost_of_each_is_the_slope_beside_a_constant():
    x = [10, 100, 1000, 10_000]
    assert power_law.cost_of_each(x, [0.5 + 2e-3 * n for n in x]) == pytest.approx(2e-3)


@pytest.mark.parametrize("elements", [1000, 12_345, 10**6, 10**8])
def test_a_list_of_shapes_like_a_resnet_has_the_elements_asked_for(elements):
    shapes = models.like_resnet(elements)
    assert len(shapes) == 100
    assert models.numel(shapes) == elements
    assert all(size >= 1 for (size,) in shapes)
    if elements == 10**8:  # a third are convolutions, with all but a few of the elements
        assert sum(size > 1e5 for (size,) in shapes) == pytest.approx(33, abs=10)


def test_sizes_beyond_the_memory_are_left_out_and_named(monkeypatch):
    setting = sweeps.Setting(quick=True, threads=1)
    room = sweeps.bytes_needed(30_000, setting) / sweeps.SHARE
    monkeypatch.setattr(sweeps, "available", lambda device: room)
    measured = []
    monkeypatch.setattr(sweeps, "timed", lambda contenders, x, repeats: measured.append(x) or [])
    sweep = sweeps.parameters(setting)
    assert measured == [10_000, 30_000]
    assert "1e+05 parameters" in sweep.left_out
    assert "GB may be taken" in sweep.left_out
    monkeypatch.setattr(sweeps, "available", lambda device: 100 * room)
    assert sweeps.parameters(setting).left_out == ""


def test_the_memory_that_a_point_needs_is_not_underestimated():
    """What the contenders hold between steps; what one makes during its own is in LISTS_MOVED."""
    setting = sweeps.Setting(threads=1)
    entries = setting.contenders(models.like_resnet(10_000))
    contenders.measure(list(entries.values()), 1)
    held = 0
    for contender in entries.values():
        state = [v for s in contender.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        tensors = [*contender.params, *contender.source, *state, *(p.grad for p in contender.params)]
        held += sum(t.numel() * t.element_size() for t in tensors)
    assert held <= sweeps.bytes_needed(10_000, setting) - sweeps.LISTS_MOVED * 10_000 * 4


def test_the_available_memory_is_that_of_the_machine_and_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    machine = memory.available("cpu")
    assert 1 << 26 < machine < 1 << 50
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available("cpu") > 1 << 26
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    assert memory.available("cpu") == 3000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70, 80))
    assert memory.available("cuda") == 70


@pytest.mark.parametrize(
    ("cores", "asked", "counts"), [(1, 1, [1]), (2, 2, [1, 2]), (6, 2, [1, 2, 4, 6]), (8, 3, [1, 2, 3, 4, 8])]
)
def test_threads_double_up_to_the_cores(cores, asked, counts, monkeypatch):
    monkeypatch.setattr(sweeps.os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert sweeps.thread_counts(asked) == counts


def test_a_round_pays_for_no_garbage_but_its_own():
    setting = sweeps.Setting(threads=1)
    entries = setting.contenders([(4,), (3,)])
    contenders.measure(list(entries.values()), 7)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    for contender in entries.values():
        assert len(contender.ms) == 7
        assert contender.spread.percent >= 0


@pytest.mark.parametrize("method", ["torch", "SAM", *(key for key in PEERS if key != "compiled-gam")])
def test_every_method_and_peer_can_be_a_contender(method):
    contender = contenders.Contender(method, "SGD", [(3, 2), (4,)])
    before = [p.detach().clone() for p in contender.params]
    contenders.measure([contender], 7)
    assert len(contender.ms) == 7
    assert all(ms > 0 for ms in contender.ms)
    assert not any(torch.equal(p, q) for p, q in zip(contender.params, before, strict=True))


def test_the_spread_is_that_of_the_times():
    contender = contenders.Contender("torch", "SGD", [(1,)])
    contender.ms = list(range(21))
    assert (contender.median, contender.spread.low, contender.spread.high) == (10, 1, 19)


def full_sweeps(per_tensor, plain, slope, resnet):
    """What a full run could have measured."""

    def sweep(name, low, high, times):
        points = [sweeps.Point(label, x, ms, 0.1) for label, x, ms in times]
        return sweeps.Sweep(name, "", low, high, points)

    sizes = [10**5, 10**6, 10**7, 10**8]
    return [
        sweep("parameters", 1e6, 1e8, [("GAM eager", n, 1e-6 * n**slope) for n in sizes]),
        sweep("tensors", 100, 10_000, [("GAM eager", 10_000, 10 * per_tensor), ("plain GAM", 10_000, plain)]),
        sweep("threads", 1, 2, [("GAM eager", 2, resnet), ("plain GAM", 2, 1.0)]),
    ]


def test_the_targets_are_what_the_figures_say():
    setting = sweeps.Setting(backend="eager")

    def of(*figures):
        return [target for sweep in full_sweeps(*figures) for target in growth.targets(sweep, setting)]

    found = of(1.5, 400.0, 1.02, 0.3)
    assert [target.value for target in found] == pytest.approx([1.02, 1.5, 0.0375, 0.3])
    assert all(target.met for target in found)
    assert [str(target).split(": ", 1)[1] for target in found] == [
        "1.02, must be 0.95 to 1.05",
        "1.5, must be at most 2",
        "0.0375, must be at most 0.05",
        "0.3, must be at most 0.35",
    ]
    assert not any(target.met for target in of(2.5, 40.0, 0.9, 0.4))


def test_a_target_that_memory_does_not_allow_is_missed():
    sweep = full_sweeps(1.5, 400.0, 1.0, 0.3)[0]
    sweep.points = sweep.points[:3]
    (target,) = growth.targets(sweep, sweeps.Setting(backend="eager"))
    assert not target.met
    assert "1e+06 to 1e+08 parameters: not measured, must be 0.95 to 1.05: MISSED" in str(target)


def test_check_exits_with_1_where_a_target_is_missed(monkeypatch, capsys):
    for met, status in ((0.3, 0), (0.4, 1)):
        sweep = full_sweeps(1.0, 400.0, 1.0, met)[2]
        monkeypatch.setitem(growth.SWEEPS, "threads", lambda setting, sweep=sweep: sweep)
        arguments = ["--sweep", "threads", "--backend", "eager"]
        assert growth.main([*arguments, "--check"]) == status
        assert growth.main(arguments) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        assert line.startswith(f"GAM eager ÷ plain GAM, ResNet-50, 2 threads: {met}, must be at most 0.35")
        assert line.endswith("MISSED") == bool(status)


def test_a_peer_that_disagrees_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(growth, "disagreement", lambda peer, **where: 1e-3)
    assert growth.main(QUICK) == 1
    assert "do not agree: their trajectories are 1.0e-03 apart" in capsys.readouterr().err


def test_the_benchmark_runs(tmp_path, capsys):
    files = ["--json", str(tmp_path / "figures.json"), "--png", str(tmp_path / "figures.png")]
    assert growth.main([*QUICK, *files]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert [sweep["name"] for sweep in figures["sweeps"]] == ["parameters", "tensors", "threads"]
    labels = [sweeps.Setting().gam, "plain GAM", "torch SGD"]
    for sweep in figures["sweeps"]:
        assert {point["label"] for point in sweep["points"]} == {*labels, "GAM eager"}
        assert all(point["ms"] > 0 for point in sweep["points"])
        assert sweep["left_out"] == ""
        if sweep["name"] != "threads":
            assert set(sweep["fits"]) == {*labels, "GAM eager"}
            assert all(law["error"] >= 0 for law in sweep["fits"].values())
    assert set(figures["sweeps"][1]["us_each"]) == {*labels, "GAM eager"}
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


def test_the_other_base_and_dtype_run(capsys):
    options = ["--sweep", "tensors", "--base", "AdamW", "--dtype", "bfloat16", "--backend", "eager"]
    assert growth.main([*QUICK, *options]) == 0
    assert "torch AdamW" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "3"], "--repeats: must be at least 7 for a median to mean something, got 3"),
        (["--threads", "0"], "--threads: must be an integer of at least 1, got 0"),
        (["--sweep", "layers"], "--sweep must be of parameters, tensors, threads, got layers"),
        (["--backend", "fast", "--quick"], "--backend fast: "),
        (["--quick", "--check"], "--check is for the whole range on a CPU: leave out --quick and --device cuda"),
        (
            ["--json", "nowhere/at/all.json"],
            "the folder of nowhere/at/all.json does not exist: create it",
        ),
        (
            ["--png", "nowhere/at/all.png"],
            "the folder of nowhere/at/all.png does not exist: create it",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        growth.main(arguments)
    assert message in capsys.readouterr().err


def test_what_a_gpu_cannot_do_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        growth.main(["--device", "cuda"])
    assert (
        "--device cuda: torch sees no CUDA GPU; install a CUDA build of torch, or use --device cpu"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arguments, message in (
        (["--sweep", "threads"], "--sweep threads needs --device cpu"),
        (["--check"], "--check is for the whole range on a CPU"),
    ):
        with pytest.raises(SystemExit, match="2"):
            growth.main(["--device", "cuda", *arguments])
        assert message in capsys.readouterr().err
    _, names = growth.parse(["--device", "cuda"])
    assert names == ["parameters", "tensors"]


def test_the_sweep_of_parameters_needs_linux_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(growth.sys, "platform", "darwin")
    with pytest.raises(SystemExit, match="2"):
        growth.main(QUICK)
    assert "--sweep parameters reads the available memory from /proc" in capsys.readouterr().err


def test_help_explains_every_option():
    for action in growth.parser()._actions:
        assert action.help
        assert action.help != argparse.SUPPRESS
