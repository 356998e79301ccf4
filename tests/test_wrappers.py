"""What other packages do to an optimizer: modes, nested states, checkpoints of other methods, pickles and copies."""

import copy
import logging
import pickle
from functools import partial

import cases
import pytest
import torch
from cases import METHODS, MOMENTUM, closure_of, in_turn, make
from pytorch_optimizer import Lookahead, ScheduleFreeSGD
from snapshots import COPIES, assert_close, assert_equal, assert_same, everything, through_a_file, unchanged
from torch import nn

import gam_fast

ScheduleFree = partial(ScheduleFreeSGD, lr=0.1)
BASES = {
    "schedule_free": ScheduleFree,
    "lookahead": lambda params: Lookahead(MOMENTUM(params)),
    "lookahead_adam": lambda params: Lookahead(torch.optim.AdamW(params, lr=0.01), k=3),
}


def setting(method_name, base, model_name="batchnorm_cnn", **options):
    return cases.setting(method_name, base, model_name, torch.float32, **options)


def train(model, optimizer, batches, steps):
    for k in steps:
        optimizer.step(closure_of(model, *batches[k % len(batches)]))


# Modes


@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_train_and_eval_are_those_of_the_base(method_name):
    model, optimizer, batches = setting(method_name, ScheduleFree)
    train(model, optimizer, batches, range(3))
    at_y = copy.deepcopy(model)
    average = [p + (optimizer.state[p]["z"] - p) * (1 - 1 / 0.9) for p in model.parameters()]
    optimizer.eval()
    torch.testing.assert_close(list(model.parameters()), average)
    with pytest.raises(RuntimeError, match=r"after optimizer.eval\(\): call optimizer.train\(\)"):
        train(model, optimizer, batches, [3])
    optimizer.train()
    assert_close(model, at_y, rtol=1e-5, atol=1e-6)
    train(model, optimizer, batches, [3])


def test_base_and_the_schedule_free_optimizer_alone_take_the_same_steps():
    model, optimizer, batches = setting("base", ScheduleFree)
    twin, _ = make("batchnorm_cnn", torch.float32)
    plain = ScheduleFree(twin.parameters())
    for k in range(6):
        train(model, optimizer, batches, [k])
        plain.zero_grad()
        closure_of(twin, *batches[k % len(batches)])()
        plain.step()
        if k == 3:
            for each in (optimizer, plain):
                each.eval()
                each.train()
    assert_equal(model, twin)


def test_a_base_without_modes_has_none():
    _, optimizer, _ = setting("gam", MOMENTUM)
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "eval")
    for copied in COPIES.values():
        assert not hasattr(copied(optimizer), "eval")
    _, optimizer, _ = setting("gam", ScheduleFree)
    assert callable(copy.deepcopy(optimizer).eval)


def test_several_bases_change_their_mode_together():
    model, _ = make("mlp", torch.float32)
    params = list(model.parameters())
    bases = [ScheduleFree(params[:2]), torch.optim.SGD(params[2:3], lr=0.1), ScheduleFree(params[3:])]
    optimizer = gam_fast.SAM(None, bases)
    optimizer.eval()
    assert [group.get("train_mode") for group in optimizer.param_groups] == [False, None, False]
    optimizer.train()
    assert [group.get("train_mode") for group in optimizer.param_groups] == [True, None, True]


def test_modes_in_a_step():
    model, optimizer, batches = setting("sam", ScheduleFree)
    before = everything(model, optimizer)
    for mode in ("train", "eval"):
        with pytest.raises(RuntimeError, match=rf"{mode}\(\) while a step of this SAM is in progress"):  # noqa: PT012
            for _ in optimizer.passes():
                getattr(optimizer, mode)()
        assert_same(before, everything(model, optimizer))
    twin, plain, _ = setting("sam", ScheduleFree)
    optimizer.train()
    closure = closure_of(model, *batches[0])
    for _ in optimizer.passes():  # a Trainer calls it before each backward
        optimizer.train()
        closure()
    train(twin, plain, batches, [0])
    assert_close(model, twin)
    optimizer.eval()
    optimizer.load_state_dict(plain.state_dict())  # whose mode is that of training
    train(model, optimizer, batches, [1])


def test_a_property_that_fails_says_why():
    class Failing(gam_fast.SAM):
        @property
        def shown(self):
            return self.nothing_like_it

    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = Failing([nn.Parameter(torch.ones(1))]).shown


# State dicts


@pytest.mark.parametrize(("method_name", "base_name"), in_turn(["base", "sam", "gam"], BASES))
def test_nested_states_resume_with_the_same_bits(method_name, base_name):
    model, optimizer, batches = setting(method_name, BASES[base_name])
    key = optimizer.key("rho") if method_name != "base" else "lr"
    optimizer.param_groups[0][key] = 0.07
    train(model, optimizer, batches, range(3))
    of_model, of_optimizer = through_a_file((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, batches, range(3, 7))
    twin, resumed, _ = setting(method_name, BASES[base_name])
    twin.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    assert resumed.param_groups[0][key] == 0.07
    train(twin, resumed, batches, range(3, 7))
    assert_equal(model, twin)


def test_a_nested_state_of_the_wrapper_alone_loads():
    model, optimizer, batches = setting("gam", BASES["lookahead"])
    train(model, optimizer, batches, [0])
    plain = BASES["lookahead"](make("batchnorm_cnn", torch.float32)[0].parameters())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["rho"] == METHODS["gam"].hyper["rho"]
    plain.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches, [1])


def test_a_nested_state_out_of_range_changes_nothing():
    model, optimizer, batches = setting("gam", BASES["lookahead"])
    train(model, optimizer, batches, [0])
    state = optimizer.state_dict()
    state["base_optimizer"]["param_groups"][0]["rho"] = -1.0
    with unchanged(model, optimizer), pytest.raises(ValueError, match="rho must not be negative, got -1.0"):
        optimizer.load_state_dict(state)


def test_a_state_without_any_groups_is_for_the_base_to_read():
    class Opaque(torch.optim.SGD):
        def state_dict(self):
            return {"all": torch.tensor(self.param_groups[0]["lr"])}

        def load_state_dict(self, state_dict):
            self.param_groups = [{"params": self.param_groups[0]["params"], **self.defaults}]
            self.param_groups[0]["lr"] = float(state_dict["all"])

    _, optimizer, _ = setting("gam", Opaque, lr=0.5)
    optimizer.param_groups[0]["rho"] = 0.3
    optimizer.load_state_dict(optimizer.state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["rho"]) == (0.5, 0.3)


NAMES = list(METHODS)


@pytest.mark.parametrize(("saved", "loaded"), in_turn(NAMES, [*NAMES[2:], *NAMES[:2]]))
def test_a_state_of_another_method_keeps_the_values_of_the_constructor(saved, loaded, caplog):
    """The momentum is the checkpoint's, the recipe's numbers are those of the method that goes on."""
    model, before, batches = setting(saved, MOMENTUM, "mlp")
    train(model, before, batches, [0])
    twin, after, _ = setting(loaded, partial(MOMENTUM, lr=0.2), "mlp")
    given = {key: after.param_groups[0][key] for key in after.recipe.defaults}
    with caplog.at_level(logging.WARNING, "gam_fast"):
        after.load_state_dict(before.state_dict())
    assert {key: after.param_groups[0][key] for key in after.recipe.defaults} == given
    assert after.param_groups[0]["lr"] == 0.1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(given)
    for line in said:
        assert f"a state of {before.recipe.name} into {after.recipe.name}" in line
        assert all(f"{key}={value!r}" in line for key, value in given.items())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(before.state[p]["momentum_buffer"], after.state[q]["momentum_buffer"])


def test_a_state_of_the_same_method_brings_its_values(caplog):
    params = [nn.Parameter(torch.ones(2))]
    saved = gam_fast.GAM(params, rho=0.7, beta=(1.0, 0.5)).state_dict()
    assert saved["param_groups"][0]["flat_method"] == "GAM"
    optimizer = gam_fast.GAM(params, rho=0.1)
    optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["beta"]) == (0.7, (1.0, 0.5))
    assert "flat_method" not in optimizer.param_groups[0]
    for group in saved["param_groups"]:  # as 0.7.0 wrote it
        del group["flat_method"]
    optimizer.param_groups[0]["rho"] = 0.2
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rho"] == 0.7
    assert not caplog.records


@pytest.mark.parametrize(
    "keys", [{"rho": 0.05}, {"rho": 0.05, "adaptive": False}, {"rho": 0.04, "alpha": 0.4}], ids=str
)
def test_a_state_that_names_no_method_and_lacks_a_value_is_of_another(keys, caplog):
    """As 0.7.0 and other packages wrote it."""
    params = [torch.nn.Parameter(torch.ones(2))]
    saved = torch.optim.SGD(params, lr=0.3).state_dict()
    saved["param_groups"][0].update(keys)
    optimizer = gam_fast.GAM(params, lr=0.1, rho=0.2, alpha=0.6)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["rho"], group["alpha"]) == (0.3, 0.2, 0.6)
    (record,) = caplog.records
    assert "loaded a state of another method into GAM, which keeps its own rho=0.2" in record.getMessage()


def test_a_state_goes_through_the_plain_base_and_comes_back(caplog):
    params = [nn.Parameter(torch.ones(2))]
    plain = torch.optim.SGD(params, lr=0.1)
    plain.load_state_dict(gam_fast.SAM(params, lr=0.3, rho=0.4).state_dict())
    assert plain.param_groups[0]["lr"] == 0.3
    same = gam_fast.SAM(params, lr=0.1, rho=0.1)
    same.load_state_dict(plain.state_dict())
    assert same.param_groups[0]["rho"] == 0.4
    other = gam_fast.GAM(params, lr=0.1, rho=0.1)
    other.load_state_dict(plain.state_dict())
    assert other.param_groups[0]["rho"] == 0.1
    assert other.state_dict()["param_groups"][0]["flat_method"] == "GAM"
    assert len(caplog.records) == 1


def test_groups_and_bases_with_names_of_their_own_keep_them():
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]

    def of(method, alpha):
        groups = [{"params": params[:1]}, {"params": params[1:], f"{method.recipe.name.lower()}_alpha": alpha}]
        return method(groups, torch.optim.RMSprop, lr=0.1, alpha=0.3)

    optimizer = of(gam_fast.GAM, 0.2)
    optimizer.load_state_dict(of(gam_fast.GSAM, 0.9).state_dict())
    assert [group["gam_alpha"] for group in optimizer.param_groups] == [0.3, 0.2]
    assert [group["alpha"] for group in optimizer.param_groups] == [0.99, 0.99]  # of RMSprop


# Pickles and copies


class Unpicklable(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = make("batchnorm_cnn", torch.float32)[0]
        self.activation = lambda v: v

    def forward(self, x):
        return self.activation(self.inner(x))


@pytest.mark.parametrize(("method_name", "how"), in_turn(["base", "sam", "gam"], COPIES))
def test_an_optimizer_is_copied_without_its_module(method_name, how):
    model = Unpicklable()
    method = METHODS[method_name]
    optimizer = method.optimizer(model.parameters(), torch.optim.SGD, lr=0.1, model=model, **method.hyper)
    batches = make("batchnorm_cnn", torch.float32)[1]
    train(model, optimizer, batches, [0])
    if how != "deepcopy":  # which copies a function as it is
        with pytest.raises((pickle.PicklingError, AttributeError)):
            COPIES[how](model)
    memo = {}
    twin = copy.deepcopy(optimizer, memo) if how == "deepcopy" else COPIES[how](optimizer)
    assert not memo.keys() & {id(each) for each in (model, *model.buffers())}
    assert len(twin.param_groups[0]["params"]) == len(list(model.parameters()))
    assert twin.model is None
    with pytest.raises(RuntimeError, match="a copy without its model .a Unpicklable, whose buffers"):
        next(iter(twin.passes()))
    assert COPIES["pickle"](twin).state_dict()["param_groups"] == twin.state_dict()["param_groups"]
    twin.model = None  # says that it is known
    next(iter(twin.passes())).backward(twin.param_groups[0]["params"][0].sum())


@pytest.mark.parametrize("replay", [True, False])
def test_a_pickle_of_an_older_version(replay):
    """It knows no share and no schedule, and of random numbers whether they are replayed."""
    _, optimizer, _ = setting("sam", MOMENTUM, "mlp")
    state = optimizer.__getstate__()
    del state["_schedule"]
    options = {key: value for key, value in state["_options"].items() if key != "ascent_share"}
    old = object.__new__(gam_fast.SAM)
    old.__setstate__({**state, "_options": {**options, "replay_rng": replay}})
    assert (old.ascent_share, old.interval, old.active) == (1.0, 1, None)
    assert (old._options["replay_rng"] is not None) is replay


def test_a_copy_needs_no_module_that_has_no_buffers():
    _, optimizer, _ = setting("gam", MOMENTUM, "mlp")
    twin = copy.deepcopy(optimizer)
    params = twin.param_groups[0]["params"]
    twin.step(lambda: sum(p.square().sum() for p in params).backward())
    assert not any(map(torch.equal, params, optimizer.param_groups[0]["params"]))
