"""Cheaper steps in several processes: shares of local batches, and decisions that all ranks take alike."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import loss_of, make, pairwise
from ranks import assert_close, on_two, optimizer_of, same_on_all_ranks, shares, values
from test_active import train
from test_sharded import load_from, save_to, shard
from torch.nn.parallel import DistributedDataParallel

import gam_fast
from gam_fast.active import Between, Sometimes, WhenSteep

STEEP = WhenSteep(deviations=0.3, decay=0.7)


def wrap(model, wrapper, world):
    return DistributedDataParallel(model) if wrapper == "ddp" else shard(model, world)


@pytest.mark.parametrize(("wrapper", "method_name"), [("ddp", "gam"), ("fsdp", "fad"), ("ddp", "sam")])
@on_two
def test_a_share_is_of_each_local_batch(rank, world, wrapper, method_name):
    (model, batches), (alone, _), (accumulated, _) = make("mlp"), make("mlp"), make("mlp")
    wrapped, other = wrap(model, wrapper, world), wrap(accumulated, wrapper, world)
    optimizer, small = (optimizer_of(each, method_name, ascent_share=0.5) for each in (wrapped, other))
    single = optimizer_of(alone, method_name)
    for x, y in batches:
        ((a, b),) = mine = shares([(x, y)], rank, world)
        train(wrapped, optimizer, mine)
        for turn in small.passes():
            for part in small.micro_batches(zip(a.chunk(2), b.chunk(2), strict=True)):
                turn.backward(loss_of(other, *part) / 2)
        leading = [torch.cat([part[: len(part) // 2] for part in tensor.chunk(world)]) for tensor in (x, y)]
        for turn in single.passes():
            loss_of(alone, *((x, y) if turn.last else leading)).backward()
    assert_close(values(model), values(alone), 1e-9)
    assert_close(values(accumulated), values(alone), 1e-9)


@on_two
def test_a_share_in_local_steps(rank, world):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    options = {"base_name": "sgd", "ascent_share": 0.5}
    optimizer = optimizer_of(ddp, "gam", sync="local", **options)
    for batch in batches:
        parts = [shares([batch], r, world) for r in range(world)]
        ends = []
        for part in parts:
            alone = copy.deepcopy(model)
            train(alone, optimizer_of(alone, "gam", **options), part)
            ends.append(values(alone))
        train(ddp, optimizer, parts[rank])
        assert_close(values(model), [sum(ps) / world for ps in zip(*ends, strict=True)])
    assert same_on_all_ranks(model.parameters())


def decide(rank, world, rule, sync, part):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    options = {"lr": 0.3, "sync": sync, "ascent_share": part, **rule}
    optimizer = gam_fast.GAM(ddp.parameters(), torch.optim.SGD, model=ddp, **options)
    counts = train(ddp, optimizer, shares(3 * batches, rank, world))
    assert same_on_all_ranks(model.parameters())
    state = optimizer.state_dict()["param_groups"][0]
    return counts, {key: value for key, value in state.items() if key.startswith("flat_")}


RULES = {
    "steep": {"active": STEEP},
    "sometimes": {"active": Sometimes(0.5, seed=4)},
    "both": {"active": [Between(2), STEEP], "interval": 2, "rho_prime": "auto"},
}


@pytest.mark.parametrize(("rule", "sync", "part"), pairwise(RULES, ["global", "local"], [1.0, 0.5]))
def test_all_ranks_take_the_same_decisions(two, rule, sync, part):
    first, second = two.run(decide, RULES[rule], sync, part)
    assert first == second
    counts, state = first
    assert 4 in counts
    assert {1, 2} & set(counts)
    assert rule != "both" or state["flat_length"] > 0.0


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@on_two
def test_decisions_of_a_global_step_are_those_of_one_process(rank, world, wrapper):
    (model, batches), (alone, _) = make("mlp"), make("mlp")
    wrapped = wrap(model, wrapper, world)
    options = {"lr": 0.3, "active": STEEP, "rho_prime": "auto"}
    optimizer = gam_fast.GAM(wrapped.parameters(), torch.optim.SGD, model=wrapped, **options)
    single = gam_fast.GAM(alone.parameters(), torch.optim.SGD, **options)
    mine = shares(3 * batches, rank, world)
    assert train(wrapped, optimizer, mine) == train(alone, single, 3 * batches)
    assert_close(values(model), values(alone), 1e-6)  # the difference of gradients has half the digits
    for key in ("flat_mean", "flat_length"):
        assert optimizer.param_groups[0][key] == pytest.approx(single.param_groups[0][key], rel=1e-5)


@on_two
def test_a_local_step_decides_by_the_mean_over_the_ranks(rank, world):
    model, batches = make("mlp")
    ddp = DistributedDataParallel(model)
    optimizer = gam_fast.GAM(ddp.parameters(), torch.optim.SGD, lr=0.1, model=ddp, sync="local", active=STEEP)
    parts = [shares(batches[:1], r, world) for r in range(world)]
    squares = []
    for ((x, y),) in parts:
        gradients = torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))
        squares.append(float(sum(g.square().sum() for g in gradients)))
    train(ddp, optimizer, parts[rank])
    assert optimizer.param_groups[0]["flat_mean"] == pytest.approx(sum(squares) / world, rel=1e-12)


CHEAP = {"lr": 0.3, "momentum": 0.9, "interval": 2, "active": STEEP, "ascent_share": 0.5, "rho_prime": "auto"}


@on_two
def test_a_distributed_checkpoint_resumes_with_the_same_bits(rank, world, tmp_path):
    def build():
        model, batches = make("mlp")
        shard(model, world)
        optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, model=model, **CHEAP)
        return model, optimizer, shares(3 * batches, rank, world)

    through, optimizer, mine = build()
    counts = train(through, optimizer, mine)
    model, first, _ = build()
    assert train(model, first, mine[:5]) == counts[:5]
    save_to(str(tmp_path), model, first)
    model, second, _ = build()
    load_from(str(tmp_path), model, second)
    assert train(model, second, mine[5:]) == counts[5:]
    assert all(map(torch.equal, values(model), values(through)))
    for key in ("flat_steps", "flat_looks", "flat_mean", "flat_variance", "flat_length"):
        assert second.param_groups[0][key] == optimizer.param_groups[0][key] > 0
