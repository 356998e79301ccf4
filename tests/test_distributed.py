"""Data parallelism by real processes and collectives (gloo, on a CPU)."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import warnings
from contextlib import closing

import pytest
import reference
import torch
from cases import METHODS, closure_of, loss_of, make
from ranks import RankError, Ranks, free_port, same_on_all_ranks
from torch import distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

import gam_fast

STEPS = 4
MULTIPASS = ["sam", "gsam", "gam"]
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-4}),
}
WRAPPERS = {
    "plain": {},
    "bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
    "find_unused": {"find_unused_parameters": True},
    "small_buckets": {"bucket_cap_mb": 0.0001},
}


def optimizer_of(model, method_name, base_name="sgd", **options):
    method, (base, arguments) = METHODS[method_name], BASES[base_name]
    return method.optimizer(model.parameters(), base, model=model, **arguments, **method.hyper, **options)


def share(tensor, rank, world):
    return tensor.chunk(world)[rank]


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_close(ours, theirs, tolerance=1e-10):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


# Global: every pass along the averaged gradient


def train_global(rank, world, method_name, base_name, wrapper, model_name, backend):
    model, batches = make(model_name)
    ddp = DistributedDataParallel(model, **WRAPPERS[wrapper])
    optimizer = optimizer_of(ddp, method_name, base_name, backend=backend)
    for x, y in batches:
        optimizer.step(closure_of(ddp, share(x, rank, world), share(y, rank, world)))
    alone, _ = make(model_name)
    single = optimizer_of(alone, method_name, base_name, backend="eager")
    for x, y in batches:
        single.step(closure_of(alone, x, y))
    assert_close(values(model), values(alone))
    assert same_on_all_ranks(model.parameters())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_global_steps_are_those_of_one_process(two, wrapper):
    for method_name in MULTIPASS:
        two.run(train_global, method_name, "sgd", wrapper, "mlp", "auto")
    if wrapper == "find_unused":
        two.run(train_global, "gam", "sgd", wrapper, "partly_used", "eager")


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_global_steps_of_four_processes_are_those_of_one(four, backend):
    four.run(train_global, "gam", "adamw", "plain", "tied_transformer", backend)


class SyncedNorm(nn.Module):
    """What SyncBatchNorm does, which torch has for accelerators only: statistics of the batches of all ranks."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(features, dtype=torch.float64))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x):
        count = len(x) * distributed.get_world_size()
        mean = all_reduce(x.sum(0)) / count
        var = all_reduce((x - mean).square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var * count / (count - 1), 0.1)
            self.num_batches_tracked += 1
        return (x - mean) / (var + 1e-5).sqrt()


def train_synced_norm(rank, world):
    def build(norm):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 3)).double()

    model, alone = build(SyncedNorm(8)), build(nn.BatchNorm1d(8, affine=False))
    ddp = DistributedDataParallel(model)
    ours, theirs = optimizer_of(ddp, "gam"), optimizer_of(alone, "gam")
    for x, y in make("mlp")[1]:
        ours.step(closure_of(ddp, share(x, rank, world), share(y, rank, world)))
        theirs.step(closure_of(alone, x, y))
    assert_close(values(model), values(alone), 1e-9)
    assert_close([model[1].running_mean, model[1].running_var], [alone[1].running_mean, alone[1].running_var], 1e-9)
    assert model[1].num_batches_tracked == len(make("mlp")[1])


def test_statistics_over_all_ranks_move_once_a_step(two):
    two.run(train_synced_norm)


def reductions_of(ddp):
    """The all-reduces of a DistributedDataParallel, counted as they are asked for."""
    counted = []

    def hook(_, bucket):
        counted.append(bucket.index())
        flat = bucket.buffer().div_(distributed.get_world_size())
        return distributed.all_reduce(flat, async_op=True).get_future().then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, hook)
    return counted


def count_reductions(rank, world, sync):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    counted = reductions_of(ddp)
    optimizer = optimizer_of(ddp, "gam", sync=sync)
    for x, y in batches:
        optimizer.step(closure_of(ddp, share(x, rank, world), share(y, rank, world)))
        assert ddp.require_backward_grad_sync
    return len(counted)


def test_a_local_step_asks_nothing_of_ddp(two):
    assert two.run(count_reductions, "global") == [4 * STEPS, 4 * STEPS]
    assert two.run(count_reductions, "local") == [0, 0]


def accumulate(rank, world, method_name):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    counted = reductions_of(ddp)
    optimizer = optimizer_of(ddp, method_name)
    alone, _ = make("mlp")
    single = optimizer_of(alone, method_name)
    for x, y in batches:
        single.step(closure_of(alone, x, y))
        mine = list(zip(share(x, rank, world).chunk(3), share(y, rank, world).chunk(3), strict=True))
        for turn in optimizer.passes():
            for a, b in optimizer.micro_batches(iter(mine)):
                turn.backward(loss_of(ddp, a, b) / 3)
    assert_close(values(model), values(alone))
    assert len(counted) == METHODS[method_name].passes * len(batches)  # once a pass

    def leave():
        for _ in optimizer.passes():
            for _ in optimizer.micro_batches([1, 2]):
                raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert ddp.require_backward_grad_sync


def test_micro_batches_are_averaged_once_a_pass(two):
    two.run(accumulate, "gam")
    two.run(accumulate, "base")  # which reads one micro-batch ahead of the one in use


# Local: each rank along its own gradient, the direction averaged


def gradient_at(model, x, y):
    params = list(model.parameters())

    def gradient(theta):
        with torch.no_grad():
            for p, value in zip(params, theta, strict=True):
                p.copy_(value)
        found = torch.autograd.grad(loss_of(model, x, y), params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]

    return gradient


def train_local(rank, world, method_name, base_name, wrapper, clip):
    method, (base, arguments) = METHODS[method_name], BASES[base_name]
    model, batches = make("mlp")
    wrapped = DistributedDataParallel(model, **WRAPPERS[wrapper]) if wrapper else model
    optimizer = optimizer_of(wrapped, method_name, base_name, sync="local", clip_grad_norm=clip)
    alone, _ = make("mlp")
    params = list(alone.parameters())
    plain = base(params, **arguments)
    for x, y in batches:
        optimizer.step(closure_of(wrapped, share(x, rank, world), share(y, rank, world)))
        theta = values(alone)
        directions = [
            method.reference(gradient_at(alone, share(x, r, world), share(y, r, world)), theta, **method.hyper)
            for r in range(world)
        ]
        for p, value, *ds in zip(params, theta, *directions, strict=True):
            p.data.copy_(value)
            p.grad = sum(ds) / world
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        plain.step()
        assert_close(values(model), values(alone))
    assert same_on_all_ranks(model.parameters())


@pytest.mark.parametrize("wrapper", [*(name for name in WRAPPERS if name != "static_graph"), None])
def test_a_local_step_is_the_mean_of_the_ranks_directions(two, wrapper):
    for method_name in MULTIPASS:
        two.run(train_local, method_name, "sgd", wrapper, None)
    two.run(train_local, "gam", "adamw", wrapper, 0.05)


def test_a_local_step_of_four_processes(four):
    four.run(train_local, "gam", "sgd", "plain", 0.05)


class Experts(nn.Module):
    """Two layers of which a batch takes one, and one that nobody takes."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x, which):
        return self.experts[which](x)


def train_experts(rank, world, sync):
    torch.manual_seed(7)
    model = Experts().double()
    start = values(model)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = gam_fast.SAM(ddp.parameters(), torch.optim.SGD, lr=0.1, weight_decay=0.1, rho=0.1, model=ddp, sync=sync)
    x, y = make("mlp")[1][0]
    for _ in range(3):
        for _ in optimizer.passes():
            loss = nn.functional.cross_entropy(ddp(share(x, rank, world), rank), share(y, rank, world))
            loss.backward()
    assert same_on_all_ranks(model.parameters())
    assert torch.equal(model.experts[2].weight, start[4])  # not even decayed
    # by hand
    torch.manual_seed(7)
    alone = Experts().double()
    for _ in range(3):
        theta = values(alone)
        used, directions = list(alone.parameters())[:4], []

        def gradient(point, ranks, used=used):
            for p, value in zip(used, point, strict=True):
                p.data.copy_(value)
            loss = sum(nn.functional.cross_entropy(alone(share(x, r, 2), r), share(y, r, 2)) for r in ranks)
            found = torch.autograd.grad(loss / len(ranks), used, allow_unused=True)
            return [torch.zeros_like(p) if g is None else g for p, g in zip(used, found, strict=True)]

        for ranks in [[0], [1]] if sync == "local" else [[0, 1]]:
            directions.append(reference.sam(lambda point, r=ranks: gradient(point, r), theta[:4], rho=0.1))
        for p, value, *ds in zip(used, theta, *directions, strict=False):
            p.data.copy_(value - 0.1 * (sum(ds) / len(ds) + 0.1 * value))
    assert_close(values(model), values(alone))


@pytest.mark.parametrize("sync", ["global", "local"])
def test_parameters_that_some_ranks_do_not_use(two, sync):
    two.run(train_experts, sync)


def train_batchnorm(rank, world, broadcast):
    model, batches = make("batchnorm_cnn")
    plain, _ = make("batchnorm_cnn")
    ddp, plain_ddp = (
        DistributedDataParallel(model, broadcast_buffers=broadcast),
        DistributedDataParallel(plain, broadcast_buffers=broadcast),
    )
    optimizer = gam_fast.SAM(ddp.parameters(), torch.optim.SGD, lr=0.0, rho=0.1, model=ddp, sync="local")
    for x, y in batches:
        mine = share(x, rank, world), share(y, rank, world)
        optimizer.step(closure_of(ddp, *mine))
        loss_of(plain_ddp, *mine).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.buffers(), plain.buffers(), strict=True))
    return model.net[1].running_mean


@pytest.mark.parametrize("broadcast", [True, False])
def test_buffers_of_a_local_step_are_those_of_plain_ddp(two, broadcast):
    first, second = two.run(train_batchnorm, broadcast)
    assert not torch.equal(first, second)


def train_long(rank, world, sync, steps):
    torch.manual_seed(rank)  # dropout differs
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = optimizer_of(ddp, "gam", sync=sync)
    data = torch.Generator().manual_seed(rank)
    losses = []
    for step in range(steps):
        x = torch.randn(8, 6, generator=data)
        y = (x.sum(1) > 0).long()
        losses.append(optimizer.step(closure_of(ddp, x, y)).item())
        if step % 50 == 49:
            assert same_on_all_ranks(model.parameters()), step
            assert same_on_all_ranks(s["momentum_buffer"] for s in optimizer.state.values()), step
    assert sum(losses[-50:]) < sum(losses[:50])  # it learns


@pytest.mark.parametrize("sync", ["global", "local"])
def test_replicas_have_the_same_bits_after_100_steps(two, four, sync):
    two.run(train_long, sync, 100)
    four.run(train_long, sync, 100)


# Faults


def nan_on_one_rank(rank, world, sync, policy, at):
    model, batches = make("batchnorm_cnn")
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp, "gam", sync=sync, on_nonfinite="raise" if policy == "raise" else "skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if policy == "scaler" else None
    mine = [(share(x, rank, world), share(y, rank, world)) for x, y in batches]

    def step(batch, spoiled):
        for turn in optimizer.passes(scaler=scaler):
            loss = loss_of(ddp, *batch)
            turn.backward(loss * float("nan") if spoiled and rank == 1 and turn.index == at else loss)

    step(mine[0], spoiled=False)
    before = [t.clone() for t in model.state_dict().values()]
    momenta = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    if policy == "raise":
        where = "rank 1" if sync == "local" else f"pass {at}"
        with pytest.raises(gam_fast.NonFiniteGradientError, match=where):
            step(mine[1], spoiled=True)
    else:
        step(mine[1], spoiled=True)
        assert optimizer.skipped_steps == 1
    now = list(model.state_dict().values())
    if sync == "global":  # whose forward takes over rank 0's buffers
        before, now = [list(model.parameters())] * 2
    assert all(torch.equal(p, q) for p, q in zip(before, now, strict=True))
    assert all(torch.equal(p, s["momentum_buffer"]) for p, s in zip(momenta, optimizer.state.values(), strict=True))
    if scaler is not None:
        assert scaler.get_scale() == 32.0
    step(mine[1], spoiled=False)
    assert same_on_all_ranks(model.parameters())
    assert not any(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize("policy", ["raise", "skip", "scaler"])
@pytest.mark.parametrize("sync", ["global", "local"])
def test_a_nan_on_one_rank_is_undone_by_all(two, sync, policy):
    for at in range(4):
        two.run(nan_on_one_rank, sync, policy, at)


def leave(rank, world, sync, how):
    """Rank 1 leaves a step in pass 3. What it and the others see."""
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp, "gam", sync=sync)
    mine = share(batches[0][0], rank, world), share(batches[0][1], rank, world)
    optimizer.step(closure_of(ddp, *mine))
    before = values(model)

    def step():
        for turn in optimizer.passes():
            if turn.index == 3 and rank == 1:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "break":
                    return
                raise KeyError("of the user's own")
            loss_of(ddp, *mine).backward()

    try:
        step()
        seen = "nothing"
    except Exception as error:
        seen = f"{type(error).__name__}: {error}"
    assert all(torch.equal(p, q) for p, q in zip(before, values(model), strict=True))
    assert ddp.require_backward_grad_sync
    if sync == "local":
        optimizer.step(closure_of(ddp, *mine))
        assert same_on_all_ranks(model.parameters())
        assert not all(torch.equal(p, q) for p, q in zip(before, values(model), strict=True))
    elif rank == 1:
        os._exit(7)  # what an error that nobody catches leads to
    return seen


@pytest.mark.parametrize("how", ["raise", "break"])
def test_others_are_told_when_a_rank_leaves_a_local_step(four, how):
    seen = four.run(leave, "local", how)
    assert seen[1] == ("KeyError: 'of the user\\'s own'" if how == "raise" else "nothing") or "KeyError" in seen[1]
    for rank in (0, 2, 3):
        assert "was left by an exception on rank 1; it is undone on all ranks" in seen[rank]


def leave_and_go_on(rank, world, how):
    """Rank 1 leaves its first local step by letting go of the iterator; then all take a second step."""
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp, "sam", sync="local")
    before = values(model)

    def passes(turns, count):
        for _ in itertools.islice(turns, count):
            loss_of(ddp, *batches[0]).backward()

    seen = "nothing"
    if rank == 1:
        turns = optimizer.passes()
        held = enumerate(turns) if how == "enumerate" else turns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the enumerate is noticed late
            passes(held, 1)
            next(held, None)
            del turns, held  # undone; who has to be told is told by the next step
    else:
        with pytest.raises(RuntimeError) as error:
            passes(optimizer.passes(), None)
        seen = str(error.value)
    assert all(torch.equal(p, q) for p, q in zip(before, values(model), strict=True))
    passes(optimizer.passes(), None)
    assert same_on_all_ranks(model.parameters())
    assert not all(torch.equal(p, q) for p, q in zip(before, values(model), strict=True))
    return seen


@pytest.mark.parametrize("how", ["passes", "enumerate"])
def test_no_collective_runs_in_a_finalizer_and_others_are_told_all_the_same(two, how):
    seen = two.run(leave_and_go_on, how)
    assert "was left by an exception on rank 1; it is undone on all ranks" in seen[0]
    assert seen[1] == "nothing"


def test_an_iterator_that_is_held_until_the_end_of_a_process_does_no_harm():
    program = """
import os, sys
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1], RANK="0", WORLD_SIZE="1")
import torch, gam_fast
from gam_fast.local_step import LocalSync
from torch import distributed, nn
distributed.init_process_group("gloo")
LocalSync.is_needed = staticmethod(lambda: True)
model = nn.Linear(3, 2)
optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1, sync="local")
turns = optimizer.passes()
held = enumerate(turns)
for _ in held:
    model(torch.ones(4, 3)).square().mean().backward()
    break
distributed.destroy_process_group()
print("the end")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(free_port())], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the end\n"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_others_get_an_error_when_a_rank_ends_in_a_global_step(how):
    ranks = Ranks(2)
    try:
        (fine, seen), (lives, ended) = ranks.answers(leave, "global", how, seconds=60)
    finally:
        ranks.close()
    assert not lives
    assert "ended with code" in ended
    assert fine, seen
    assert "RuntimeError" in seen or "DistBackendError" in seen


def train_and_save(rank, world, folder, until, kill_at):
    torch.manual_seed(rank)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 3))
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of(ddp, "gam", "adamw", sync="local")
    start = 0
    file = f"{folder}/{rank}.pt"
    if os.path.exists(file):
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        start = saved["step"]
    for step in range(start, until):
        data = torch.Generator().manual_seed(1000 * rank + step)
        x = torch.randn(8, 6, generator=data)
        for turn in optimizer.passes():
            if step == kill_at and turn.index == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            loss_of(ddp, x, (x.sum(1) > 0).long()).backward()
        if step % 3 == 2:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rng": torch.get_rng_state(),
                    "step": step + 1,
                },
                file,
            )
    return values(model)


def test_killed_in_a_step_and_resumed_from_the_checkpoint(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    ranks = Ranks(2)
    try:
        whole = ranks.run(train_and_save, str(tmp_path / "whole"), 9, None)
        killed = ranks.answers(train_and_save, str(tmp_path / "killed"), 9, 7, seconds=60)
        assert not any(fine for fine, _ in killed)
        resumed = ranks.run(train_and_save, str(tmp_path / "killed"), 9, None)
    finally:
        ranks.close()
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


# ZeroRedundancyOptimizer


def zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when imported

    return ZeroRedundancyOptimizer


def train_zero(rank, world, method_name, sync, bucket_view):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    method = METHODS[method_name]
    optimizer = method.optimizer(
        ddp.parameters(),
        zero(),
        optimizer_class=torch.optim.AdamW,
        parameters_as_bucket_view=bucket_view,
        lr=0.01,
        eps=1e-4,
        model=ddp,
        sync=sync,
        **method.hyper,
    )
    plain_model, _ = make("mlp")
    plain_ddp = DistributedDataParallel(plain_model)
    plain = optimizer_of(plain_ddp, method_name, "adamw", sync=sync)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    plain_scheduler = torch.optim.lr_scheduler.StepLR(plain, 2, 0.5)
    for x, y in batches:
        mine = share(x, rank, world), share(y, rank, world)
        optimizer.step(closure_of(ddp, *mine))
        plain.step(closure_of(plain_ddp, *mine))
        scheduler.step()
        plain_scheduler.step()
    assert_close(values(model), values(plain_model))
    assert same_on_all_ranks(model.parameters())
    held = len(optimizer.base.optim.state)
    optimizer.base.consolidate_state_dict(to=0)
    if rank == 0:
        saved = optimizer.state_dict()
        assert len(saved["state"]) == len(list(model.parameters()))
        assert saved["param_groups"][0]["lr"] == plain.param_groups[0]["lr"]
        plain.load_state_dict(saved)
        for ours, theirs in zip(saved["state"].values(), plain.state_dict()["state"].values(), strict=True):
            assert torch.equal(ours["exp_avg"], theirs["exp_avg"])
    return held


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("sync", ["global", "local"])
def test_zero_redundancy_optimizer_as_base(two, sync, bucket_view):
    for method_name in ("sam", "gam"):
        held = two.run(train_zero, method_name, sync, bucket_view)
        assert sum(held) == len(list(make("mlp")[0].parameters()))  # each holds a part of the state


def zero_with_overlap(rank, world):
    model, _ = make("mlp")
    with pytest.raises(TypeError, match="overlap_with_ddp=True.*steps in the backward pass"):
        gam_fast.SAM(
            model.parameters(),
            zero(),
            optimizer_class=torch.optim.SGD,
            overlap_with_ddp=True,
            lr=0.1,
        )


def test_zero_that_overlaps_with_ddp_is_refused(two):
    two.run(zero_with_overlap)


def local_with_static_graph(rank, world):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model, static_graph=True)
    optimizer = optimizer_of(ddp, "sam", sync="local")
    with pytest.raises(ValueError, match="static_graph=True.*leave static_graph out"):
        optimizer.step(closure_of(ddp, *batches[0]))
    assert optimizer.turn is None


def test_a_static_graph_is_refused_by_local_steps(two):
    two.run(local_with_static_graph)


# Without several processes, and misuse


def step_by_the_scaler(rank, world):
    model, batches = make("mlp")
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
    return all(torch.equal(p, q) for p, q in zip(before, values(model), strict=True))


def test_the_scalers_own_step_is_not_for_local_steps(two):
    assert two.run(step_by_the_scaler) == [True, True]


def test_one_process_takes_no_notice_of_sync():
    (one, batches), (two_, _) = make("mlp"), make("mlp")
    first, second = optimizer_of(one, "gam"), optimizer_of(two_, "gam", sync="local")
    for x, y in batches:
        first.step(closure_of(one, x, y))
        second.step(closure_of(two_, x, y))
    assert all(torch.equal(p, q) for p, q in zip(values(one), values(two_), strict=True))


@pytest.mark.parametrize("sync", ["none", None, "Global"])
def test_an_unknown_sync_is_refused(sync):
    with pytest.raises(ValueError, match="sync must be one of global, local, got"):
        gam_fast.SAM([nn.Parameter(torch.ones(1))], lr=0.1, sync=sync)


def test_a_rank_that_hangs_is_reported_with_what_it_does():
    with closing(Ranks(2)) as ranks:  # which start here: the seconds are those of the function alone
        with pytest.raises(RankError, match=r"(?s)ranks \[1\] of 2 not done in 10 s.*rank 1:.*hang"):
            ranks.run(hang, seconds=10)
        assert ranks.run(number) == [0, 1]  # others have taken their places


def hang(rank, world):
    if rank == 1:
        signal.pause()


def number(rank, world):
    return rank
