"""Groups with ``perturb=False``: in place in every pass, in no norm and in no backup, and updated as all others."""

import copy
from contextlib import suppress

import pytest
import reference
import torch
from cases import ALL, BASES, DTYPES, MULTIPASS, closure_of, in_turn, loss_of, make, pairwise
from ranks import same_on_all_ranks
from test_trajectories import assert_same_steps
from torch import nn

import gam_fast
from gam_fast import recipe as language
from gam_fast import subsets
from gam_fast.backends.native import NativeBackend

RADII = ("rho", "rho_prime")
CHOICES = {"matrices": lambda p: p.ndim > 1, "biases": lambda p: p.ndim == 1, "none": lambda p: False}


def groups_of(model, choice):
    chosen = [p for p in model.parameters() if CHOICES[choice](p)]
    rest = [p for p in model.parameters() if not CHOICES[choice](p)]
    return [group for group in ({"params": chosen}, {"params": rest, "perturb": False}) if group["params"]]


@pytest.mark.parametrize(
    ("model_name", "method_name", "base_name", "choice"),
    pairwise(["mlp", "batchnorm_cnn", "partly_used"], MULTIPASS, BASES, CHOICES),
)
def test_agrees_with_the_plain_loops_in_fp64(model_name, method_name, base_name, choice):
    method, build = ALL[method_name], BASES[base_name]
    ours, batches = make(model_name)
    theirs = copy.deepcopy(ours)
    optimizer = method.optimizer(groups_of(ours, choice), build, model=ours, **method.hyper)
    plain = build([p for p in theirs.parameters() if p.requires_grad])
    trained = [p for p in theirs.parameters() if p.requires_grad]
    radii = {
        name: [method.hyper[name] if CHOICES[choice](p) else None for p in trained]
        for name in RADII
        if name in method.hyper
    }
    assert_same_steps(optimizer, ours, plain, theirs, method, {**method.hyper, **radii}, batches)


OWN_NORMS = [name for name in ALL if name not in ("base", "asam", "gam_release")]


@pytest.mark.parametrize(
    ("model_name", "method_name", "base_name"), pairwise(["mlp", "batchnorm_cnn"], OWN_NORMS, ["sgd_nesterov", "adamw"])
)
def test_each_layer_has_a_norm_of_its_own(model_name, method_name, base_name):
    method, build = ALL[method_name], BASES[base_name]
    ours, batches = make(model_name)
    theirs = copy.deepcopy(ours)
    optimizer = method.optimizer(subsets.layers(ours), build, model=ours, norm="group", **method.hyper)
    plain = build(subsets.layers(theirs))
    of_layer = {p: g for g, group in enumerate(plain.param_groups) for p in group["params"]}
    assert len(set(of_layer.values())) > 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "NORMS", [of_layer[p] for p in theirs.parameters()])
        assert_same_steps(optimizer, ours, plain, theirs, method, method.hyper, batches)


@pytest.mark.parametrize("strides", [1, 2])
def test_the_norm_of_the_only_group_is_that_of_all(strides):
    """Also of parameters with gaps in memory, which no backend but eager takes."""
    found = []
    for norm in ("global", "group"):
        weight = nn.Parameter(torch.tensor([3.0, 0.0, 4.0, 0.0])[::strides])
        optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, rho=0.5, norm=norm)
        optimizer.step(lambda weight=weight: weight.square().sum().backward())
        found.append(weight.detach().clone())
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.tensor([3.0, 0.0, 4.0, 0.0])[::strides])


@pytest.mark.parametrize("norm", ["global", "group"])
def test_a_radius_that_is_capped(norm):
    """min(σ/(‖v‖ + ϱ), cap) v in place of ρ/‖v‖ v, by hand; the second group ascends, and the first is at its cap."""

    class Capped(gam_fast.SharpnessAwareOptimizer):
        recipe = language.Recipe(
            name="Capped",
            citation="this test",
            defaults={"sigma": 0.5, "more": 0.25, "cap": 0.125},
            path=(language.Perturbation(0, "sigma", offset=language.Value("more"), cap=language.Value("cap")),),
            u=(None, 1.0),
        )

    vectors = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.25])]
    params = [nn.Parameter(torch.zeros(2)) for _ in vectors]
    groups = [{"params": params[:1], "cap": 0.01}, {"params": params[1:], "maximize": True}]
    optimizer = Capped(groups, torch.optim.SGD, lr=0.1, norm=norm)
    for turn in optimizer.passes():
        at = [p.detach().clone() for p in params]
        turn.backward(sum((p * v).sum() for p, v in zip(params, vectors, strict=True)))
    total = (25.0 + 0.0625) ** 0.5
    factors = [0.01, -min(0.5 / ((total if norm == "global" else 0.25) + 0.25), 0.125)]
    for point, v, factor in zip(at, vectors, factors, strict=True):
        torch.testing.assert_close(point, factor * v)


def test_exact_gam_takes_the_gradient_norm_of_what_is_perturbed():
    """For a loss ½ θᵀAθ of two parameters of which one stays: all of it by hand."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    matrix, rho, alpha = root @ root.T, 0.2, 0.4
    moved, still = (nn.Parameter(torch.randn(n, dtype=torch.float64, generator=generator)) for n in (3, 2))
    theta = torch.cat([moved, still]).detach()
    params = [{"params": [moved]}, {"params": [still], "perturb": False}]
    optimizer = gam_fast.ExactGAM(params, torch.optim.SGD, lr=0.1, rho=rho, alpha=alpha)
    for turn in optimizer.passes():
        point = torch.cat([moved, still])
        turn.backward(point @ matrix @ point / 2)

    def of_norm(point):  # of ‖g over the first three‖
        g = matrix @ point
        unit = torch.cat([g[:3] / g[:3].norm(), torch.zeros(2, dtype=torch.float64)])
        return matrix @ unit

    f = of_norm(theta)[:3]
    there = theta + torch.cat([rho * f / f.norm(), torch.zeros(2, dtype=torch.float64)])
    wanted = theta - 0.1 * (matrix @ theta + alpha * rho * of_norm(there))
    torch.testing.assert_close(torch.cat([moved, still]).detach(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("method_name", "dtype"), in_turn(MULTIPASS, DTYPES))
def test_what_is_not_perturbed_stays_and_an_undone_step_leaves_no_trace(method_name, dtype):
    method = ALL[method_name]
    model, batches = make("mlp", dtype)
    start = copy.deepcopy(model.state_dict())
    optimizer = method.optimizer(groups_of(model, "matrices"), torch.optim.SGD, lr=0.1, momentum=0.9, **method.hyper)
    with suppress(KeyboardInterrupt):
        for turn in optimizer.passes():
            for name, p in model.named_parameters():
                assert p.ndim > 1 or torch.equal(p, start[name])
            loss_of(model, *batches[0]).backward()
            if turn.index == method.passes - 1:
                raise KeyboardInterrupt
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name])
    optimizer.step(closure_of(model, *batches[0]))
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_a_perturbation_has_the_length_of_its_radius_and_only_it_is_backed_up(monkeypatch):
    sizes = []
    allocate = NativeBackend.allocate

    def counted(self, like):
        sizes.append(sum(tensor.numel() for tensor in like))
        return allocate(self, like)

    monkeypatch.setattr(NativeBackend, "allocate", counted)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 3))
    x, y = torch.randn(64, 20), torch.randint(3, (64,))
    groups = subsets.normalization(model)
    optimizer = gam_fast.SAM(groups, torch.optim.SGD, lr=0.1, rho=0.5, backend="native")
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    lengths = []
    for _ in optimizer.passes():
        lengths.append(float((nn.utils.parameters_to_vector(model.parameters()).detach() - start).norm()))
        nn.functional.cross_entropy(model(x), y).backward()
    assert lengths == pytest.approx([0.0, 0.5], abs=1e-6)
    assert sizes == [128]


def test_a_value_that_changes_counts_from_the_next_step_on_and_is_in_the_state():
    model, batches = make("mlp")
    optimizer = gam_fast.SAM(groups_of(model, "matrices"), torch.optim.SGD, lr=0.1, rho=0.1)

    def perturbed():
        start = [p.detach().clone() for p in model.parameters()]
        for turn in optimizer.passes():
            loss_of(model, *batches[0]).backward()
            if turn.index == 0:
                continue
            found = [not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True)]
        return found

    assert perturbed() == [True, False] * 3
    state = optimizer.state_dict()
    optimizer.param_groups[1]["perturb"] = True
    assert perturbed() == [True] * 6
    optimizer.load_state_dict(state)
    assert perturbed() == [True, False] * 3
    optimizer.load_state_dict(torch.optim.SGD(groups_of(model, "matrices"), lr=0.1).state_dict())  # which has the key
    assert perturbed() == [True, False] * 3
    plain = torch.optim.SGD([{"params": group["params"]} for group in optimizer.param_groups], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())  # which has not
    assert perturbed() == [True, False] * 3


def test_a_gradient_scaler_and_accumulation_see_nothing_of_it():
    found = []
    for scaled in (False, True):
        model, batches = make("mlp", torch.float32)
        optimizer = gam_fast.GAM(groups_of(model, "matrices"), torch.optim.SGD, lr=0.1, rho_prime=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for _ in range(3):
            for turn in optimizer.passes(scaler):
                for x, y in optimizer.micro_batches(batches[:2]):
                    turn.backward(loss_of(model, x, y) / 2)
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_where_nothing_that_is_perturbed_has_a_gradient_the_step_is_that_of_the_base():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    params = [{"params": [unused]}, {"params": [used], "perturb": False}]
    optimizer = gam_fast.GAM(params, torch.optim.SGD, lr=0.1, gamma=0.0)
    for _ in optimizer.passes():
        used.square().sum().backward()
    assert torch.allclose(used, torch.full((3,), 0.8))
    assert torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: gam_fast.SAM([{"params": m.parameters(), "perturb": 0}]), TypeError, "perturb .*got 0"),
        (lambda m: gam_fast.SAM([{"params": m.parameters(), "pertrub": True}]), ValueError, "did you mean perturb"),
        (subsets.normalization, ValueError, "Linear has no parameter of a normalisation layer"),
        (subsets.lora, ValueError, "no parameter to train has a name like .*lora.*weight, bias"),
        (lambda m: subsets.named(m, "head.*"), ValueError, "'head"),
        (lambda m: subsets.named(m, 1), TypeError, "got 1"),
        (lambda m: subsets.named(m), ValueError, "no parameter to perturb"),
        (lambda m: subsets.matrices(m.requires_grad_(False)), ValueError, "two dimensions"),
        (lambda m: subsets.layers(m.requires_grad_(False)), ValueError, "Linear has no parameter that requires"),
        (lambda m: gam_fast.SAM(m.parameters(), norm="layer"), ValueError, "norm must be one of global, group, got"),
        (lambda m: gam_fast.ASAM(m.parameters(), norm="group"), ValueError, "not for ASAM, which has a radius per"),
    ],
)
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call(nn.Linear(3, 2))


def test_groups_by_what_the_parameters_are():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    model = nn.ModuleDict({"a": nn.Linear(4, 4), "n": RMSNorm(), "b": nn.BatchNorm1d(4), "f": nn.Linear(4, 4)})
    model["f"].requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}

    def found(groups):
        return [([names[id(p)] for p in group["params"]], group.get("perturb", True)) for group in groups]

    assert found(subsets.normalization(model)) == [
        (["n.scale", "b.weight", "b.bias"], True),
        (["a.weight", "a.bias"], False),
    ]
    assert found(subsets.matrices(model))[0] == (["a.weight"], True)
    assert found(subsets.named(model, "a.*", "n.*"))[0] == (["a.weight", "a.bias", "n.scale"], True)
    assert len(subsets.named(model, "*")) == 1


def on_two(rank, world, sync, sharded):
    model, batches = make("mlp")
    whole = copy.deepcopy(model)
    x, y = batches[0]
    mine = slice(rank * 6, rank * 6 + 6)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        trained = fully_shard(model)
    else:
        trained = nn.parallel.DistributedDataParallel(model)
    hyper = {"lr": 0.1, "rho": 0.2, "rho_prime": 0.1}

    def groups(model):
        perturbed, rest = groups_of(model, "matrices")
        return [*({"params": [p]} for p in perturbed["params"]), rest]

    norm = "group" if sharded else "global"
    optimizer = gam_fast.GAM(groups(model), torch.optim.SGD, model=trained, sync=sync, norm=norm, **hyper)
    alone = gam_fast.GAM(groups(whole), torch.optim.SGD, norm=norm, **hyper)
    for _ in range(3):
        for _ in optimizer.passes():
            loss_of(trained, x[mine], y[mine]).backward()
        alone.step(closure_of(whole, x, y))
    parts = [p.full_tensor() if sharded else p for p in model.parameters()]
    difference = max(float((p - q).abs().max()) for p, q in zip(parts, whole.parameters(), strict=True))
    return sharded or same_on_all_ranks(parts), difference


@pytest.mark.parametrize(("sync", "sharded"), [("global", False), ("local", False), ("global", True)])
def test_processes_agree(two, sync, sharded):
    for same, difference in two.run(on_two, sync, sharded):
        assert same
        assert difference < (1e-10 if sync == "global" else 1e-2)


@pytest.mark.parametrize(("model_name", "base_name"), [("mlp", "sgd_nesterov"), ("batchnorm_cnn", "adamw")])
@pytest.mark.parametrize("perturbed", [True, False])
def test_asam_with_weights_adaptive_and_the_rest_not_as_the_authors_have_it(model_name, base_name, perturbed):
    ours, batches = make(model_name)
    theirs = copy.deepcopy(ours)
    weights = [p for p in ours.parameters() if p.ndim > 1]
    rest = [p for p in ours.parameters() if p.ndim == 1]
    groups = [{"params": weights}, {"params": rest, "adaptive_radius": False, "perturb": perturbed}]
    optimizer = gam_fast.ASAM(groups, BASES[base_name], model=ours, rho=0.4, eta=0.01)
    plain = BASES[base_name](theirs.parameters())
    is_weight = [p.ndim > 1 for p in theirs.parameters()]
    hyper = {
        "rho": [0.4 if w or perturbed else None for w in is_weight],
        "eta": [0.01 if w else None for w in is_weight],
    }
    assert_same_steps(optimizer, ours, plain, theirs, ALL["asam"], hyper, batches)
    assert optimizer.state_dict()["param_groups"][1]["adaptive_radius"] is False


def test_adaptive_is_for_asam():
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="group has adaptive_radius=False, which is for ASAM; SAM has no T"):
        gam_fast.SAM([{"params": [weight], "adaptive_radius": False}], torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="adaptive_radius of a parameter group must be True or False, got 0"):
        gam_fast.ASAM([{"params": [weight], "adaptive_radius": 0}], torch.optim.SGD, lr=0.1)
