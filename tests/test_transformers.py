"""Transformers, the real package: what its Trainer does with our steps is what a plain loop does."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers_trainer
from pytorch_optimizer import ScheduleFreeSGD
from ranks import same_on_all_ranks
from snapshots import assert_close, assert_equal
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import gam_fast
from gam_fast.integrations import SharpnessAwareTrainer

GAM = {"base_optimizer": torch.optim.AdamW, "lr": 3e-3, "rho": 0.1, "rho_prime": 0.05}


def language_model(dropout=0.1):
    torch.manual_seed(2)
    config = GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=16,
        vocab_size=11,
        n_positions=6,
        bos_token_id=None,
        eos_token_id=None,
        loss_type="ForCausalLM",
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return GPT2LMHeadModel(config)


def rows(n=24):
    tokens = torch.randint(11, (n, 6), generator=torch.Generator().manual_seed(4))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Recorder(SharpnessAwareTrainer):
    """Notes the micro-batches of each step and the losses that the Trainer is told."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.told, self.calls = [], [], 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        state = torch.get_rng_state()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen.append((inputs, num_items_in_batch, state, self.accelerator.sync_gradients))
        self.told.append(loss)
        return loss

    def compute_loss(self, *args, **kwargs):
        self.calls += 1
        return super().compute_loss(*args, **kwargs)


def arguments_of(folder, **options):
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    return TrainingArguments(str(folder), **{"max_steps": 5, "per_device_train_batch_size": 4, **quiet, **options})


def trainer_of(folder, model=None, kind=Recorder, optimizer=(gam_fast.GAM, GAM), callbacks=None, **options):
    return kind(
        language_model() if model is None else model,
        arguments_of(folder, **options),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=optimizer,
        callbacks=callbacks,
    )


@pytest.mark.parametrize(("accumulate", "limit"), [(1, 0.3), (3, 0.0)])
def test_it_takes_the_steps_of_a_plain_loop(accumulate, limit, tmp_path):
    options = {"gradient_accumulation_steps": accumulate, "max_grad_norm": limit, "lr_scheduler_type": "constant"}
    trainer = trainer_of(tmp_path, **options, weight_decay=0.1)
    twin = copy.deepcopy(trainer.model)
    trainer.train()
    assert trainer.calls == 4 * 5 * accumulate

    twin.train()
    decay = trainer.get_decay_parameter_names(twin)
    groups = [
        {"params": [p for n, p in twin.named_parameters() if n in decay], "weight_decay": 0.1},
        {"params": [p for n, p in twin.named_parameters() if n not in decay], "weight_decay": 0.0},
    ]
    optimizer = gam_fast.GAM(groups, **GAM, clip_grad_norm=limit or None)
    told = []
    for first in range(0, len(trainer.seen), accumulate):
        step = trainer.seen[first : first + accumulate]
        assert [last for *_, last in step] == [False] * (accumulate - 1) + [True]
        torch.set_rng_state(step[0][2])
        for turn in optimizer.passes():
            for inputs, count, *_ in optimizer.micro_batches(step):
                loss = twin(**inputs, num_items_in_batch=count).loss
                turn.backward(loss)
                if turn.index == 0:
                    told.append(loss.detach())
    assert_equal(trainer.model, twin)
    assert trainer.told == told


def test_the_norm_that_is_logged_is_that_of_the_last_pass(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=1)

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.norm = float(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()]))

    look = Look()
    trainer.add_callback(look)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(look.norm, rel=1e-6)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(trainer.told[0]), rel=1e-6)


def test_a_checkpoint_resumes_with_the_same_bits(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    straight = trainer_of(tmp_path / "a", **options)
    straight.train()
    resumed = trainer_of(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert len(resumed.seen) == 3 * 2
    assert_equal(resumed.model, straight.model)


def test_another_optimizer_is_trained_as_by_the_trainer(tmp_path):
    found = []
    for kind in (SharpnessAwareTrainer, Trainer):
        trainer = trainer_of(tmp_path, kind=kind, optimizer=(torch.optim.AdamW, {"lr": 1e-3}))
        trainer.train()
        found.append(trainer)
    assert_equal(found[0].model, found[1].model)
    ours, theirs = ([entry["loss"] for entry in trainer.state.log_history[:5]] for trainer in found)
    assert ours == theirs


def test_the_optimizer_may_be_given_as_it_is(tmp_path):
    model = language_model()
    before = model.transformer.wte.weight.detach().clone()
    flat = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    trainer = Recorder(model, arguments_of(tmp_path), train_dataset=rows(), optimizers=(flat, None))
    trainer.train()
    assert trainer.calls == 2 * 5
    assert trainer.flat_optimizer is flat
    assert flat.clip_grad_norm == 1.0  # the Trainer's own default
    assert not torch.equal(model.transformer.wte.weight, before)


class Interrupted(Exception):
    pass


class Stop(TrainerCallback):
    """Raises in the third step."""

    def __init__(self, event):
        setattr(self, event, self.stop)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise Interrupted


class Failing(Recorder):
    """Raises in the third pass of the third step."""

    def compute_loss(self, *args, **kwargs):
        if self.calls == 10:
            raise Interrupted
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("where", ["pass", "on_pre_optimizer_step"])
def test_a_run_that_ends_by_an_exception_leaves_the_weights_of_the_step_before(where, tmp_path):
    options = {"lr_scheduler_type": "constant"}
    expected = trainer_of(tmp_path, max_steps=2, **options)
    expected.train()
    callbacks = [] if where == "pass" else [Stop(where)]
    trainer = trainer_of(tmp_path, kind=Failing if where == "pass" else Recorder, callbacks=callbacks, **options)
    with pytest.raises(Interrupted):
        trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.flat_optimizer.turn is None
    assert_equal(trainer.model, expected.model)


def test_an_epoch_may_end_within_an_accumulation(tmp_path):
    trainer = trainer_of(tmp_path, gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert [last for *_, last in trainer.seen] == 2 * [False, False, False, True, False, True]
    assert trainer.calls == 4 * 12


class Spoiling(Recorder):
    """A loss of each step, that of pass ``at``, is too large; or it raises ``error`` there, once."""

    at, error = 0, None

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if self.flat_optimizer.turn.index != self.at:
            return loss
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return loss * float("inf")


def with_scaler(trainer):
    """The scaler where Accelerate has it; its own switch, ``fp16=True``, asks for a GPU."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return trainer


def test_fp16_takes_the_steps_of_full_precision(tmp_path):
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.5}
    plain = trainer_of(tmp_path, language_model(0.0).double(), **options)
    plain.train()
    scaled = with_scaler(trainer_of(tmp_path, language_model(0.0).double(), **options))
    scaled.train()
    assert_close(scaled.model, plain.model, rtol=1e-10, atol=1e-10)
    ours, theirs = ([entry["grad_norm"] for entry in t.state.log_history[:-1]] for t in (scaled, plain))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("at", "scaler"), [(0, True), (3, True), (1, False), (3, False)])
def test_a_pass_that_is_not_finite_undoes_the_step_and_the_schedule_waits(at, scaler, tmp_path):
    optimizer = (gam_fast.GAM, {**GAM, "on_nonfinite": "raise" if scaler else "skip"})
    trainer = trainer_of(tmp_path, language_model(0.0), kind=Spoiling, optimizer=optimizer, learning_rate=1e-3)
    trainer.at = at
    if scaler:
        with_scaler(trainer)
    before = copy.deepcopy(trainer.model)
    trainer.train()
    assert trainer.flat_optimizer.skipped_steps == trainer.state.global_step == 5
    assert trainer.lr_scheduler.last_epoch == 0
    assert_equal(trainer.model, before)
    if scaler:
        assert trainer.accelerator.scaler.get_scale() == 1024.0 / 2**5


def test_a_smaller_batch_after_an_error_starts_from_the_weights_before(tmp_path, monkeypatch):
    options = {"auto_find_batch_size": True, "lr_scheduler_type": "constant", "max_steps": 2}
    trainer = trainer_of(tmp_path, language_model(0.0), kind=Spoiling, **options)
    trainer.at, trainer.error = 2, RuntimeError("CUDA out of memory.")
    states = []

    def begin(*arguments):
        states.append([p.detach().clone() for p in trainer.model.parameters()])
        return SharpnessAwareTrainer._begin(trainer, *arguments)

    monkeypatch.setattr(trainer, "_begin", begin)
    with pytest.raises(gam_fast.NonFiniteGradientError):  # the second attempt spoils the loss of pass 2
        trainer.train()
    assert len(states) == 2
    for p, q in zip(*states, strict=True):
        assert torch.equal(p, q)


def test_options_of_the_optimizer_come_first(tmp_path):
    """Its own limit of the norm, and the whole recipe in every second step."""
    options = {**GAM, "clip_grad_norm": 0.1, "interval": 2, "active": [gam_fast.active.Between(0.4, total_steps=5)]}
    trainer = trainer_of(tmp_path, optimizer=(gam_fast.GAM, options), gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.flat_optimizer.clip_grad_norm == 0.1
    assert trainer.flat_optimizer.param_groups[0]["flat_steps"] == 5
    assert trainer.calls == 2 * 8


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (gam_fast.ExactGAM, {}, "ExactGAM differentiates the loss by itself: use GAM"),
        (gam_fast.GAM, {"ascent_share": 0.5}, "ascent_share=0.5: the Trainer divides each loss.*loop of your own"),
        (
            gam_fast.GAM,
            {"active": gam_fast.active.WhenSteep()},
            "WhenSteep.*ends a step in its last pass.*another rule",
        ),
    ],
)
def test_an_optimizer_that_it_cannot_step_is_refused(method, options, message, tmp_path):
    trainer = trainer_of(tmp_path, optimizer=(method, {"base_optimizer": torch.optim.SGD, "lr": 0.1, **options}))
    with pytest.raises(TypeError, match=message):
        trainer.train()


def test_a_parallelism_that_it_cannot_follow_is_refused(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    weight = trainer.model.transformer.wte.weight
    weight.ds_id = 3
    with pytest.raises(TypeError, match="DeepSpeed is not supported.*fully_shard"):
        trainer.train()
    del weight.ds_id
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)
    trainer.accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=2))
    with pytest.raises(TypeError, match="context parallelism splits the inputs"):
        trainer._check(optimizer)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(TypeError, match="2 GPUs in one process.*torchrun"):
        trainer._check(optimizer)


def test_the_example_learns(capsys):
    trainer = transformers_trainer.main(steps=16, logging_steps=8)
    first, last = (entry["loss"] for entry in trainer.state.log_history[:2])
    assert last < 0.9 * first


def two_processes(rank, world, accumulate, sync, folder):
    optimizer = (gam_fast.GAM, {**GAM, "sync": sync})
    trainer = trainer_of(folder, optimizer=optimizer, gradient_accumulation_steps=accumulate, ddp_backend="gloo")
    trainer.train()
    assert isinstance(trainer.flat_optimizer.model, DistributedDataParallel)
    distributed.barrier()
    return same_on_all_ranks(list(trainer.model.parameters())), trainer.state.global_step


@pytest.mark.parametrize(("accumulate", "sync"), [(1, "local"), (2, "global")])
def test_two_processes_stay_equal(two, accumulate, sync, tmp_path):
    assert two.run(two_processes, accumulate, sync, str(tmp_path)) == [(True, 5), (True, 5)]


def test_a_schedule_free_base_is_trained_and_evaluated_in_its_modes(tmp_path):
    """As in a plain loop: train() before each step, and the evaluation sees the averaged weights."""
    seen = []

    class Look(Recorder):
        def prediction_step(self, model, *args, **kwargs):
            seen.append([p.detach().clone() for p in model.parameters()])
            return super().prediction_step(model, *args, **kwargs)

    model = language_model(dropout=0.0)
    twin = copy.deepcopy(model)
    optimizer = gam_fast.SAM(model.parameters(), ScheduleFreeSGD, lr=0.05, rho=0.05)
    options = {"eval_strategy": "steps", "eval_steps": 2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = Look(model, arguments_of(tmp_path, max_steps=4, **options), train_dataset=rows(), eval_dataset=rows(4))
    trainer.optimizer = optimizer
    trainer.train()

    twin.train()
    plain = gam_fast.SAM(twin.parameters(), ScheduleFreeSGD, lr=0.05, rho=0.05)
    averaged = []
    for k, (inputs, count, *_) in enumerate(trainer.seen, start=1):
        plain.train()
        for turn in plain.passes():
            turn.backward(twin(**inputs, num_items_in_batch=count).loss)
        if k % 2 == 0:
            plain.eval()
            averaged.append([p.detach().clone() for p in twin.parameters()])
    assert len(averaged) == 2
    for at, weights in zip((seen[0], seen[-1]), averaged, strict=True):
        for p, q in zip(at, weights, strict=True):
            assert torch.equal(p, q)
    assert_equal(model, twin)
