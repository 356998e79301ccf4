"""``examples/cifar.py`` on images that are generated here: what it reads, how it augments, and that a run can go on."""

import io
import json
import pickle
from dataclasses import replace

import cifar
import cifar_images
import numpy as np
import pytest
import torch
from PIL import Image
from ranks import same_on_all_ranks
from torch import nn
from torch.nn import functional as F

from experiments import evidence, share

TINY = ["--network", "small", "--epochs", "2", "--batch", "16", "--train-images", "48", "--device", "cpu"]


def generated(n):
    """So many images, and their classes."""
    random = np.random.default_rng(0)
    labels = np.arange(n) % 10
    noise = random.integers(0, 60, (n, 32, 32, 3))
    return (noise + 19 * labels[:, None, None, None]).astype(np.uint8), labels


def encoded(image, kind):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


@pytest.fixture
def packed(tmp_path):
    """A file of packed images: 128 to train on, 20 to test on."""
    arrays = {}
    for split, n in (("train", 128), ("test", 20)):
        images, labels = generated(n)
        files = [encoded(image, "JPEG") for image in images]
        arrays[f"{split}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{split}_ends"] = np.cumsum([len(file) for file in files])
        arrays[f"{split}_labels"] = labels
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path


def test_folders_of_torchvision_are_read(tmp_path):
    images, labels = generated(20)
    data = images.transpose(0, 3, 1, 2).reshape(20, -1)
    for name, key in (("cifar-10-batches-py/data_batch_", "labels"), ("cifar-100-python/train", "fine_labels")):
        parts = 5 if key == "labels" else 1
        for i in range(parts):
            path = tmp_path / (f"{name}{i + 1}" if parts > 1 else name)
            path.parent.mkdir(exist_ok=True)
            rows = slice(20 * i // parts, 20 * (i + 1) // parts)
            path.write_bytes(pickle.dumps({"data": data[rows], key: labels[rows].tolist()}))
    for dataset in ("cifar10", "cifar100"):
        found = cifar_images.load(tmp_path, dataset, "train")
        assert torch.equal(found.pixels.permute(0, 2, 3, 1), torch.from_numpy(images))
        assert found.labels.tolist() == labels.tolist()


def test_folders_of_image_files_and_packed_ones_are_read(tmp_path, packed):
    images, labels = generated(20)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "test" / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(encoded(image, "PNG"))
    found = cifar_images.load(tmp_path, "cifar10", "test")
    order = sorted(range(20), key=lambda i: (labels[i], str(i)))
    assert torch.equal(found.pixels.permute(0, 2, 3, 1), torch.from_numpy(images[order]))
    assert found.labels.tolist() == labels[order].tolist()
    lossy = cifar_images.load(packed, "cifar10", "test")
    assert (lossy.pixels.permute(0, 2, 3, 1).float() - torch.from_numpy(images).float()).abs().mean() < 20
    assert lossy.labels.tolist() == labels.tolist()
    with pytest.raises(SystemExit, match="no images at"):
        cifar.main(["--data", str(tmp_path / "nothing"), *TINY])


def test_an_image_is_shifted_or_mirrored_and_nothing_else():
    x = torch.rand(40, 3, 32, 32)
    padded = torch.nn.functional.pad(x, (4,) * 4)
    found = cifar_images.augmented(x, torch.Generator().manual_seed(0))
    mirrored = 0
    for image, source in zip(found, padded, strict=True):
        shifts = [(source[:, i : i + 32, j : j + 32], i, j) for i in range(9) for j in range(9)]
        plain = any(torch.equal(image, part) for part, _, _ in shifts)
        flipped = any(torch.equal(image, part.flip(2)) for part, _, _ in shifts)
        assert plain != flipped
        mirrored += flipped
    assert 10 < mirrored < 30


def test_wrong_labels_are_the_same_whatever_the_run():
    images = cifar_images.Images(torch.zeros(1000, 3, 1, 1), torch.zeros(1000, dtype=torch.int64))
    wrong = cifar_images.with_wrong_labels(images, 0.2, 10).labels
    assert torch.equal(wrong, cifar_images.with_wrong_labels(images, 0.2, 10).labels)
    assert 160 < int((wrong != 0).sum()) < 200  # a tenth of those drawn anew stays right


@pytest.mark.parametrize(
    ("name", "millions"),
    [("small", 0.15), ("resnet18", 11.17), ("wrn28_2", 1.47), ("wrn28_10", 36.48), ("pyramidnet110", 28.49)],
)
def test_networks_have_the_size_of_the_papers(name, millions):
    with torch.device("meta"):
        network = cifar.NETWORKS[name](10)
        assert network(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "SGD"],
        ["--method", "GAM", "--late", "0.5", "--ascent-share", "0.5", "--ema", "0.9"],
        ["--method", "SAM", "--set", "rho=0.1", "--interval", "2", "--bf16", "--wrong-labels", "0.2"],
    ],
    ids=["SGD", "GAM late", "SAM"],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, packed, options):
    arguments = ["--data", str(packed), *TINY, *options]
    whole = cifar.main([*arguments, "--json", str(tmp_path / "run.json"), "--picture", str(tmp_path / "run.png")])
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["test_accuracy"] == whole.test_accuracy
    assert stored["settings"]["method"] == options[1]
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")

    checkpoint = tmp_path / "run.pt"
    parsed, settings = cifar.parse(arguments)
    first = cifar.Run(settings, parsed.data, torch.device("cpu"))
    loss = first.train()
    test_loss, accuracy = first.test()
    first.epoch = 1
    first.curve = cifar.Curve([loss], [test_loss], [accuracy], [1.0])
    first.save(checkpoint)
    resumed = cifar.main([*arguments, "--checkpoint", str(checkpoint)])
    assert resumed.train_loss == whole.train_loss
    assert resumed.test_loss == whole.test_loss
    with pytest.raises(SystemExit, match="other settings: lr"):
        cifar.main([*arguments, "--lr", "0.3", "--checkpoint", str(checkpoint)])


def test_test_images_are_left_alone_where_some_are_set_apart(packed):
    _, settings = cifar.parse(["--data", str(packed), *TINY, "--train-images", "0", "--validation", "16"])
    train, held = cifar.split(settings, packed)
    assert (len(train), len(held)) == (112, 16)
    every = torch.cat([train.pixels, held.pixels]).flatten(1).double().sum(1).sort().values
    assert torch.equal(every, cifar_images.load(packed, "cifar10", "train").pixels.flatten(1).double().sum(1).sort()[0])


def test_an_experiment_runs_what_it_has_not_run_yet(packed, tmp_path, capsys, monkeypatch):
    arms = tuple(arm for arm in evidence.ARMS if arm.name in ("SGD", "GAM, last .3"))
    monkeypatch.setitem(evidence.TASKS, "quick", replace(evidence.TASKS["quick"], arms=arms))
    monkeypatch.setattr(evidence, "TUNED", evidence.TUNED[:1])
    results = tmp_path / "results.json"
    command = ["--data", str(packed), "--task", "quick", "--device", "cpu", "--results", str(results)]
    assert evidence.main([*command, "--seconds", "0"]) == 0
    assert not results.exists()
    assert evidence.main([*command, "--tune"]) == 0
    first = json.loads(results.read_text())
    assert evidence.main(command) == 0
    runs = json.loads(results.read_text())
    assert {key: runs[key] for key in first} == first
    assert {(found["arm"], found["wrong_labels"], found["tune"]) for found in runs.values()} == {
        ("SGD", 0.2, True),
        ("SAM, rho 0.02", 0.2, True),
        ("SGD", 0.2, False),
        ("GAM, last .3", 0.2, False),
    }
    assert all(found["lambda_max"] > 0 and found["r1"] > 0 for found in runs.values() if not found["tune"])
    out = capsys.readouterr().out
    assert "### 1 epochs, 20% wrong labels" in out
    assert "| GAM, last .3 | 1 |" in out
    picture = tmp_path / "picture.png"
    assert evidence.main([*command, "--seconds", "0", "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_gains_are_over_the_base_of_the_same_seed():
    def run(arm, seed, accuracy, tune=False):
        return {
            "arm": arm, "seed": seed, "test_accuracy": accuracy, "tune": tune, "epochs": 60, "wrong_labels": 0.2
        }  # fmt: skip

    runs = [run("SGD", 0, 50.0), run("SGD", 1, 40.0), run("SAM", 0, 52.0), run("SAM", 1, 43.0), run("GAM", 2, 60.0)]
    runs += [run("SAM", 0, 0.0, tune=True)]
    sgd, sam = evidence.gains(evidence.TASKS["few"], dict(enumerate(runs)), 60, 0.2)
    assert (sgd.name, sgd.cost, sgd.value, sgd.error) == ("SGD", 1.0, 0.0, 0.0)
    assert (sam.name, sam.cost, sam.value, sam.error) == ("SAM", 2.0, 2.5, 0.5)


def on_two(rank, world, path):
    _, settings = cifar.parse(["--data", path, *TINY, "--method", "GAM"])
    run = cifar.Run(settings, cifar.Path(path), torch.device("cpu"), rank, world)
    run.go_on()
    return same_on_all_ranks(run.plain.parameters()), run.curve.test_accuracy


def test_two_processes_train_one_network(two, packed):
    (same, first), (_, second) = two.run(on_two, str(packed))
    assert same
    assert len(first) == 2
    assert first[-1] > 0
    assert len(second) == 2


def test_a_share_of_the_batch_is_compared_with_the_whole(packed, tmp_path, capsys):
    """Without BatchNorm it makes no difference whether the other rows are seen."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).double()
    x, y = torch.randn(8, 3, 2, 2).double(), torch.arange(8)
    found = share.steps(model, x, y)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    torch.testing.assert_close(found["SGD"], torch.cat([g.flatten() for g in gradients]))
    for part in ("0.5", "0.25"):
        alike = found[f"GAM, share {part}"], found[f"GAM, share {part}, statistics of all rows"]
        torch.testing.assert_close(*alike, rtol=1e-12, atol=1e-14)
    path = tmp_path / "share.json"
    sizes = ["--images", "32", "--epochs", "1", "--batches", "2", "--batch", "16"]
    assert share.main(["--data", str(packed), *sizes, "--json", str(path)]) == 0
    whole, *others = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert (round(whole["cosine"], 5), whole["length"]) == (1.0, 1.0)
    assert [row["step"] for row in others] == list(found)[1:]
    assert all(abs(row["cosine"]) < 1.0 for row in others)
    assert "32 images, 1 epochs of SGD, batch 16" in capsys.readouterr().out
