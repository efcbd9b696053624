"""Arrows of import point one way, and the house rules that a program can check."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("radial_attn", "models", "scripts", "toyworld")
SOURCES = sorted(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
KERNELS = sorted(file for file in (ROOT / "radial_attn" / "kernels").glob("*.py") if file.stem != "__init__")
LIBRARIES = """torch numpy diffusers transformers tokenizers safetensors huggingface_hub omegaconf yaml
    imageio imageio_ffmpeg PIL matplotlib tqdm psutil pytest triton accelerate bitsandbytes torchmetrics
    torchvision vbench"""
# imported where they are used, each by one kernel
OPTIONAL = ("flashinfer", "spas_sage_attn", "sparse_sageattn", "sageattention")
DRAWING = {"matplotlib", "PIL"}
XDIT = ("xfuser", "yunchang")  # where several processes share a video
ALLOWED = {
    "radial_attn": {"torch", "numpy", *DRAWING, "triton", *OPTIONAL},
    "models": {"radial_attn", "torch", "diffusers", "safetensors", "peft", "torchao", "bitsandbytes", *XDIT},
    "scripts": {"radial_attn", "models", "toyworld", *LIBRARIES.split()},
    "toyworld": {"torch"},
}
FORBIDDEN = {"radial_attn": set(), "models": {"argparse"}, "scripts": set(), "toyworld": set()}


def modules_of(node: ast.AST, package: tuple[str, ...]) -> list[str]:
    """Dotted names that an import statement of a file in `package` may load; [] for another node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else ()
        base = ".".join([*above, *filter(None, [node.module])])
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    if (
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
    ):
        return [leaf.value for leaf in node.args[:1] if isinstance(leaf, ast.Constant)]
    return []


def imports(file: Path) -> set[str]:
    package = file.relative_to(ROOT).parent.parts
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {name for node in ast.walk(tree) for name in modules_of(node, package)}


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def strangers(names: set[str], package: str) -> set[str]:
    """Top-level packages among imported names that a package of ours may not use."""
    known = ALLOWED[package] | {package} | set(sys.stdlib_module_names) - FORBIDDEN[package]
    return roots(names) - known


def short(file: Path) -> str:
    return str(file.relative_to(ROOT))


def code_lines(function: ast.AST) -> int:
    """Lines of a function without its docstring."""
    docstring = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - (len(docstring.split("\n")) if docstring else 0)


def test_there_is_something_to_check():
    assert len(SOURCES) > 10 and {file.stem for file in KERNELS} >= {"reference", "blocks", "flex"}


@pytest.mark.parametrize("file", SOURCES, ids=short)
def test_arrows_point_one_way(file):
    assert not strangers(imports(file), file.relative_to(ROOT).parts[0])


def test_the_walk_finds_strangers():
    names = {"os.path", "torch.nn", "einops", "models.wan", "argparse"}
    assert strangers(names, "radial_attn") == {"einops", "models"}
    assert strangers(names, "models") == {"einops", "argparse"}
    assert strangers(names, "scripts") == {"einops"}
    assert strangers(names, "toyworld") == {"einops", "models"}


def test_only_the_picture_needs_the_drawing_packages_and_only_when_it_is_drawn():
    core = [file for file in SOURCES if file.is_relative_to(ROOT / "radial_attn")]
    users = {file.name for file in core if DRAWING & set(roots(imports(file)))}
    assert users == {"draw.py"}
    tree = ast.parse((ROOT / "radial_attn" / "draw.py").read_text(encoding="utf-8"))
    at_once = {name for node in tree.body for name in modules_of(node, ("radial_attn",))}
    assert "numpy" in at_once and not DRAWING & set(roots(at_once))


def test_kernels_do_not_import_one_another():
    for file in KERNELS:
        family = file.stem.split("_")[0]  # one backend may be several files
        strange = (other.stem for other in KERNELS if other.stem.split("_")[0] != family)
        others = {f"radial_attn.kernels.{stem}" for stem in strange}
        assert not others & imports(file), short(file)


def test_the_walk_sees_relative_and_nested_imports():
    source = "def f():\n    from ..grid import TokenGrid\n    from . import flex\n    import yaml as y\n"
    tree = ast.parse(source + "import_module('models.wan')")
    names = [name for node in ast.walk(tree) for name in modules_of(node, ("radial_attn", "kernels"))]
    assert {"radial_attn.grid", "radial_attn.kernels.flex", "yaml", "models.wan"} <= set(names)


@pytest.mark.parametrize("file", SOURCES + TESTS, ids=short)
def test_files_and_lines_are_short(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 110]


def test_functions_are_short():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = [code_lines(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    assert np.median(lengths) <= 10
    assert np.percentile(lengths, 95) <= 60
