"""Arrows of import point one way, and the house rules that a program can check."""

import ast
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PLACES = {
    "radial_attn": "radial_attn",
    "radial_attn.models": "models",
    "comfyui": "comfyui",
    "scripts": "scripts",
}
SOURCES = sorted(file for folder in PLACES.values() for file in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
LIBRARIES = """torch numpy jinja2 diffusers transformers tokenizers safetensors huggingface_hub omegaconf yaml
    av imageio imageio_ffmpeg PIL matplotlib tqdm psutil pytest triton accelerate bitsandbytes torchmetrics
    torchvision gradio"""
# imported where they are used, each by one kernel
OPTIONAL = (
    "flash_attn",
    "cutlass",
    "tvm_ffi",
    "flashinfer",
    "spas_sage_attn",
    "sparse_sageattn",
    "sageattention",
)
DRAWING = {"matplotlib", "PIL"}
ALLOWED = {
    "radial_attn": {"torch", "numpy", *DRAWING, "triton", *OPTIONAL},
    "radial_attn.models": {
        *("torch", "diffusers", "transformers", "safetensors", "peft", "torchao", "bitsandbytes", "xfuser"),
        *("accelerate", "gguf"),
    },
    "comfyui": {"torch", "comfy_api"},
    "scripts": {"radial_attn", *LIBRARIES.split(), "flash_attn", "cutlass", "tvm_ffi"},
}
FORBIDDEN = {
    "radial_attn": set(),
    "radial_attn.models": {"argparse"},
    "comfyui": {"argparse"},
    "scripts": set(),
}
COMMANDS = {f"scripts.{file.stem}" for file in (ROOT / "scripts").glob("*.py") if file.stem != "__init__"}
PLANNERS = {"scripts.run.plan", "scripts.lora.plan"}  # derive from a configuration and a model
LAYERS = (  # lowest first: a module imports from its own row and those before it
    "radial_attn.files radial_attn.grid radial_attn.block_mask",
    "radial_attn.masks.radial",
    "radial_attn.masks.density radial_attn.masks.patterns radial_attn.masks.compat",
    "radial_attn.masks.make",
    "radial_attn.masks.density_curve radial_attn.masks.draw",
    "radial_attn.kernels",
    "radial_attn.dispatch",
    "radial_attn.partial radial_attn.shards",
    "radial_attn.far_field",
    "radial_attn.attention",
    "radial_attn.analysis",
    "radial_attn.selection radial_attn.residual radial_attn.trial",
    "radial_attn.chooser",
    "radial_attn.models.runtime",
    "radial_attn.models.wan radial_attn.models.mochi radial_attn.models.ltx radial_attn.models.kandinsky5",
    "radial_attn.models.hunyuan_video",
    "radial_attn.models.wan_vace radial_attn.models.hunyuan_video15",
    "radial_attn.models.apply",
    "radial_attn.models.pipeline radial_attn.models.lora radial_attn.models.parallel",
    "radial_attn.models.training radial_attn.models.published",
    "radial_attn.models.enable radial_attn.models.vllm_omni",
    "comfyui.protocol",
    "comfyui.state",
    "comfyui.override",
    "comfyui.nodes",
    "scripts.run",
    "scripts.lora scripts.toyworld",
    "scripts.evaluation",
    "scripts.benchmarks scripts.length scripts.web",
)


def module_of(file: Path) -> str:
    """Dotted name of a source file; models/ is `radial_attn.models`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return f"radial_attn.{name}" if parts[0] == "models" else name


def package_of(name: str) -> str:
    """Which of `PLACES` a module belongs to."""
    return max((package for package in PLACES if f"{name}.".startswith(f"{package}.")), key=len, default="")


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
    """Dotted names that a file may load."""
    name = module_of(file)
    package = tuple(name.split(".") if file.stem == "__init__" else name.split(".")[:-1])
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {name for node in ast.walk(tree) for name in modules_of(node, package)}


def at_once(file: Path) -> set[str]:
    """Dotted names that a file loads when it is imported, outside functions and type checking."""
    name = module_of(file)
    package = tuple(name.split(".") if file.stem == "__init__" else name.split(".")[:-1])
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {name for node in tree.body for name in modules_of(node, package)}


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def strangers(names: set[str], package: str) -> set[str]:
    """Packages among imported names that a package of ours may not use."""
    if package == "radial_attn":
        own = {name for name in names if package_of(name) == "radial_attn"}
    else:
        own = {name for name in names if package_of(name).startswith(("radial_attn", package))}
    known = ALLOWED[package] | set(sys.stdlib_module_names) - FORBIDDEN[package]
    return {package_of(name) or name.split(".")[0] for name in names - own} - known


def short(file: Path) -> str:
    return str(file.relative_to(ROOT))


def code_lines(function: ast.AST) -> int:
    """Lines of a function without its docstring."""
    docstring = ast.get_docstring(function, clean=False)
    return function.end_lineno - function.lineno + 1 - (len(docstring.split("\n")) if docstring else 0)


def parameter_types(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names in the annotations of the parameters."""
    given = function.args
    everything = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    annotations = [entry.annotation for entry in everything if entry is not None and entry.annotation]
    return {name for annotation in annotations for name in re.findall(r"\w+", ast.unparse(annotation))}


def test_there_is_something_to_check():
    assert len(SOURCES) > 100 and {"scripts.generate", "scripts.train_lora"} <= COMMANDS


@pytest.mark.parametrize("file", SOURCES, ids=short)
def test_arrows_point_one_way(file):
    names = imports(file)
    if module_of(file) == "radial_attn":  # `enable` and `disable` are loaded when they are first used
        names = at_once(file)
    assert not strangers(names, package_of(module_of(file)))


def test_the_walk_finds_strangers():
    names = {
        "os.path",
        "torch.nn",
        "einops",
        "radial_attn.models.wan",
        "radial_attn.grid",
        "argparse",
        "models",
    }
    assert strangers(names, "radial_attn") == {"einops", "radial_attn.models", "models"}
    assert strangers(names, "radial_attn.models") == {"einops", "argparse", "models"}
    assert strangers(names, "scripts") == {"einops", "models"}


def test_no_imports_in_a_circle():
    """Also none through imports inside functions."""
    known = {module_of(file): file for file in SOURCES}
    arrows = {
        name: {other for other in imports(file) if other in known and other != name}
        for name, file in known.items()
    }
    arrows["radial_attn"] = set()  # the front door: everything below may name it, it loads `enable` late
    packages = {module_of(file) for file in SOURCES if file.stem == "__init__"}
    for name in packages - {"radial_attn"}:  # a package that only says what it holds is no room of its own
        arrows = {key: values - ({name} if not arrows[name] else set()) for key, values in arrows.items()}
    while leaves := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert not arrows, f"imports in a circle among: {sorted(arrows)}"


def test_the_layers():
    rows = {name: row for row, names in enumerate(LAYERS) for name in names.split()}

    def row_of(name: str) -> int | None:
        return next((row for prefix, row in rows.items() if f"{name}.".startswith(f"{prefix}.")), None)

    for file in SOURCES:
        row = row_of(module_of(file))
        if row is not None:
            above = {other for other in imports(file) if (row_of(other) or 0) > row}
            assert not above, f"{short(file)} imports {sorted(above)}"


@pytest.mark.parametrize("file", TESTS, ids=short)
def test_tests_are_not_imported_by_tests(file):
    package = tuple(file.relative_to(ROOT).parent.parts)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {name for node in ast.walk(tree) for name in modules_of(node, package)}
    assert not [name for name in names if name.startswith("tests.") and ".test_" in name]


@pytest.mark.parametrize("file", SOURCES, ids=short)
def test_only_the_plans_take_a_configuration_and_a_model(file):
    """What follows from both is derived once, and read from the plan by all others."""
    if module_of(file) in PLANNERS:
        return
    configurations = {"Config", "LoraTrainConfig", "EvaluationConfig"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            named = parameter_types(node)
            assert not (named & configurations and "ModelInfo" in named), f"{short(file)}: {node.name}"


def test_the_walk_sees_the_types_of_all_parameters():
    source = "def f(a: Config, /, b: 'ModelInfo | None', *c: x.Y, d: list[int] = [], **e: Z) -> Plan: pass"
    (function,) = ast.parse(source).body
    assert parameter_types(function) == {"Config", "ModelInfo", "None", "x", "Y", "list", "int", "Z"}


@pytest.mark.parametrize("file", SOURCES, ids=short)
def test_commands_are_not_imported(file):
    assert not imports(file) & (COMMANDS - {module_of(file)})


CHECKOUT = ("results/", "configs/", "scripts/", "third_party/", ".venv")  # what an installed package lacks


def test_nothing_below_scripts_names_keys_or_files_of_the_checkout():
    """Keys of the YAML files and files beside the package are known to scripts/ alone."""
    from scripts.run.config import keys

    for file in SOURCES:
        if package_of(module_of(file)) == "scripts":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        named = [name for name in (*keys(), *CHECKOUT) for text in texts if name in text]
        assert not named, f"{short(file)}: {named}"


def test_only_the_picture_needs_the_drawing_packages_and_only_when_it_is_drawn():
    core = [file for file in SOURCES if file.is_relative_to(ROOT / "radial_attn")]
    users = {file.name for file in core if DRAWING & set(roots(imports(file)))}
    assert users == {"draw.py"}
    early = roots(at_once(ROOT / "radial_attn" / "masks" / "draw.py"))
    assert "numpy" in early and not DRAWING & early


def test_kernels_do_not_import_one_another():
    shared = {"contract", "compiler", "operator", "quantized_reference", "block_tiles"}
    kernels = {module_of(file) for file in SOURCES if module_of(file).startswith("radial_attn.kernels.")}
    for file in SOURCES:
        if module_of(file) in kernels:
            backend = module_of(file).split(".")[2]
            others = {
                name for name in kernels & imports(file) if name.split(".")[2] not in {backend, *shared}
            }
            assert not others, short(file)


def test_the_walk_sees_relative_and_nested_imports():
    source = "def f():\n    from ..grid import TokenGrid\n    from . import flex\n    import yaml as y\n"
    tree = ast.parse(source + "import_module('radial_attn.models.wan')")
    names = [name for node in ast.walk(tree) for name in modules_of(node, ("radial_attn", "kernels"))]
    assert {"radial_attn.grid", "radial_attn.kernels.flex", "yaml", "radial_attn.models.wan"} <= set(names)


@pytest.mark.parametrize("file", SOURCES + TESTS, ids=short)
def test_files_and_lines_are_short(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 110]


LONG = {  # over 40 lines: kernels, their launches, and functions with many keywords or one long list of steps
    *("forward_kernel", "attend", "attend_far", "quantized_forward_kernel", "quantized_attention"),
    *("triton_attention_backward", "apply_radial_attention", "enable", "make_plan", "prepared"),
}


def test_functions_are_short():
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    lengths = [code_lines(node) for node in functions]
    assert np.median(lengths) <= 8 and np.percentile(lengths, 95) <= 25
    assert {node.name for node in functions if code_lines(node) > 40} <= LONG
