"""Lists what the page offers, and plans the two videos of a request."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from radial_attn.selection import SELECTIONS
from scripts.run.command_line import choose_preset
from scripts.run.config import find_path, read_config
from scripts.run.errors import UsageError
from scripts.run.plan import RunPlan, make_plan

DENSE = "dense"
# name -> presets without .yaml, one for each length; PRESET_profile and PRESET_adaptive hold other selections
BUNDLED = {
    "Wan (bundled)": ("configs/wan_tiny", "configs/wan_tiny_4x"),
    "HunyuanVideo (bundled)": ("configs/hunyuan_tiny",),
    "Mochi (bundled)": ("configs/mochi_tiny",),
}
LARGE = {
    "Wan2.1 14B": ("configs/wan2.1_t2v_14b",),
    "HunyuanVideo": ("configs/hunyuan_t2v",),
    "Mochi 1": ("configs/mochi_t2v",),
}
WITH_DENSE_STEPS = ("attention.selection=dense_step", "attention.profile=null", "attention.dense_steps=4")
Models = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Request:
    """Holds what a user asks for; `layer` and `head` say whose mask is shown, from 0."""

    model: str
    frames: int
    prompt: str
    selection: str
    density: float | None
    seed: int | None
    layer: int
    head: int


def offered() -> Models:
    """Returns the models that the page offers: the bundled ones, and on a GPU those of the paper."""
    return BUNDLED | LARGE if torch.cuda.is_available() else BUNDLED


def lengths(models: Models, model: str) -> dict[int, str]:
    """Returns the presets of a model by number of frames; UsageError for an unknown model."""
    if model not in models:
        raise UsageError(f"model: got {model!r}, allowed: {', '.join(models)}")
    return {read_config(f"{preset}.yaml", []).generation.num_frames: preset for preset in models[model]}


def selections(preset: str) -> list[str]:
    """Returns the ways of selecting blocks that a preset has."""
    return [name for name in SELECTIONS if name != "profile" or find_path(f"{preset}_profile.yaml").is_file()]


def settings(preset: str, selection: str) -> tuple[str, list[str]]:
    """Returns the configuration file of a preset with a selection, and overrides of its keys.

    On a GPU that is too small for a large model, the overrides save memory. UsageError if the preset lacks
    the selection, or the model does not fit.
    """
    if selection not in selections(preset):
        raise UsageError(f"selection: got {selection!r}, allowed: {', '.join(selections(preset))}")
    saving: list[str] = []
    if any(preset in presets for presets in LARGE.values()):
        chosen, saving, reason = choose_preset([], f"{preset}.yaml")
        if chosen != f"{preset}.yaml":
            raise UsageError(f"model: {preset} does not fit here: {reason}; choose a bundled model")
    if selection == "static":
        return f"{preset}.yaml", saving
    if selection == "dense_step" and find_path(f"{preset}_adaptive.yaml").is_file():
        return f"{preset}_adaptive.yaml", saving
    return f"{preset}_profile.yaml", [*saving, *(WITH_DENSE_STEPS if selection == "dense_step" else ())]


def usual(preset: str, selection: str) -> RunPlan:
    """Returns the unchanged plan of a preset with a selection; the page starts from its density."""
    return make_plan(read_config(*settings(preset, selection)), dry_run=True)


def plans(models: Models, request: Request, folder: str) -> dict[str, RunPlan]:
    """Returns the plans of the dense video and of the sparse one, which is named by its selection.

    At the preset's own density its mask stays as it is. Videos go to subfolders of `folder`.

    Raises UsageError for everything that can be refused without weights.
    """
    presets = lengths(models, request.model)
    if request.frames not in presets:
        frames = ", ".join(map(str, presets))
        raise UsageError(f"frames: got {request.frames}, allowed for {request.model}: {frames}")
    preset = presets[request.frames]
    asked = [f"generation.prompt={' '.join(request.prompt.split())}", f"generation.seed={request.seed}"]
    name, density = preset.rpartition("/")[2], []
    if request.density != round(usual(preset, request.selection).density, 3):
        density = [f"attention.density={request.density}"]
    words = {
        DENSE: ["attention.pattern=dense", f"output.path={folder}/{name}_{DENSE}"],
        request.selection: [*density, f"output.path={folder}/{name}_{request.selection}_{request.density}"],
    }
    planned = {}
    for kind, more in words.items():
        file, overrides = settings(preset, "static" if kind == DENSE else kind)
        planned[kind] = make_plan(read_config(file, [*overrides, *asked, *more]))
    for key, count in zip(("layer", "head"), heads(planned[DENSE]), strict=True):
        if not 0 <= (got := getattr(request, key)) < count:
            raise UsageError(f"{key}: got {got}, must be 0 to {count - 1}")
    return planned


def heads(plan: RunPlan) -> tuple[int, int]:
    """Returns the numbers of layers and of heads that have a mask."""
    return plan.model.attention_layers(), plan.model.heads
