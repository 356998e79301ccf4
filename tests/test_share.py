"""ascent_share: all passes but the last see the leading share of the batch, the last sees all of it."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cases import BASES, DTYPES, METHODS, MODELS, loss_of, make, pairwise
from reference import exact_gam
from snapshots import assert_same, everything
from test_exact import Functional
from torch import Tensor, nn

import gam_fast
from gam_fast import sums

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp itself

MULTIPASS = [name for name in METHODS if METHODS[name].passes > 1]
SHARES = [0.05, 0.25, 0.5]
ROWS = {0.05: 1, 0.25: 3, 0.5: 6}
"""Of batches of 12."""


def train_by_turns(model, optimizer, batches):
    for x, y in batches:
        for turn in optimizer.passes():
            turn.backward(loss_of(model, *turn.rows(x, y)))


# The mathematics


def reference_step(model, optimizer, method, x, y, rows):
    """By the book: the gradients of the first ``rows`` rows, but for the last, which is that of all."""
    params = [p for p in model.parameters() if p.requires_grad]
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    used: list[bool] = []
    calls = itertools.count(1)

    def gradient(values):
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
        model.zero_grad()
        last = next(calls) == method.passes
        (sign * (loss_of(model, x, y) if last else loss_of(model, x[:rows], y[:rows]))).backward()
        used[:] = [p.grad is not None for p in params]
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]

    theta = [p.detach().clone() for p in params]
    direction = method.reference(gradient, theta, **method.hyper)
    with torch.no_grad():
        for p, value, d, takes_part in zip(params, theta, direction, used, strict=True):
            p.copy_(value)
            p.grad = sign * d if takes_part else None
    optimizer.step()


@pytest.mark.parametrize(
    ("model_name", "method_name", "base_name", "share"),
    pairwise(MODELS, MULTIPASS, ["sgd_nesterov", "adamw_maximize"], SHARES),
)
def test_a_step_is_that_of_a_plain_loop_over_the_same_rows(model_name, method_name, base_name, share):
    method, build = METHODS[method_name], BASES[base_name]
    ours, batches = make(model_name)
    theirs = copy.deepcopy(ours)
    optimizer = method.optimizer(ours.parameters(), build, model=ours, ascent_share=share, **method.hyper)
    plain = build([p for p in theirs.parameters() if p.requires_grad])
    for k, (x, y) in enumerate(batches if sums.reads_are_free(torch.device("cpu")) else batches[:2]):
        if k % 2:

            def closure(turn, x=x, y=y):
                loss = loss_of(ours, *turn.rows(x, y))
                loss.backward()
                return loss

            optimizer.step(closure)
        else:
            train_by_turns(ours, optimizer, [(x, y)])
        reference_step(theirs, plain, method, x, y, ROWS[share])
    for (name, p), q in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p, q[1], rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("sam_rho", [None, 0.1])
def test_exact_gam_differentiates_the_loss_of_the_same_rows(sam_rho, share):
    ours, batches = make("mlp")
    theirs = copy.deepcopy(ours)
    hyper = {"rho": 0.2, "alpha": 0.4, "sam_rho": sam_rho}
    optimizer = gam_fast.ExactGAM(ours.parameters(), torch.optim.SGD, lr=0.1, ascent_share=share, **hyper)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for x, y in batches:
        part = Functional(theirs, x[: ROWS[share]], y[: ROWS[share]])
        whole = Functional(theirs, x, y)
        # θ, θ_adv (the last pass), and with sam_rho its point; products at θ and θ_adv
        gradients, products = iter([part, whole, part]), iter([part, whole])
        theta = [p.detach().clone() for p in theirs.parameters()]
        direction = exact_gam(
            lambda values, them=gradients: next(them).gradient(values),
            theta,
            product=lambda values, v, them=products: next(them).product(values, v),
            **hyper,
        )
        for p, d in zip(theirs.parameters(), direction, strict=True):
            p.grad = d
        plain.step()
        optimizer.step(lambda turn, x=x, y=y: loss_of(ours, *turn.rows(x, y)))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method_name", METHODS)
def test_a_share_of_one_is_the_plain_recipe_bit_for_bit(method_name, dtype):
    method = METHODS[method_name]
    (ours, batches), (theirs, _) = make("batchnorm_cnn", dtype), make("batchnorm_cnn", dtype)
    options = {"lr": 0.1, "momentum": 0.9, **method.hyper}
    optimizer = method.optimizer(ours.parameters(), torch.optim.SGD, model=ours, ascent_share=1, **options)
    plain = method.optimizer(theirs.parameters(), torch.optim.SGD, model=theirs, **options)
    for x, y in batches[:2]:
        train_by_turns(ours, optimizer, [(x, y)])
        for _ in plain.passes():
            loss_of(theirs, x, y).backward()
    for (name, ours_), theirs_ in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(ours_, theirs_), name


@pytest.mark.parametrize("method_name", MULTIPASS)
def test_a_share_of_the_micro_batches_is_that_share_of_the_batch(method_name):
    method = METHODS[method_name]
    (whole, batches), (model, _) = make("mlp"), make("mlp")
    options = {"lr": 0.1, "momentum": 0.9, "ascent_share": 0.5, **method.hyper}
    large = method.optimizer(whole.parameters(), torch.optim.SGD, **options)
    small = method.optimizer(model.parameters(), torch.optim.SGD, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for k, (x, y) in enumerate(batches):
        train_by_turns(whole, large, [(x, y)])
        seen = []
        for turn in small.passes(scaler if k % 2 else None):
            parts = list(small.micro_batches(zip(x.chunk(4), y.chunk(4), strict=True)))
            seen.append(len(parts))
            for a, b in parts:
                turn.backward(loss_of(model, a, b) / 4)
        assert seen == [2] * (method.passes - 1) + [4]
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sam_rho", [None, 0.1])
def test_a_share_of_the_micro_batches_of_exact_gam(sam_rho):
    (whole, batches), (model, _) = make("mlp"), make("mlp")
    options = {"lr": 0.1, "ascent_share": 0.5, "sam_rho": sam_rho}
    large = gam_fast.ExactGAM(whole.parameters(), torch.optim.SGD, **options)
    small = gam_fast.ExactGAM(model.parameters(), torch.optim.SGD, **options)
    for x, y in batches:
        train_by_turns(whole, large, [(x, y)])
        for turn in small.passes():
            for a, b in small.micro_batches(zip(x.chunk(4), y.chunk(4), strict=True)):
                turn.backward(loss_of(model, a, b) / 4)
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


# What else a step touches


@pytest.mark.parametrize("method_name", MULTIPASS)
def test_running_statistics_are_those_of_the_last_pass(method_name):
    method = METHODS[method_name]
    model, batches = make("batchnorm_cnn")
    optimizer = method.optimizer(model.parameters(), torch.optim.SGD, lr=0.1, model=model, ascent_share=0.25)
    for x, y in batches:
        start = copy.deepcopy(model.state_dict())
        last = copy.deepcopy(model)
        for turn in optimizer.passes():
            if turn.last:
                last.load_state_dict({**model.state_dict(), **{k: v for k, v in start.items() if "running" in k}})
                last.net[1].num_batches_tracked.copy_(start["net.1.num_batches_tracked"])
                last.net[4].num_batches_tracked.copy_(start["net.4.num_batches_tracked"])
                loss_of(last, x, y)
            turn.backward(loss_of(model, *turn.rows(x, y)))
        assert all(map(torch.equal, model.buffers(), last.buffers()))
    assert int(model.net[1].num_batches_tracked) == len(batches)


def test_random_numbers_after_a_step_are_those_after_plain_training():
    def build():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()

    ours, theirs = build(), build()
    _, batches = make("mlp")
    optimizer = gam_fast.GAM(ours.parameters(), torch.optim.SGD, lr=0.1, ascent_share=0.25)
    plain = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for x, y in batches:
        start = torch.get_rng_state()
        train_by_turns(ours, optimizer, [(x, y)])
        end = torch.get_rng_state()
        torch.set_rng_state(start)
        plain.zero_grad()
        loss_of(theirs, x, y).backward()
        assert torch.equal(torch.get_rng_state(), end)


def test_the_ascent_passes_draw_the_same_masks():
    drop, masks = nn.Dropout(0.5), []
    weight = nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1, ascent_share=0.5)
    for turn in optimizer.passes():
        x = turn.rows(torch.ones(6, 8, dtype=torch.float64))
        masks.append(drop(torch.ones_like(x)))
        (masks[-1] * weight).square().sum().backward()
    assert [tuple(mask.shape) for mask in masks] == [(3, 8)] * 3 + [(6, 8)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_loader_that_is_read_in_the_first_pass_draws_as_in_plain_training(dropout, share):
    """Its numbers are drawn once, go on from step to step, and all passes have the masks that come after them."""
    torch.manual_seed(5)
    drop = nn.Dropout(dropout)
    weight = nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1, ascent_share=share)

    def loader():
        for _ in range(4):
            yield torch.rand(2, 8, dtype=torch.float64)

    steps, masks = [], []
    start = torch.get_rng_state()
    for _ in range(2):
        for turn in optimizer.passes():
            seen = []
            for x in optimizer.micro_batches(loader()):
                masks.append((turn.index, drop(torch.ones_like(x))))
                seen.append(x)
                (masks[-1][1] * x * weight).square().sum().backward()
        steps.append(seen)
    end = torch.get_rng_state()
    torch.set_rng_state(start)
    for seen in steps:  # as plain training: all batches, then a mask for each
        plain = list(loader())
        expected = [drop(torch.ones_like(x)) for x in plain]
        assert all(map(torch.equal, seen, plain))
        count = 3 * (4 if share == 1.0 else 1) + 4  # of the ascent passes, and of the last
        mine, masks = masks[:count], masks[count:]
        for k in range(4):
            assert all(map(torch.equal, [mask for at, mask in mine if at == k], expected))
    assert torch.equal(torch.get_rng_state(), end)


def test_a_loader_that_fails_while_it_is_read_leaves_the_random_state():
    weight = nn.Parameter(torch.ones(3))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, ascent_share=0.5)

    def loader():
        yield torch.rand(3)
        raise OSError("the disk is gone")

    before = torch.get_rng_state()
    with pytest.raises(OSError, match="the disk is gone"):
        optimizer.step(lambda: list(optimizer.micro_batches(loader())))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_is_drawn_in_the_first_pass_is_another_in_the_next_step():
    weight = nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, ascent_share=0.5)
    drawn = []
    for _ in range(2):
        for turn in optimizer.passes():
            if turn.index == 0:
                x = torch.rand(4, 8, dtype=torch.float64)
                drawn.append(x)
            (turn.rows(x) * weight).square().sum().backward()
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", range(4))
def test_a_step_left_early_leaves_nothing_behind(at, dtype):
    model, batches = make("batchnorm_cnn", dtype)
    options = {"lr": 0.1, "momentum": 0.9, "model": model, "ascent_share": 0.25}
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, **options)
    train_by_turns(model, optimizer, batches[:1])
    before = everything(model, optimizer)
    x, y = batches[1]
    for turn in optimizer.passes():
        loss = loss_of(model, *turn.rows(x, y))
        torch.rand(1)
        if turn.index == at:
            break
        turn.backward(loss)
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method_name", MULTIPASS)
def test_a_step_of_learning_rate_zero_leaves_the_parameters(method_name, dtype):
    method = METHODS[method_name]
    model, batches = make("mlp", dtype)
    optimizer = method.optimizer(model.parameters(), torch.optim.SGD, lr=0.0, ascent_share=0.25, **method.hyper)
    before = [p.detach().clone() for p in model.parameters()]
    train_by_turns(model, optimizer, batches)
    assert all(map(torch.equal, before, model.parameters()))


def test_the_loss_is_that_of_the_first_pass():
    model, batches = make("mlp")
    optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1, ascent_share=0.25)
    x, y = batches[0]
    expected = loss_of(model, x[:3], y[:3])

    def closure(turn):
        loss = loss_of(model, *turn.rows(x, y))
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure), expected)


def test_whoever_ignores_the_turn_gets_the_whole_recipe_and_one_warning():
    (ours, batches), (theirs, _) = make("batchnorm_cnn"), make("batchnorm_cnn")
    optimizer = gam_fast.GAM(ours.parameters(), torch.optim.SGD, lr=0.1, model=ours, ascent_share=0.25)
    plain = gam_fast.GAM(theirs.parameters(), torch.optim.SGD, lr=0.1, model=theirs)
    for k, (x, y) in enumerate(batches):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in optimizer.passes():
                loss_of(ours, x, y).backward()
        assert ["ascent_share=0.25 of this GAM had no effect" in str(w.message) for w in caught] == [True] * (k == 0)
        assert all(w.filename == __file__ for w in caught)
        for _ in plain.passes():
            loss_of(theirs, x, y).backward()
    for ours_, theirs_ in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(ours_, theirs_)


@pytest.mark.parametrize("by", ["rows", "count"])
@pytest.mark.parametrize("method_name", ["sam", "gam"])
def test_rows_of_what_the_pass_before_has_kept_are_refused_and_the_step_is_undone(method_name, by):
    """Else ``x, y = turn.rows(x, y)`` would train on a part of a part."""
    model, batches = make("mlp")
    method = METHODS[method_name]
    optimizer = method.optimizer(model.parameters(), torch.optim.SGD, lr=0.1, ascent_share=0.25, **method.hyper)
    before = everything(model, optimizer)

    def step(x, y):
        for turn in optimizer.passes():
            if by == "rows":
                x, y = turn.rows(x, y)
            else:
                n = turn.count(len(x))
                x, y = x[:n], y[:n]
            loss_of(model, x, y).backward()

    with pytest.raises(RuntimeError, match=r"a batch of 3 rows in this pass, which is what the pass before kept of 12"):
        step(*batches[0])
    assert_same(everything(model, optimizer), before)


def test_several_batches_of_one_pass_may_be_as_long_as_parts_of_each_other():
    weight = nn.Parameter(torch.ones(2))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1, ascent_share=0.25)
    seen = []
    for turn in optimizer.passes():
        for n in (16, 4, 1, 16):
            x = turn.rows(torch.ones(n, 2))
            seen.append(len(x))
            (x * weight).square().sum().backward()
    assert seen == [4, 1, 1, 4] * 3 + [16, 4, 1, 16]


def test_whoever_goes_by_the_share_has_asked():
    """As by rows: statistics of the last pass, the whole batch in a step that stays, and no warning."""
    (ours, batches), (theirs, _) = make("batchnorm_cnn"), make("batchnorm_cnn")
    options = {"lr": 0.1, "ascent_share": 0.25, "active": gam_fast.active.WhenSteep(deviations=0.0)}
    optimizer = gam_fast.GAM(ours.parameters(), torch.optim.SGD, model=ours, **options)
    other = gam_fast.GAM(theirs.parameters(), torch.optim.SGD, model=theirs, **options)
    passes = []
    for x, y in batches:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for turn in optimizer.passes():
                n = int(turn.share * len(x))
                turn.backward(loss_of(ours, x[:n], y[:n]))
        passes.append(turn.index + 1)
        train_by_turns(theirs, other, [(x, y)])
    assert set(passes) == {2, 4}
    for ours_, theirs_ in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(ours_, theirs_)


def test_a_turn_says_which_it_is():
    assert repr(gam_fast.Turn(0, 4, share=0.25)) == "Turn(index=0, passes=4, share=0.25)"


def test_the_base_optimizer_alone_takes_no_notice_of_the_share():
    (ours, batches), (theirs, _) = make("mlp"), make("mlp")
    optimizer = gam_fast.Base(ours.parameters(), torch.optim.SGD, lr=0.1, ascent_share=0.25)
    plain = gam_fast.Base(theirs.parameters(), torch.optim.SGD, lr=0.1)
    for x, y in batches:
        for _ in optimizer.passes():
            loss_of(ours, x, y).backward()
    train_by_turns(theirs, plain, batches)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


# How a closure asks


def closures_of(model, optimizer, x, y, seen):
    def note(part_x, part_y):
        seen.append(len(part_x))
        loss_of(model, part_x, part_y).backward()

    class Callable:
        def __call__(self, turn):
            note(*turn.rows(x, y))

        def method(self, turn):
            note(*turn.rows(x, y))

    def with_default(turn, x=x, y=y):
        note(*turn.rows(x, y))

    def by_attribute(x=x, y=y):
        note(*optimizer.turn.rows(x, y))

    return {
        "default": with_default,
        "attribute": by_attribute,
        "object": Callable(),
        "method": Callable().method,
        "lambda": lambda turn: note(*turn.rows(x, y)),
        "decorated": torch.enable_grad()(with_default),
        "wrapped": functools.wraps(note)(lambda: note(*optimizer.turn.rows(x, y))),
        "partial": functools.partial(lambda data, turn: note(*turn.rows(*data)), (x, y)),
        "anything": lambda *args, **kwargs: note(*(args[0] if args else optimizer.turn).rows(x, y)),
    }


@pytest.mark.parametrize(
    "kind",
    ["default", "attribute", "object", "method", "lambda", "decorated", "wrapped", "partial", "anything"],
)
def test_a_closure_asks_its_turn(kind):
    model, batches = make("mlp")
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, ascent_share=0.25)
    seen: list[int] = []
    optimizer.step(closures_of(model, optimizer, *batches[0], seen)[kind])
    assert seen == [3, 3, 3, 12]


def test_a_closure_that_needs_more_than_a_turn_is_refused():
    model, batches = make("mlp")
    optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = everything(model, optimizer)
    with pytest.raises(TypeError, match="the closure needs x, y, but is called without"):
        optimizer.step(lambda x, y: loss_of(model, x, y).backward())
    assert_same(before, everything(model, optimizer))
    assert batches


# The rows of a batch


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Graph:
    nodes: Tensor
    name: str
    size: int = dataclasses.field(init=False, default=7)


def test_rows_of_all_that_a_batch_may_be():
    x, y = torch.arange(16).view(8, 2), torch.arange(8)
    turn = gam_fast.Turn(0, 4, share=0.25)
    assert torch.equal(turn.rows(x), x[:2])
    assert turn.rows(x).data_ptr() == x.data_ptr()  # a view
    first, second = turn.rows(x, y)
    assert torch.equal(first, x[:2])
    assert torch.equal(second, y[:2])
    nested = {"a": [x, (y, None)], "weight": torch.tensor(2.0), "names": list("abcdefgh"), "why": "because", "n": 8}
    found = turn.rows(nested)
    assert torch.equal(found["a"][0], x[:2])
    assert torch.equal(found["a"][1][0], y[:2])
    assert (found["a"][1][1], found["weight"], found["why"], found["n"]) == (None, torch.tensor(2.0), "because", 8)
    assert found["names"] == ["a", "b"]
    assert nested["names"] == list("abcdefgh")
    left, right = turn.rows([{"x": x}, Pair(x, y)])  # as a loader collates examples of a dict and a pair
    assert torch.equal(left["x"], right.x)
    pair = turn.rows(Pair(x, y))
    assert isinstance(pair, Pair)
    assert torch.equal(pair.y, y[:2])
    graph = turn.rows(Graph(x, "g"))
    assert torch.equal(graph.nodes, x[:2])
    assert (graph.name, graph.size) == ("g", 7)
    encoding = collections.UserDict(input_ids=x, labels=y)  # as of transformers
    cut = turn.rows(encoding)
    assert isinstance(cut, collections.UserDict)
    assert torch.equal(cut["labels"], y[:2])
    assert len(encoding["labels"]) == 8
    assert isinstance(turn.rows(collections.OrderedDict(x=x)), collections.OrderedDict)
    assert np.array_equal(turn.rows(np.arange(8)), np.arange(2))
    assert turn.rows(["a", "b", "c", "d"]) == ["a"]
    assert turn.rows(x, tuple("abcdefgh"))[1] == ("a", "b")
    assert turn.rows(x[:2], (224, 224), torch.Size([2, 3]))[1:] == ((224, 224), torch.Size([2, 3]))
    assert turn.rows(x, range(8), [{"id": i} for i in range(8)])[1:] == (range(2), [{"id": 0}, {"id": 1}])
    assert turn.rows(x, list(torch.arange(8)), [])[1:] == ([torch.tensor(0), torch.tensor(1)], [])


def test_rows_of_a_tokenizer_and_a_model_output():
    from transformers import BatchEncoding
    from transformers.modeling_outputs import BaseModelOutput

    x = torch.arange(16).view(8, 2)
    turn = gam_fast.Turn(0, 4, share=0.25)
    encoding = turn.rows(BatchEncoding({"input_ids": x, "attention_mask": torch.ones(8, 2)}))
    assert isinstance(encoding, BatchEncoding)
    assert torch.equal(encoding["input_ids"], x[:2])
    output = turn.rows(BaseModelOutput(last_hidden_state=x))
    assert isinstance(output, BaseModelOutput)
    assert torch.equal(output.last_hidden_state, x[:2])


def test_the_last_pass_gets_what_it_was_given():
    batch = {"x": torch.ones(3), "y": torch.ones(4)}  # not even looked at
    assert gam_fast.Turn(3, 4).rows(batch) is batch
    assert gam_fast.Turn(3, 4).rows(batch, 1)[0] is batch


@pytest.mark.parametrize(
    ("share", "n", "expected"),
    [
        (0.25, 100, 25),
        (0.25, 10, 3),
        (0.25, 1, 1),
        (0.01, 12, 1),
        (0.5, 3, 2),
        (1 / 3, 9, 3),
        (0.999, 4, 4),
        (0.5, 0, 0),
    ],
)
def test_how_many_rows(share, n, expected):
    turn = gam_fast.Turn(0, 2, share=share)
    assert turn.count(n) == expected
    assert len(turn.rows(torch.ones(n, 2))) == expected
    assert gam_fast.Turn(1, 2).count(n) == n


def test_what_rows_cannot_cut_is_refused():
    turn = gam_fast.Turn(0, 2, share=0.5)
    with pytest.raises(ValueError, match=r"one number of rows, got shapes \(4, 2\), \(3,\).*turn.count"):
        turn.rows(torch.ones(4, 2), torch.ones(3))
    with pytest.raises(TypeError, match="no tensor with rows in tuple.*turn.count"):
        turn.rows(object(), torch.tensor(1.0))
    with pytest.raises(TypeError, match="needs the batch"):
        turn.rows()
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"a list of 3 beside tensors of 4 rows: \['a', 'b', 'c'\].*turn.count"):
        turn.rows(x, ["a", "b", "c"])
    with pytest.raises(ValueError, match="a list of examples and not a batch: collate it first.*turn.count"):
        turn.rows([(x, 1), (x, 0)])
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2)])
    with pytest.raises(TypeError, match="a PackedSequence has no rows.*pack what turn.rows"):
        turn.rows(packed)
    for odd in (x.to_sparse(), collections.deque(["a", "b", "c", "d"])):
        with pytest.raises(TypeError, match="the rows of a .* cannot be taken .*turn.count"):
            turn.rows(torch.ones(4), odd)


def test_rows_of_micro_batches_are_refused_and_the_step_is_undone():
    model, batches = make("mlp")
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, ascent_share=0.5)
    before = everything(model, optimizer)
    x, y = batches[0]

    def closure(turn):
        for part in optimizer.micro_batches(zip(x.chunk(4), y.chunk(4), strict=True)):
            loss_of(model, *turn.rows(*part)).backward()

    def counting(turn):
        for a, b in optimizer.micro_batches(zip(x.chunk(4), y.chunk(4), strict=True)):
            n = turn.count(len(a))
            loss_of(model, a[:n], b[:n]).backward()

    def rows_first(turn):
        a, b = turn.rows(x, y)
        for part in optimizer.micro_batches(zip(a.chunk(2), b.chunk(2), strict=True)):
            loss_of(model, *part).backward()

    for interval in (1, 2):  # in plain steps too
        optimizer.interval = interval
        before = everything(model, optimizer)
        for wrong in (closure, counting, rows_first):
            with pytest.raises(RuntimeError, match="a share of the batch already"):
                optimizer.step(wrong)
            assert_same(before, everything(model, optimizer))


# The option


@pytest.mark.parametrize(
    ("share", "error"),
    [(0.0, ValueError), (-0.5, ValueError), (1.5, ValueError), (float("nan"), ValueError), ("half", TypeError),
     (True, TypeError), (None, TypeError)],
)  # fmt: skip
def test_a_share_that_is_none_is_refused(share, error):
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=f"ascent_share must be .*{share!r}"):
        gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, ascent_share=share)
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    with pytest.raises(error, match=f"ascent_share must be .*{share!r}"):
        optimizer.ascent_share = share
    assert optimizer.ascent_share == 1.0


def test_the_share_may_be_set_between_steps_and_is_copied():
    model, batches = make("mlp")
    optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.ascent_share = 0.5
    assert copy.deepcopy(optimizer).ascent_share == 0.5
    x, y = batches[0]
    for turn in optimizer.passes():
        assert turn.share == (1.0 if turn.last else 0.5)
        turn.backward(loss_of(model, *turn.rows(x, y)))
        with pytest.raises(RuntimeError, match="setting ascent_share while a step"):
            optimizer.ascent_share = 0.25
