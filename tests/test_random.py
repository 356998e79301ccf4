"""Random numbers of a step: whose generators are replayed, and what threads that draw beside a step get."""

import copy
import itertools
import pickle
import random
import sys
import threading

import numpy as np
import pytest
import torch
from cases import METHODS, in_turn
from snapshots import leave
from torch import nn
from torch.utils.checkpoint import checkpoint

import gam_fast
from gam_fast import rng
from gam_fast.rng import ReplayRNG

OWN = {
    "torch": (lambda: torch.Generator().manual_seed(5), lambda g: torch.rand(3, generator=g).tolist()),
    "numpy": (lambda: np.random.default_rng(5), lambda g: g.normal(size=3).tolist()),
    "numpy_mt": (lambda: np.random.Generator(np.random.MT19937(5)), lambda g: g.random(3).tolist()),
    "numpy_legacy": (lambda: np.random.RandomState(5), lambda g: [g.randn(), g.rand()]),
    "random": (lambda: random.Random(5), lambda g: [g.random(), g.gauss(0.0, 1.0)]),
}

GLOBAL = {
    "torch": lambda: torch.rand(3).tolist(),
    "torch_normal": lambda: torch.randn(1).tolist(),  # the second of each pair of which is kept
    "numpy": lambda: np.random.beta(0.2, 0.2),
    "numpy_normal": lambda: np.random.randn(),
    "random": lambda: random.random(),
    "random_normal": lambda: random.gauss(0.0, 1.0),
}


@pytest.fixture(autouse=True)
def _global_generators():
    kept = random.getstate(), np.random.get_state()
    yield
    random.setstate(kept[0])
    np.random.set_state(kept[1])


def optimizer_of(method_name, params, **options):
    method = METHODS[method_name]
    return method.optimizer(params, torch.optim.SGD, lr=0.1, **method.hyper, **options)


def drawn_in_steps(optimizer, weight, draw, steps=3, before=lambda: None):
    """What each pass of each step has drawn."""
    found = []
    for _ in range(steps):
        before()
        passes = []
        for _ in optimizer.passes():
            passes.append(draw())
            (weight**2).sum().backward()
        found.append(passes)
    return found


def undo(optimizer, weight, draw, last):
    """Leave a step by an error in pass ``last``."""
    leave(optimizer, lambda: (draw(), (weight**2).sum().backward()), last)


# Generators of the user's own


@pytest.mark.parametrize(("method_name", "kind"), in_turn(METHODS, OWN))
def test_named_generators_draw_the_same_in_each_pass_and_go_on_as_after_one(method_name, kind):
    build, draw = OWN[kind]
    generator, plain = build(), build()
    weight = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(method_name, [weight], replay_rng=[generator])
    for passes in drawn_in_steps(optimizer, weight, lambda: draw(generator)):
        assert passes == [draw(plain)] * METHODS[method_name].passes


@pytest.fixture(params=OWN)
def own(request):
    """Two generators in the same state, and how to draw from one."""
    build, draw = OWN[request.param]
    return build(), build(), draw


def test_an_undone_step_has_not_drawn_from_named_generators(own):
    generator, plain, draw = own
    weight = nn.Parameter(torch.ones(3))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, replay_rng=[generator])
    for last in range(2):
        undo(optimizer, weight, lambda: draw(generator), last)
    assert draw(generator) == draw(plain)


def test_what_a_named_generator_draws_while_micro_batches_are_read_is_drawn_once(own):
    generator, plain, draw = own
    weight = nn.Parameter(torch.ones(3))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1, replay_rng=[generator])
    for _ in range(2):
        expected = None
        for _ in optimizer.passes():
            seen = []
            for read in optimizer.micro_batches(draw(generator) for _ in range(2)):
                seen.append((read, draw(generator)))
                (weight**2).sum().backward()
            if expected is None:
                read = [draw(plain), draw(plain)]
                expected = [(value, draw(plain)) for value in read]
            assert seen == expected


def test_with_a_share_of_the_batch_the_last_pass_is_the_one_that_counts(own):
    generator, plain, draw = own
    weight, x = nn.Parameter(torch.ones(3)), torch.ones(8, 3)
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, replay_rng=[generator], ascent_share=0.25)
    for turn in optimizer.passes():
        rows = turn.rows(x)
        for _ in rows:
            draw(generator)
        (rows @ weight).sum().backward()
    for _ in x:
        draw(plain)
    assert draw(generator) == draw(plain)


def test_named_generators_go_with_the_optimizer_into_copies_and_pickles():
    generator = np.random.default_rng(3)
    weight = nn.Parameter(torch.ones(3))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, replay_rng=[generator])
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (own,) = other._options["replay_rng"].generators
        assert own is not generator
        param = other.param_groups[0]["params"][0]
        assert all(a == b for a, b in drawn_in_steps(other, param, own.random))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (lambda: [3], "got 3$"),
        (lambda: "all", "list of generators whose state"),
        (lambda: [random.SystemRandom()], "whose state can be read and set .* got <random.SystemRandom"),
        (lambda: torch.Generator(), r"write replay_rng=\[<torch"),
        (lambda: random.Random(1), r"write replay_rng=\[<random"),
    ],
)
def test_no_generator_is_refused_with_its_value(given, match):
    with pytest.raises(TypeError, match=match):
        gam_fast.SAM([nn.Parameter(torch.ones(3))], torch.optim.SGD, lr=0.1, replay_rng=given())


# Python's and NumPy's


@pytest.mark.usefixtures("_alone_and_not")
@pytest.mark.parametrize(("method_name", "kind"), in_turn(METHODS, GLOBAL))
def test_the_body_may_draw_from_global_generators(method_name, kind):
    """Mixup's λ, a batch drawn by its indices. An undone step has not drawn."""
    draw, passes = GLOBAL[kind], METHODS[method_name].passes

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    weight = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(method_name, [weight])
    seed()
    found = drawn_in_steps(optimizer, weight, draw, steps=4)
    for last in range(passes):
        undo(optimizer, weight, draw, last)
    found += drawn_in_steps(optimizer, weight, draw, steps=1)
    seed()
    assert found == [[draw()] * passes for _ in range(5)]


@pytest.mark.parametrize("kind", ["numpy", "random"])
def test_a_body_may_draw_in_some_steps_only(kind):
    weight = nn.Parameter(torch.ones(3))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    for i in range(60):
        draw = GLOBAL[kind] if i % 3 == 0 else lambda: None
        ((first, second),) = drawn_in_steps(optimizer, weight, draw, steps=1)
        assert first == second, i


def test_a_body_that_never_draws_from_them_is_looked_at_once_in_a_while(monkeypatch):
    clock, looks = [0.0], []
    monkeypatch.setattr(rng.time, "perf_counter", lambda: clock[0])
    real = random.getstate

    def getstate():
        looks.append(clock[0])
        clock[0] += 1e-5
        return real()

    monkeypatch.setattr(random, "getstate", getstate)
    weight = nn.Parameter(torch.ones(3))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    drawn_in_steps(optimizer, weight, lambda: None, steps=100, before=lambda: clock.__setitem__(0, clock[0] + 1e-4))
    assert 2 < len(looks) < 20  # of 200
    looks.clear()
    found = drawn_in_steps(
        optimizer, weight, random.random, steps=10, before=lambda: clock.__setitem__(0, clock[0] + 0.1)
    )
    assert all(one == other for one, other in found)


# Threads


class Beside:
    """A thread that draws all the time."""

    def __init__(self, draw):
        self.drawn, self._stop = [], threading.Event()
        self._thread = threading.Thread(target=self._run, args=(draw,))

    def _run(self, draw):
        while not self._stop.is_set() and len(self.drawn) < 100_000:
            self.drawn.append(draw())

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def dropout_model():
    return nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 3))


def losses_of_passes(optimizer, model, x, steps):
    found = []
    for _ in range(steps):
        losses = []
        for _ in optimizer.passes():
            loss = model(x).square().mean()
            loss.backward()
            losses.append(loss.item())
        found.append(losses)
    return found


@pytest.mark.parametrize(("method", "threads"), [(gam_fast.SAM, 3), (gam_fast.GAM, 2)])
def test_threads_that_train_with_dropout_each_have_the_masks_of_their_step(method, threads):
    torch.set_num_threads(1)
    x, found = torch.randn(16, 6), []

    def train():
        model = dropout_model()
        still = {"rho_prime": 0.0} if method is gam_fast.GAM else {}
        optimizer = method(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.0, **still)
        found.extend(losses_of_passes(optimizer, model, x, 60))

    running = [threading.Thread(target=train) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert len(found) == 60 * threads
    for losses in found:
        assert max(losses) - min(losses) < 1e-4
    assert len({losses[0] for losses in found}) > 50 * threads  # and the masks of no other


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("draw", [torch.rand, torch.randn], ids=["rand", "randn"])
@pytest.mark.parametrize("method_name", ["base", "sam", "gam"])
def test_a_thread_that_draws_beside_a_step_gets_no_number_twice_and_leaves_the_masks_alone(method_name, draw, drops):
    torch.set_num_threads(1)
    model = dropout_model() if drops else nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = optimizer_of(method_name, model.parameters())
    for group in optimizer.param_groups:  # so that passes of the same masks have the same loss
        group.update(dict.fromkeys(group.keys() & {"lr", "rho", "rho_prime"}, 0.0))
    x = torch.randn(16, 6)
    with Beside(lambda: tuple(draw(2).tolist())) as beside:
        found = losses_of_passes(optimizer, model, x, 20)
    assert len(beside.drawn) - len(set(beside.drawn)) == 0
    assert all(len(set(losses)) == 1 for losses in found)


@pytest.mark.usefixtures("_alone_and_not")
def test_a_later_pass_that_draws_more_than_the_first_does_not_shift_the_stream():
    weight = nn.Parameter(torch.ones(3))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)
    counts = itertools.cycle([3, 3, 100, 3])
    start = torch.get_rng_state()
    found = drawn_in_steps(optimizer, weight, lambda: torch.rand(next(counts))[:3].tolist())
    torch.set_rng_state(start)
    assert found == [[torch.rand(3).tolist()] * 4 for _ in range(3)]


@pytest.mark.usefixtures("_alone_and_not")
def test_checkpointed_activations_are_recomputed_with_the_masks_of_their_forward():
    masks = []

    class Branch(nn.Dropout):
        def forward(self, x):
            y = super().forward(x)
            masks.append(y.detach() != 0)
            return y

    branch, weight = Branch(0.5), nn.Parameter(torch.rand(32) + 0.5)
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)
    for _ in range(2):
        masks.clear()
        for _ in optimizer.passes():
            checkpoint(lambda w: branch(w * w).square(), weight, use_reentrant=False).sum().backward()
        assert len(masks) == 8
        assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize("kind", ["numpy", "random"])
def test_a_thread_that_draws_from_pythons_or_numpys_generator_is_left_alone(kind):
    """Who draws cannot be known there: what moves between two looks is taken to be another thread's."""
    draw, weight = {"numpy": np.random.rand, "random": random.random}[kind], nn.Parameter(torch.ones(3))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    with Beside(draw) as beside:
        drawn_in_steps(optimizer, weight, lambda: None, steps=30)
    assert len(beside.drawn) - len(set(beside.drawn)) == 0


@pytest.mark.usefixtures("_alone_and_not")
def test_two_optimizers_over_one_body_draw_the_same_and_the_stream_goes_on():
    weights = [nn.Parameter(torch.ones(16)) for _ in range(2)]
    optimizers = [gam_fast.GAM([weight], torch.optim.SGD, lr=0.1) for weight in weights]
    model = nn.Dropout(0.5)
    for _ in range(2):
        state, masks = torch.get_rng_state(), []
        for _ in zip(*(optimizer.passes() for optimizer in optimizers), strict=False):
            masks.append(model(torch.ones(16)))
            (masks[-1] * sum(weights)).square().sum().backward()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        assert torch.equal(masks[0], model(torch.ones(16)))
        assert torch.equal(after, torch.get_rng_state())
        assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.usefixtures("_alone_and_not")
def test_a_step_within_a_pass_is_replayed_with_it():
    outer, inner = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16))
    first = gam_fast.SAM([outer], torch.optim.SGD, lr=0.1)
    second = gam_fast.SAM([inner], torch.optim.SGD, lr=0.1)
    model, seen = nn.Dropout(0.5), []
    for _ in first.passes():
        masks = [model(torch.ones(16))]
        for _ in second.passes():
            masks.append(model(torch.ones(16)))
            (masks[-1] * inner).square().sum().backward()
        masks.append(model(torch.ones(16)))
        (masks[-1] * outer).square().sum().backward()
        assert torch.equal(masks[1], masks[2])
        assert not torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[3], masks[1])
        seen.append(masks)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_without_the_core_the_state_tells_and_a_quiet_pass_rewinds_nothing(monkeypatch):
    monkeypatch.setattr(rng, "_draws", lambda: None)
    with ReplayRNG() as replay:
        replay._alone = False
        replay.begin()
        replay.end()
        torch.rand(2)  # of another thread
        state = torch.get_rng_state()
        replay.begin()
        assert torch.equal(state, torch.get_rng_state())
        replay.end()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.usefixtures("_idle")
def test_neither_numpy_nor_the_core_is_needed(monkeypatch):
    monkeypatch.setattr(rng, "_draws", lambda: None)
    monkeypatch.setitem(sys.modules, "numpy.random", None)
    weight = nn.Parameter(torch.ones(3))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)
    for passes in drawn_in_steps(optimizer, weight, GLOBAL["torch"]):
        assert passes == [passes[0]] * 4
