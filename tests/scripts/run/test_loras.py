"""`model.loras`: its forms, refusals before any weight is loaded, the record, presets and scripts."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from radial_attn.models.lora.load import EXPERTS, MODES, UNMATCHED
from scripts.generate import main
from scripts.run.command_line import TINY_PRESET, Command, choose_config, parse
from scripts.run.config import ROOT, keys, read_config
from scripts.run.loras import find_loras
from scripts.run.values import EXPERTS as NAMED_EXPERTS
from scripts.run.values import LoraConfig
from tests.support.script_cases import refused
from tests.support.tiny import wan_pipeline, wan_transformer
from tests.support.tiny_lora import random_distilled, random_pairs, spell, write

TINY = "configs/wan_tiny.yaml"
SIZES = ["steps=2", "num_frames=5", "height=32", "width=32", "guidance_scale=1"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """Writes a LoRA for the model of `tiny_model`."""
    state = random_distilled(wan_transformer(patch_size=(1, 1, 1)))[0]
    return write(tmp_path_factory.mktemp("loras") / "distilled.safetensors", state)


def run(model: Path, output: Path, *overrides: str) -> int:
    sizes = [f"generation.{size}" for size in SIZES]
    return main([TINY, f"model.path={model}", f"output.path={output}", *sizes, *overrides])


def test_choices_are_those_of_the_models():
    choices = {name: keys()[f"model.lora_{name}"].metadata["choices"] for name in ("mode", "unmatched")}
    assert (choices["mode"], choices["unmatched"]) == (MODES, UNMATCHED)
    assert NAMED_EXPERTS == EXPERTS


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a/b.safetensors", [LoraConfig("a/b.safetensors")]),
        ("owner/name", [LoraConfig("owner/name")]),
        ("", []),
        ("null", []),
        ("[]", []),
        ("{path: a, scale: 0.8}", [LoraConfig("a", scale=0.8)]),
        (
            "[a, {path: b, scale: -1, weight_name: c/d.safetensors}]",
            [LoraConfig("a"), LoraConfig("b", "c/d.safetensors", -1.0)],
        ),
        ("[{path: 'x: ${y}', transformer: 2}]", [LoraConfig("x: ${y}", transformer="2")]),
        ("a${b}, c.safetensors", [LoraConfig("a${b}, c.safetensors")]),
    ],
)
def test_forms_on_the_command_line(text, entries):
    assert read_config(TINY, [f"model.loras={text}"]).model.loras == entries


def test_forms_in_a_file_and_precedence(tmp_path):
    file = tmp_path / "mine.yaml"
    for text in ("a", "[a]", "[{path: a}]", "{path: a, scale: 1, transformer: both}"):
        file.write_text(f"model: {{loras: {text}}}\n")
        assert read_config(str(file), []).model.loras == [LoraConfig("a")]
        assert read_config(str(file), ["model.loras=b"]).model.loras == [LoraConfig("b")]
        assert read_config(str(file), ["model.loras="]).model.loras == []
    file.write_text("model:\n  loras:\n")
    assert read_config(str(file), []).model.loras == []


def test_a_video_with_loras_and_its_record(lora, tiny_model, tmp_path, capsys):
    entry = f"model.loras=[{{path: {lora}, scale: 0.5}}, {lora}]"
    assert run(tiny_model, tmp_path / "a.mp4", entry) == 0
    assert (
        f"lora          {lora}, scale 0.5, 46 layers, 77 other changes, separate" in capsys.readouterr().out
    )
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["config"]["model"]["loras"][1] == vars(LoraConfig(str(lora)))
    assert [item["scale"] for item in record["loras"]] == [0.5, 1.0]
    assert record["loras"][0] == {
        "transformer": 1,
        "file": str(lora),
        "scale": 0.5,
        "rank": 3,
        "pairs": 46,
        "deltas": 77,
        "left_out": 0,
        "bytes": lora.stat().st_size,
        "sha256": hashlib.sha256(lora.read_bytes()).hexdigest(),
        "mode": "separate",
    }


def test_scales_and_modes_in_the_video(lora, tiny_model, tmp_path):
    variants = {
        "none": [],
        "zero": [f"model.loras={{path: {lora}, scale: 0}}"],
        "apart": [f"model.loras={lora}"],
        "fused": [f"model.loras={lora}", "model.lora_mode=fused"],
    }
    for name, overrides in variants.items():
        assert run(tiny_model, tmp_path / f"{name}.mp4", *overrides) == 0
    videos = {name: (tmp_path / f"{name}.mp4").read_bytes() for name in variants}
    assert videos["none"] == videos["zero"] != videos["apart"]
    assert json.loads((tmp_path / "none.json").read_text())["loras"] == []
    assert json.loads((tmp_path / "fused.json").read_text())["loras"][0]["mode"] == "fused"


def test_another_scale_makes_the_videos_of_a_prompt_file_again(lora, tiny_model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    overrides = [f"generation.prompt_file={tmp_path / 'prompts.txt'}", f"model.loras={lora}"]
    assert run(tiny_model, tmp_path / "out", *overrides) == 0
    assert run(tiny_model, tmp_path / "out", *overrides) == 0
    assert "0 of 1 videos to make" in capsys.readouterr().out
    again = (overrides[0], f"model.loras={{path: {lora}, scale: 0.9}}", "output.overwrite=true")
    assert run(tiny_model, tmp_path / "out", *again) == 0
    assert "made with other settings (model.loras): made again" in capsys.readouterr().out


def test_keys_that_are_left_out_are_reported(tiny_model, tmp_path, capsys):
    pairs = random_pairs(wan_transformer())
    stray = {"diffusion_model.blocks.0.cross_attn.k_img.diff_b": torch.ones(24)}
    file = write(tmp_path / "a.safetensors", spell(pairs, "original") | stray)
    overrides = [TINY, f"model.path={tiny_model}", f"output.path={tmp_path / 'out'}", f"model.loras={file}"]
    for option in ([], ["--dry-run"]):
        named = ["error: model.loras[0]: LoRA a.safetensors: 1 of 81 keys match nothing"]
        named += ["k_img.diff_b (no such layer)", "model.lora_unmatched=warn"]
        refused(capsys, [*overrides, *option], *named)
    assert not (tmp_path / "out").exists()
    assert run(tiny_model, tmp_path / "out", f"model.loras={file}", "model.lora_unmatched=warn") == 0
    printed = capsys.readouterr()
    assert "1 left out" in printed.out and "LoRA a.safetensors: 1 of 81 keys match nothing" in printed.out
    assert "k_img" not in printed.err


def _several(folder: Path) -> str:
    for name in "ab":
        write(folder / f"{name}.safetensors", {"x.diff": torch.ones(1)})
    return str(folder)


def _other(folder: Path) -> str:
    pairs = random_pairs(wan_transformer(attention_head_dim=24))
    return str(write(folder / "a.safetensors", spell(pairs, "kohya")))


def _dora(folder: Path) -> str:
    state = spell(random_pairs(wan_transformer()), "original")
    return str(
        write(folder / "a.safetensors", state | {"blocks.0.self_attn.q.dora_scale": torch.ones(24, 1)})
    )


BAD = {
    "dora": (_dora, "{}", ["model.loras[0]: LoRA a.safetensors is a DoRA (blocks.0", "use a plain LoRA"]),
    "several": (_several, "{}", ["model.loras[0].path", "set weight_name", "a.safetensors, b.safetensors"]),
    "other name": (_several, "{{path: {}, weight_name: c}}", ["weight_name", "'c'", "a.saf"]),
    "name of a file": (_other, "{{path: {}, weight_name: c}}", ["weight_name", "is a file"]),
    "other sizes": (_other, "{}", ["model.loras[0]", "a model of other sizes", "48x3 times 3x48", "24x24"]),
}


@pytest.mark.parametrize("option", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("case", BAD)
def test_bad_loras_are_refused_before_anything_is_written(case, option, tiny_model, tmp_path, capsys):
    make, entry, parts = BAD[case]
    (tmp_path / "loras").mkdir()
    argv = [TINY, f"model.path={tiny_model}", f"output.path={tmp_path / 'out'}"]
    line = refused(capsys, [*argv, f"model.loras={entry.format(make(tmp_path / 'loras'))}", *option], *parts)
    assert "lora_unmatched" not in line
    assert not (tmp_path / "out").exists()


def test_a_folder_with_one_file_or_a_name(lora, tiny_model, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.safetensors").write_bytes(lora.read_bytes())
    for text in (f"{tmp_path / 'deep'}", f"{{path: {tmp_path}, weight_name: deep/a.safetensors}}"):
        (entry,) = find_loras(read_config(TINY, [f"model.loras={text}"]).model, str(tiny_model))
        assert entry.file == tmp_path / "deep/a.safetensors"


@pytest.mark.parametrize("absent", ["transformer", "transformer_2"])
def test_a_folder_with_one_of_two_experts_runs_with_a_note_and_refuses_what_needs_both(
    absent, lora, tmp_path, capsys
):
    wan_pipeline(experts=2, patch_size=(1, 1, 1)).save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / absent)
    kept = (
        "transformer_2, the expert of the last" if absent == "transformer" else "transformer, the expert of"
    )
    for option in ([], ["--dry-run"]):
        assert run(tmp_path / "model", tmp_path / "a.mp4", f"model.loras={lora}", *option) == 0
        assert f"model.path has no {absent}: {kept}" in capsys.readouterr().out
    assert [entry["transformer"] for entry in json.loads((tmp_path / "a.json").read_text())["loras"]] == [1]
    argv = [TINY, f"model.path={tmp_path / 'model'}"]
    refused(capsys, [*argv, "generation.guidance_scale_2=2"], "generation.guidance_scale_2", "one expert")
    second = f"model.loras={{path: {lora}, transformer: 2}}"
    refused(capsys, [*argv, second], "model.loras[0].transformer", "has one transformer")


def test_values_that_are_not_finite_are_one_line(tiny_model, tmp_path, capsys):
    state = spell(random_pairs(wan_transformer()), "original")
    state["diffusion_model.blocks.1.ffn.0.lora_A.weight"][0, 0] = torch.nan
    file = write(tmp_path / "a.safetensors", state)
    argv = [TINY, f"model.path={tiny_model}", f"output.path={tmp_path / 'out'}", f"model.loras={file}"]
    refused(capsys, argv, "not finite: diffusion_model.blocks.1.ffn.0.lora_A.weight")
    assert not (tmp_path / "out").exists()


def test_a_hub_id_out_of_reach(capsys, tiny_model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for entry in ("nobody/nothing", "{path: nobody/nothing, weight_name: a.safetensors}"):
        argv = [TINY, f"model.path={tiny_model}", f"model.loras={entry}"]
        refused(capsys, argv, "model.loras[0].path", "'nobody/nothing'", "hub")
        assert main([*argv, "--dry-run"]) == 0
        assert "not checked (the file is not downloaded yet)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["fusionx", "lightx2v"])
def test_scripts_of_few_steps_have_a_stand_in_with_its_own_folder(name):
    preset = f"configs/wan2.1_t2v_14b_{name}.yaml"
    file, overrides, _ = choose_config(parse([f"--preset={preset}", "model.device=cpu", "generation.seed=5"]))
    config = read_config(file, overrides)
    assert file == TINY_PRESET and config.model.loras == [] and config.generation.seed == 5
    assert config.output.path == f"outputs/wan2.1_t2v_14b_{name}_tiny"
    assert f'--preset={preset} "$@"' in (ROOT / f"scripts/wan_t2v_{name}.sh").read_text()
    assert choose_config(Command(config_file=TINY, preset=preset))[0] == TINY
