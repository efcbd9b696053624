"""The package that people install: what it holds, that nothing else lands on their path, and that it works.

Nothing is downloaded: the package is built with the setuptools of the test environment, and installed into
environments that find torch and diffusers in the one of the tests.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from radial_attn import __version__ as VERSION
from radial_attn.kernels.flash4.library import VERSION as FLASH4

ROOT = Path(__file__).parent.parent
SHIPPED = {"radial_attn": "radial_attn", "radial_attn.models": "models"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation")
PIPELINE = f"""
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained({str(ROOT / "assets" / "wan-tiny")!r})
pipe.set_progress_bar_config(disable=True)
"""
SEARCH = """
from importlib.util import find_spec
import radial_attn
print(find_spec("radial_attn.models").origin)
print(find_spec("models"), find_spec("scripts"))
print(radial_attn.__version__)
print(len(radial_attn.__path__))
"""
ORDERS = (
    "from models import apply_radial_attention as first; import models, radial_attn.models as named",
    "import models; import radial_attn.models as named; first = models.apply_radial_attention",
    "import radial_attn.models as named; import models; first = models.apply_radial_attention",
    "import models.wan, models, radial_attn.models as named; first = models.apply_radial_attention",
)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program with neither PYTHONPATH nor an index of packages."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
        capture_output=True,
        text=True,
    )


def output(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a program that must succeed printed on stdout."""
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def files_of(wheel: Path) -> dict[str, bytes]:
    """Every file of a wheel but the list of their checksums."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def make_environment(folder: Path, package: Path, *options: str) -> Path:
    """An environment's interpreter, with `package` installed and the other packages of the tests in reach."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder))
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(sorted(others)) + "\n")
    output(*PIP, "--python", python, "install", *OFFLINE, *options, package, cwd=folder)
    return python


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without weights, for a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("checkout") / "radial-attention"
    folder.mkdir()
    for name in ("radial_attn", "models", "scripts", "tests", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    output(sys.executable, "-c", code, folder, cwd=checkout)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    output(*PIP, "wheel", *OFFLINE, "--wheel-dir", folder, checkout, cwd=folder)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel."""
    return make_environment(tmp_path_factory.mktemp("environment") / "clean", wheel)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with packages of his own that are called like folders of the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for name in ("models", "scripts"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('the {name} of the user')\n")
    return folder


def readme_example() -> str:
    """README's lines for a user of diffusers, with sizes that suit the bundled model."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    block = next(block for block in blocks if "radial_attn.enable(pipe" in block)
    for name, size in {"height": 64, "width": 64, "num_frames": 17, "num_inference_steps": 2}.items():
        block = re.sub(rf"\b{name}=\d+", f"{name}={size}", block)
    return PIPELINE + block.replace("num_frames=17)", "num_frames=17, num_inference_steps=2)")


def test_the_packages_listed_are_the_folders_that_exist():
    folders = {
        ".".join([package, *file.parent.relative_to(ROOT / place).parts])
        for package, place in SHIPPED.items()
        for file in (ROOT / place).rglob("*.py")
    }
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["package-dir"] == SHIPPED
    assert sorted(setuptools["packages"]) == sorted(folders) and len(folders) > 10


def test_the_citation_names_the_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {VERSION}\n" in citation


def test_the_pinned_versions_lie_within_the_ranges_of_the_package():
    extras = dict(PROJECT["project"]["optional-dependencies"])
    on_gpus, pinned = extras.pop("flash4"), f"flash-attn-4=={FLASH4}"  # not installed by requirements.txt
    assert pinned in on_gpus and pinned in (ROOT / "requirements-gpu.txt").read_text(encoding="utf-8")
    page = extras.pop("demo")  # installed by scripts/demo.sh
    for name in ("demo.sh", "demo.py"):
        assert f'"{page[0]}"' in (ROOT / "scripts" / name).read_text(encoding="utf-8")
    ranges = [Requirement(line) for line in [*PROJECT["project"]["dependencies"], *chain(*extras.values())]]
    assert {"torch", "diffusers"} < {entry.name for entry in ranges}
    for entry in ranges:
        assert entry.specifier.contains(version(entry.name)), f"{entry}: {version(entry.name)} is installed"


def test_the_wheel_registers_the_plugin_of_vllm_omni(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        lines = archive.read(name).decode().split("\n")
    assert lines[:2] == ["[vllm_omni.sparse_attn]", "radial_attn = radial_attn.models.vllm_omni:attention"]


def test_wheel_holds_the_package_alone(wheel):
    files = files_of(wheel)
    tops = {name.split("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"radial_attn"} and len(tops) == 2
    for package, place in SHIPPED.items():
        sources = [file for kind in ("py", "cpp", "h", "typed") for file in (ROOT / place).rglob(f"*.{kind}")]
        assert len(sources) > 20
        for file in sources:
            name = "/".join([*package.split("."), *file.relative_to(ROOT / place).parts])
            assert files.pop(name) == file.read_bytes()
    assert {name.split("/")[0] for name in files} == tops - {"radial_attn"}
    assert any(name.endswith("/licenses/LICENSE") for name in files)


def test_sdist_keeps_the_folders_and_makes_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"models/wan.py", "radial_attn/kernels/cpp/attention.cpp", "radial_attn/py.typed"} <= names
    assert not {name for name in names if name.startswith(("tests", "scripts", "configs"))}
    output(*PIP, "wheel", *OFFLINE, "--wheel-dir", tmp_path, sdist, cwd=tmp_path)
    assert files_of(tmp_path / wheel.name) == files_of(wheel)


def test_nothing_else_lands_on_the_path(installed, tmp_path):
    origin, others, number, paths = output(installed, "-c", SEARCH, cwd=tmp_path).splitlines()
    assert Path(origin).is_relative_to(installed.parents[1])
    assert others == "None None" and paths == "1" and number == VERSION


def test_readme_example_beside_models_and_scripts_of_the_user(installed, elsewhere):
    (elsewhere / "example.py").write_text(
        readme_example() + "print(pipe.transformer.device, len(video[0]))\n"
    )
    lines = output(installed, "example.py", cwd=elsewhere).splitlines()
    assert lines[0].startswith("Radial attention for ") and lines[-1] == "cpu 17"
    assert any("density" in line for line in lines[2:-1])


def test_commands_of_the_package(installed, elsewhere):
    table = output(installed, "-m", "radial_attn", "backends", "--device", "cpu", cwd=elsewhere)
    assert {"reference", "blocks", "cpp"} <= {line.split()[0] for line in table.splitlines()}
    grid = "--frames 3 --height 4 --width 4 --block-size 16"
    commands = [f"draw {grid} --out mask.png".split(), f"density {grid} --target 0.9".split()]
    code = f"from radial_attn.__main__ import main; print(max(main(command) for command in {commands}))"
    drawn, *solved, status = output(installed, "-c", code, cwd=elsewhere).splitlines()
    assert "density" in drawn and any("0.9" in line for line in solved) and status == "0"
    assert (elsewhere / "mask.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_editable_install_leads_to_the_checkout(checkout, tmp_path):
    python = make_environment(tmp_path / "editable", checkout, "--editable")
    origin, others, _, _ = output(python, "-c", SEARCH, cwd=tmp_path).splitlines()
    assert Path(origin) == checkout / "models" / "__init__.py"
    assert others == "None None"


def test_a_checkout_runs_without_being_installed(tmp_path):
    command = ("-m", "scripts.generate", "--help")
    there = output(sys.executable, "-P", *command, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "usage" in there.lower()
    assert output(sys.executable, *command, cwd=ROOT) == there


@pytest.mark.long
def test_models_of_a_checkout_exist_once():
    """In whatever order they are imported: each order begins in a fork of a process that has diffusers."""
    code = f"""
import os
from diffusers import WanTransformer3DModel
for order in {ORDERS}:
    child = os.fork()
    if not child:
        exec(order)
        from models.runtime.schedule import Schedule
        from radial_attn.models.runtime import schedule
        assert models is named and first is named.apply_radial_attention and schedule.Schedule is Schedule
        assert schedule.__spec__.name == schedule.__name__ == "radial_attn.models.runtime.schedule"
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, order
print("once")"""
    assert output(sys.executable, "-c", code, cwd=ROOT) == "once"
