"""Sharded parameters (FSDP2, hybrid, tensor parallel, beside plain ones) by real processes, on a CPU."""

from __future__ import annotations

import pytest
import torch
from cases import METHODS, closure_of, loss_of, make
from snapshots import assert_same, everything
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import gam_fast

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-4}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3, "eps": 1e-4}),
}


def optimizer_of(model, method_name, base_name="sgd", **options):
    method, (base, arguments) = METHODS[method_name], BASES[base_name]
    return method.optimizer(model.parameters(), base, model=model, **arguments, **method.hyper, **options)


def share(tensor, rank, world):
    return tensor.chunk(world)[rank]


def shard(model, mesh, **options):
    """``fully_shard`` each layer and what is left; most sizes are not divisible by the number of ranks."""
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def full(model):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def assert_close(ours, theirs, tolerance=1e-9):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def mesh_of(world, kind):
    if kind == "hybrid":
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (world,))


def train(rank, world, kind, method_name, base_name, backend, model_name, options):
    model, batches = make(model_name)
    shard(model, mesh_of(world, kind))
    optimizer = optimizer_of(model, method_name, base_name, backend=backend, **options)
    alone, _ = make(model_name)
    single = optimizer_of(alone, method_name, base_name, backend="eager", **options)
    for x, y in batches:
        optimizer.step(closure_of(model, share(x, rank, world), share(y, rank, world)))
        single.step(closure_of(alone, x, y))
        assert_close(full(model), full(alone))
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if value.dim():
                assert value.placements == p.placements, name  # so that checkpoints know where it belongs


@pytest.mark.parametrize("base_name", BASES)
@pytest.mark.parametrize("method_name", ["base", "sam", "asam", "gsam", "gam"])
def test_fully_shard_takes_the_steps_of_one_process(two, method_name, base_name):
    for backend in ("eager", "auto"):
        two.run(train, "plain", method_name, base_name, backend, "mlp", {})


def test_fully_shard_clips_by_the_norm_over_all_ranks(two):
    two.run(train, "plain", "gam", "sgd", "auto", "mlp", {"clip_grad_norm": 0.05})


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_four_ranks_sharded_and_replicated(four, kind):
    four.run(train, kind, "gam", "sgd", "auto", "mlp", {"clip_grad_norm": 0.5})
    four.run(train, kind, "gam", "adamw", "auto", "mlp", {})


def tensor_parallel(rank, world, with_fsdp):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def build():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 3)).double()

    model, alone = build(), build()
    parts = world // 2 if with_fsdp else world
    mesh = init_device_mesh("cpu", (world // parts, parts), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if with_fsdp:
        shard(model, mesh["dp"])
    optimizer, single = optimizer_of(model, "gam"), optimizer_of(alone, "gam")
    index, count = (mesh["dp"].get_local_rank(), 2) if with_fsdp else (0, 1)
    for x, y in make("mlp")[1]:
        optimizer.step(closure_of(model, share(x, index, count), share(y, index, count)))
        single.step(closure_of(alone, x, y))
        assert_close(full(model), full(alone))


def test_tensor_parallel_beside_plain_parameters(two):
    two.run(tensor_parallel, False)


def test_tensor_parallel_within_fully_shard(four):
    four.run(tensor_parallel, True)


def count_reductions(rank, world, kind):
    model, batches = make("mlp")
    shard(model, mesh_of(world, kind))
    optimizer = optimizer_of(model, "gam")
    counted = []
    original = distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        counted.append(tuple(tensor.shape))
        return original(tensor, *args, **kwargs)

    closure = closure_of(model, *batches[0])
    optimizer.step(closure)
    distributed.all_reduce = counting
    try:
        optimizer.step(closure)
    finally:
        distributed.all_reduce = original
    return [shape for shape in counted if shape in ((1,), (1, 1, 3))]


def test_one_scalar_all_reduce_for_each_norm(two, four):
    expected = [(1,), (1,), (1,), (1, 1, 3)]  # of three moves, and of the products of the direction
    assert two.run(count_reductions, "plain") == [expected] * 2
    assert four.run(count_reductions, "hybrid") == [expected] * 4


def mixed_precision(rank, world):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, batches = make("mlp", torch.float32)
    shard(model, mesh_of(world, "plain"), mp_policy=policy)
    optimizer = optimizer_of(model, "gam")
    alone, _ = make("mlp", torch.float32)
    single = optimizer_of(alone, "gam")
    for x, y in batches:
        optimizer.step(closure_of(model, share(x, rank, world), share(y, rank, world)))

        def closure(x=x, y=y):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(alone, x, y)
            loss.backward()

        single.step(closure)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_close(full(model), full(alone), 0.05)


def test_mixed_precision_policy(two):
    two.run(mixed_precision)


def offloaded(rank, world):
    from torch.distributed.fsdp import CPUOffloadPolicy

    model, batches = make("mlp")
    shard(model, mesh_of(world, "plain"), offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = optimizer_of(model, "gam")
    alone, _ = make("mlp")
    single = optimizer_of(alone, "gam")
    for x, y in batches:
        optimizer.step(closure_of(model, share(x, rank, world), share(y, rank, world)))
        single.step(closure_of(alone, x, y))
    assert_close(full(model), full(alone))


def test_cpu_offload_policy(two):
    two.run(offloaded)


def undone(rank, world, how):
    """A step that is left: shards are as before, and no module keeps a gathered copy of what was moved."""
    model, batches = make("mlp")
    shard(model, mesh_of(world, "plain"), reshard_after_forward=False)
    optimizer = optimizer_of(model, "gam", on_nonfinite="skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    mine = [(share(x, rank, world), share(y, rank, world)) for x, y in batches]
    for turn in optimizer.passes(scaler=scaler):
        turn.backward(loss_of(model, *mine[0]))
    theta = [p.to_local().clone() for p in model.parameters()]
    with torch.no_grad():
        loss = loss_of(model, *mine[1])  # leaves parameters gathered

    def step():
        for turn in optimizer.passes(scaler=scaler):
            found = loss_of(model, *mine[0])
            if turn.index == 2 and how == "raise":
                raise KeyError("between forward and backward")
            turn.backward(found * float("inf") if how == "nan" and turn.index == 2 and rank == 1 else found)

    if how == "raise":
        with pytest.raises(KeyError):
            step()
    else:
        step()
        assert (optimizer.skipped_steps, scaler.get_scale()) == (1, 32.0)
    assert all(torch.equal(p.to_local(), q) for p, q in zip(optimizer.param_groups[0]["params"], theta, strict=True))
    with torch.no_grad():
        assert torch.equal(loss_of(model, *mine[1]), loss)
    alone, _ = make("mlp")
    single = optimizer_of(alone, "gam")
    single.step(closure_of(alone, *batches[0]))
    single.step(closure_of(alone, *batches[1]))
    for turn in optimizer.passes(scaler=scaler):
        turn.backward(loss_of(model, *mine[1]))
    assert_close(full(model), full(alone))


@pytest.mark.parametrize("how", ["raise", "nan"])
def test_a_step_that_is_left_is_undone_on_all_ranks(two, how):
    two.run(undone, how)


def save(rank, world, folder, base_name):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, batches = make("mlp")
    shard(model, mesh_of(world, "plain"))
    optimizer = optimizer_of(model, "gam", base_name)
    for x, y in batches:
        optimizer.step(closure_of(model, share(x, rank, world), share(y, rank, world)))
    states = get_state_dict(model, optimizer)
    checkpoint.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)


def resume(rank, world, folder, base_name):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, batches = make("mlp")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    shard(model, mesh_of(world, "plain"))
    optimizer = optimizer_of(model, "gam", base_name)
    optimizer.param_groups[0].update(rho=0.9, lr=7.0)
    states = get_state_dict(model, optimizer)
    wanted = {"model": states[0], "optimizer": states[1]}
    checkpoint.load(wanted, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=wanted["model"], optim_state_dict=wanted["optimizer"])
    assert optimizer.param_groups[0]["rho"] == METHODS["gam"].hyper["rho"]
    assert optimizer.param_groups[0]["lr"] == BASES[base_name][1]["lr"]
    alone, _ = make("mlp")
    single = optimizer_of(alone, "gam", base_name)
    for x, y in batches:
        single.step(closure_of(alone, x, y))
    assert_close(full(model), full(alone))
    for x, y in batches:
        optimizer.step(closure_of(model, share(x, rank, world), share(y, rank, world)))
        single.step(closure_of(alone, x, y))
    assert_close(full(model), full(alone))


@pytest.mark.parametrize("base_name", ["sgd", "adamw"])
def test_a_checkpoint_resumes_on_another_number_of_ranks(two, four, tmp_path, base_name):
    four.run(save, str(tmp_path / "four"), base_name)
    two.run(resume, str(tmp_path / "four"), base_name)
    two.run(save, str(tmp_path / "two"), base_name)
    four.run(resume, str(tmp_path / "two"), base_name)


def accumulate(rank, world):
    model, batches = make("mlp")
    shard(model, mesh_of(world, "plain"))
    optimizer = optimizer_of(model, "sam")
    alone, _ = make("mlp")
    single = optimizer_of(alone, "sam")
    for x, y in batches:
        mine = list(zip(share(x, rank, world).chunk(3), share(y, rank, world).chunk(3), strict=True))
        for turn in optimizer.passes():
            for a, b in optimizer.micro_batches(mine):
                turn.backward(loss_of(model, a, b) / 3)
        single.step(closure_of(alone, x, y))
    assert_close(full(model), full(alone))


def test_micro_batches_of_sharded_parameters(two):
    two.run(accumulate)


# What is refused


def refused(rank, world):
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (True, False):
        model, _ = make("mlp")
        try:
            wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        except Exception as error:  # on a CPU some versions of torch refuse it themselves
            return f"{type(error).__name__}: {error}"
        with pytest.raises(TypeError, match="FSDP1.*is not supported.*fully_shard"):
            gam_fast.SAM(wrapped.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(TypeError, match="FSDP1.*is not supported.*fully_shard"):
            gam_fast.SAM([nn.Parameter(torch.ones(1))], torch.optim.SGD, lr=0.1, model=wrapped)
    return "refused"


def test_fsdp1_is_refused(two):
    assert two.run(refused) == ["refused"] * 2


def local_refused(rank, world):
    model, batches = make("mlp")
    shard(model, mesh_of(world, "plain"))
    optimizer = optimizer_of(model, "sam", sync="local")
    with pytest.raises(TypeError, match="sync='local' with sharded parameters.*sync='global'"):
        optimizer.step(closure_of(model, *batches[0]))
    exact = gam_fast.ExactGAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match=r"torch.distributed|processes"):
        exact.step(lambda: loss_of(model, *batches[0]))


def test_local_steps_of_sharded_parameters_are_refused(two):
    two.run(local_refused)


class DeepSpeedEngine(nn.Module):
    """Stands for the engine, which is recognised by the package it is from."""

    __module__ = "deepspeed.runtime.engine"


def test_deepspeed_is_refused():
    weight = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="DeepSpeed is not supported.*fully_shard.*ZeroRedundancyOptimizer"):
        gam_fast.SAM([weight], lr=0.1, model=DeepSpeedEngine())
    weight.ds_id = 3  # of its ZeRO-3
    with pytest.raises(TypeError, match="DeepSpeed is not supported"):
        gam_fast.SAM([weight], lr=0.1)


def test_a_model_may_be_set_later_and_is_checked():
    model = nn.Linear(2, 2)
    optimizer = gam_fast.SAM(model.parameters(), lr=0.1)
    assert optimizer.model is None
    optimizer.model = model
    assert optimizer.model is model
    with pytest.raises(TypeError, match="model must be a torch.nn.Module or None, got 3"):
        optimizer.model = 3
    with pytest.raises(TypeError, match="DeepSpeed is not supported"):
        optimizer.model = DeepSpeedEngine()
    assert optimizer.model is model


def test_a_step_without_closure_only_makes_state_where_nothing_can_move():
    """As torch.distributed.checkpoint calls it."""
    model, _ = make("mlp")
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.AdamW, lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert len(optimizer.state) == len(before)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    other = gam_fast.GAM(model.parameters(), torch.optim.AdamW, lr=0.0)
    next(model.parameters()).grad.fill_(1.0)
    snapshot = everything(model, other)
    with pytest.raises(RuntimeError, match="GAM takes 4 passes"):
        other.step()
    assert_same(snapshot, everything(model, other))
