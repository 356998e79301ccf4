"""However a loop over the passes is left: the step is taken, or undone at once; never lost in silence."""

import copy
import gc
import itertools
import sys
import threading

import pytest
import torch
from cases import ALL, METHODS, closure_of, in_turn, loss_of, make, setting
from snapshots import assert_close, assert_same, everything, unchanged

import gam_fast

SOME = ["base", "sam", "gam"]
PASSES = [(name, k) for name in SOME for k in range(METHODS[name].passes)]
WRITE_WITH = r"write `with optimizer.passes\(\) as turns:`"


class Interruption(Exception):
    pass


def started(method_name):
    """After a step."""
    model, optimizer, batches = setting(method_name, model_name="batchnorm_cnn")
    optimizer.step(closure_of(model, *batches[0]))
    return model, optimizer, batches[1]


def tensors(model, optimizer):
    return [*model.state_dict().values(), *(state["momentum_buffer"] for state in optimizer.state.values())]


# Exceptions: a handler around the loop sees the parameters as they were


def plain(turns, body):
    for turn in turns:
        body(turn)


def named(turns, body):
    held = turns
    for turn in held:
        body(turn)


def named_iterator(turns, body):
    held = iter(turns)
    for turn in held:
        body(turn)


def enumerated(turns, body):
    for _, turn in enumerate(turns):
        body(turn)


def zipped(turns, body):
    for turn, _ in zip(turns, itertools.count(), strict=False):
        body(turn)


def generator(turns, body):
    def parts():
        for turn in turns:
            yield body(turn)

    return list(parts())


def by_context(turns, body):
    with turns:
        held = enumerate(turns)
        for _, turn in held:
            body(turn)


LOOPS = {
    "plain": plain,
    "named": named,
    "named iterator": named_iterator,
    "enumerated": enumerated,
    "zipped": zipped,
    "comprehension": lambda turns, body: [body(turn) for turn in turns],
    "enumerated comprehension": lambda turns, body: [body(turn) for _, turn in enumerate(turns)],
    "generator expression": lambda turns, body: list(body(turn) for turn in turns),  # noqa: C400
    "inner comprehension": lambda turns, body: {n: body(turn) for n in range(1) for turn in turns},
    "generator": generator,
    "context": by_context,
}


@pytest.mark.parametrize("error", [Interruption, KeyboardInterrupt])
@pytest.mark.parametrize(("method_name", "at"), PASSES)
def test_an_exception_handler_sees_the_parameters_as_they_were(method_name, at, error):
    model, optimizer, (x, y) = started(method_name)
    before = everything(model, optimizer)

    def body(turn):
        loss_of(model, x, y).backward()
        if turn.index == at:
            raise error

    for name, loop in LOOPS.items():
        turns = optimizer.passes()  # a name that holds it
        try:
            loop(turns, body)
        except error:
            after = everything(model, optimizer)
            assert sys.exc_info()[2] is not None  # which holds the frames
        else:
            pytest.fail(f"{name} has not raised")
        assert_same(before, after)
        assert optimizer.turn is None
        assert list(turns) == []
    optimizer.step(closure_of(model, x, y))


@pytest.mark.parametrize("method_name", SOME)
def test_every_kind_of_loop_takes_the_same_step(method_name):
    def train(loop):
        model, optimizer, (x, y) = started(method_name)
        loop(optimizer.passes(), lambda turn: loss_of(model, x, y).backward())
        return tensors(model, optimizer)

    expected = train(plain)
    for name, loop in LOOPS.items():
        assert all(map(torch.equal, expected, train(loop))), name


def test_a_kept_wrapper_around_the_passes_is_noticed_when_it_goes_and_says_what_to_write():
    model, optimizer, (x, y) = started("sam")
    before = everything(model, optimizer)
    held = [enumerate(optimizer.passes())]

    def train():
        for i, _ in held[0]:
            loss_of(model, x, y).backward()
            if i == 1:
                raise Interruption

    with pytest.raises(Interruption):
        train()
    with pytest.warns(UserWarning, match=WRITE_WITH):
        held.clear()
    assert_same(before, everything(model, optimizer))


def deleted(optimizer, body):
    pairs = zip(range(4), optimizer.passes(), strict=False)
    for _ in pairs:
        body()
    del pairs


def by_next(optimizer, body):
    turns = optimizer.passes()
    for _ in range(4):
        next(turns)
        body()


@pytest.mark.parametrize("how", [deleted, by_next])
def test_a_step_that_goes_with_a_name_is_undone_and_noticed(how):
    model, optimizer, (x, y) = started("gam")
    with unchanged(model, optimizer), pytest.warns(UserWarning, match=WRITE_WITH):
        how(optimizer, lambda: loss_of(model, x, y).backward())


# Loops whose last body ran, and that do not ask for a pass after it


def by_zip(optimizer, passes, body):
    for _, turn in zip(range(passes), optimizer.passes(), strict=False):
        body(turn)


def by_islice(optimizer, passes, body):
    for turn in itertools.islice(optimizer.passes(), passes):
        body(turn)


def by_held_zip_in_a_context(optimizer, passes, body):
    with optimizer.passes() as turns:
        pairs = zip(range(passes), turns, strict=False)
        for _, turn in pairs:
            body(turn)


def by_next_in_a_context(optimizer, passes, body):
    with optimizer.passes() as turns:
        for _ in range(passes):
            body(next(turns))


def by_break_in_a_context(optimizer, passes, body):
    with optimizer.passes() as turns:
        for turn in turns:
            body(turn)
            if turn.last:
                break


def by_step(optimizer, passes, body):
    for turn in optimizer.passes():
        body(turn)
        if turn.last:
            optimizer.step()
            assert optimizer.turn is None


ENDS = [by_zip, by_islice, by_held_zip_in_a_context, by_next_in_a_context, by_break_in_a_context, by_step]


@pytest.mark.parametrize(("method_name", "how"), [*in_turn(METHODS, ENDS), *in_turn(["base"], ENDS[1:])])
def test_a_loop_that_does_not_ask_again_takes_its_step(method_name, how):
    def train(how):
        model, optimizer, (x, y) = started(method_name)
        how(optimizer, ALL[method_name].passes, lambda turn: loss_of(model, x, y).backward())
        assert optimizer.turn is None
        return tensors(model, optimizer)

    expected = train(lambda optimizer, passes, body: plain(optimizer.passes(), body))
    assert all(map(torch.equal, expected, train(how)))


def test_an_error_of_a_step_that_nobody_asked_for_is_raised_by_the_next():
    model, optimizer, (x, y) = started("sam")

    def train():
        for i, _ in zip(range(2), optimizer.passes(), strict=False):
            (loss_of(model, x, y) * (float("nan") if i else 1.0)).backward()

    with unchanged(model, optimizer), pytest.warns(UserWarning, match=r"raised by the next step"):
        train()
    with pytest.raises(gam_fast.NonFiniteGradientError):
        optimizer.step(closure_of(model, x, y))
    optimizer.step(closure_of(model, x, y))


def by_break(optimizer, passes, body):
    for turn in optimizer.passes():
        body(turn)
        if turn.last:
            break


def by_return(optimizer, passes, body):
    for turn in optimizer.passes():
        loss = body(turn)
        if turn.last:
            return loss
    return None


def by_return_of_a_constant(optimizer, passes, body):
    for turn in optimizer.passes():
        body(turn)
        if turn.last:
            return


@pytest.mark.parametrize(("method_name", "how"), in_turn(METHODS, [by_break, by_return, by_return_of_a_constant]))
def test_a_break_in_the_last_pass_undoes_the_step_and_says_so(method_name, how):
    model, optimizer, (x, y) = started(method_name)
    message = "left by break or return in its last pass: the step was undone"
    with unchanged(model, optimizer), pytest.warns(UserWarning, match=message):
        how(optimizer, ALL[method_name].passes, lambda turn: loss_of(model, x, y).backward())
    optimizer.step(closure_of(model, x, y))


@pytest.mark.parametrize(("method_name", "at"), PASSES)
def test_a_break_before_backward_in_a_context_undoes_the_step(method_name, at):
    model, optimizer, (x, y) = started(method_name)
    with unchanged(model, optimizer), optimizer.passes() as turns:
        held = enumerate(turns)
        for i, _ in held:
            if i == at:
                break
            loss_of(model, x, y).backward()


def test_a_context_left_before_the_last_pass_undoes_the_step():
    model, optimizer, (x, y) = started("gam")
    with unchanged(model, optimizer), optimizer.passes() as turns:
        next(turns)
        loss_of(model, x, y).backward()
        next(turns)

    def train():
        with optimizer.passes() as turns:
            for i, _ in zip(range(4), turns, strict=False):
                if i < 3:
                    loss_of(model, x, y).backward()

    with unchanged(model, optimizer), pytest.raises(RuntimeError, match="without a gradient"):
        train()


def test_a_step_left_in_a_cycle_is_undone_by_the_collector_in_any_thread():
    model, optimizer, (x, y) = started("sam")
    before = everything(model, optimizer)
    turns = optimizer.passes()
    next(turns)
    loss_of(model, x, y).backward()
    next(turns)
    cycle = [turns]
    cycle.append(cycle)
    del turns, cycle

    def collect():
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()

    with pytest.warns(UserWarning, match=WRITE_WITH):
        collect()
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize("method_name", SOME)
def test_step_behind_the_loop_is_refused(method_name):
    model, optimizer, (x, y) = started(method_name)
    plain(optimizer.passes(), lambda turn: loss_of(model, x, y).backward())
    with unchanged(model, optimizer), pytest.raises(RuntimeError, match="leave step\\(\\) out|step\\(\\) out"):
        optimizer.step()
    if ALL[method_name].passes == 1:  # a gradient of the user's own is one for step()
        loss_of(model, x, y).backward()  # onto what the loop has left
        optimizer.step()
        model.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.step()  # by the same gradient, as torch allows


# Two optimizers in lockstep


def two(method_name, model_name="mlp", known=(True, True)):
    """Over parts of a model; ``known``: which of them are given the model."""
    method = ALL[method_name]
    model, batches = make(model_name)
    params = list(model.parameters())
    first, second = (
        method.optimizer(part, torch.optim.SGD, lr=0.1, model=model if one else None, **method.hyper)
        for part, one in zip((params[::2], params[1::2]), known, strict=True)
    )
    return model, first, second, batches


@pytest.mark.parametrize("method_name", SOME)
def test_two_optimizers_in_lockstep(method_name):
    """Each walks by the gradients of its own parameters, and clears those; both see the other's perturbation."""

    def by_hand(first, second):
        for _ in range(ALL[method_name].passes):
            yield next(first), next(second)
        assert next(first, None) is next(second, None) is None

    found = []
    for together, *known in ((by_hand, 0, 0), (zip, 0, 0), (zip, 1, 0), (zip, 1, 1)):
        model, first, second, batches = two(method_name, known=known)
        for x, y in batches:
            for _ in together(first.passes(), second.passes()):
                loss_of(model, x, y).backward()
        found.append(model)
    for model in found[1:]:
        assert_close(model, found[0])


@pytest.mark.parametrize("method_name", SOME)
def test_statistics_move_once_when_two_in_lockstep_were_given_the_model(method_name):
    model, first, second, batches = two(method_name, "batchnorm_cnn")
    once, _ = make("batchnorm_cnn")
    for x, y in batches[:3]:
        once.load_state_dict(model.state_dict())
        once(x)
        for _ in zip(first.passes(), second.passes(), strict=False):
            loss_of(model, x, y).backward()
        for buffer, expected in zip(model.buffers(), once.buffers(), strict=True):
            assert torch.equal(buffer, expected)


@pytest.mark.parametrize("how", ["error", "nan"])
@pytest.mark.parametrize("method_name", SOME)
def test_an_error_in_one_of_two_undoes_both(method_name, how):
    model, first, second, [(x, y), *_] = two(method_name, "batchnorm_cnn")
    before = copy.deepcopy(model.state_dict())

    def train():
        for turn, _ in zip(first.passes(), second.passes(), strict=False):
            loss_of(model, x, y).backward()
            if turn.last and how == "error":
                raise Interruption
            if turn.last:
                next(model.parameters()).grad.fill_(float("nan"))

    with pytest.raises(Interruption if how == "error" else gam_fast.NonFiniteGradientError):
        train()
    torch.testing.assert_close(model.state_dict(), before, rtol=0.0, atol=0.0)


def test_a_with_block_without_a_loop_is_warned_of():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    said = pytest.warns(UserWarning, match=r"ran no pass, and no step was taken: write `for turn in turns:`")
    with said, optimizer.passes():
        weight.sum().backward()
    assert torch.equal(weight, torch.ones(2))
