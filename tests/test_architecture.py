"""The shape of the code: imports run one way, one source of version, no host synchronisation, nothing of a machine."""

from __future__ import annotations

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest
from ranks import in_a_process

import gam_fast

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gam_fast"

LAYERS = [
    {"capture"},
    {"_version", "_torch_version", "recipe", "distributed", "rows", "radius", "places"},
    {"recipes", "coefficients"},
    {"ownership"},
    {"models"},
    {"kernels.table"},
    {"kernels.elements", "kernels.formulas"},
    {"kernels.combine"},
    {"kernels.sums", "kernels.moves", "kernels.updates"},
    {"kernels"},
    {"backends.base"},
    {"backends.scalars", "_C"},
    {"backends.eager", "backends.tables"},
    {"backends.launches"},
    {"backends.probe"},
    {"backends.native"},
    {"backends.triton"},
    {"backends"},
    {"rng", "buffers", "amp", "hooks"},
    {"sums", "turn"},
    {"active"},
    {"options"},
    {"finite", "bases"},
    {"parameters"},
    {"updates", "hvp", "subsets", "stored", "noise"},
    {"local_step"},
    {"path"},
    {"step"},
    {"progress"},
    {"passes"},
    {"groups"},
    {"optimizer"},
    {"methods", "variants", "one_pass"},
    {"schedules"},
    {"integrations.lightning", "integrations.timm", "integrations.transformers"},
    {"integrations"},
    {"flatness.extra", "flatness.vectors", "flatness.batches"},
    {"flatness.loss"},
    {"flatness.ascent", "flatness.curvature", "flatness.slices"},
    {"flatness.plots", "flatness.measure"},
    {"flatness"},
    {""},
    {"__main__", "flatness.__main__"},
]
"""From the bottom to the top: a module may import those below it only. The empty name is the package itself."""


def modules():
    found = [(path, path.relative_to(PACKAGE)) for path in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi"))]
    found += [(path, path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")]
    for path, inside in sorted(found):
        parts = inside.with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, name):
    """The modules of the package that ``path`` imports, by their names below it."""
    package = name.split(".") if path.name == "__init__.py" and name else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            known = {n for _, n in modules()}
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                yield inner if inner in known else target
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(str(n).split(".")[0] == "gam_fast" for n in names), f"{name}: import the package relatively"


def test_every_module_has_its_layer():
    assert {name for _, name in modules()} == set().union(*LAYERS)


@pytest.mark.parametrize("name", sorted(set().union(*LAYERS)))
def test_no_import_runs_against_the_arrows(name):
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    path = next(p for p, n in modules() if n == name)
    tree = {found for found in imports_of(path, name) if found != name}
    for found in tree:
        assert level[found] < level[name], f"{name} imports {found}"
    if name in ("recipe", "recipes"):
        assert "torch" not in {
            node.names[0].name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)
        }


def test_examples_use_only_what_the_package_exports():
    for path in (ROOT / "examples").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("gam_fast."), path
            if isinstance(node, ast.Import):
                assert all(not alias.name.startswith("gam_fast.") for alias in node.names), path


def test_no_host_synchronisation_in_a_backend():
    """``float(t)``, ``bool(t)`` and ``.item()`` of a tensor wait for the device; the engine looks once, in the walk."""
    for path in (PACKAGE / "backends").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\.item\(\)|\.tolist\(\)|\bfloat\(|\bbool\(|\.cpu\(\)", text), path
        # a list copied to the device waits for it too; the probe of a device, and what is there already, do not count
        copied = re.findall(r"torch\.tensor\([^\n]*device=(?!\"cpu\")", text)
        assert not copied or path.name == "probe.py", path


def test_the_core_works_without_the_gil_on_plain_memory_only():
    """Where it lets go of the GIL, no object of Python is made, asked or let go."""
    places = 0
    for path in sorted((ROOT / "csrc").rglob("*")):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for found in re.finditer(r"gil_scoped_release no_gil;(.*?)\n\s*\}", text, re.DOTALL):
            places += 1
            assert not re.search(r"\bpy::|Py|\brelease\(|\.reset\(|std::move|taken_\[\S+\] =", found[1]), path
        assert "gil_scoped_release" not in text.replace("gil_scoped_release no_gil;", ""), path
    assert places == 3


def test_files_have_one_subject_and_a_readable_length():
    for path, _ in modules():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path


def test_one_version_everywhere():
    assert metadata.version("gam-fast") == gam_fast.__version__
    assert f"## [{gam_fast.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_mapped_folder_is_a_package():
    import gam_fast.kernels

    assert Path(gam_fast.kernels.__file__).parent.resolve() == (ROOT / "kernels").resolve()


def test_everything_exported_exists_and_is_documented():
    for name in gam_fast.__all__:
        assert getattr(gam_fast, name) is not None
        if name != "__version__":
            assert getattr(gam_fast, name).__doc__, name
    for recipe in gam_fast.recipes.RECIPES.values():
        assert recipe.citation
        optimizer = getattr(gam_fast, recipe.name)
        assert optimizer.recipe is recipe
        for hyper in recipe.defaults:
            assert re.search(rf"\b{hyper}:", optimizer.__doc__), f"{recipe.name}: {hyper} is not documented"


def test_constructor_defaults_are_those_of_the_table():
    import inspect

    for recipe in gam_fast.recipes.RECIPES.values():
        parameters = inspect.signature(getattr(gam_fast, recipe.name)).parameters
        for name, default in recipe.defaults.items():
            assert parameters[name].default == default


def test_it_trains_with_torch_alone():
    """No compiler, no Triton, no NumPy: their import is made to fail in a fresh process."""
    program = """
import sys
for name in ("triton", "numpy", "scipy", "matplotlib", "rich", "curvlinops", "mlxtend", "gam_fast._C"):
    sys.modules[name] = None
import torch, gam_fast
model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
optimizer = gam_fast.GAM(model.parameters(), torch.optim.AdamW, model=model)
for _ in range(3):
    optimizer.step(lambda: model(torch.ones(4, 2)).square().mean().backward())
print(repr(optimizer)[:30])
"""
    assert in_a_process(program, warnings="ignore").startswith("GAM (base: AdamW")


def files_that_name(word):
    """The source files of the package in which it is a word of its own."""
    sources = [path for path, _ in modules()] + [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    named = [path for path in sources if re.search(rf"\b{word}\b", path.read_text(encoding="utf-8"), re.IGNORECASE)]
    return sorted(str(path.relative_to(ROOT)) for path in named)


@pytest.mark.parametrize(
    ("method", "where"), [("FAD", "methods"), ("CFlat", "methods"), ("VaSSO", "variants"), ("LookSAM", "variants")]
)
def test_a_method_is_a_row_a_class_and_a_name(method, where):
    assert files_that_name(method) == sorted(["gam_fast/__init__.py", "gam_fast/recipes.py", f"gam_fast/{where}.py"])


def test_a_base_optimizer_that_is_fused_is_a_functor_on_each_backend_and_a_row():
    assert files_that_name("Lion") == [
        "csrc/math.h",
        "gam_fast/backends/base.py",
        "gam_fast/backends/eager.py",
        "gam_fast/updates.py",
        "kernels/formulas.py",
        "kernels/table.py",
    ]
