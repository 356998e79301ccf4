"""Cheaper steps in several processes: shares of local batches, and decisions that all ranks take alike."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import METHODS, loss_of, make
from ranks import same_on_all_ranks
from test_active import train
from test_distributed import assert_close, optimizer_of, share, values
from test_sharded import full, mesh_of, shard
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import gam_fast
from gam_fast.active import Between, Sometimes, WhenSteep

STEEP = WhenSteep(deviations=0.3, decay=0.7)


def of_rank(batches, rank, world):
    return [(share(x, rank, world), share(y, rank, world)) for x, y in batches]


def leading_of_all(tensor, world, part):
    """The leading share of what each rank has."""
    pieces = tensor.chunk(world)
    return torch.cat([piece[: round(part * len(piece))] for piece in pieces])


def train_shares(rank, world, wrapper, method_name):
    model, batches = make("mlp")
    wrapped = DistributedDataParallel(model) if wrapper == "ddp" else shard(model, mesh_of(world, "plain"))
    optimizer = optimizer_of(wrapped, method_name, ascent_share=0.5)
    train(wrapped, optimizer, of_rank(batches, rank, world))
    alone, _ = make("mlp")
    single = optimizer_of(alone, method_name)
    for x, y in batches:
        for turn in single.passes():
            if turn.last:
                loss_of(alone, x, y).backward()
            else:
                loss_of(alone, leading_of_all(x, world, 0.5), leading_of_all(y, world, 0.5)).backward()
    assert_close(full(model), values(alone), 1e-9)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_share_is_of_each_local_batch(two, wrapper):
    for method_name in ("sam", "gam", "fad"):
        two.run(train_shares, wrapper, method_name)


def train_shares_locally(rank, world):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    options = {**METHODS["gam"].hyper, "lr": 0.1, "ascent_share": 0.5}
    optimizer = gam_fast.GAM(ddp.parameters(), torch.optim.SGD, model=ddp, sync="local", **options)
    for x, y in batches:
        ends = []
        for r in range(world):
            alone = copy.deepcopy(model)
            single = gam_fast.GAM(alone.parameters(), torch.optim.SGD, **options)
            train(alone, single, [(share(x, r, world), share(y, r, world))])
            ends.append(values(alone))
        train(ddp, optimizer, of_rank([(x, y)], rank, world))
        assert_close(values(model), [sum(ps) / world for ps in zip(*ends, strict=True)], 1e-10)
    assert same_on_all_ranks(model.parameters())


def test_a_share_in_local_steps(two):
    two.run(train_shares_locally)


def statistics_of_shares(rank, world):
    """With radius and learning rate 0, the last pass is the forward of plain training."""
    (model, batches), (plain, _) = make("batchnorm_cnn"), make("batchnorm_cnn")
    ddp, plain_ddp = DistributedDataParallel(model), DistributedDataParallel(plain)
    options = {"lr": 0.0, "rho": 0.0, "ascent_share": 0.5}
    optimizer = gam_fast.SAM(ddp.parameters(), torch.optim.SGD, model=ddp, sync="local", **options)
    for x, y in of_rank(batches, rank, world):
        train(ddp, optimizer, [(x, y)])
        loss_of(plain_ddp, x, y).backward()
    assert all(torch.equal(p, q) for p, q in zip(model.buffers(), plain.buffers(), strict=True))


def test_statistics_of_local_steps_start_from_those_of_the_first_rank(two):
    two.run(statistics_of_shares)


def accumulate_shares(rank, world):
    (whole, batches), (model, _) = make("mlp"), make("mlp")
    one, other = DistributedDataParallel(whole), DistributedDataParallel(model)
    large, small = optimizer_of(one, "gam", ascent_share=0.5), optimizer_of(other, "gam", ascent_share=0.5)
    for x, y in of_rank(batches, rank, world):
        train(one, large, [(x, y)])
        for turn in small.passes():
            for a, b in small.micro_batches(zip(x.chunk(2), y.chunk(2), strict=True)):
                turn.backward(loss_of(other, a, b) / 2)
    assert_close(values(model), values(whole))


def test_a_share_of_the_micro_batches_of_each_rank(two):
    two.run(accumulate_shares)


def decide(rank, world, rule, sync, part):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    options = {"lr": 0.3, "sync": sync, "ascent_share": part, **rule}
    optimizer = gam_fast.GAM(ddp.parameters(), torch.optim.SGD, model=ddp, **options)
    counts = train(ddp, optimizer, of_rank(3 * batches, rank, world))
    assert same_on_all_ranks(model.parameters())
    state = optimizer.state_dict()["param_groups"][0]
    return counts, {key: value for key, value in state.items() if key.startswith("flat_")}


RULES = {
    "steep": {"active": STEEP},
    "sometimes": {"active": Sometimes(0.5, seed=4)},
    "both": {"active": [Between(2), STEEP], "interval": 2},
}


@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("sync", ["global", "local"])
@pytest.mark.parametrize("rule", RULES)
def test_all_ranks_take_the_same_decisions(two, rule, sync, part):
    first, second = two.run(decide, RULES[rule], sync, part)
    assert first == second
    assert 4 in first[0]
    assert {1, 2} & set(first[0])


def steep_like_one(rank, world):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    options = {"lr": 0.3, "active": STEEP, **METHODS["gam"].hyper}
    optimizer = gam_fast.GAM(ddp.parameters(), torch.optim.SGD, model=ddp, **options)
    alone, _ = make("mlp")
    single = gam_fast.GAM(alone.parameters(), torch.optim.SGD, **options)
    assert train(ddp, optimizer, of_rank(3 * batches, rank, world)) == train(alone, single, 3 * batches)
    assert_close(values(model), values(alone))


def steep_when_sharded(rank, world):
    model, batches = make("mlp")
    shard(model, mesh_of(world, "plain"))
    options = {"lr": 0.3, "active": STEEP, "rho_prime": "auto"}
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, model=model, **options)
    alone, _ = make("mlp")
    single = gam_fast.GAM(alone.parameters(), torch.optim.SGD, **options)
    assert train(model, optimizer, of_rank(3 * batches, rank, world)) == train(alone, single, 3 * batches)
    assert_close(full(model), values(alone), 1e-6)  # the difference of gradients has half the digits
    for key in ("flat_mean", "flat_length"):
        assert optimizer.param_groups[0][key] == pytest.approx(single.param_groups[0][key], rel=1e-5)


@pytest.mark.parametrize("function", [steep_like_one, steep_when_sharded])
def test_decisions_of_a_global_step_are_those_of_one_process(two, function):
    two.run(function)


def mean_of_squares(rank, world):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    optimizer = gam_fast.GAM(ddp.parameters(), torch.optim.SGD, lr=0.1, model=ddp, sync="local", active=STEEP)
    x, y = batches[0]
    squares = []
    for r in range(world):
        gradients = torch.autograd.grad(
            loss_of(model, share(x, r, world), share(y, r, world)), list(model.parameters())
        )
        squares.append(float(sum(g.square().sum() for g in gradients)))
    train(ddp, optimizer, of_rank([(x, y)], rank, world))
    assert optimizer.param_groups[0]["flat_mean"] == pytest.approx(sum(squares) / world, rel=1e-12)


def test_a_local_step_decides_by_the_mean_over_the_ranks(two):
    two.run(mean_of_squares)


def leave_before_the_decision(rank, world, at):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    rule = WhenSteep(deviations=-1e9)
    optimizer = gam_fast.GAM(ddp.parameters(), torch.optim.SGD, lr=0.1, model=ddp, sync="local", active=rule)
    mine = of_rank(batches, rank, world)
    train(ddp, optimizer, mine[:1])
    before, group = values(model), dict(optimizer.param_groups[0], params=None)

    def closure(turn):
        if rank == 1 and turn.index == at:
            raise KeyError("of the user's own")
        loss_of(ddp, *mine[1]).backward()

    with pytest.raises((KeyError, RuntimeError)) as caught:
        optimizer.step(closure)
    assert all(map(torch.equal, before, values(model)))
    assert group == dict(optimizer.param_groups[0], params=None)
    assert train(ddp, optimizer, mine[1:]) == [4, 4, 4]
    assert same_on_all_ranks(model.parameters())
    return str(caught.value)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_others_are_told_when_a_rank_leaves_before_or_after_the_decision(two, at):
    theirs, ours = two.run(leave_before_the_decision, at)
    assert "was left by an exception on rank 1; it is undone on all ranks" in theirs
    assert "of the user's own" in ours


def automatic_radius(rank, world, sync):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    options = {"lr": 0.1, "rho_prime": "auto", "sync": sync}
    optimizer = gam_fast.GAM(ddp.parameters(), torch.optim.SGD, model=ddp, **options)
    train(ddp, optimizer, of_rank(batches, rank, world))
    assert same_on_all_ranks(model.parameters())
    assert distributed.get_world_size() == world
    return optimizer.param_groups[0]["flat_length"]


@pytest.mark.parametrize("sync", ["global", "local"])
def test_all_ranks_have_the_same_automatic_radius(two, sync):
    first, second = two.run(automatic_radius, sync)
    assert first == second
    assert first > 0.0


CHEAP = {"lr": 0.3, "momentum": 0.9, "interval": 2, "active": STEEP, "ascent_share": 0.5, "rho_prime": "auto"}


def resume(rank, world, folder):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def build():
        model, batches = make("mlp")
        shard(model, mesh_of(world, "plain"))
        return model, gam_fast.GAM(model.parameters(), torch.optim.SGD, model=model, **CHEAP), batches

    through, optimizer, batches = build()
    mine = of_rank(3 * batches, rank, world)
    counts = train(through, optimizer, mine)
    model, first, _ = build()
    assert train(model, first, mine[:5]) == counts[:5]
    states = get_state_dict(model, first)
    checkpoint.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder)
    model, second, _ = build()
    states = get_state_dict(model, second)
    wanted = {"model": states[0], "optimizer": states[1]}
    checkpoint.load(wanted, checkpoint_id=folder)
    set_state_dict(model, second, model_state_dict=wanted["model"], optim_state_dict=wanted["optimizer"])
    assert train(model, second, mine[5:]) == counts[5:]
    assert all(map(torch.equal, full(model), full(through)))
    for key in ("flat_steps", "flat_looks", "flat_mean", "flat_variance", "flat_length"):
        assert second.param_groups[0][key] == optimizer.param_groups[0][key] > 0


def test_a_distributed_checkpoint_resumes_with_the_same_bits(two, tmp_path):
    two.run(resume, str(tmp_path / "checkpoint"))
