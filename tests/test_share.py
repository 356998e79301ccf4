"""ascent_share: all passes but the last see the leading share of the batch, the last sees all of it."""

import collections
import copy
import dataclasses
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cases import ALL, BASES, MODELS, MULTIPASS, VARIANTS, in_turn, loss_of, make, setting
from reference import exact_gam
from snapshots import assert_close, assert_equal, unchanged
from test_active import train
from test_exact import Functional, set_gradients
from torch import Tensor, nn

import gam_fast
from gam_fast import sums

SHARES = [0.05, 0.25, 0.5]
ROWS = {0.05: 1, 0.25: 3, 0.5: 6}
"""Of batches of 12."""


# The mathematics


def reference_step(model, optimizer, method, x, y, rows):
    """By the book: the gradients of the first ``rows`` rows, but for the last, which is that of all."""
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    part, whole = Functional(model, x[:rows], y[:rows], sign), Functional(model, x, y, sign)
    losses = iter([part] * (method.passes - 1) + [whole])
    params = [p for p in model.parameters() if p.requires_grad]
    theta = [p.detach().clone() for p in params]
    state = optimizer.__dict__.setdefault("state_of_reference", {"step": 0, "used": lambda: [True] * len(params)})
    more = {"state": state} if method in VARIANTS.values() else {}
    direction = method.reference(lambda values: next(losses).gradient(values), theta, **method.hyper, **more)
    set_gradients(model, direction, sign, x, y)
    optimizer.step()
    for p, w in zip(params, state.get("after") or [0.0] * len(params), strict=True):
        p.data.sub_(optimizer.param_groups[0]["lr"] * w)


@pytest.mark.parametrize(
    ("model_name", "method_name", "base_name", "share"),
    in_turn(MODELS, MULTIPASS, ["sgd_nesterov", "adamw_maximize"], SHARES),
)
def test_a_step_is_that_of_a_plain_loop_over_the_same_rows(model_name, method_name, base_name, share):
    method, build = ALL[method_name], BASES[base_name]
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

            first = loss_of(copy.deepcopy(ours), x[: ROWS[share]], y[: ROWS[share]])
            assert torch.equal(optimizer.step(closure), first)
        else:
            train(ours, optimizer, [(x, y)])
        reference_step(theirs, plain, method, x, y, ROWS[share])
    assert_close(ours, theirs, 1e-9, 1e-9)


@pytest.mark.parametrize(("sam_rho", "share"), list(zip([None, 0.1, 0.1], SHARES, strict=True)))
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
    assert_close(ours, theirs, 1e-9, 1e-9)


@pytest.mark.parametrize(
    "method",
    [
        gam_fast.SAM,
        gam_fast.GAM,
        partial(gam_fast.ExactGAM, sam_rho=0.1),
        *(method.optimizer for method in VARIANTS.values() if method.passes > 1),
    ],
    ids=["sam", "gam", "exact", *(name for name, method in VARIANTS.items() if method.passes > 1)],
)
def test_a_share_of_the_micro_batches_is_that_share_of_the_batch(method):
    (whole, batches), (model, _) = make("mlp"), make("mlp")
    options = {"lr": 0.1, "momentum": 0.9, "ascent_share": 0.5}
    large = method(whole.parameters(), torch.optim.SGD, **options)
    small = method(model.parameters(), torch.optim.SGD, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for k, (x, y) in enumerate(batches):
        train(whole, large, [(x, y)])
        seen = []
        for turn in small.passes(scaler if k % 2 else None):
            parts = list(small.micro_batches(zip(x.chunk(4), y.chunk(4), strict=True)))
            seen.append(len(parts))
            for a, b in parts:
                turn.backward(loss_of(model, a, b) / 4)
        assert seen == [2] * (turn.passes - 1) + [4]
    assert_close(whole, model, 1e-9, 1e-9)


# What else a step touches


@pytest.mark.usefixtures("_alone_and_not")
def test_ascent_passes_draw_the_same_masks_and_the_stream_is_that_of_the_last_pass():
    drop, masks = nn.Dropout(0.5), []
    weight, x = nn.Parameter(torch.ones(8)), torch.ones(6, 8)
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1, ascent_share=0.5)
    start = torch.get_rng_state()
    for turn in optimizer.passes():
        masks.append(drop(turn.rows(x)))
        (masks[-1] * weight).square().sum().backward()
    end = torch.get_rng_state()
    torch.set_rng_state(start)
    assert torch.equal(masks[3], drop(x))
    assert torch.equal(torch.get_rng_state(), end)
    assert all(mask.shape == (3, 8) and torch.equal(mask, masks[0]) for mask in masks[:3])


@pytest.mark.usefixtures("_alone_and_not")
@pytest.mark.parametrize(("dropout", "share"), [(0.5, 1.0), (0.5, 0.25), (0.0, 0.25)])
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


def test_whoever_ignores_the_turn_gets_the_whole_recipe_and_one_warning():
    ours, optimizer, batches = setting("gam", model_name="batchnorm_cnn", ascent_share=0.25)
    theirs, plain, _ = setting("gam", model_name="batchnorm_cnn")
    for k, (x, y) in enumerate(batches):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in optimizer.passes():
                loss_of(ours, x, y).backward()
        assert ["ascent_share=0.25 of this GAM had no effect" in str(w.message) for w in caught] == [True] * (k == 0)
        assert all(w.filename == __file__ for w in caught)
        for _ in plain.passes():
            loss_of(theirs, x, y).backward()
    assert_equal(ours, theirs)


@pytest.mark.parametrize("by", ["rows", "count"])
def test_rows_of_what_the_pass_before_has_kept_are_refused_and_the_step_is_undone(by):
    """Else ``x, y = turn.rows(x, y)`` would train on a part of a part."""
    model, optimizer, batches = setting("gam", ascent_share=0.25)

    def step(x, y):
        for turn in optimizer.passes():
            if by == "rows":
                x, y = turn.rows(x, y)
            else:
                n = turn.count(len(x))
                x, y = x[:n], y[:n]
            loss_of(model, x, y).backward()

    message = "a batch of 3 rows in this pass, the part that the pass before kept of 12"
    with unchanged(model, optimizer), pytest.raises(RuntimeError, match=message):
        step(*batches[0])


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
    options = {"ascent_share": 0.25, "active": gam_fast.active.WhenSteep(deviations=0.0)}
    (ours, optimizer, batches), (theirs, other, _) = (
        setting("gam", model_name="batchnorm_cnn", **options) for _ in range(2)
    )
    passes = []
    for x, y in batches:
        for turn in optimizer.passes():
            n = int(turn.share * len(x))
            turn.backward(loss_of(ours, x[:n], y[:n]))
        passes.append(turn.index + 1)
        train(theirs, other, [(x, y)])
    assert set(passes) == {2, 4}
    assert_equal(ours, theirs)


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


@pytest.mark.parametrize(
    ("share", "n", "expected"),
    [(0.25, 100, 25), (0.25, 10, 3), (0.25, 1, 1), (0.01, 12, 1), (1 / 3, 9, 3), (0.999, 4, 4), (0.5, 0, 0)],
)
def test_how_many_rows(share, n, expected):
    turn, last = gam_fast.Turn(0, 2, share=share), gam_fast.Turn(1, 2)
    assert turn.count(n) == len(turn.rows(torch.ones(n, 2))) == expected
    assert last.count(n) == n
    batch = {"x": torch.ones(3), "y": torch.ones(4)}  # in the last pass not even looked at
    assert last.rows(batch) is last.rows(batch, 1)[0] is batch
    assert repr(turn) == f"Turn(index=0, passes=2, share={share})"


def test_what_rows_cannot_cut_is_refused():
    turn = gam_fast.Turn(0, 2, share=0.5)
    with pytest.raises(ValueError, match=r"one number of rows, got shapes \(4, 2\), \(3,\).*turn.count"):
        turn.rows(torch.ones(4, 2), torch.ones(3))
    with pytest.raises(TypeError, match="no tensor with rows in tuple.*turn.count"):
        turn.rows(object(), torch.tensor(1.0))
    with pytest.raises(TypeError, match="needs the batch"):
        turn.rows()
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"a list of 3 among tensors of 4 rows: \['a', 'b', 'c'\].*turn.count"):
        turn.rows(x, ["a", "b", "c"])
    with pytest.raises(ValueError, match="a list of examples and not a batch: collate it first.*turn.count"):
        turn.rows([(x, 1), (x, 0)])
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2)])
    with pytest.raises(TypeError, match="a PackedSequence has no rows.*pack the result of turn.rows"):
        turn.rows(packed)
    for odd in (x.to_sparse(), collections.deque(["a", "b", "c", "d"])):
        with pytest.raises(TypeError, match="the rows of a .* cannot be taken .*turn.count"):
            turn.rows(torch.ones(4), odd)


@pytest.mark.parametrize("interval", [1, 2])  # in plain steps too
def test_rows_of_micro_batches_are_refused_and_the_step_is_undone(interval):
    model, optimizer, batches = setting("gam", ascent_share=0.5, interval=interval)

    def parts(x, y):
        return optimizer.micro_batches(zip(x.chunk(2), y.chunk(2), strict=True))

    def rows_of_parts(turn):
        for part in parts(*batches[0]):
            loss_of(model, *turn.rows(*part)).backward()

    def count_of_parts(turn):
        for x, y in parts(*batches[0]):
            n = turn.count(len(x))
            loss_of(model, x[:n], y[:n]).backward()

    def parts_of_rows(turn):
        for part in parts(*turn.rows(*batches[0])):
            loss_of(model, *part).backward()

    for wrong in (rows_of_parts, count_of_parts, parts_of_rows):
        with unchanged(model, optimizer), pytest.raises(RuntimeError, match="a share of the batch already"):
            optimizer.step(wrong)


# The option


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan"), "half", True, None])
def test_a_share_that_is_none_is_refused(share):
    weight = nn.Parameter(torch.ones(2))
    error = ValueError if isinstance(share, float) else TypeError
    with pytest.raises(error, match=f"ascent_share must be .*{share!r}"):
        gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, ascent_share=share)
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    with pytest.raises(error, match=f"ascent_share must be .*{share!r}"):
        optimizer.ascent_share = share
    assert optimizer.ascent_share == 1.0


def test_the_share_may_be_set_between_steps_and_is_copied():
    weight = nn.Parameter(torch.ones(2))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    optimizer.ascent_share = 0.5
    assert copy.deepcopy(optimizer).ascent_share == 0.5
    for turn in optimizer.passes():
        assert turn.share == (1.0 if turn.last else 0.5)
        (turn.rows(torch.ones(4, 2)) * weight).sum().backward()
