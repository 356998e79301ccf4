"""skorch and PyTorch-Ignite, the real packages: the recipes of docs/frameworks.md take the steps of a plain loop."""

from __future__ import annotations

import pytest
import torch
from frameworks import GAM, by_hand, loader, net
from snapshots import assert_equal
from torch import nn
from torch.nn import functional as F

import gam_fast

# raised as torch.distributed.optim is imported, which Ignite does


def test_skorch_takes_the_steps_of_the_loop_and_logs_the_loss_at_the_weights():
    from skorch import NeuralNetClassifier

    class Classifier(NeuralNetClassifier):
        def initialize_optimizer(self, *args, **kwargs):
            super().initialize_optimizer(*args, **kwargs)
            self.optimizer_.model = self.module_
            return self

    hyper = {f"optimizer__{name}": value for name, value in GAM.items()}
    settings = {"criterion": nn.CrossEntropyLoss, "batch_size": 12, "train_split": None, "verbose": 0}
    classifier = Classifier(
        net(), optimizer=gam_fast.GAM, optimizer__base_optimizer=torch.optim.SGD, max_epochs=2, **hyper, **settings
    )
    classifier.initialize()
    torch.manual_seed(9)
    classifier.partial_fit(*loader().dataset.tensors)
    model, losses = by_hand()
    assert_equal(classifier.module_, model)
    assert classifier.history[:, "train_loss"] == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4])
    classifier.set_params(optimizer__rho=0.3)
    assert classifier.optimizer_.param_groups[0]["rho"] == 0.3


def test_ignite_takes_the_steps_of_the_loop_and_moves_the_radius():
    from ignite.engine import Engine, Events, create_supervised_trainer
    from ignite.handlers import LinearCyclicalScheduler

    model = net()
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, model=model, **GAM)

    def update(engine, batch):
        return optimizer.step(lambda: backward(F.cross_entropy(model(batch[0]), batch[1]))).item()

    def backward(loss):
        loss.backward()
        return loss

    trainer, seen = Engine(update), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.output))
    torch.manual_seed(9)
    trainer.run(loader(), max_epochs=2)
    expected, losses = by_hand()
    assert_equal(model, expected)
    assert seen == losses

    radius = LinearCyclicalScheduler(optimizer, "rho", 0.1, 0.0, cycle_size=8)
    trainer.add_event_handler(Events.ITERATION_STARTED, radius)
    trainer.run(loader(), max_epochs=4)
    assert optimizer.param_groups[0]["rho"] < 0.1
    with pytest.raises(RuntimeError, match=r"call step\(closure\)"):
        create_supervised_trainer(model, optimizer, F.cross_entropy).run(loader(), 1)
