"""Nodes, workflows and metadata of the node pack."""

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import radial_attn
from comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from comfyui.nodes import INPUTS, KEY, report_text
from comfyui.protocol import APPLY_MODEL, ON_CLEANUP
from comfyui.state import Settings
from tests.support.auto_backend import AUTO
from tests.support.comfy_stub import Base, Flux, Patcher, WanModel

PACK = Path(radial_attn.__file__).parents[1] / "comfyui"
WORKFLOWS = sorted(file.stem for file in (PACK / "workflows").glob("*.json"))
DEFAULTS = {entry.name: entry.options["default"] for entry in INPUTS if entry.name != "model"}


def node(name: str, **inputs):
    made = NODE_CLASS_MAPPINGS[name]()
    return getattr(made, made.FUNCTION)(**inputs)


def test_the_inputs_are_the_settings_and_all_are_explained():
    assert asdict(Settings()) == DEFAULTS
    for name, made in NODE_CLASS_MAPPINGS.items():
        assert NODE_DISPLAY_NAME_MAPPINGS[name].startswith("Radial Attention") and made.DESCRIPTION
        assert all(options["tooltip"] for _, options in made.INPUT_TYPES()["required"].values())
    kinds = NODE_CLASS_MAPPINGS["RadialAttention"].INPUT_TYPES()["required"]
    assert kinds["selection"][0] == ["static", "dense_step", "profile"] and kinds["density"][0] == "FLOAT"


def test_a_model_is_patched_as_a_clone_and_reports():
    model = Patcher(WanModel())
    (first,) = node("RadialAttention", model=model, **DEFAULTS)
    (clone,) = node("RadialAttention", model=first, **DEFAULTS | {"min_tokens": 0, "start_percent": 0.0})
    assert not model.wrappers and first.get_attachment(KEY) is not clone.get_attachment(KEY)
    (wrapper,), (clean_up,) = clone.wrappers[APPLY_MODEL, KEY], clone.callbacks[ON_CLEANUP, KEY]
    x, text = torch.randn(1, 4, 6, 12, 16), torch.randn(1, 5, 16)
    options = {"sample_sigmas": torch.tensor([1.0, 0.0])}
    arguments = {"c_crossattn": text, "transformer_options": options}
    Base(model.model).apply_model(wrapper, x, torch.ones(1), **arguments)
    clean_up()
    output = node("RadialAttentionReport", model=clone.clone(), after={})
    (shown,) = output["result"]
    assert output["ui"]["text"] == (shown,)
    assert re.fullmatch(
        r"Radial Attention over 6 x 6 x 8 tokens, density 0\.306\n"
        rf"self-attention calls: 1 dense, 2 {AUTO}\n"
        r"stayed dense: 1 dense_block, 3 cross_attention\n"
        r"a call of the model: sparse \d+\.\d\d\d s \(median of 1\)\n"
        r"note: no mask of this size has density 0.25: the nearest has 0.306",
        shown,
    )


def test_reports_without_a_sparse_call():
    assert "connect the output of the node" in report_text(Patcher(WanModel()))
    (unknown,) = node("RadialAttention", model=Patcher(Flux()), **DEFAULTS)
    assert not unknown.wrappers
    assert report_text(unknown).startswith("No call was sparse.\nself-attention calls: none\n")
    assert "note: Flux stays dense: this node serves Wan" in report_text(unknown)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dense_blocks": "first"}, "dense_blocks must be numbers and ranges"),
        ({"density": 1.5}, "density must be from 0 to 1, got 1.5"),
        ({"end_percent": -0.1}, "end_percent must be from 0 to 1"),
        ({"start_percent": 0.9, "end_percent": 0.5}, "at most end_percent, got 0.9 and 0.5"),
        ({"min_tokens": -1}, "min_tokens must be at least 0"),
        ({"backend": "xformers"}, "backend must be one of auto, .*, got 'xformers'"),
        ({"selection": "profile"}, "needs the file of a profile"),
        ({"selection": "profile", "profile": "none.safetensors"}, "none.safetensors"),
        ({"profile": "some.safetensors"}, "serves selection='profile' alone"),
    ],
)
def test_wrong_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        node("RadialAttention", model=Patcher(WanModel()), **DEFAULTS | changes)


def test_the_metadata_follows_the_rules_of_the_registry():
    content = tomllib.loads((PACK / "pyproject.toml").read_text())
    project, comfy = content["project"], content["tool"]["comfy"]
    assert re.fullmatch(r"[a-z](?:[._-]?[a-z0-9])*", project["name"]) and len(project["name"]) < 100
    assert "comfyui" not in project["name"].lower()
    assert project["version"] == radial_attn.__version__ and re.fullmatch(
        r"\d+\.\d+\.\d+", project["version"]
    )
    whole = tomllib.loads((PACK.parent / "pyproject.toml").read_text())["project"]
    assert project["license"] == {"text": whole["license"]}
    assert project["requires-python"] == whole["requires-python"]
    assert comfy["PublisherId"] and comfy["DisplayName"] == "Radial Attention"
    assert all((PACK / folder).is_dir() for folder in comfy["includes"])
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])


def graph_of(ui: dict) -> dict:
    """Returns the nodes of a workflow as the API has them: class, links, and values of widgets."""
    sources = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    graph = {}
    for entry in ui["nodes"]:
        values = [value for value in entry.get("widgets_values", []) if value != "fixed"]
        inputs = {}
        for slot in entry["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = sources[slot["link"]]
            elif "widget" in slot:
                inputs[slot["name"]] = values.pop(0)
        graph[str(entry["id"])] = {"class_type": entry["type"], "inputs": inputs}
    return graph


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_the_same_in_both_formats(name):
    ui = json.loads((PACK / "workflows" / f"{name}.json").read_text())
    api = json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text())
    graph = graph_of(ui)
    for entry in graph.values():
        entry["inputs"].pop("preview", None)  # what the front end shows
    assert graph == api
    for link, source, slot, target, place, kind in ui["links"]:
        nodes = {entry["id"]: entry for entry in ui["nodes"]}
        assert link in nodes[source]["outputs"][slot]["links"]
        assert nodes[target]["inputs"][place]["link"] == link and kind
    ours = [entry for entry in api.values() if entry["class_type"] == "RadialAttention"]
    for entry in ours:
        assert list(entry["inputs"]) == [entry.name for entry in INPUTS]
    reports = [entry for entry in api.values() if entry["class_type"] == "RadialAttentionReport"]
    assert len(ours) == len(reports) == (2 if "wan2.2" in name else 1)


def test_there_are_workflows():
    assert WORKFLOWS == ["hunyuan_video_t2v", "minimax_h3", "wan2.1_t2v_14b", "wan2.2_t2v_a14b"]


def load(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Loads the pack from a folder as ComfyUI does, in a Python of its own, and prints its nodes."""
    code = (
        "import sys, importlib.util as u; f = sys.argv[1]\n"
        "spec = u.spec_from_file_location(f, f + '/__init__.py')\n"
        "sys.modules[f] = m = u.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "print(list(m.NODE_CLASS_MAPPINGS))"
    )
    command = [sys.executable, *options, "-c", code, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, check=True)


def test_a_copy_without_the_package_says_how_to_install_it(tmp_path):
    copy = tmp_path / "radial-attention"
    copy.mkdir()
    for file in PACK.glob("*.py"):
        (copy / file.name).write_text(file.read_text())
    run = load(copy, "-P", "-S")
    assert run.stdout.startswith("[]\n")
    (line,) = run.stderr.splitlines()
    assert "No module named 'radial_attn'" in line and "-m pip install" in line


@pytest.mark.long
def test_a_link_finds_the_checkout_around_it(tmp_path):
    (tmp_path / "radial-attention").symlink_to(PACK)
    run = load(tmp_path / "radial-attention", "-P")
    assert run.stdout.startswith("['RadialAttention', 'RadialAttentionReport']\n") and not run.stderr
