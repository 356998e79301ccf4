"""interval and active: which steps take the whole recipe, and that the others are plain steps of the base optimizer."""

import copy
import itertools
import math
import random

import pytest
import torch
from cases import BASES, DTYPES, EXACT, METHODS, in_turn, loss_of, make
from snapshots import COPIES, assert_close, assert_equal, assert_same, everything, through_a_file, unchanged
from torch import nn

import gam_fast
from gam_fast.active import AboveThreshold, Activity, Between, Late, Sometimes, WhenSteep

STEPS = 6


def data(batches, steps=STEPS):
    return [batches[k % len(batches)] for k in range(steps)]


def train(model, optimizer, batches, scaler=None):
    """The numbers of turns that the steps had."""
    counts = []
    for x, y in batches:
        count = 0
        for turn in optimizer.passes(scaler):
            turn.backward(loss_of(model, *turn.rows(x, y)))
            count += 1
        assert turn.last or optimizer.decides_in_first_pass
        assert turn.share == 1.0
        counts.append(count)
    return counts


def build(method_name, name="mlp", dtype=torch.float64, base="sgd_nesterov", **options):
    model, batches = make(name, dtype)
    method = (METHODS | EXACT)[method_name]
    return model, method.optimizer(model.parameters(), BASES[base], model=model, **{**method.hyper, **options}), batches


# What steps there are


ALWAYS = {
    "interval": {"interval": 1},
    "between": {"active": Between(0)},
    "sometimes": {"active": Sometimes(1.0)},
    "steep": {"active": WhenSteep(deviations=-1e9)},
    "function": {"active": lambda step: True},
    "several": {"active": [Between(0.0, total_steps=10), Sometimes(1.0), lambda step: step >= 0]},
    "all": {"ascent_share": 1.0, "interval": 1, "active": Between()},
}
NEVER = {
    "interval": {"interval": math.inf},
    "between": {"active": Between(100)},
    "sometimes": {"active": Sometimes(0.0)},
    "function": {"active": lambda step: False},
    "one_says_no": {"active": [Between(), Sometimes(0.0)], "ascent_share": 0.25},
}


@pytest.mark.parametrize(
    ("as_by", "rule", "base", "dtype"),
    [
        (method_name, *row)
        for method_name, rules in (("gam", ALWAYS), ("base", NEVER))
        for row in in_turn(rules, ["sgd_nesterov", "adamw", "rmsprop"], DTYPES)
    ],
)
def test_always_is_the_plain_recipe_and_never_the_base_bit_for_bit(as_by, rule, base, dtype):
    rules = ALWAYS if as_by == "gam" else NEVER
    ours, optimizer, batches = build("gam", "batchnorm_cnn", dtype, base, **rules[rule])
    theirs, plain, _ = build(as_by, "batchnorm_cnn", dtype, base)
    assert train(ours, optimizer, data(batches)) == [plain.recipe.passes] * STEPS
    train(theirs, plain, data(batches))
    assert_equal(ours, theirs)


def alternating(method_name, lr=0.1, **options):
    """A step of the recipe, or one of the plain base, over the same parameters and state: the oracle of both."""
    model, _ = make("batchnorm_cnn")
    method = (METHODS | EXACT)[method_name]
    base = torch.optim.SGD(model.parameters(), lr=lr)
    whole = method.optimizer(None, base, model=model, **method.hyper, **options)
    plain = gam_fast.Base(None, base, model=model, **options)
    return model, lambda is_taken, batch: train(model, whole if is_taken else plain, [batch])


@pytest.mark.parametrize("method_name", ["sam", "gam", "exact"])
def test_every_third_step_and_the_base_between(method_name):
    ours, optimizer, batches = build(method_name, "batchnorm_cnn", base="sgd", interval=3)
    theirs, step = alternating(method_name)
    n = optimizer.recipe.passes
    assert train(ours, optimizer, data(batches)) == [1, 1, n, 1, 1, n]
    for k, batch in enumerate(data(batches)):
        step(k % 3 == 2, batch)
    assert_equal(ours, theirs)


# Rules


class OnPrimes(Activity):
    """A rule of one's own."""

    def before(self, step):
        return step in (2, 3, 5)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (OnPrimes(), [2, 3, 5]),
        (Between(2, 4), [2, 3]),
        (Between(stop=2), [0, 1]),
        (Between(4), [4, 5]),
        (Between(0.5, total_steps=6), [3, 4, 5]),
        (Between(0.25, 0.75, total_steps=6), [2, 3]),
        (Between(1, 0.5, total_steps=6), [1, 2]),
        (Between(3, 3), []),
        (Late(0.3, total_steps=6), [4, 5]),
        (Late(0.0, total_steps=6), []),
        (Late(1.0, total_steps=6), [0, 1, 2, 3, 4, 5]),
        ([Between(1), lambda step: step % 2 == 0], [2, 4]),
    ],
)
def test_ranges(rule, expected):
    model, optimizer, batches = build("sam", active=rule)
    counts = train(model, optimizer, data(batches))
    assert [k for k, count in enumerate(counts) if count == 2] == expected


@pytest.mark.parametrize("rule", [Late(0.5, total_steps=2), [Between(0.5, total_steps=2)]])
def test_a_run_that_is_longer_than_a_rule_was_told_warns_once(rule):
    model, optimizer, batches = build("sam", active=rule, interval=2)
    rows = data(batches)
    train(model, optimizer, rows[:2])
    with pytest.warns(UserWarning, match=r"2 steps are over, .*beyond total_steps of .*total_steps=2\): .*not epochs"):
        train(model, optimizer, rows[2:3])
    train(model, optimizer, rows[3:])


def test_a_probability_draws_from_nobody_elses_generator():
    states = random.getstate(), torch.get_rng_state()
    rule = Sometimes(0.3, seed=7)
    found = [rule.before(step) for step in range(2000)]
    assert found == [Sometimes(0.3, seed=7).before(step) for step in range(2000)]
    assert found != [Sometimes(0.3, seed=8).before(step) for step in range(2000)]
    assert abs(sum(found) - 600) < 5 * math.sqrt(2000 * 0.3 * 0.7)
    runs = sum(a and b for a, b in itertools.pairwise(found))  # neighbours are independent
    assert abs(runs - 180) < 5 * math.sqrt(2000 * 0.09)
    assert states[0] == random.getstate()
    assert torch.equal(states[1], torch.get_rng_state())


def steep(squares, deviations, decay):
    """By the book."""
    mean, variance, out = None, 0.0, []
    for square in squares:
        if mean is None:
            mean = square
        else:
            mean = decay * mean + (1 - decay) * square
            variance = decay * variance + (1 - decay) * (square - mean) ** 2
        out.append(square >= mean + deviations * variance**0.5)
    return out


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("method_name", ["gam", "exact"])
def test_steep_steps_take_the_recipe_and_others_the_base(method_name, share):
    options = {"lr": 0.3, "ascent_share": share, "clip_grad_norm": 1.0}
    rule = WhenSteep(deviations=0.3, decay=0.7)
    ours, optimizer, batches = build(method_name, "batchnorm_cnn", base="sgd", active=rule, **options)
    theirs, step = alternating(method_name, **options)
    squares, kinds = [], []
    for x, y in data(batches, 12):
        rows = 3 if share == 0.25 else 12
        frozen = copy.deepcopy(theirs)
        gradients = torch.autograd.grad(loss_of(frozen, x[:rows], y[:rows]), list(frozen.parameters()))
        squares.append(float(sum(g.square().sum() for g in gradients)))
        kinds.append(steep(squares, 0.3, 0.7)[-1])
        step(kinds[-1], (x, y))
        passes = optimizer.recipe.passes if kinds[-1] else 1 if share == 1.0 else 2
        assert train(ours, optimizer, [(x, y)]) == [passes]
        assert_equal(ours, theirs)
    assert 2 <= sum(kinds) <= 10


def test_the_rule_of_c_flat_plus_plus():
    """By the authors' code: E = A/(1 + exp(−k (t − t0))) − ‖g0‖, C-Flat where E ≤ 0, then A ← A − c E."""
    rule = AboveThreshold(height=1.2, slope=0.4, middle=4.0, rate=0.1)
    model, optimizer, batches = build("cflat", base="sgd", lr=0.3, active=rule)
    height, kinds = 1.2, []
    for t, (x, y) in enumerate(data(batches, 12), 1):
        norm = math.sqrt(
            sum(float(g.square().sum()) for g in torch.autograd.grad(loss_of(model, x, y), model.parameters()))
        )
        excess = height / (1.0 + math.exp(-0.4 * (t - 4.0))) - norm
        height -= 0.1 * excess
        kinds.append(excess <= 0.0)
        assert train(model, optimizer, [(x, y)]) == [4 if kinds[-1] else 1]
        assert optimizer.param_groups[0]["flat_height"] == pytest.approx(height, rel=1e-9)
    assert len(set(kinds)) == 2


@pytest.mark.parametrize("rule", [WhenSteep(deviations=1e9), Between(0, 1)])
def test_a_step_that_a_rule_takes_from_looksam_is_one_of_the_base_alone(rule):
    model, batches = make("mlp")
    twin = copy.deepcopy(model)
    ruled = gam_fast.LookSAM(model.parameters(), torch.optim.SGD, lr=0.1, k=1 + isinstance(rule, Between), active=rule)
    plain = gam_fast.SAM(twin.parameters(), torch.optim.SGD, lr=0.1, active=Between(0, 1))
    assert train(model, ruled, batches) == train(twin, plain, batches) == [2, 1, 1, 1]
    assert_equal(model, twin)


def test_after_a_step_that_is_not_steep_the_gradient_is_that_at_the_start():
    model, optimizer, batches = build("gam", active=WhenSteep(deviations=1e9))
    train(model, optimizer, batches[:1])  # the first is taken whatever it is
    x, y = batches[1]
    expected = torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))
    assert train(model, optimizer, [(x, y)]) == [1]
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p.grad, g)
    assert train(model, optimizer, [(x, y)]) == [1]  # nobody is told of unused gradients


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_steep_over_micro_batches(share):
    options = {"lr": 0.3, "active": WhenSteep(deviations=0.3, decay=0.7), "ascent_share": share}
    (whole, large, batches), (model, small, _) = (build("gam", base="sgd", **options) for _ in range(2))
    kinds = set()
    for x, y in data(batches, 12):
        (expected,) = train(whole, large, [(x, y)])
        count = 0
        for turn in small.passes():
            count += 1
            for a, b in small.micro_batches(zip(x.chunk(4), y.chunk(4), strict=True)):
                turn.backward(loss_of(model, a, b) / 4)
        assert count == expected
        kinds.add(count)
    assert len(kinds) == 2
    for key in ("flat_mean", "flat_variance"):
        assert small.param_groups[0][key] == pytest.approx(large.param_groups[0][key], rel=1e-9)
    assert_close(whole, model, 1e-10, 1e-10)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_loss_scaling_changes_no_decision(share):
    options = {"lr": 0.3, "active": WhenSteep(deviations=0.3, decay=0.7), "ascent_share": share}
    (ours, optimizer, batches), (theirs, plain, _) = (
        build("gam", dtype=torch.float32, base="sgd", **options) for _ in range(2)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    counts = train(ours, optimizer, data(batches, 12), scaler)
    assert counts == train(theirs, plain, data(batches, 12))
    assert len(set(counts)) == 2
    assert_close(ours, theirs, 1e-5, 1e-5)

    def step():
        for turn in optimizer.passes():  # without the scaler
            scaler.scale(loss_of(ours, *turn.rows(*batches[0]))).backward()
            if turn.last:
                scaler.step(optimizer)

    message = r"a rule such as WhenSteep.*call passes\(scaler=scaler\)"
    with unchanged(ours, optimizer), pytest.raises(RuntimeError, match=message):
        step()


@pytest.mark.parametrize("policy", ["raise", "skip", "ignore"])
def test_a_first_gradient_that_is_not_finite(policy):
    model, optimizer, batches = build("gam", active=WhenSteep(), on_nonfinite=policy)
    train(model, optimizer, batches)
    before = everything(model, optimizer)
    group = {key: optimizer.param_groups[0][key] for key in ("flat_looks", "flat_mean", "flat_variance")}
    x, y = batches[0]

    def closure():
        (math.nan * loss_of(model, x, y)).backward()

    if policy == "raise":
        with pytest.raises(gam_fast.NonFiniteGradientError):
            optimizer.step(closure)
    else:
        optimizer.step(closure)
    if policy == "ignore":
        assert {key: optimizer.param_groups[0][key] for key in group} == group
    else:
        assert_same(before, everything(model, optimizer))


# What lasts


RULES = {
    "steep": {"active": WhenSteep(deviations=0.3, decay=0.7)},
    "between": {"active": Between(3, 7)},
    "sometimes": {"active": Sometimes(0.5, seed=3)},
    "automatic": {"interval": 2, "rho_prime": "auto"},
    "interval": {"interval": 3},
    "steep_of_a_share": {"active": WhenSteep(deviations=0.3, decay=0.7), "ascent_share": 0.25, "interval": 2},
}


@pytest.mark.parametrize(("rule", "how"), in_turn(RULES, ["state_dict", "pickle", "deepcopy"]))
def test_resuming_within_an_interval_has_the_same_bits(rule, how):
    through, optimizer, batches = build("gam", base="adamw", **RULES[rule])
    counts = train(through, optimizer, data(batches, 10))
    model, first, _ = build("gam", base="adamw", **RULES[rule])
    assert train(model, first, data(batches, 4)) == counts[:4]
    if how == "state_dict":
        saved = through_a_file((model.state_dict(), first.state_dict()))
        model, second, _ = build("gam", base="adamw", **RULES[rule])
        model.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
    else:
        first.model = None
        model, second = COPIES[how]((model, first))
    assert train(model, second, data(batches, 10)[4:]) == counts[4:]
    assert_equal(model, through)


@pytest.mark.parametrize(("rule", "at"), [(rule, at) for rule in RULES for at in (0, 1) if (rule, at) != ("steep", 1)])
def test_a_step_left_early_counts_for_nothing(rule, at):
    model, optimizer, batches = build("gam", "batchnorm_cnn", **RULES[rule])
    train(model, optimizer, data(batches, 5))
    with unchanged(model, optimizer):
        for turn in optimizer.passes():
            loss = loss_of(model, *turn.rows(*batches[0]))
            if turn.index == at or turn.last:
                break
            turn.backward(loss)


def test_checkpoints_go_to_the_base_optimizer_and_come_from_it():
    model, optimizer, batches = build("gam", interval=2, rho_prime="auto")
    train(model, optimizer, data(batches, 3))
    before = {key: optimizer.param_groups[0][key] for key in ("flat_steps", "flat_length", "rho_prime")}
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    base.load_state_dict(optimizer.state_dict())
    base.step()
    plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    assert before.items() <= optimizer.param_groups[0].items()  # what it does not say stays as it is
    assert train(model, optimizer, data(batches, 2)) == [4, 1]


@pytest.mark.parametrize(("of_ours", "expected"), [(False, [1, 2, 1, 2]), (True, [2, 1, 2, 1])])
def test_what_a_state_that_is_loaded_into_the_base_does_not_say_starts_anew(of_ours, expected):
    """One of torch's, and one of ours, which counts but has no trigger."""
    model, optimizer, batches = build("sam", interval=2)
    train(model, optimizer, batches[:1])
    state = (optimizer if of_ours else torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)).state_dict()
    model, optimizer, batches = build("sam", interval=2, active=WhenSteep(deviations=-1e9))
    train(model, optimizer, batches[:1])
    optimizer.base.load_state_dict(state)
    assert train(model, optimizer, batches) == expected
    assert optimizer.param_groups[0]["flat_looks"] == 2


def test_a_wrapper_that_copies_attributes_sees_what_is_set():
    model, optimizer, batches = build("sam")
    wrapper = copy.copy(optimizer)  # as Lightning's
    wrapper.interval = 2
    assert optimizer.interval == 2
    optimizer.active = Between(4)
    assert wrapper.active == Between(4)
    assert train(model, wrapper, [*batches, *batches[:2]]) == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("key", "value"),
    [("flat_steps", "x"), ("flat_looks", -1), ("flat_mean", math.nan), ("flat_variance", None), ("flat_length", True)],
)
def test_a_state_that_makes_no_sense_is_refused(key, value):
    model, optimizer, batches = build("gam", interval=2, active=WhenSteep(), rho_prime="auto")
    train(model, optimizer, batches)
    state = optimizer.state_dict()
    assert key in state["param_groups"][0]
    state["param_groups"][0][key] = value
    message = f"{key} of a parameter group must be a number.*got {value!r}"
    with unchanged(model, optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)


def test_groups_that_come_later_count_with_the_others():
    model, batches = make("mlp")
    params = list(model.parameters())
    optimizer = gam_fast.GAM(params[:2], torch.optim.SGD, lr=0.1, interval=2, rho_prime="auto")
    train(model, optimizer, batches[:2])
    optimizer.add_param_group({"params": params[2:], "rho_prime": "auto"})
    assert [group["flat_steps"] for group in optimizer.param_groups] == [2, 2]
    assert train(model, optimizer, batches[:2]) == [1, 4]
    assert [group["flat_steps"] for group in optimizer.param_groups] == [4, 4]
    assert len({group["flat_length"] for group in optimizer.param_groups}) == 1


def test_interval_and_rules_may_be_set_between_steps():
    model, optimizer, batches = build("sam")
    assert "flat_steps" not in optimizer.param_groups[0]
    assert train(model, optimizer, batches[:2]) == [2, 2]
    optimizer.interval = 2
    assert train(model, optimizer, batches) == [1, 2, 1, 2]
    optimizer.active = Between(6)
    assert (optimizer.interval, optimizer.active) == (2, Between(6))
    assert train(model, optimizer, batches) == [1, 1, 1, 2]
    optimizer.interval, optimizer.active = 1, None
    assert train(model, optimizer, batches[:2]) == [2, 2]


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: {"interval": 0}, ValueError, "interval must be at least 1, got 0"),
        (lambda: {"interval": -math.inf}, TypeError, "interval must be an integer, or math.inf"),
        (lambda: {"interval": 1.5}, TypeError, "interval must be an integer, or math.inf for never, got 1.5"),
        (lambda: {"interval": True}, TypeError, "interval must be an integer"),
        (lambda: {"active": "always"}, TypeError, "active must be a rule .*got 'always'"),
        (lambda: {"active": 0.5}, TypeError, "active must be a rule .*got 0.5"),
        (lambda: {"active": Between}, TypeError, "got the class Between: construct it"),
        (
            lambda: {"active": [WhenSteep(), WhenSteep()]},
            ValueError,
            "one rule at most that looks at the gradient, got WhenSteep, WhenSteep",
        ),
        (lambda: {"active": Between(-1)}, ValueError, "start must not be negative, got -1"),
        (lambda: {"active": Between(0.5)}, ValueError, "start=0.5 is a fraction of the run: give total_steps="),
        (lambda: {"active": Between(1.5, total_steps=9)}, ValueError, "start .*from 0.0 to 1.0, got 1.5"),
        (lambda: {"active": Between("1")}, TypeError, "start must be a step .*got '1'"),
        (lambda: {"active": Between(3, 2)}, ValueError, "stop must not come before start, got start=3, stop=2"),
        (lambda: {"active": Late(1.5, 9)}, ValueError, "share must be from 0.0 to 1.0, got 1.5"),
        (lambda: {"active": Late("1", 9)}, TypeError, "share must be a number, got '1'"),
        (lambda: {"active": Late(0.5, 0.5)}, ValueError, "total_steps must be a positive integer, got 0.5"),
        (lambda: {"active": Between(total_steps=0)}, ValueError, "total_steps must be a positive integer"),
        (lambda: {"active": Sometimes(1.5)}, ValueError, "probability must be from 0 to 1, got 1.5"),
        (lambda: {"active": Sometimes("x")}, TypeError, "probability must be a number, got 'x'"),
        (lambda: {"active": Sometimes(0.5, seed=-1)}, ValueError, "seed must be .*got -1"),
        (lambda: {"active": WhenSteep(math.nan)}, ValueError, "deviations must be finite, got nan"),
        (lambda: {"active": WhenSteep(decay=1.0)}, ValueError, "decay must be at least 0 and below 1, got 1.0"),
        (lambda: {"active": WhenSteep(decay=None)}, TypeError, "decay must be a number, got None"),
        (lambda: {"active": AboveThreshold(height=-1.0)}, ValueError, "height must not be negative, got -1.0"),
        (lambda: {"active": AboveThreshold(rate=1.5)}, ValueError, "rate must be from 0.0 to 1.0, got 1.5"),
        (lambda: {"active": AboveThreshold(slope=math.inf)}, ValueError, "slope must be finite, got inf"),
        (lambda: {"active": AboveThreshold(middle="80")}, TypeError, "middle must be a number, got '80'"),
    ],
)
def test_what_is_no_rule_is_refused(make_it, error, message):
    with pytest.raises(error, match=message):
        gam_fast.SAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, **make_it())
