"""The tests that docs/development.md names are there; the examples of docs/python.md and the notebook run."""

import json
import re
from itertools import count

import pytest
import torch

import radial_attn
from scripts.run.config import ROOT
from tests.support.notebook import NOTEBOOK, code_cells, outputs_of, read
from tests.support.pipelines import CALL, generate
from tests.support.tiny import wan_pipeline
from tests.support.tiny_lora import random_pairs, spell, write

HERE = {  # an example's words for a GPU and a trained model -> for a CPU and a random one
    '"cuda"': '"cpu"',
    "compile_repeated_blocks()": 'compile_repeated_blocks(backend="eager")',
    "threshold=0.05": "threshold=100.0",
    "threshold=0.25": "threshold=100.0",
}


def test_every_named_test_is_there():
    text = (ROOT / "docs/development.md").read_text(encoding="utf-8").split("## What users met")[1]
    rows = [line for line in text.split("## House rules")[0].splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 30
    for row in rows:
        kind, tests = row.strip("| ").split(" | ")
        for part in tests.split("; "):
            file, *names = re.findall(r"`([^`]+)`", part)
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            missing = [name for name in names if f"\ndef {name}(" not in source]
            assert file.endswith(".py") and not missing, (kind, file, missing)


def examples():
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    for part in text.split("\n## With offload")[1].split("\n## ")[0].split("\n### ")[1:]:
        title, numbers = part.splitlines()[0], count(1)
        for block in re.findall(r"```python\n(.*?)```", part, re.DOTALL):
            marks = pytest.mark.long if title == "torch.compile" else ()
            yield pytest.param(block, marks=marks, id=f"{title} {next(numbers)}")


def test_the_lines_for_those_who_come_from_elsewhere(capsys):
    text = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")
    names = {"pipe": wan_pipeline(), "radial_attn": radial_attn}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
        assert radial_attn.disable(names["pipe"])
    assert re.findall(r"compat=(\w+),", capsys.readouterr().out) == ["woct0rdho", "kijai", "lightx2v"]


@pytest.mark.parametrize("block", examples())
def test_an_example_runs(block, tmp_path, monkeypatch):
    """A cache skips calls, anything else changes nothing but a LoRA; compiled blocks round otherwise."""
    monkeypatch.chdir(tmp_path)
    pipe, made = wan_pipeline(num_layers=2), []
    with radial_attn.enable(pipe, quiet=True):
        expected = generate(pipe, 3)
    write(tmp_path / "my_lora.safetensors", spell(random_pairs(pipe.transformer), "diffusers"))
    pipe.transformer.blocks[-1].attn1.to_q.register_forward_hook(lambda *_: made.append(1))
    for words, ours in HERE.items():
        block = block.replace(words, ours)
    call = CALL | {"guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": 3}
    names = {"pipe": pipe, "radial_attn": radial_attn, "torch": torch}
    names["call"] = call | {"generator": torch.Generator().manual_seed(0)}
    exec(block, names)
    assert names["handle"].report()["density"] < 1 and len(block.splitlines()) <= 5
    cached = "enable_cache" in block
    assert (0 < len(made) < 3) == cached
    same = "lora" not in block and not cached
    assert ((names["video"] - expected).abs().max() < 1e-5 * expected.abs().max()) == same


def kinds(outputs: list[list[dict]]) -> list[list[str]]:
    """Names what each cell printed and showed."""
    return [[name for output in cell for name in output.get("data", {"text": 0})] for cell in outputs]


@pytest.mark.parametrize("steps", [2, pytest.param(20, marks=pytest.mark.long)])
def test_the_notebook_runs(steps):
    """With few steps also with one density."""
    changes = {} if steps == 20 else {"steps = 20": f"steps = {steps}", "(0.21, 0.35, 0.5)": "(0.21,)"}
    outputs = outputs_of(read(), changes)
    assert kinds(outputs) == kinds([cell["outputs"] for cell in code_cells(read())])
    assert kinds(outputs)[2] == ["text", "image/gif"] and kinds(outputs)[4] == ["text", "image/png"]
    if steps == 20:
        radial, profile = (re.search(r"([\d.]+) dB at 0.21", line)[1] for line in outputs[4][0]["text"])
        assert float(profile) > float(radial) > 15


def test_the_notebook_is_whole_small_and_of_no_machine():
    notebook, text = read(), NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 60_000 and (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(names) == len(set(names))
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    said = [output.get("text", "") for cell in cells for output in cell["outputs"]]
    assert not re.search(r"/home|/tmp|/root|/work|\.venv/lib", json.dumps(said))
