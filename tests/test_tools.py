"""Tools of developers: the runner of what waits for a GPU, with commands that need none; the reader of SASS."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import in_a_process

from tools import gpu, sass
from tools.gpu import Stage

HERE = [sys.executable, "-c"]


def run(tmp_path, *stages, budget=60.0):
    found = gpu.Run(tmp_path / "out", tmp_path, budget, "some_card")
    for stage in stages:
        found.stage(stage, gpu.surroundings())
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    return found, [line.split(None, 4) for line in lines]


def test_a_stage_that_fails_or_hangs_stops_no_other(tmp_path):
    stages = [
        Stage("fails", 20, {"fails": [*HERE, "print('FAILED some_test'); raise SystemExit(3)"]}),
        Stage("hangs", 1, {"hangs": [*HERE, "import time; print('begun', flush=True); time.sleep(60)"]}),
        Stage("works", 20, {"works": [*HERE, "print('seen'); print('236 passed')"]}),
    ]
    found, lines = run(tmp_path, *stages)
    assert found.failed
    verdicts = [line[:2] for line in lines if not line[0].startswith("FAILED")]
    assert verdicts == [["fails", "FAILED"], ["hangs", "TIMEOUT"], ["works", "ok"]]
    assert lines[-1][4] == "236 passed"
    assert "seen" in (tmp_path / "out" / "log.txt").read_text()


def test_what_is_not_there_or_has_no_time_left_is_left_out_by_name(tmp_path):
    nothing = {"x": [*HERE, "raise SystemExit(1)"]}
    found, lines = run(tmp_path, Stage("tool", 20, nothing, needs="no-such-program"), Stage("late", 20, nothing))
    assert lines[0][:2] == ["tool", "SKIPPED"]
    assert "no-such-program" in lines[0][4]
    found, lines = run(tmp_path, Stage("late", 20, nothing), budget=10)
    assert lines[0][:2] == ["late", "SKIPPED"]
    assert not found.failed


def test_every_command_names_a_file_or_module_that_is_there_and_smoke_some_tests():
    for command in [command for stage in gpu.STAGES for command in stage.commands.values()]:
        for word in command:
            assert not word.startswith("tests/") or (gpu.ROOT / word).is_file(), word
            assert not word.startswith("bench.") or (gpu.ROOT / f"{word.replace('.', '/')}.py").is_file(), word
    text = (gpu.ROOT / "tests" / "test_gpu.py").read_text()
    for part in gpu.SMOKE.split(" or "):
        assert part in text


def test_a_gpu_or_a_stage_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA GPU"):
        gpu.main([])
    with pytest.raises(SystemExit):
        gpu.main(["--stages", "core, smok"])
    assert "there is no smok; there are core, report, smoke" in capsys.readouterr().err


def test_the_script_runs_by_itself():
    command = [sys.executable, Path("tools") / "gpu.py", "--help"]
    found = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=True)
    assert "stages: core, report, smoke" in found.stdout


LISTING = [
    (0x00, "S2R R0, SR_TID.X"),
    (0x10, "LDG.E.128 R4, desc[UR6][R2.64]"),
    (0x20, "LDG.E.64 R8, desc[UR6][R2.64]"),
    (0x30, "STG.E.128 desc[UR6][R2.64], R4"),
    (0x40, "@P0 BRA 0x20"),
    (0x50, "@P1 BRA 0x10"),
    (0x60, "BRA 0x60"),
    (0x70, "LDL R1, [R1]"),
]


def test_the_inspection_of_machine_code_finds_loops_and_what_exceeds_limits():
    assert [len(loop) for loop in sass.loops(LISTING)] == [3]  # the inner one
    limits = json.loads(sass.LIMITS.read_text(encoding="utf-8"))
    good = sass.Kernel("sm_90", "perturb", "float, false", 32, 8, 0, 0, 2, 1, 256, 8, 1.0)
    assert sass.check([good], limits) == []
    for change, message in (
        ({"spills": 2}, "2 spills"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"registers": 200}, "200 registers"),
        ({"occupancy": 0.1}, "occupancy 0.10"),
        ({"loads": 1}, "1 loads"),
        ({"stores": 0}, "0 stores"),
    ):
        assert message in sass.check([dataclasses.replace(good, **change)], limits)[0]
    assert sum("perturb" in line for line in sass.table([good], False)) == 1


def test_a_step_makes_no_more_python_calls_than_it_did():
    """In a process of its own: where threads live that other tests have left, random numbers take five more."""
    program = "from tools import calls; print(*(calls.of('GAM', tensors=n).total() for n in (10, 40)))"
    few, many = map(int, in_a_process(program).split())
    assert few <= 160
    assert many == few  # none for a tensor
