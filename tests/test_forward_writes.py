"""What a forward writes into the model moves once a step, as in plain training, and not at all in an undone one."""

import copy
import types
import warnings

import pytest
import torch
from cases import METHODS, MULTIPASS, in_turn, loss_of
from snapshots import leave
from torch import nn
from torch.nn import functional as F

import gam_fast
from gam_fast import buffers, places


def register(norm, value):
    if hasattr(norm, "late"):
        norm.late.copy_(value)
    else:
        norm.register_buffer("late", value)


HOWS = {
    "in_place": lambda norm, value: norm.centre.copy_(value),
    "assigned": lambda norm, value: setattr(norm, "centre", value),
    "first_none": lambda norm, value: setattr(norm, "centre", value),
    "expanded": lambda norm, value: setattr(norm, "centre", value.mean().expand(4)),  # nobody can write to it in place
    "by_data": lambda norm, value: norm.centre.data.copy_(value),
    "data_by_another": lambda norm, value: setattr(norm.centre, "data", value),
    "set": lambda norm, value: norm.centre.set_(value),
    "registered": register,
    "renormalised": lambda norm, value: norm.centre.copy_(value),
    "functional": None,
}


class Norm(nn.Module):
    """A batch norm by hand."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("centre", None if how == "first_none" else torch.zeros(4))
        self.register_buffer("spread", torch.ones(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.how == "functional":  # which no version tells
            return F.batch_norm(x, self.centre, self.spread, self.weight, None, self.training)
        mean = x.mean(0)
        out = self.weight * (x - mean)
        if self.how == "renormalised":  # whose output reads what it moves
            out = out + (mean.detach() - self.centre).clamp(-1.0, 1.0)
        with torch.no_grad():
            if self.training:
                HOWS[self.how](self, mean.clone() if self.centre is None else 0.9 * self.centre + 0.1 * mean)
        self.steps += 1
        return out


class InstanceNorm(nn.InstanceNorm1d):
    def forward(self, x):
        return super().forward(x.view(3, 4, 4)).reshape(12, 4)


class Queue(nn.Module):
    def __init__(self, n=2000):
        super().__init__()
        self.register_buffer("queue", torch.randn(n, 4))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, z):
        out = z + 0.1 * torch.softmax(z @ self.queue.clone().T, 1) @ self.queue.clone()
        at = int(self.queue_ptr)
        self.queue[at : at + len(z)] = z.detach()
        self.queue_ptr[0] = (at + len(z)) % len(self.queue)
        return out


class Momentum(nn.Module):
    """A layer, and an average of it that the forward moves; equal at the start, as they mostly are."""

    def __init__(self, how, requires_grad=False):
        super().__init__()
        self.how = how
        self.query = nn.Linear(4, 4)
        self.key = copy.deepcopy(self.query).requires_grad_(requires_grad)

    def forward(self, x):
        move(self.how, self.key, self.query)
        with torch.no_grad():
            target = self.key(x)
        return self.query(x) - target + x


def move(how, key, query):
    for (name, k), q in zip(list(key.named_parameters()), query.parameters(), strict=True):
        if how == "replaced":  # as the best known notebook of a VQ-VAE moves its codebook
            setattr(key, name, nn.Parameter(k * 0.9 + q.detach() * 0.1, requires_grad=k.requires_grad))
        elif how == "no_grad":
            with torch.no_grad():
                k.mul_(0.9).add_(q, alpha=0.1)
        elif how == "lerp":  # which leaves equal ones bit for bit as they are
            k.data.lerp_(q.data, 0.1)
        elif how == "data":
            k.data.copy_(k.data * 0.9 + q.data * 0.1)
        else:
            k.data = k.data * 0.9 + q.data * 0.1


def fused_fake_quantize():
    """Its buffers take their shape in the first forward; what it writes later changes no version."""
    from torch.ao.quantization import FusedMovingAvgObsFakeQuantize, MovingAverageMinMaxObserver

    return FusedMovingAvgObsFakeQuantize(MovingAverageMinMaxObserver, quant_min=0, quant_max=255)


KINDS = {
    **{how: lambda how=how: Norm(how) for how in HOWS},
    "batchnorm": lambda: nn.BatchNorm1d(4),
    "batchnorm, cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "batchnorm, eval": lambda: nn.BatchNorm1d(4).eval(),
    "batchnorm, no statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "instancenorm": lambda: InstanceNorm(4, affine=True, track_running_stats=True),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "parametrized_spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "fused_fake_quantize": fused_fake_quantize,
    "queue": Queue,
}
ENCODERS = {
    f"{how}{', requires_grad' if requires_grad else ''}": (how, requires_grad)
    for how in ("no_grad", "lerp", "data", "data_replaced", "replaced")
    for requires_grad in (False, True)
}
WITHOUT_MODEL = [encoder for encoder in ENCODERS if not encoder.startswith("replaced")]
ALL = (*KINDS, *ENCODERS)


def build(kind, *, apart=False):
    """With ``apart``, a layer and its average are not equal at the start: some moves leave equal ones as they are."""
    torch.manual_seed(1)
    middle = KINDS[kind]() if kind in KINDS else Momentum(*ENCODERS[kind])
    if apart:
        for p in middle.key.parameters():
            nn.init.ones_(p)
    return nn.Sequential(nn.Linear(5, 4), middle, nn.Tanh(), nn.Linear(4, 3))


def batch():
    return torch.randn(12, 5), torch.randint(3, (12,))


def optimizer_of(method_name, model, /, **options):
    method = METHODS[method_name]
    options = {"model": model, **options}
    params = options.pop("params", model.parameters())
    return method.optimizer(params, torch.optim.SGD, lr=0.1, momentum=0.9, **method.hyper, **options)


def state_of(model):
    """All that a forward may have moved, by name: copies, and the tensors themselves."""
    found = {name: tensor for name, tensor in model.named_buffers() if tensor is not None}
    found |= {name: p for name, p in model.named_parameters() if ".key." in name}
    return {name: (tensor.detach().clone(), tensor) for name, tensor in found.items()}


def take_trained(twin, model):
    """The parameters that are trained, and nothing else."""
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ".key." not in name:
            q.data.copy_(p.data)


def assert_same(found, right):
    assert found.keys() == right.keys()
    for name, (values, _) in found.items():
        assert torch.equal(values, right[name][0]), name


def step(model, optimizer, x=None, y=None):
    x, y = batch() if x is None else (x, y)
    optimizer.step(lambda: loss_of(model, x, y).backward())


def leave_in_each_pass(model, optimizer):
    for at in range(optimizer.recipe.passes):
        before = state_of(model)
        leave(optimizer, lambda: loss_of(model, *batch()).backward(), at, KeyboardInterrupt)
        after = state_of(model)
        assert_same(after, before)
        assert all(tensor is before[name][1] for name, (_, tensor) in after.items())


def check_that_all_move_once(method_name, kind, **options):
    """Against a twin that makes one plain forward a step, at the same weights; also, which tensors are exchanged."""
    model, twin = build(kind), build(kind)
    optimizer = optimizer_of(method_name, model, **options)
    for _ in range(3):
        x, y = batch()
        take_trained(twin, model)
        before, twins = state_of(model), state_of(twin)
        loss_of(twin, x, y)
        for _ in optimizer.passes():
            assert_same(state_of(model), before)
            loss_of(model, x, y).backward()
        after, right = state_of(model), state_of(twin)
        assert_same(after, right)
        for name, (_, tensor) in before.items():
            assert (after[name][1] is tensor) == (right[name][1] is twins[name][1]), name


def rows(kinds):
    """All kinds under GAM, and each under another method."""
    return [*(("gam", kind) for kind in kinds), *in_turn([name for name in METHODS if name != "gam"], kinds)]


@pytest.mark.parametrize(("method_name", "kind"), rows(KINDS))
def test_buffers_move_once_a_step_and_all_passes_see_the_same(method_name, kind):
    check_that_all_move_once(method_name, kind)


@pytest.mark.parametrize(("method_name", "encoder"), rows(ENCODERS))
def test_parameters_that_are_not_trained_move_once_a_step(method_name, encoder):
    check_that_all_move_once(method_name, encoder)


@pytest.mark.parametrize("encoder", WITHOUT_MODEL)
@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_so_do_those_of_the_optimizer_without_a_model(method_name, encoder):
    check_that_all_move_once(method_name, encoder, model=None)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_so_do_those_that_are_in_no_optimizer(method_name, encoder):
    model = build(encoder, apart=True)
    optimizer = optimizer_of(method_name, model, params=[p for n, p in model.named_parameters() if ".key." not in n])
    for _ in range(3):
        right = copy.deepcopy(model)
        leave_in_each_pass(model, optimizer)
        x, y = batch()
        loss_of(right, x, y)
        step(model, optimizer, x, y)
        assert_same(state_of(model), state_of(right))


@pytest.mark.parametrize("how", ["no_grad", "lerp", "data_replaced", "no gradient any more"])
@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_a_teacher_that_is_frozen_and_moved_in_mid_training(method_name, how):
    model = build("no_grad, requires_grad", apart=True)
    average = model[1]
    average.forward = lambda x: average.query(x) + average.key(x)
    optimizer = optimizer_of(method_name, model)
    for _ in range(2):
        step(model, optimizer)
    del average.forward
    if how != "no gradient any more":
        average.key.requires_grad_(False)
        average.how = how
    for _ in range(2):
        right = copy.deepcopy(model)
        if how != "no gradient any more":
            leave_in_each_pass(model, optimizer)
        loss_of(right, *batch())
        step(model, optimizer)
        assert_same(state_of(model), state_of(right))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_an_undone_step_leaves_no_trace(method_name, kind):
    # (the only pass of the first step has to show what moves)
    model = build(kind, apart=method_name == "base" and kind in ENCODERS)
    optimizer = optimizer_of(method_name, model)
    leave_in_each_pass(model, optimizer)
    for _ in range(2):
        step(model, optimizer)
    leave_in_each_pass(model, optimizer)


@pytest.mark.parametrize("how", ["no_grad", "lerp", "data", "data_replaced", "replaced"])
@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_a_teacher_that_the_body_of_the_loop_moves(method_name, how):
    model = build("no_grad")
    model[1].forward = model[1].query.forward
    twin = copy.deepcopy(model)
    optimizer = optimizer_of(method_name, model)
    for _ in range(3):
        x, y = batch()
        twin[1].query.load_state_dict(model[1].query.state_dict())
        move(how, twin[1].key, twin[1].query)
        for _ in optimizer.passes():
            loss_of(model, x, y).backward()
            move(how, model[1].key, model[1].query)
        assert_same(state_of(model), state_of(twin))


def test_with_a_share_of_the_batch_the_last_pass_counts():
    model = build("assigned")
    optimizer = optimizer_of("gam", model, ascent_share=0.5)
    for _ in range(2):
        x, y = batch()
        before = state_of(model)
        for turn in optimizer.passes():
            assert_same(state_of(model), before)
            loss_of(model, *turn.rows(x, y)).backward()
            last = state_of(model)
        assert_same(state_of(model), last)


@pytest.mark.parametrize("training", ["mode", "switch"])
@pytest.mark.parametrize("kind", ["in_place", "functional", "assigned"])
def test_a_buffer_that_begins_to_move_later(kind, training):
    """Modes are looked at; a switch of another name is seen by the version, and a small buffer has a copy."""
    model, twin = build(kind), build(kind)
    if training == "switch" and kind == "functional":
        pytest.xfail("nothing shows a switch that is not the module's mode, where not even a version tells")
    for net in (model, twin):
        net[1].eval() if training == "mode" else setattr(net[1], "training", False)
    optimizer = optimizer_of("gam", model)
    for number in range(4):
        if number == 2:
            for net in (model, twin):
                net[1].training = True
        x, y = batch()
        take_trained(twin, model)
        loss_of(twin, x, y)
        for _ in optimizer.passes():
            loss_of(model, x, y).backward()
        assert_same(state_of(model), state_of(twin))


class Gated(nn.Module):
    """A large buffer that a flag keeps from moving."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.zeros(places.SMALL + 1))
        self.flag = False

    def forward(self, x):
        if self.flag:
            self.bank += 1
        return x


@pytest.mark.parametrize("start", [0, 2])
def test_a_large_buffer_that_begins_to_move_later_moves_once_too(start, monkeypatch):
    if start == 0:  # the copies of the first step have a limit
        monkeypatch.setattr(buffers, "LEAST_BYTES", 0)
    model = nn.Sequential(nn.Linear(5, 3), Gated())
    optimizer = optimizer_of("gam", model)
    for number in range(4):
        model[1].flag = number >= start
        step(model, optimizer)
        assert model[1].bank.unique().tolist() == [max(0, number + 1 - start)]


def test_only_what_moves_or_is_small_is_copied_after_the_first_step():
    model = nn.Sequential(nn.Linear(5, 4), Gated(), Queue(), nn.Linear(4, 3))
    state = buffers.ForwardState()
    for number in range(3):
        state.enter(model, list(model.parameters()))
        copied = {place.name for place in state._places if place.start is not None}
        assert copied >= {"queue", "queue_ptr"}
        assert ("bank" in copied) == (number == 0)
        for _ in range(2):
            state.begin()
            loss_of(model, *batch()).backward()
        state.exit(undo=False)
    assert int(model[2].queue_ptr) == 36


def test_named_buffers_may_move_in_every_pass():
    model = build("in_place")
    optimizer = optimizer_of("gam", model, moving_buffers=["*.steps"])
    for _ in range(2):
        step(model, optimizer)
    assert int(model[1].steps) == 8
    with pytest.raises(ValueError, match=r"'\*.stepss' fits no buffer of the model, which has 1.centre, 1.spread"):
        optimizer_of("gam", model, moving_buffers=["*.stepss"]).step(lambda: None)
    with pytest.raises(TypeError, match="list of patterns"):
        optimizer_of("gam", model, moving_buffers="steps")


def test_a_parameter_that_begins_to_be_trained_is_trained():
    model = build("no_grad, requires_grad", apart=True)
    optimizer = optimizer_of("gam", model)
    step(model, optimizer)
    model[1].forward = lambda x: model[1].query(x) - model[1].key(x)
    twin = copy.deepcopy(model)
    twin[1].forward = lambda x: twin[1].query(x) - twin[1].key(x)
    other = optimizer_of("gam", twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        x, y = batch()
        step(model, optimizer, x, y)
        step(twin, other, x, y)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))


# Parameters that are being trained


class ActNorm(nn.Module):
    def __init__(self, by_data):
        super().__init__()
        self.by_data = by_data
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x):
        if not self.initialized:
            with torch.no_grad():
                (self.scale.data if self.by_data else self.scale).copy_(1 / x.std(0))
            self.initialized.fill_(True)
        return x * self.scale


class Bag(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.table = kind(7, 4, max_norm=0.5)

    def forward(self, x):
        return self.table((x[:, :1].abs() * 3).long().clamp(max=6)).reshape(len(x), 4)


WRITERS = {
    "embedding": (lambda: Bag(nn.Embedding), "0.table.weight"),
    "embedding_bag": (lambda: Bag(nn.EmbeddingBag), "0.table.weight"),
    "actnorm": (lambda: nn.Sequential(nn.Linear(5, 4), ActNorm(by_data=False)), "0.1.scale"),
    "actnorm_by_data": (lambda: nn.Sequential(nn.Linear(5, 4), ActNorm(by_data=True)), "0.1.scale"),
}


@pytest.mark.parametrize(("method_name", "writer"), [*in_turn(["base"], WRITERS), *in_turn(MULTIPASS, WRITERS)])
def test_a_forward_that_writes_to_trained_parameters(method_name, writer):
    make, name = WRITERS[writer]
    model = nn.Sequential(make(), nn.Linear(4, 3))
    x, y = batch()
    if METHODS[method_name].passes == 1:
        twin = copy.deepcopy(model)
        plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        optimizer = optimizer_of(method_name, model)
        for _ in range(2):
            plain.zero_grad()
            loss_of(twin, x, y).backward()
            plain.step()
            step(model, optimizer, x, y)
            torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
    else:
        optimizer = optimizer_of(method_name, model)
        with pytest.raises(
            RuntimeError, match=rf"\({name}\), of shape .* was modified during pass 0 .*max_norm=.*once"
        ):
            step(model, optimizer, x, y)
        step(model, optimizer_of(method_name, model, active=lambda step: False), x, y)


@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_lazy_modules(method_name):
    torch.manual_seed(2)
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 3))
    x, y = batch()
    optimizer = optimizer_of(method_name, model)
    if METHODS[method_name].passes > 1:
        with pytest.raises(RuntimeError, match="0.weight is not initialized: .*run the model once"):
            step(model, optimizer, x, y)
        with torch.no_grad():
            model.eval()(x)
        model.train()
    for _ in range(2):
        step(model, optimizer, x, y)
    assert int(model[1].num_batches_tracked) == 2


# model= forgotten


def forgotten(how):
    """Steps of a GAM without ``model=``, called in different ways."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=how != "plain"), nn.Linear(4, 3))
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1)
    x, y = batch()
    if how in ("attribute", "list"):
        held = types.SimpleNamespace(model=model) if how == "attribute" else [model]
        del model
        if how == "attribute":
            return lambda: optimizer.step(lambda: loss_of(held.model, x, y).backward())
        return lambda: optimizer.step(lambda: loss_of(held[0], x, y).backward())
    if how == "loop":
        return lambda: [loss_of(model, x, y).backward() for _ in optimizer.passes()]
    return lambda: optimizer.step(lambda: loss_of(model, x, y).backward())


@pytest.mark.parametrize("how", ["a part", "a copy"])
def test_a_model_that_does_not_hold_all_parameters_is_warned_of_once(how):
    model, x, y = build("batchnorm"), *batch()
    given = copy.deepcopy(model) if how == "a copy" else [*model.modules()][-1]
    optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=given)
    with pytest.warns(UserWarning, match=r"buffers of the module that this SAM trains .*a module that holds all"):
        optimizer.step(lambda: loss_of(model, x, y).backward())
    optimizer.step(lambda: loss_of(model, x, y).backward())


@pytest.mark.parametrize("how", ["loop", "closure", "plain", "attribute", "list"])
def test_a_forgotten_model_is_warned_of_once(how):
    take = forgotten(how)
    with pytest.warns(UserWarning, match=r"buffers of the module that this GAM trains \(1.running_mean, .*model=model"):
        take()
    take()  # warnings are errors here


def test_where_nothing_moves_in_every_pass_nobody_is_warned():
    x, y = batch()
    for model, options in (
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 3)), {}),
        (nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), Gated(), nn.Linear(4, 3)), {}),
        (build("batchnorm"), {"freeze_running_statistics": False}),
        (build("batchnorm"), {"interval": float("inf")}),
    ):
        optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(lambda model=model: loss_of(model, x, y).backward())
    base = gam_fast.Base(build("batchnorm").parameters(), torch.optim.SGD, lr=0.1)
    base.step(lambda: None)
