"""Data parallelism by real processes and collectives (gloo, on a CPU)."""

from __future__ import annotations

import itertools
import os
import re
import signal
import warnings

import pytest
import reference
import torch
from cases import ALL, BASES, VARIANTS, closure_of, in_turn, loss_of, make
from ranks import assert_close, in_a_process, on_two, optimizer_of, same_on_all_ranks, share, shares, values
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

import gam_fast
from gam_fast.active import WhenSteep

WRAPPERS = {
    "plain": {},
    "bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "find_unused": {"find_unused_parameters": True},
    "small_buckets": {"bucket_cap_mb": 0.0001},
}


def reductions_of(ddp):
    """The all-reduces of a DistributedDataParallel, counted as they are asked for."""
    counted = []

    def hook(_, bucket):
        counted.append(bucket.index())
        flat = bucket.buffer().div_(distributed.get_world_size())
        return distributed.all_reduce(flat, async_op=True).get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, hook)
    return counted


# Global: every pass along the averaged gradient


def train_global(rank, world, method_name, base_name, wrapper, model_name, backend):
    (model, batches), (alone, _) = make(model_name), make(model_name)
    ddp = DistributedDataParallel(model, **WRAPPERS[wrapper])
    optimizer = optimizer_of(ddp, method_name, base_name, backend=backend)
    single = optimizer_of(alone, method_name, base_name, backend="eager")
    for x, y in batches:
        optimizer.step(closure_of(ddp, share(x, rank, world), share(y, rank, world)))
        single.step(closure_of(alone, x, y))
    assert_close(values(model), values(alone))
    assert same_on_all_ranks(model.parameters())


@pytest.mark.parametrize(
    ("method_name", "base_name", "wrapper", "backend"),
    in_turn(
        ["sam", "gam", "gsam", "gam", "gam", "vasso", "momentum_sam", "wsam", "look", "sagm"],
        ["sgd_nesterov", "adamw"],
        WRAPPERS,
        ["auto", "auto", "auto", "eager"],
    ),
)
def test_global_steps_are_those_of_one_process(two, method_name, base_name, wrapper, backend):
    model_name = "partly_used" if wrapper == "find_unused" else "mlp"
    two.run(train_global, method_name, base_name, wrapper, model_name, backend)


def test_global_steps_of_four_processes_are_those_of_one(four):
    four.run(train_global, "gam", "adamw", "plain", "tied_transformer", "auto")


class SyncedNorm(nn.BatchNorm1d):
    """What SyncBatchNorm does, which torch has for accelerators only: statistics of the batches of all ranks."""

    def forward(self, x):
        count = len(x) * distributed.get_world_size()
        mean = all_reduce(x.sum(0)) / count
        var = all_reduce((x - mean).square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var * count / (count - 1), 0.1)
            self.num_batches_tracked += 1
        return (x - mean) / (var + self.eps).sqrt()


@on_two
def test_statistics_over_all_ranks_move_once_a_step(rank, world):
    def build(norm):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 8), norm(8, affine=False), nn.Tanh(), nn.Linear(8, 3)).double()

    model, alone = build(SyncedNorm), build(nn.BatchNorm1d)
    ddp = DistributedDataParallel(model)
    ours, theirs = optimizer_of(ddp, "gam"), optimizer_of(alone, "gam")
    for x, y in make("mlp")[1]:
        ours.step(closure_of(ddp, share(x, rank, world), share(y, rank, world)))
        theirs.step(closure_of(alone, x, y))
    assert_close(model.state_dict().values(), alone.state_dict().values(), 1e-9)


@on_two
def test_micro_batches_are_averaged_once_a_pass(rank, world):
    for method_name in ("gam", "base"):  # of which the last reads one micro-batch ahead of the one in use
        (model, batches), (alone, _) = make("mlp"), make("mlp")
        ddp = DistributedDataParallel(model)
        counted = reductions_of(ddp)
        optimizer, single = optimizer_of(ddp, method_name), optimizer_of(alone, method_name)
        for x, y in batches:
            single.step(closure_of(alone, x, y))
            mine = list(zip(share(x, rank, world).chunk(3), share(y, rank, world).chunk(3), strict=True))
            for turn in optimizer.passes():
                for a, b in optimizer.micro_batches(iter(mine)):
                    turn.backward(loss_of(ddp, a, b) / 3)
        assert_close(values(model), values(alone))
        assert len(counted) == ALL[method_name].passes * len(batches)  # once a pass

        def leave(optimizer=optimizer):
            for _ in optimizer.passes():
                for _ in optimizer.micro_batches([1, 2]):
                    raise KeyError

        with pytest.raises(KeyError):
            leave()
        assert ddp.require_backward_grad_sync


# Local: each rank along its own gradient, the direction averaged


def gradient_at(params, loss):
    """The gradient of ``loss()`` as a function of the values of ``params``."""

    def gradient(theta):
        with torch.no_grad():
            for p, value in zip(params, theta, strict=True):
                p.copy_(value)
        found = torch.autograd.grad(loss(), params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]

    return gradient


def train_local(rank, world, method_name, base_name, wrapper, clip):
    method = ALL[method_name]
    (model, batches), (alone, _) = make("mlp"), make("mlp")
    wrapped = DistributedDataParallel(model, **WRAPPERS[wrapper]) if wrapper else model
    counted = reductions_of(wrapped) if wrapper else []
    optimizer = optimizer_of(wrapped, method_name, base_name, sync="local", clip_grad_norm=clip)
    params = list(alone.parameters())
    plain = BASES[base_name](params)
    states = [{"step": 0, "used": lambda: [True] * len(params)} for _ in range(world)]
    for batch in batches:
        parts = [shares([batch], r, world)[0] for r in range(world)]
        optimizer.step(closure_of(wrapped, *parts[rank]))
        theta = values(alone)
        directions = [
            method.reference(
                gradient_at(params, lambda part=part: loss_of(alone, *part)),
                theta,
                **({"state": state} if method_name in VARIANTS else {}),
                **method.hyper,
            )
            for part, state in zip(parts, states, strict=True)
        ]
        memories = [state["memory"] for state in states if state.get("memory", [None])[0] is not None]
        for state in states:
            state["step"] += 1
            if memories:
                state["memory"] = [sum(of_rank) / world for of_rank in zip(*memories, strict=True)]
        for p, value, *ds in zip(params, theta, *directions, strict=True):
            p.data.copy_(value)
            p.grad = sum(ds) / world
        if clip:
            nn.utils.clip_grad_norm_(params, clip)
        plain.step()
    assert_close(values(model), values(alone))
    assert same_on_all_ranks(model.parameters())
    assert counted == []
    assert not wrapper or wrapped.require_backward_grad_sync


@pytest.mark.parametrize(
    ("method_name", "base_name", "wrapper", "clip"),
    in_turn(
        ["sam", "gsam", "gam", "gam", "gam", "vasso", "friendly", "look", "stable", "previous_gradient"],
        ["sgd_nesterov", "adamw", "rmsprop"],
        ["plain", "bucket_view", "find_unused", "small_buckets", None],
        [None, 0.05],
    ),
)
def test_a_local_step_is_the_mean_of_the_ranks_directions(two, method_name, base_name, wrapper, clip):
    two.run(train_local, method_name, base_name, wrapper, clip)


def test_a_local_step_of_four_processes(four):
    four.run(train_local, "gam", "sgd_nesterov", "plain", 0.05)


class Experts(nn.Module):
    """Two layers of which a batch takes one, and one that nobody takes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(3)).double()

    def forward(self, x, which):
        return self.experts[which](x)


@pytest.mark.parametrize("sync", ["global", "local"])
@on_two
def test_parameters_that_some_ranks_do_not_use(rank, world, sync):
    model, alone = Experts(), Experts()
    unused = model.experts[2].weight.clone()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = gam_fast.SAM(ddp.parameters(), torch.optim.SGD, lr=0.1, weight_decay=0.1, rho=0.1, model=ddp, sync=sync)
    parts = [shares(make("mlp")[1], r, world)[0] for r in range(world)]
    used = list(alone.parameters())[:4]

    def loss(module, r):
        x, y = parts[r]
        return nn.functional.cross_entropy(module(x, r), y)

    for _ in range(3):
        optimizer.step(lambda: loss(ddp, rank).backward())
        theta = [p.detach().clone() for p in used]
        directions = [
            reference.sam(
                gradient_at(used, lambda group=group: sum(loss(alone, r) for r in group) / len(group)), theta, rho=0.1
            )
            for group in ([[0], [1]] if sync == "local" else [[0, 1]])
        ]
        for p, value, *ds in zip(used, theta, *directions, strict=True):
            p.data.copy_(value - 0.1 * (sum(ds) / len(ds) + 0.1 * value))
    assert_close(values(model), values(alone))
    assert same_on_all_ranks(model.parameters())
    assert torch.equal(model.experts[2].weight, unused)  # not even decayed


def train_batchnorm(rank, world, broadcast, options):
    (model, batches), (plain, _) = make("batchnorm_cnn"), make("batchnorm_cnn")
    ddp, plain_ddp = (DistributedDataParallel(m, broadcast_buffers=broadcast) for m in (model, plain))
    optimizer = gam_fast.SAM(ddp.parameters(), torch.optim.SGD, lr=0.0, model=ddp, sync="local", **options)
    for x, y in shares(batches, rank, world):
        for turn in optimizer.passes():
            turn.backward(loss_of(ddp, *turn.rows(x, y)))
        loss_of(plain_ddp, x, y).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.buffers(), plain.buffers(), strict=True))
    return model.net[1].running_mean


@pytest.mark.parametrize(
    ("broadcast", "options"),
    [(True, {"rho": 0.1}), (False, {"rho": 0.1}), (True, {"rho": 0.0, "ascent_share": 0.5})],
    ids=["broadcast", "each its own", "of the last pass"],
)
def test_buffers_of_a_local_step_are_those_of_plain_ddp(two, broadcast, options):
    first, second = two.run(train_batchnorm, broadcast, options)
    assert not torch.equal(first, second)


def train_long(rank, world, sync):
    torch.manual_seed(rank)  # dropout differs
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = optimizer_of(ddp, "gam", sync=sync)
    data = torch.Generator().manual_seed(rank)
    losses = []
    for step in range(100):
        x = torch.randn(8, 6, generator=data)
        losses.append(optimizer.step(closure_of(ddp, x, (x.sum(1) > 0).long())).item())
        if step % 50 == 49:
            assert same_on_all_ranks(model.parameters()), step
            assert same_on_all_ranks(s["momentum_buffer"] for s in optimizer.state.values()), step
    assert sum(losses[-50:]) < sum(losses[:50])  # it learns


def test_replicas_have_the_same_bits_after_100_steps(two, four):
    two.run(train_long, "global")
    four.run(train_long, "local")


# Faults


@pytest.mark.parametrize("policy", ["raise", "skip", "scaler"])
@pytest.mark.parametrize("sync", ["global", "local"])
@on_two
def test_a_nan_on_one_rank_is_undone_by_all(rank, world, sync, policy):
    model, batches = make("batchnorm_cnn")
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp, "gam", sync=sync, on_nonfinite="raise" if policy == "raise" else "skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if policy == "scaler" else None
    first, second = shares(batches[:2], rank, world)

    def step(batch, spoiled=None):
        for turn in optimizer.passes(scaler=scaler):
            loss = loss_of(ddp, *batch)
            turn.backward(loss * float("nan") if rank == 1 and turn.index == spoiled else loss)

    step(first)
    for at in (0, 3):
        # the forward of a global step takes over rank 0's buffers
        state = list(model.parameters()) if sync == "global" else list(model.state_dict().values())
        state += [s["momentum_buffer"] for s in optimizer.state.values()]
        before = [t.clone() for t in state]
        if policy == "raise":
            where = "rank 1" if sync == "local" else f"pass {at}"
            with pytest.raises(gam_fast.NonFiniteGradientError, match=where):
                step(second, spoiled=at)
        else:
            step(second, spoiled=at)
        assert all(map(torch.equal, before, state))
    assert optimizer.skipped_steps == (0 if policy == "raise" else 2)
    assert scaler is None or scaler.get_scale() == 16.0
    step(second)
    assert same_on_all_ranks(model.parameters())
    assert not any(p.isnan().any() for p in model.parameters())


def leave(rank, world, how, at, options):
    """Rank 1 leaves a local step before the backward of pass ``at``. Return what each rank sees."""
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    optimizer = gam_fast.GAM(ddp.parameters(), torch.optim.SGD, lr=0.1, model=ddp, sync="local", **options)
    first, second, *_ = shares(batches, rank, world)

    def take(passes, batch, count=None):
        for _ in itertools.islice(passes, count):
            loss_of(ddp, *batch).backward()

    def closure(turn):
        if rank == 1 and turn.index == at:
            raise KeyError("of the user's own")
        loss_of(ddp, *second).backward()

    take(optimizer.passes(), first)
    before, group = values(model), dict(optimizer.param_groups[0], params=None)
    seen = "nothing"
    try:
        if how == "raise":
            optimizer.step(closure)
        elif rank == 1:
            turns = optimizer.passes()
            held = enumerate(turns) if how == "let go of a wrapper" else turns
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the wrapper is noticed late
                take(held, second, at)
                next(held, None)
                del turns, held  # undone; where this is late, the next step tells the others
        else:
            take(optimizer.passes(), second)
    except (KeyError, RuntimeError) as error:
        seen = str(error)
    assert all(map(torch.equal, before, values(model)))
    assert group == dict(optimizer.param_groups[0], params=None)
    assert ddp.require_backward_grad_sync
    take(optimizer.passes(), second)
    assert same_on_all_ranks(model.parameters())
    assert not any(map(torch.equal, before, values(model)))
    return seen


STEEP = {"active": WhenSteep(deviations=-1e9)}


LEAVING = {
    "raise": ("raise", 3, {}),
    "return": ("return", 3, {}),
    "let go of a wrapper": ("let go of a wrapper", 2, {}),
    "before the decision": ("raise", 0, STEEP),
    "after the decision": ("raise", 1, STEEP),
}


@pytest.mark.parametrize("row", LEAVING)
def test_others_are_told_when_a_rank_leaves_a_local_step(two, row):
    """Also when it is the garbage collector that ends the step, in which no collective runs."""
    theirs, own = two.run(leave, *LEAVING[row])
    assert "was left by an exception on rank 1; it is undone on all ranks" in theirs
    assert ("of the user's own" if "raise" in LEAVING[row] else "nothing") in own


def train_and_save(rank, world, folder, kill_at):
    """Rank 1 is killed in pass 2 of step ``kill_at``. Return the parameters, or what the others see of it."""
    torch.manual_seed(rank)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 3))
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp, "gam", "adamw")
    file = folder / f"{rank}.pt"
    saved = {"step": 0}
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])

    def step(number):
        data = torch.Generator().manual_seed(1000 * rank + number)
        x = torch.randn(8, 6, generator=data)
        for turn in optimizer.passes():
            if number == kill_at and rank == 1 and turn.index == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            loss_of(ddp, x, (x.sum(1) > 0).long()).backward()

    for number in range(saved["step"], 6):
        before = values(model)
        try:
            step(number)
        except Exception as error:
            assert all(map(torch.equal, before, values(model)))
            return f"{type(error).__name__}: {error}"
        if number == 2:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "rng": torch.get_rng_state(), "step": number + 1}, file)
    return values(model)


def test_others_get_an_error_when_a_rank_is_killed_and_the_checkpoint_resumes(two, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    expected = two.run(train_and_save, whole, None)
    (fine, seen), (lives, ended) = two.answers(train_and_save, killed, 4, seconds=60)
    assert not lives
    assert "ended with code" in ended
    assert fine, seen
    assert re.match("RuntimeError|DistBackendError", seen)
    for ours, theirs in zip(two.run(train_and_save, killed, None), expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_an_iterator_that_is_held_until_the_end_of_a_process_does_no_harm():
    program = """
import gam_fast, torch
from gam_fast.local_step import LocalSync
from torch import distributed
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
LocalSync.is_needed = staticmethod(lambda: True)
model = torch.nn.Linear(3, 2)
held = enumerate(gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1, sync="local").passes())
for _ in held:
    model(torch.ones(4, 3)).square().mean().backward()
    break
distributed.destroy_process_group()
"""
    in_a_process(program, warnings="default")


@on_two
def test_a_rank_may_leave_a_local_step_before_its_first_forward(rank, world):
    """The other rank's forward then waits for no buffers: the step has them from rank 0 already."""
    model, batches = make("batchnorm_cnn")
    ddp = DistributedDataParallel(model)
    optimizer = gam_fast.SAM(ddp.parameters(), torch.optim.SGD, lr=0.1, model=ddp, sync="local")
    mine = shares(batches, rank, world)
    before = values(model)

    def step(fails):
        for _ in optimizer.passes():
            if fails:
                raise KeyError("reading the batch failed")
            loss_of(ddp, *mine[0]).backward()

    with pytest.raises(KeyError if rank == 1 else RuntimeError, match=r"reading the batch|left .* on rank 1"):
        step(rank == 1)
    assert all(map(torch.equal, before, values(model)))
    step(False)
    assert same_on_all_ranks(model.parameters())
    assert not all(map(torch.equal, before, values(model)))


@on_two
def test_clipping_has_the_same_bits_on_all_ranks_whatever_they_use(rank, world):
    """The order in which a rank adds up the squares is that in which it has used the parameters."""
    torch.manual_seed(7)
    model = nn.ModuleList(nn.Linear(6, 40) for _ in range(2)).double()
    ddp = DistributedDataParallel(Switch(model), find_unused_parameters=True)
    optimizer = gam_fast.Base(
        ddp.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=ddp, sync="local", clip_grad_norm=0.05
    )
    for step in range(40):
        x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2 * step + rank))
        optimizer.step(lambda x=x: (ddp(x, rank) - 1).square().mean().backward())
        assert same_on_all_ranks(model.parameters()), step


class Switch(nn.Module):
    """One of several layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, which):
        return self.layers[which](x)


@on_two
def test_micro_batches_of_a_static_graph(rank, world):
    """torch records its graph in a pass that averages, so each micro-batch is averaged."""
    (model, batches), (alone, _) = make("mlp"), make("mlp")
    ddp = DistributedDataParallel(model, static_graph=True)
    optimizer, single = optimizer_of(ddp, "gam"), optimizer_of(alone, "gam")
    for x, y in batches:
        for _ in optimizer.passes():
            for part in optimizer.micro_batches(list(zip(*(t.chunk(2) for t in (x, y)), strict=True))):
                (loss_of(ddp, *shares([part], rank, world)[0]) / 2).backward()
        single.step(closure_of(alone, x, y))
    assert_close(values(model), values(alone), 1e-9)


# What is refused


@on_two
def test_local_steps_of_several_models_and_rules_in_join_are_refused(rank, world):
    model, batches = make("mlp")
    several = nn.ModuleList(DistributedDataParallel(module) for module in (model, nn.Linear(2, 2)))
    optimizer = gam_fast.SAM(model.parameters(), lr=0.1, model=several, sync="local")
    with pytest.raises(ValueError, match="several DistributedDataParallels: wrap the modules in one"):
        optimizer.step(closure_of(several[0], *batches[0]))
    ddp = several[0]
    before = values(model)
    for options, what in (
        ({"sync": "local"}, "sync='local'"),
        ({"interval": 2}, "a step by interval= or active="),
        ({"active": WhenSteep()}, "a step by interval= or active="),
    ):
        optimizer = gam_fast.SAM(ddp.parameters(), lr=0.1, model=ddp, **options)
        with ddp.join(), pytest.raises(RuntimeError, match=rf"{what} in DistributedDataParallel.join\(\).*drop_last"):
            optimizer.step(closure_of(ddp, *batches[0]))
    assert all(map(torch.equal, before, values(model)))


@on_two
def test_what_local_steps_cannot_do_is_refused(rank, world):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model, static_graph=True)
    optimizer = optimizer_of(ddp, "sam", sync="local")
    with pytest.raises(ValueError, match="static_graph=True.*leave static_graph out"):
        optimizer.step(closure_of(ddp, *batches[0]))
    assert optimizer.turn is None
    optimizer = optimizer_of(DistributedDataParallel(model), "gam", sync="local")
    scaler = torch.amp.GradScaler("cpu")
    before = values(model)

    def step():
        for turn in optimizer.passes():
            scaler.scale(loss_of(model, *batches[0])).backward()
            if turn.last:
                scaler.step(optimizer)

    with pytest.raises(RuntimeError, match=r"scaler.step\(optimizer\) in a step with sync='local'.*passes\(scaler="):
        step()
    assert all(map(torch.equal, before, values(model)))


def test_one_process_takes_no_notice_of_sync():
    (one, batches), (two_, _) = make("mlp"), make("mlp")
    first, second = optimizer_of(one, "gam"), optimizer_of(two_, "gam", sync="local")
    for x, y in batches:
        first.step(closure_of(one, x, y))
        second.step(closure_of(two_, x, y))
    assert all(map(torch.equal, values(one), values(two_)))
