"""``examples/imagenet.py`` on images that are generated here: timm's networks and loaders, and a run that goes on."""

from __future__ import annotations

import json

import imagenet
import numpy as np
import pytest
import torch
from PIL import Image
from ranks import same_on_all_ranks

import gam_fast

pytestmark = pytest.mark.filterwarnings("ignore:.*unclosed file")  # timm leaves images open

TINY = ["--size", "32", "--classes", "3", "--batch", "8", "--epochs", "2", "--warm-up", "1", "--device", "cpu"]
TINY += ["--no-bf16", "--workers", "0"]
NETWORKS = {
    "resnet50": ["--preset", "resnet50", "--network", "resnet10t"],
    "vit_small": ["--preset", "vit_small", "--network", "vit_tiny_patch16_224", "--drop-path", "0.1"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 images to train on and 6 to test on, of three colours."""
    path = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, n in (("train", 16), ("val", 6)):
        for i in range(n):
            pixels = random.integers(0, 100, (40, 48, 3)).astype(np.uint8)
            pixels[..., i % 3] += 120
            target = path / split / f"class{i % 3}" / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
    return path


@pytest.mark.parametrize("preset", NETWORKS)
@pytest.mark.parametrize("method", [["--method", "GAM", "--late", "0.5"], ["--method", "SGD"]], ids=["GAM late", "SGD"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, folder, preset, method):
    arguments = ["--data", str(folder), *NETWORKS[preset], *TINY, *method]
    whole = imagenet.main([*arguments, "--json", str(tmp_path / "run.json")])
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["test_loss"] == whole.test_loss
    assert all(np.isfinite(whole.train_loss + whole.test_loss))

    parsed, settings = imagenet.parse(arguments)
    first = imagenet.Run(settings, parsed.data, torch.device("cpu"), workers=0)
    loss = first.train()
    test_loss, accuracy = first.test()
    first.epoch = 1
    first.curve = imagenet.Curve([loss], [test_loss], [accuracy], [1.0])
    first.save(tmp_path / "run.pt")
    resumed = imagenet.main([*arguments, "--checkpoint", str(tmp_path / "run.pt")])
    assert resumed.train_loss == whole.train_loss
    assert resumed.test_loss == whole.test_loss


def test_biases_and_normalisations_do_not_decay_and_a_base_may_be_named_as_method(folder):
    _, settings = imagenet.parse(["--data", str(folder), *NETWORKS["vit_small"], *TINY, "--method", "AdamW"])
    run = imagenet.Run(settings, folder, torch.device("cpu"), workers=0)
    assert isinstance(run.optimizer.base, torch.optim.AdamW)
    assert type(run.optimizer) is gam_fast.Base
    decays = [(group["weight_decay"], {p.ndim for p in group["params"]} & {1}) for group in run.optimizer.param_groups]
    assert decays == [(0.0, {1}), (0.05, set())]


def test_what_cannot_be_is_said(tmp_path, folder):
    with pytest.raises(SystemExit, match="no images at .*train/CLASS"):
        imagenet.main(["--data", str(tmp_path), *TINY])
    with pytest.raises(SystemExit, match="16 images are fewer than a batch of 32"):
        imagenet.main(["--data", str(folder), *TINY, "--network", "resnet10t", "--batch", "32"])
    with pytest.raises(SystemExit, match="--shard needs several processes"):
        imagenet.main(["--data", str(folder), *TINY, "--network", "resnet10t", "--shard"])


def on_two(rank, world, folder, checkpoint, shard):
    arguments = ["--data", folder, *NETWORKS["vit_small"], *TINY, "--method", "GAM", "--drop-path", "0"]
    _, settings = imagenet.parse(arguments)

    def run():
        return imagenet.Run(settings, imagenet.Path(folder), torch.device("cpu"), shard=shard, workers=0)

    whole = run()
    whole.go_on()
    part = run()
    part.train()
    part.epoch = 1
    part.save(imagenet.Path(checkpoint))
    resumed = run()
    resumed.load(imagenet.Path(checkpoint))
    resumed.go_on()
    same = shard or same_on_all_ranks(whole.plain.parameters())
    return same, whole.curve.test_loss, resumed.curve.test_loss


@pytest.mark.parametrize("shard", [False, True], ids=["DDP", "FSDP2"])
def test_processes_train_one_network(two, folder, tmp_path, shard):
    found = two.run(on_two, str(folder), str(tmp_path / "run.pt"), shard)
    for same, whole, resumed in found:
        assert same
        assert whole == found[0][1]
        assert resumed[-1] == whole[-1]
