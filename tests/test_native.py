"""Tests of the compiled core alone: threads, instruction sets, bad objects, processes, memory."""

from __future__ import annotations

import gc
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from cases import BACKENDS, DTYPES, METHODS, closure_of, in_turn, make
from primitives import CASES, Lists, Place, run_all, same_bits
from ranks import in_a_process
from snapshots import Dispatched

import gam_fast
from gam_fast import backends
from gam_fast.backends import base

if "native" not in BACKENDS:
    pytest.skip("GAM_FAST_BUILD=none: there is no compiled core to test", allow_module_level=True)

CPU = torch.device("cpu")


def test_the_core_is_built():
    status = backends.available()["native"]
    assert status.available, status.reason
    if os.environ.get("GAM_FAST_SANITIZED"):
        assert "sanitize" in _C.__file__


from gam_fast import _C  # noqa: E402  # after the test that says why it is missing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streaming_stores_write_the_same(dtype):
    """A call that exceeds the caches takes another way of writing; so does eager, which has none."""
    shapes = [(12_000_000 // dtype.itemsize + 37,), (33,)]  # three lists are more than 32 MiB
    eager, native = (Place(backends.select(name, CPU)) for name in ("eager", "native"))
    for name in ("perturb", "perturb-saved-from_start", "direction-all-saved-in_place", "update-sgd"):
        expected, found = (CASES[name](place, Lists(dtype, shapes, groups=1)) for place in (eager, native))
        assert same_bits([*found.rounded, *found.exact], [*expected.rounded, *expected.exact]), name


SIZES = [(300_003,), *[(7,)] * 300, (64, 3, 3), *[(1,)] * 50, (70_000,)]  # many chunks, and many tensors in one


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    first, *others = (all_with(threads, dtype) for threads in (1, 2, 7))
    for other in others:
        for name, values in first.items():
            assert same_bits(values, other[name]), name


def all_with(threads, dtype):
    torch.set_num_threads(threads)
    return run_all(backends.select("native", CPU), dtype, SIZES)


@pytest.fixture
def each_instruction_set():
    best = _C.instruction_set()
    yield _C.instruction_sets()
    _C.use_instruction_set(best)


def test_an_unknown_instruction_set_is_refused():
    best = _C.instruction_set()
    with pytest.raises(ValueError, match=r"name must be one of instruction_sets\(\), got 'mmx'"):
        _C.use_instruction_set("mmx")
    assert _C.instruction_set() == best


def every_value(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_those_of_torch(dtype, each_instruction_set):
    """Every value of the type, and the halves between neighbours, which round to even."""
    values = every_value(dtype)
    step = torch.full_like(values, 0.5)
    for name in each_instruction_set:
        _C.use_instruction_set(name)
        backend = backends.select("native", CPU)
        out = [torch.empty_like(values)]
        target = base.Block([values.clone()], [0])
        backend.direction(target, base.Direction([[values]], [[1.0]]), out)
        assert same_bits(out, [values]), name
        # v · (1 + 2^-k) lands between neighbours
        for factor in (1.0 + 2.0**-8, 1.0 + 2.0**-9, 1.0 + 2.0**-11, 1.0 + 2.0**-12, 0.5, 2.0**-20):
            backend.direction(target, base.Direction([[values]], [[factor]]), out)
            assert same_bits(out, [(values.float() * factor).to(dtype)]), (name, factor)
        backend.direction(target, base.Direction([[values], [step]], [[1.0], [2.0**-8]]), out)
        assert same_bits(out, [(values.float() + 2.0**-9).to(dtype)]), name


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 has instruction sets to choose from")
def test_only_the_loops_hold_instructions_of_newer_processors():
    """What every x86-64 runs must not use wide registers; it takes one inline function compiled in the wrong file."""
    if os.environ.get("GAM_FAST_SANITIZED"):
        return  # that build is not for others
    command = ["objdump", "-d", "--no-show-raw-insn", _C.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    inside, found, wide = "", set(), 0
    for line in text.splitlines():
        if line.endswith(">:"):
            inside = line
        elif "%ymm" in line or "%zmm" in line:
            wide += 1
            if "3gam3cpu4avx2" not in inside and "3gam3cpu6avx512" not in inside:  # mangled namespaces
                found.add(inside)
    assert wide > 1000, "the loops are not vectorized"
    assert not found


# Bad objects: lists and numbers are those of test_backends.py


FP64 = torch.float64
NO_SUM = [torch.ones(()), torch.ones(0, dtype=FP64), torch.ones((), dtype=FP64, device="meta")]
ONE_SUM = "square must be a contiguous float64 tensor on cpu of one number"
NO_SUMS = [torch.ones(2, 3), torch.ones(4, dtype=FP64), torch.ones(3, 2, dtype=FP64).T[:1]]


def test_objects_of_other_types_are_refused():
    params, a = ([torch.randn(3, 4), torch.randn(5)] for _ in range(2))
    plan, block = _C.Plan(params, [0, 1]), base.Block(params, [0, 1], [torch.zeros(3, 4), torch.zeros(5)], True)
    factors, rows = [[1.0, 1.0]], [(0.1, 0.9, 0.0, 0.0, 0.0, 0.0)] * 2
    d = base.Direction([a], factors)

    def perturb(a=a, b=None, radius=(0.1, 0.2), square=0.5):
        return lambda: _C.perturb(plan, block, a, b, radius, square, True, None, None)

    def perturb_three_groups(square):
        three = _C.Plan(params, [0, 2])
        return lambda: _C.perturb(three, block, a, None, (0.1, 0.2, 0.3), square, True, None, None)

    def update(formula="sgd", groups=rows, option=(0, 0)):
        return lambda: _C.update(plan, block, d, formula, [a], groups, [(1.0,)], option)

    def products(products):
        return lambda: _C.direction(plan, block, base.Direction([a], factors, factors, products), a)

    for call, error, message in (
        (perturb(a=None), TypeError, "a must be a list of tensors, got NoneType"),
        (perturb(a=torch.ones(3)), TypeError, "a must be a list of tensors, got Tensor"),
        (perturb(a=[a[0], None]), TypeError, r"a\[1\] must be a tensor, got NoneType"),
        (perturb(a=[a[0], a[1] * 1j]), ValueError, r"a\[1\] must be a plain tensor"),
        (perturb(b=[1.5, a[1]]), TypeError, r"b\[0\] must be a tensor, got float"),
        (perturb(radius=None), TypeError, "radius must be a list of numbers, got NoneType"),
        (perturb(radius=["1", 2.0]), TypeError, r"radius\[0\] must be one of the numbers, got str"),
        (perturb(square=None), TypeError, "square must be given, got None"),
        *((perturb(square=square), ValueError, ONE_SUM) for square in NO_SUM),
        (perturb_three_groups(torch.ones(2, dtype=FP64)), ValueError, f"{ONE_SUM}, or one per parameter group"),
        (lambda: _C.Plan(params, [0]), ValueError, "group must have one index per parameter, that is 2, got 1"),
        (lambda: _C.Plan(params, [0, 2**62]), ValueError, r"group\[1\] must be the index"),
        (lambda: _C.Plan([torch.ones(1).expand(2**40)], [0]), ValueError, r"params\[0\] must be a plain tensor"),
        (lambda: _C.Plan([torch.ones(8, device="meta")], [0]), ValueError, r"params\[0\] must be on one of the dev"),
        (lambda: plan.fits(params, None), TypeError, "group must be a list of integers, got NoneType"),
        (lambda: plan.fits([a[0], a[0].view(-1)[:5]], [0, 1]), ValueError, r"params\[0\] and params\[1\] must not"),
        (lambda: _C.square_norm(plan, block, a, [1, 2], None), TypeError, r"b\[0\] must be a tensor, got int"),
        (lambda: _C.square_norm(plan, None, a, None, None), TypeError, "leaves must be a Block"),
        (lambda: _C.inner_products(plan, [a], factors, [[1.0]], 2), ValueError, "m must have one entry"),
        (lambda: _C.inner_products(plan, [a], factors, None, 2**62), ValueError, "groups must be 2 to 1048576"),
        (lambda: _C.direction(plan, block, None, a), TypeError, "d must be a Direction"),
        (lambda: _C.direction(plan, block, d, [None] * 2), TypeError, r"out\[0\] must be a tensor, got NoneType"),
        *(
            (products(table), ValueError, "products must be a contiguous float64 tensor on cpu of three")
            for table in NO_SUMS
        ),
        (products([[1.0]]), ValueError, "products must be .* of three numbers per parameter group"),
        (update("rmsprop"), ValueError, "formula must be one of sgd, adam, lion, assign, got rmsprop"),
        (update(groups=[(None, *rows[0][1:])] * 2), TypeError, r"groups\[0\]\[0\] must be one of the numbers"),
        (update(option=[0, 1]), ValueError, r"option must have .* the index of one of 1 options, got \[0, 1\]"),
        (
            lambda: _C.empty_like([torch.ones(6, 8)[:, ::2]]),
            ValueError,
            r"tensors\[0\] must be a plain tensor .* dense in memory",
        ),
        (lambda: _C.empty_like([3]), TypeError, r"tensors\[0\] must be a tensor, got int"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_the_same_array_may_be_read_and_written_and_read_twice():
    a, b = [torch.ones(5)], [torch.ones(5)]
    block = base.Block(a, [0], b, True)
    backends.select("native", CPU).perturb(block, b, b, [1.0], 1.0, from_start=True)
    assert torch.equal(a[0], b[0])


def test_the_plan_is_kept_between_steps_and_made_anew_for_other_shapes():
    backend = backends.select("native", CPU)
    plans = []
    for shape in ((3, 5), (3, 5), (5, 3)):
        block = base.Block([torch.randn(shape)], [0])
        backend.square_norm(block, block.params)
        plans.append(block.prepared)
    assert plans[0] is plans[1]
    assert plans[1] is not plans[2]


# The step


@pytest.mark.parametrize(
    ("method", "base_optimizer"),
    in_turn(["base", "sam", "asam", "gsam", "gam", "cflat"], [torch.optim.SGD, torch.optim.AdamW]),
)
def test_a_step_dispatches_at_most_twenty_operations(method, base_optimizer):
    params = [torch.nn.Parameter(torch.randn(n % 7 + 1, 3)) for n in range(161)]
    options = {"momentum": 0.9} if base_optimizer is torch.optim.SGD else {}
    optimizer = METHODS[method].optimizer(params, base_optimizer, lr=0.1, **METHODS[method].hyper, **options)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(3 * METHODS[method].passes)]

    def closure():
        fresh = gradients.pop()
        for p in params:
            p.grad = fresh.pop(0)

    optimizer.step(closure)
    optimizer.step(closure)
    with Dispatched() as count:
        optimizer.step(closure)
    assert len(count.names) <= 20, count.names


@pytest.mark.parametrize(("method", "dtype"), in_turn(METHODS, DTYPES))
def test_an_alarm_at_any_moment_leaves_the_parameters(method, dtype):
    """A signal between any two instructions of Python; with a learning rate of 0 the parameters never change."""
    model, batches = make("mlp", dtype)
    optimizer = METHODS[method].optimizer(
        model.parameters(), torch.optim.SGD, lr=0.0, momentum=0.9, backend="native", **METHODS[method].hyper
    )
    start = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure_of(model, *batches[0]))  # torch imports modules at the first step
    armed = []

    def interrupt(number, frame):
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    gc.disable()  # an interruption of what others (hypothesis) do at a collection goes nowhere
    try:
        for round_ in range(60):
            closure = closure_of(model, *batches[round_ % 4])
            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + 4e-5 * round_)
                optimizer.step(closure)
                armed.clear()
            except KeyboardInterrupt:
                interrupted += 1
            assert torch.is_grad_enabled()
            for p, value in zip(model.parameters(), start, strict=True):
                assert torch.equal(p, value)
    finally:
        gc.enable()
        torch.set_grad_enabled(True)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 0


def test_a_parameter_may_change_its_shape_and_dtype_between_steps():
    weight = torch.nn.Parameter(torch.randn(300, 300))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, momentum=0.9, backend="native")

    def closure():
        (weight.float() ** 2).sum().backward()

    optimizer.step(closure)
    weight.data = weight.data[:200].clone()
    weight.grad = weight.grad[:200].clone()
    optimizer.state.clear()
    with pytest.warns(UserWarning, match="not used"):
        optimizer.step(closure)
    weight.data = weight.data.bfloat16()  # the momentum stays fp32
    weight.grad = None
    before = weight.detach().clone()
    optimizer.step(closure)
    assert optimizer.state[weight]["momentum_buffer"].dtype == torch.float32
    assert not torch.equal(weight, before)


# Threads and processes


def test_other_threads_run_meanwhile():
    """The GIL is free: a thread counts while the core works, though Python itself never switches."""
    leaves = base.Block([torch.randn(30_000_000)], [0])
    plan = _C.Plan(leaves.params, leaves.group)
    counter = [0]
    running = threading.Event()
    stop = []

    def count():
        running.set()
        while not stop:
            counter[0] += 1
            time.sleep(1e-4)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    thread.start()
    running.wait()
    sys.setswitchinterval(100.0)
    try:
        before = counter[0]
        for _ in range(3):
            _C.square_norm(plan, leaves, leaves.params, None, None)
        after = counter[0]
    finally:
        sys.setswitchinterval(interval)
        stop.append(True)
        thread.join()
    assert after > before


def test_optimizers_in_several_threads_do_not_meet():
    def train(results, k):
        torch.manual_seed(k)
        weight = torch.nn.Parameter(torch.arange(300_000.0) % 7 + k)
        optimizer = gam_fast.GAM([weight], torch.optim.AdamW, lr=0.01, backend="native", replay_rng=False)
        for _ in range(6):
            optimizer.step(lambda: (weight.sin() ** 2).sum().backward())
        results[k] = weight.detach().clone()

    alone, together = {}, {}
    for k in range(4):
        train(alone, k)
    threads = [threading.Thread(target=train, args=(together, k)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(4):
        assert torch.equal(alone[k], together[k])


in_a_fresh_process = partial(in_a_process, warnings="ignore", OMP_WAIT_POLICY="PASSIVE")


def test_it_works_in_a_forked_process():
    """libgomp's threads are lost in a fork: without care the first step of the child would wait for ever."""
    program = """
    import os, torch, gam_fast
    torch.set_num_threads(2)

    def train():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(400_000))
        optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, backend="native", replay_rng=False)
        gradients = [torch.randn(400_000) for _ in range(2)]
        def closure():
            weight.grad = gradients.pop()
        optimizer.step(closure)
        return weight.detach()

    expected = train()
    child = os.fork()
    if child == 0:
        os._exit(0 if train().tolist() == expected.tolist() else 1)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
    """
    assert in_a_fresh_process(program, timeout=60).strip() == "0"


def test_no_memory_is_lost_over_thousands_of_steps():
    program = """
    import gc, resource, torch, gam_fast

    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    torch.set_num_threads(2)
    params = [torch.nn.Parameter(torch.randn(40, 50)), torch.nn.Parameter(torch.randn(70_000))]
    optimizer = gam_fast.GAM(params, torch.optim.AdamW, lr=1e-3, backend="native", replay_rng=False)

    def closure():
        for p in params:
            p.grad = torch.ones_like(p)

    for _ in range(1000):
        optimizer.step(closure)
    grown = []
    for _ in range(3):
        before = resident()
        for _ in range(1_500):
            optimizer.step(closure)
        grown.append(resident() - before)
    print(min(grown))
    """
    # What grows once, the allocator's own memory, is no loss: in one of three spells there is none. 65 bytes a step.
    assert int(in_a_fresh_process(program)) < 65 * 1_500


def test_a_step_takes_three_buffers_at_most_and_keeps_none():
    """Peak memory of a whole step beyond parameters, the newest gradient and momentum, in units of the parameters."""
    program = """
    import resource, torch, gam_fast

    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    n = 20_000_000
    weight = torch.nn.Parameter(torch.randn(n))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=1e-3, momentum=0.9, backend="native")

    def closure():
        weight.grad = torch.ones(n)

    optimizer.step(closure)
    between = resident()                 # parameters, the last gradient and momentum
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                  # forget the peak
    optimizer.step(closure)
    print((peak() - between) / (4 * n), (resident() - between) / (4 * n))
    """
    extra, left = map(float, in_a_fresh_process(program).split())
    assert extra < 3.05
    assert abs(left) < 0.05


def test_one_openmp_runtime_is_loaded():
    """Two pools of threads would fight for the cores. (scikit-learn, which some tests import, brings its own.)"""
    in_a_fresh_process(
        """
        from pathlib import Path
        import torch
        import gam_fast
        weight = torch.nn.Parameter(torch.ones(100_000))
        gam_fast.SAM([weight], torch.optim.SGD, lr=0.1).step(lambda: weight.square().sum().backward())
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        names = ("libgomp", "libiomp", "libomp")
        libraries = {line.split()[-1] for line in maps.splitlines() if any(name in line for name in names)}
        assert len(libraries) == 1, libraries
        """
    )
