"""Sharded parameters (FSDP2, hybrid, tensor parallel) and sharded state (ZeRO) by real processes, on a CPU."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from cases import METHODS, closure_of, in_turn, loss_of, make
from ranks import Ranks, assert_close, on_two, optimizer_of, same_on_all_ranks, share, shares, values
from snapshots import assert_same, everything
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import gam_fast


def shard(model, world, kind="plain", mesh=None, **options):
    """``fully_shard`` each layer and what is left; most sizes are not divisible by the number of ranks."""
    from torch.distributed.fsdp import fully_shard

    if kind == "hybrid":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    mesh = mesh or init_device_mesh("cpu", (world,))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def train(rank, world, kind, method_name, base_name, options):
    (model, batches), (alone, _) = make("mlp"), make("mlp")
    shard(model, world, kind)
    optimizer = optimizer_of(model, method_name, base_name, **options)
    single = optimizer_of(alone, method_name, base_name, **{**options, "backend": "eager"})
    for x, y in batches:
        optimizer.step(closure_of(model, share(x, rank, world), share(y, rank, world)))
        single.step(closure_of(alone, x, y))
        assert_close(values(model), values(alone), 1e-9)
    for p, state in optimizer.state.items():
        for name, value in state.items():
            if value.dim():
                assert value.placements == p.placements, name  # so that checkpoints know where it belongs


@pytest.mark.parametrize(
    ("method_name", "base_name", "options"),
    in_turn(
        ["base", "sam", "asam", "gsam", "gam", "previous_gradient", "vasso", "look", "wsam", "momentum_sam", "stable"],
        ["sgd_nesterov", "adamw", "rmsprop"],
        [{}, {"backend": "eager"}, {}, {"clip_grad_norm": 0.05}],
    ),
)
def test_fully_shard_takes_the_steps_of_one_process(two, method_name, base_name, options):
    two.run(train, "plain", method_name, base_name, options)


def test_four_ranks_sharded_and_replicated(four):
    four.run(train, "hybrid", "gam", "adamw", {"clip_grad_norm": 0.5})


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
        shard(model, world, mesh=mesh["dp"])
    optimizer, single = optimizer_of(model, "gam"), optimizer_of(alone, "gam")
    for x, y in make("mlp")[1]:
        mine = shares([(x, y)], mesh["dp"].get_local_rank(), world // parts)[0]
        optimizer.step(closure_of(model, *mine))
        single.step(closure_of(alone, x, y))
        assert_close(values(model), values(alone), 1e-9)


def test_tensor_parallel_beside_plain_parameters(two):
    two.run(tensor_parallel, False)


def test_tensor_parallel_within_fully_shard(four):
    four.run(tensor_parallel, True)


def count_reductions(rank, world, kind):
    model, batches = make("mlp")
    shard(model, world, kind)
    optimizer = optimizer_of(model, "gam")
    optimizer.step(closure_of(model, *batches[0]))
    counted = []
    original = distributed.all_reduce

    def counting(tensor, *args, **kwargs):
        counted.append(tuple(tensor.shape))
        return original(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "all_reduce", counting)
        optimizer.step(closure_of(model, *batches[0]))
    return [shape for shape in counted if shape in ((1,), (1, 1, 3))]


def test_one_scalar_all_reduce_for_each_norm(two, four):
    expected = [(1,), (1,), (1,), (1, 1, 3)]  # of three perturbations, and of the products of the direction
    assert two.run(count_reductions, "plain") == [expected] * 2
    assert four.run(count_reductions, "hybrid") == [expected] * 4


@on_two
def test_policies_and_micro_batches(rank, world):
    """One for mixed precision, and one that keeps parameters on the CPU; micro-batches."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=False)
    for dtype, policy, tolerance in (
        (torch.float32, {"mp_policy": mixed}, 0.05),
        (torch.float64, {"offload_policy": offload}, 1e-9),
    ):
        (model, batches), (alone, _) = make("mlp", dtype), make("mlp", dtype)
        shard(model, world, **policy)
        optimizer, single = optimizer_of(model, "gam"), optimizer_of(alone, "gam")
        for x, y in batches:
            mine = list(zip(share(x, rank, world).chunk(3), share(y, rank, world).chunk(3), strict=True))
            for turn in optimizer.passes():
                for a, b in optimizer.micro_batches(mine):
                    turn.backward(loss_of(model, a, b) / 3)
            single.step(closure_of(alone, x, y))
        assert all(p.dtype == dtype for p in model.parameters())
        assert_close(values(model), values(alone), tolerance)


@pytest.mark.parametrize("how", ["raise", "nan"])
@on_two
def test_a_step_that_is_left_is_undone_on_all_ranks(rank, world, how):
    """A step that is left: shards are as before, and no module keeps a gathered copy of what was moved."""
    (model, batches), (alone, _) = make("mlp"), make("mlp")
    shard(model, world, reshard_after_forward=False)
    optimizer, single = optimizer_of(model, "gam", on_nonfinite="skip"), optimizer_of(alone, "gam")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    mine = shares(batches, rank, world)

    def step(batch, spoiled=False):
        for turn in optimizer.passes(scaler=scaler):
            found = loss_of(model, *batch)
            if spoiled and how == "raise" and turn.index == 2:
                raise KeyError("between forward and backward")
            turn.backward(found * float("inf") if spoiled and rank == 1 and turn.index == 2 else found)

    step(mine[0])
    theta = [p.to_local().clone() for p in model.parameters()]
    with torch.no_grad():
        loss = loss_of(model, *mine[1])  # leaves parameters gathered
    if how == "raise":
        with pytest.raises(KeyError):
            step(mine[0], spoiled=True)
    else:
        step(mine[0], spoiled=True)
        assert (optimizer.skipped_steps, scaler.get_scale()) == (1, 32.0)
    assert all(torch.equal(p.to_local(), q) for p, q in zip(optimizer.param_groups[0]["params"], theta, strict=True))
    with torch.no_grad():
        assert torch.equal(loss_of(model, *mine[1]), loss)
    step(mine[1])
    for batch in batches[:2]:
        single.step(closure_of(alone, *batch))
    assert_close(values(model), values(alone), 1e-9)


def save_to(folder, model, optimizer):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    states = get_state_dict(model, optimizer)
    checkpoint.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)


def load_from(folder, model, optimizer):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    states = get_state_dict(model, optimizer)
    wanted = {"model": states[0], "optimizer": states[1]}
    checkpoint.load(wanted, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=wanted["model"], optim_state_dict=wanted["optimizer"])


def save(rank, world, folder, method_name="gam"):
    model, batches = make("mlp")
    shard(model, world)
    optimizer = optimizer_of(model, method_name, "adamw")
    for x, y in shares(batches, rank, world):
        optimizer.step(closure_of(model, x, y))
    save_to(folder, model, optimizer)


def resume(rank, world, folder, method_name="gam"):
    (model, batches), (alone, _) = make("mlp"), make("mlp")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    shard(model, world)
    optimizer, single = (optimizer_of(each, method_name, "adamw") for each in (model, alone))
    optimizer.param_groups[0].update(rho=0.9, lr=7.0)
    load_from(folder, model, optimizer)
    for key in ("rho", "lr"):
        assert optimizer.param_groups[0][key] == single.param_groups[0][key]
    for x, y in batches:
        single.step(closure_of(alone, x, y))
    assert_close(values(model), values(alone), 1e-9)
    for x, y in batches:
        optimizer.step(closure_of(model, share(x, rank, world), share(y, rank, world)))
        single.step(closure_of(alone, x, y))
    assert_close(values(model), values(alone), 1e-9)


@pytest.mark.parametrize("method_name", ["gam", "vasso"])
def test_a_checkpoint_resumes_on_another_number_of_ranks(two, four, tmp_path, method_name):
    four.run(save, str(tmp_path), method_name)
    two.run(resume, str(tmp_path), method_name)


@on_two
def test_a_forward_without_a_backward_changes_nothing(rank, world):
    """After one, the root of ``fully_shard`` keeps the parameters it has gathered, and would use them once more."""
    from torch.distributed.fsdp import fully_shard

    def trained(method_name, when):
        model, batches = make("mlp")
        fully_shard(model)
        optimizer = optimizer_of(model, method_name)
        for step, batch in enumerate(shares(batches, rank, world)):
            if when == "before a step" and step % 2 == 0:
                with torch.no_grad():
                    loss_of(model, *batch)
            for _ in optimizer.passes():
                loss_of(model, *batch).backward()
                if when == "in each pass":
                    with torch.no_grad():
                        loss_of(model, *batch)
        return values(model)

    for method_name in ("base", "sam", "gam", "momentum_sam", "previous_gradient"):
        plain = trained(method_name, "never")
        for when in ("before a step", "in each pass"):
            assert all(map(torch.equal, trained(method_name, when), plain)), (method_name, when)


@on_two
def test_processes_with_the_same_parameters_draw_the_same_noise(rank, world):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    parallelize_module(model, init_device_mesh("cpu", (world,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = gam_fast.RandomSAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.5, model=model)
    theta = [value.detach().clone() for value in values(model)]
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in optimizer.passes():
        moved = [value.detach().clone() for value in values(model)]
        losses = [torch.zeros((), dtype=torch.float64) for _ in range(world)]
        loss = model(x).square().sum()
        distributed.all_gather(losses, loss.detach())
        loss.backward()
    assert losses[0] == losses[1]  # so what is copied moved to the same place everywhere
    weight = moved[0] - theta[0]
    assert not torch.isclose(weight[:4], weight[4:]).any()  # and what is spread is no copy
    assert all(map(torch.equal, values(model), theta))


# ZeroRedundancyOptimizer


def zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when imported

    return ZeroRedundancyOptimizer


def train_zero(rank, world, sync, bucket_view):
    (model, batches), (plain_model, _) = make("mlp"), make("mlp")
    ddp, plain_ddp = DistributedDataParallel(model), DistributedDataParallel(plain_model)
    options = {"lr": 0.01, "eps": 1e-4, "sync": sync, **METHODS["gam"].hyper}
    optimizer = gam_fast.GAM(
        ddp.parameters(),
        zero(),
        optimizer_class=torch.optim.AdamW,
        parameters_as_bucket_view=bucket_view,
        model=ddp,
        **options,
    )
    plain = gam_fast.GAM(plain_ddp.parameters(), torch.optim.AdamW, model=plain_ddp, **options)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (optimizer, plain)]
    for mine in shares(batches, rank, world):
        optimizer.step(closure_of(ddp, *mine))
        plain.step(closure_of(plain_ddp, *mine))
        for scheduler in schedulers:
            scheduler.step()
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


@pytest.mark.parametrize(("sync", "bucket_view"), [("global", True), ("local", False)])
def test_zero_redundancy_optimizer_as_base(two, sync, bucket_view):
    held = two.run(train_zero, sync, bucket_view)
    assert sum(held) == len(list(make("mlp")[0].parameters()))  # each holds a part of the state


@on_two
def test_zero_that_overlaps_with_ddp_is_refused(rank, world):
    params = make("mlp")[0].parameters()
    with pytest.raises(TypeError, match="overlap_with_ddp=True.*steps in the backward pass"):
        gam_fast.SAM(params, zero(), optimizer_class=torch.optim.SGD, overlap_with_ddp=True, lr=0.1)


# What is refused


def refused(rank, world):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, batches = make("mlp")
    shard(model, world)
    optimizer = optimizer_of(model, "sam", sync="local")
    with pytest.raises(TypeError, match="sync='local' with sharded parameters.*sync='global'"):
        optimizer.step(closure_of(model, *batches[0]))
    for original in (True, False):
        model, _ = make("mlp")
        try:
            wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        except Exception as error:  # on a CPU some versions of torch refuse it themselves
            return f"{type(error).__name__}: {error}"
        for options in ({"params": wrapped.parameters()}, {"params": [nn.Parameter(torch.ones(1))], "model": wrapped}):
            with pytest.raises(TypeError, match="FSDP1.*is not supported.*fully_shard"):
                gam_fast.SAM(base_optimizer=torch.optim.SGD, lr=0.1, **options)
    return "refused"


def test_fsdp1_and_local_steps_of_sharded_parameters_are_refused(two):
    assert two.run(refused) == ["refused"] * 2


def exact_is_refused(rank, world):
    model, batches = make("mlp")
    shard(model, world)
    optimizer = gam_fast.ExactGAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"ExactGAM with sharded parameters.*Use GAM"):
        optimizer.step(lambda: loss_of(model, *batches[0]))


def test_exact_gam_of_sharded_parameters_is_refused_in_one_process_too():
    with closing(Ranks(1)) as one:
        one.run(exact_is_refused)


class DeepSpeedEngine(nn.Module):
    """Stands for the engine, which is recognised by the package it is from."""

    __module__ = "deepspeed.runtime.engine"


def test_a_model_may_be_set_later_and_deepspeed_is_refused():
    model = nn.Linear(2, 2)
    optimizer = gam_fast.SAM(model.parameters(), lr=0.1)
    assert optimizer.model is None
    optimizer.model = model
    with pytest.raises(TypeError, match="model must be one torch.nn.Module .*, got 3"):
        optimizer.model = 3
    with pytest.raises(TypeError, match="DeepSpeed is not supported.*fully_shard.*ZeroRedundancyOptimizer"):
        optimizer.model = DeepSpeedEngine()
    assert optimizer.model is model
    with pytest.raises(TypeError, match="DeepSpeed is not supported"):
        gam_fast.SAM(model.parameters(), lr=0.1, model=DeepSpeedEngine())
    model.weight.ds_id = 3  # of its ZeRO-3
    with pytest.raises(TypeError, match="DeepSpeed is not supported"):
        gam_fast.SAM(model.parameters(), lr=0.1)


def test_a_step_without_closure_only_makes_state_where_nothing_can_move():
    """As torch.distributed.checkpoint calls it."""
    model, _ = make("mlp")
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.AdamW, lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = values(model)
    optimizer.step()
    assert len(optimizer.state) == len(before)
    assert all(map(torch.equal, before, values(model)))
    other = gam_fast.GAM(model.parameters(), torch.optim.AdamW, lr=0.0)
    next(model.parameters()).grad.fill_(1.0)
    snapshot = everything(model, other)
    with pytest.raises(RuntimeError, match="GAM takes 4 passes"):
        other.step()
    assert_same(snapshot, everything(model, other))
