"""Lightning, the real package: automatic and manual optimization take the steps of a plain loop."""

import copy
import re
from functools import partial
from importlib import metadata
from pathlib import Path

import lightning.pytorch as pl
import lightning_automatic
import lightning_manual
import pytest
import torch
from frameworks import GAM, by_hand, loader, net, spoil
from lightning.fabric.utilities import registry
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ranks import same_on_all_ranks
from snapshots import assert_equal
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gam_fast
from gam_fast.integrations import SharpnessAwareCallback

# said by Lightning about loaders without workers and short epochs, and raised inside it
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Module(pl.LightningModule):
    """Counts what it is called for."""

    def __init__(self, automatic=True, accumulate=1, method=gam_fast.GAM, **options):
        super().__init__()
        self.automatic_optimization = automatic
        self.net = net()
        self.accumulate, self.method, self.options = accumulate, method, options
        self.batches, self.calls, self.losses, self.models = [], 0, [], []

    def loss(self, batch):
        x, y = self.optimizers().turn.rows(*batch) if "ascent_share" in self.options else batch
        return F.cross_entropy(self.net(x), y)

    def training_step(self, batch, batch_idx):
        self.calls += 1
        optimizer = self.optimizers()
        self.models = [optimizer.model]  # in a list, or it would become a submodule
        if self.automatic_optimization:
            loss = self.loss(batch)
            if gam_fast.first_pass(optimizer):
                self.losses.append(float(loss.detach()))
            return loss
        self.batches.append(batch)
        if len(self.batches) < self.accumulate:
            return None
        for turn in optimizer.passes():
            for one in optimizer.micro_batches(self.batches):
                loss = self.loss(one) / self.accumulate
                self.manual_backward(loss)
                if turn.index == 0:
                    self.losses.append(float(loss.detach()))
        self.batches = []
        return None

    def configure_optimizers(self):
        return self.method(self.parameters(), torch.optim.SGD, **GAM, **self.options)


def trainer_of(epochs=2, callbacks=(), **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks)}
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet, **options)


def fit(module, callbacks=None, ckpt_path=None, **options):
    trainer = trainer_of(callbacks=[SharpnessAwareCallback()] if callbacks is None else callbacks, **options)
    torch.manual_seed(9)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("precision", "options", "evaluations"),
    [
        ("32-true", {"clip_grad_norm": 0.5}, 4 * 8),
        ("bf16-mixed", {"clip_grad_norm": 0.5}, 4 * 8),
        ("32-true", {"ascent_share": 0.5, "interval": 2}, 4 * (1 + 4)),
    ],
)
def test_automatic_optimization_takes_the_steps_of_the_loop(precision, options, evaluations):
    module = Module(**options)
    trainer = fit(module, precision=precision)
    model, losses = by_hand(autocast=torch.bfloat16 if precision == "bf16-mixed" else None, **options)
    assert_equal(module.net, model)
    assert module.losses == losses
    assert trainer.global_step == 8
    assert module.calls == evaluations


@pytest.mark.parametrize(("precision", "accumulate"), [("bf16-mixed", 1), ("32-true", 2)])
def test_manual_optimization_takes_the_steps_of_the_loop(accumulate, precision):
    module = Module(automatic=False, accumulate=accumulate)
    trainer = fit(module, precision=precision)
    model, losses = by_hand(accumulate, torch.bfloat16 if precision == "bf16-mixed" else None)
    assert_equal(module.net, model)
    assert module.losses == losses
    assert trainer.global_step == 8 // accumulate


def test_a_checkpoint_resumes_with_the_same_bits(tmp_path):
    straight, resumed = Module(), Module()
    for module in (straight, resumed):
        module.net[2].p = 0.0  # Lightning does not keep the random state
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    fit(straight, callbacks=[SharpnessAwareCallback(), keep])
    (path,) = tmp_path.glob("epoch=0*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert "momentum_buffer" in saved["optimizer_states"][0]["state"][0]
    trainer = fit(resumed, ckpt_path=path)
    assert trainer.global_step == 8
    assert resumed.losses == straight.losses[4:]
    assert_equal(resumed, straight)


def mixed_precision():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val=0.5 clips the gradient of each pass.*clip_grad_norm=0.5"),
        ({"accumulate_grad_batches": 2}, r"accumulate_grad_batches=2.*only the last of its batches.*micro_batches\(\)"),
        (
            {"plugins": mixed_precision()},
            r"'16-mixed': automatic optimization evaluates the closure once.*bf16-mixed.*passes",
        ),
    ],
)
def test_the_callback_refuses_what_would_go_wrong_in_silence(options, message):
    module = Module()
    before = copy.deepcopy(module.net)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, **options)
    assert_equal(module.net, before)


def test_the_callback_finds_accumulation_that_begins_later():
    module = Module()
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=2"):
        fit(module, callbacks=[SharpnessAwareCallback(), GradientAccumulationScheduler({1: 2})])
    assert len(module.losses) == 4


@pytest.mark.parametrize("batch", [16, 48])
def test_averaged_weights_get_their_statistics_in_an_epoch_without_steps(batch):
    """As with any optimizer: from all batches of that epoch, of which Lightning hands the last to the optimizer."""
    counts = []
    for method in (gam_fast.GAM, torch.optim.SGD):
        module = Module()
        if method is torch.optim.SGD:
            module.optimizers = lambda: None
            module.training_step = lambda b, i, m=module: F.cross_entropy(m.net(b[0]), b[1])
            module.configure_optimizers = lambda m=module: torch.optim.SGD(m.parameters(), lr=0.05)
        trainer = trainer_of(3, [StochasticWeightAveraging(1e-2, swa_epoch_start=1), SharpnessAwareCallback()])
        trainer.fit(module, loader(batch))
        counts.append((int(module.net[1].num_batches_tracked), trainer.global_step))
    assert counts[0] == counts[1]
    assert counts[0][0] == 48 // batch


@pytest.fixture
def _not_installed(monkeypatch):
    """gam_fast is on the path only: Lightning finds no entry point of it."""
    monkeypatch.setattr(registry, "entry_points", lambda group: [])


@pytest.fixture
def _installed(monkeypatch):
    """The entry points of pyproject.toml, whatever the environment was installed from."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    found = re.findall(r'\[project.entry-points."(\S+)"\]\n(\w+) = "(\S+)"', text)
    points = [metadata.EntryPoint(name, value, group) for group, name, value in found]
    monkeypatch.setattr(registry, "entry_points", lambda group: [point for point in points if point.group == group])


@pytest.mark.usefixtures("_installed")
def test_lightning_adds_the_callback_by_itself():
    module = Module()
    trainer = fit(module, callbacks=[], epochs=1)
    assert sum(isinstance(callback, SharpnessAwareCallback) for callback in trainer.callbacks) == 1
    assert module.models[0] is module
    assert int(module.net[1].num_batches_tracked) == 4
    with pytest.raises(MisconfigurationException, match="clips the gradient of each pass"):
        fit(Module(), callbacks=[], gradient_clip_val=0.5)
    assert registry._load_external_callbacks("pytorch_lightning.callbacks_factory") == []


@pytest.mark.usefixtures("_installed")
def test_the_callback_that_is_always_there_leaves_other_optimizers_alone():
    module = Module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    module.training_step = lambda batch, batch_idx: module.loss(batch)
    assert fit(module, callbacks=[], gradient_clip_val=0.5, accumulate_grad_batches=2).global_step == 4


class Logging(Module):
    """Logs as the README says, whatever the optimizer."""

    def __init__(self, make, **options):
        super().__init__(**options)
        self.make, self.said = make, []

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            self.said.append(gam_fast.first_pass(optimizer))
        loss = self.loss(batch)
        if self.said[-1]:
            self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        assert gam_fast.first_pass(self.optimizers())

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if isinstance(optimizer, gam_fast.SharpnessAwareOptimizer):
            optimizer.model = self
        return optimizer


@pytest.mark.usefixtures("_not_installed")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(torch.optim.SGD, lr=0.1), [True] * 4),
        (partial(gam_fast.SAM, lr=0.1), [True, False] * 4),
        (partial(gam_fast.GAM, lr=0.1, interval=2), [True, True, False, False, False] * 2),
    ],
)
def test_the_first_pass_is_known_with_any_optimizer(make, expected):
    module = Logging(make)
    trainer_of(epochs=1).fit(module, loader(), loader())
    assert module.said == expected


@pytest.mark.usefixtures("_not_installed")
def test_the_first_pass_is_known_outside_a_step():
    """Of several batches, Lightning evaluates all but the last outside the step."""
    module = Logging(partial(torch.optim.SGD, lr=0.1))
    trainer_of(epochs=1, accumulate_grad_batches=2).fit(module, loader(), loader())
    assert module.said == [True] * 4
    module = Logging(partial(gam_fast.SAM, lr=0.1))
    with pytest.warns(UserWarning, match="not used.*accumulate_grad_batches"):
        trainer_of(epochs=1, accumulate_grad_batches=2).fit(module, loader(), loader())
    assert module.said == [True, True, False] * 2


def test_the_first_pass_of_what_is_no_optimizer_is_an_error():
    with pytest.raises(TypeError, match="takes one optimizer, got \\[\\]"):
        gam_fast.first_pass([])


@pytest.mark.usefixtures("_not_installed")
def test_without_the_callback_automatic_optimization_in_fp16_is_an_error():
    with pytest.raises(RuntimeError, match="GAM takes 4 passes.*16-mixed"):
        fit(OneClosure(), callbacks=[], plugins=mixed_precision())


class OneClosure(Module):
    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Overflowing(Module):
    """The loss in the last pass of the third step is too large."""

    evaluations = 0

    def loss(self, batch):
        self.evaluations += 1
        return super().loss(batch) * spoil(self.evaluations - 1)


def test_manual_optimization_in_fp16_takes_the_steps_of_the_loop_and_skips_an_overflow():
    plugin, module = mixed_precision(), Overflowing(automatic=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert fit(module, plugins=plugin).global_step == 8
    assert_equal(module.net, by_hand(autocast=torch.float16, scaler=scaler, spoil=spoil)[0])
    assert plugin.scaler.state_dict() == scaler.state_dict()
    assert plugin.scaler.get_scale() == 512.0


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.5}, {"plugins": mixed_precision()}])
def test_a_method_of_one_pass_is_clipped_and_scaled_as_any_optimizer(options):
    module = OneClosure(method=lambda params, base, rho, rho_prime, **rest: gam_fast.Base(params, base, **rest))
    assert fit(module, **options).global_step == 8


def test_the_examples_learn():
    automatic = lightning_automatic.main(epochs=2, size=600)
    assert automatic.callback_metrics["train_loss"] < 1.2
    manual = lightning_manual.main(epochs=2, size=600, precision="bf16-mixed")
    assert manual.callback_metrics["train_loss"] < 2.2
    assert manual.global_step == 2 * 6


def two_processes(rank, world, automatic, sync):
    module = Module(automatic, sync=sync)
    trainer_of(callbacks=[SharpnessAwareCallback()], devices=world, strategy="ddp").fit(module, loader(6))
    assert isinstance(module.models[0], DistributedDataParallel)
    distributed.barrier()
    return same_on_all_ranks(list(module.net.parameters())), module.trainer.global_step


@pytest.mark.parametrize(("automatic", "sync"), [(True, "global"), (False, "local")])
def test_two_processes_stay_equal(two, automatic, sync):
    assert two.run(two_processes, automatic, sync) == [(True, 8), (True, 8)]
