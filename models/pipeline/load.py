"""Loads pipelines of each family: safetensors only, fp32 VAE, the family's scheduler."""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..runtime.transformers import NAMES, WITH_REFERENCES
from .families import FAMILIES
from .single_file import find_single_file
from .weights import check_weights, read_object, read_tensors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


MOCHI_THRESHOLD = 0.025  # of the pipeline's own noise levels
# Pipelines that give the VAE an image in the transformer's dtype
IMAGE_IN_DTYPE = "motif_video_i2v", "kandinsky5_i2v"
# Models of the hub whose files for diffusers are in a branch
REVISIONS = {f"nvidia/Cosmos-Predict2.5-{size}": "diffusers/base/post-trained" for size in ("2B", "14B")}
INDEXES = "model_index.json", "modular_model_index.json"
MODULAR = ("MiniMaxAI/MiniMax-H3",)  # models of the hub that have the second of them
COSMOS_SIGMAS = {"sigma_max": 80.0, "sigma_min": 0.002}


def load_pipeline(
    path: str,
    family: str,
    dtype: torch.dtype,
    device: str,
    flow_shift: float | None = None,
    *,
    quantization_config: Any = None,
    parts: Mapping[str, Any] | None = None,
    files: Mapping[str, str | Path] | None = None,
) -> "DiffusionPipeline":
    """Returns the pipeline at `path` (a folder in diffusers format or a hub id) on `device`.

    Weights are loaded in `dtype`, the VAE's in float32. The scheduler gets `flow_shift`, or keeps the shift
    that the model's own scheduler names; for Wan it becomes UniPC on flow sigmas. The VAEs of HunyuanVideo
    and Mochi decode tile by tile. `quantization_config`: diffusers' configuration for some of the components.
    `parts`: components that are loaded already, by name; None leaves a component out. `files`: for
    `transformer` or `transformer_2`, a file of weights in place of its folder's (see `single_file`). If there
    is only one of two experts, that one is the pipeline's `transformer` and makes every step.

    Raises:
        FileNotFoundError: the folder, hub model, model_index.json or a component does not exist.
        ValueError: the family is unknown, model_index.json is unreadable or of another family, a safetensors
            file is broken, or a part lacks tensors. All of these are found before any weight is loaded.
    """
    files = files or {}
    check_model(path, family, files)
    absent = absent_expert(path, read_index(path), files)
    parts = ({absent: None} if absent else {}) | dict(parts or {})
    parts |= load_files(path, files, parts, dtype, quantization_config)
    parts |= _renamed(path, family, parts, dtype, quantization_config)
    pipeline = _assembled(path, family, parts, dtype, quantization_config)
    if absent:
        (kept,) = (getattr(pipeline, name) for name in NAMES if name != absent)
        pipeline.register_modules(transformer=kept, transformer_2=None)
        pipeline.register_to_config(boundary_ratio=None)
    if FAMILIES[family].noise == "unipc":
        pipeline.scheduler = flow_scheduler(pipeline.scheduler, flow_shift)
    elif flow_shift is not None:
        pipeline.scheduler = shifted(pipeline.scheduler, flow_shift)
    if FAMILIES[family].tiled_vae:
        pipeline.vae.enable_tiling()
    if family in IMAGE_IN_DTYPE:
        pipeline.vae.encoder.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))
        pipeline.vae.quant_conv.register_forward_hook(lambda _, args, moments: moments.to(dtype))
    return pipeline.to(device)


def _assembled(
    path: str, family: str, parts: Mapping[str, Any], dtype: torch.dtype, quantization_config: Any
) -> "DiffusionPipeline":
    """Returns a pipeline of `parts`, and of what it lacks from `path`."""
    import diffusers

    options = {"dtype": {"default": dtype, "vae": torch.float32}, "quantization_config": quantization_config}
    if FAMILIES[family].modular:
        from .minimax_h3 import load_minimax_h3

        return load_minimax_h3(path, parts, **options)
    options |= {"revision": REVISIONS.get(path), "use_safetensors": True}
    return getattr(diffusers, FAMILIES[family].pipeline).from_pretrained(path, **options, **parts)


def _renamed(
    path: str, family: str, parts: Mapping[str, Any], dtype: torch.dtype, quantization_config: Any
) -> dict[str, torch.nn.Module]:
    """Returns the transformer in the family's own class, by name, if model_index.json names another class.

    Raises ValueError if `parts` has one, from a file of weights, which was read as that other class.
    """
    import diffusers

    name, index, kind = NAMES[0], read_index(path), FAMILIES[family]
    if index["_class_name"] == kind.pipeline or index[name][1] == kind.transformer:
        return {}
    if name in parts:
        raise ValueError(f"family {family!r}: weights of its transformer are read from its folder only")
    chosen = quantization_config.quant_mapping.get(name) if quantization_config else None
    options = {"subfolder": name, "use_safetensors": True, "quantization_config": chosen}
    return {name: getattr(diffusers, kind.transformer).from_pretrained(path, dtype=dtype, **options)}


def load_files(
    path: str,
    files: Mapping[str, str | Path],
    parts: Mapping[str, Any],
    dtype: torch.dtype,
    quantization_config: Any = None,
) -> dict[str, torch.nn.Module]:
    """Returns the transformers of `files` by name, once they and the folders of all other parts are whole.

    `parts`: those that are loaded already. Raises the errors of `load_pipeline`.
    """
    import diffusers

    if NAMES[1] in files and not has_experts(read_index(path)):
        raise ValueError(f"model {path} has one transformer, so no file can be its {NAMES[1]}; leave it out")
    found = {name: find_single_file(file, path, name) for name, file in files.items()}
    without, index = dict.fromkeys(files) | dict(parts), read_index(path)
    if path not in MODULAR:  # their parts are downloaded as they are loaded
        where = {"revision": REVISIONS.get(path), "use_safetensors": True}
        folder = path if is_local(path) else diffusers.DiffusionPipeline.download(path, **where, **without)
        check_weights(Path(folder), index, sorted(parts_named(index).difference(without)))
    chosen = quantization_config.quant_mapping if quantization_config else {}
    return {name: file.load(path, name, dtype, chosen.get(name)) for name, file in found.items()}


def shifted(scheduler: object, flow_shift: float) -> object:
    """Returns the same flow-matching scheduler with another shift.

    Raises ValueError for Mochi's, whose pipeline makes its own noise levels.
    """
    if scheduler.config.get("invert_sigmas"):
        raise ValueError(f"flow_shift must be None for Mochi, which has its own schedule, got {flow_shift}")
    return type(scheduler).from_config(scheduler.config, shift=flow_shift)


def flow_scheduler(scheduler: object, flow_shift: float | None = None) -> object:
    """Returns UniPC on flow sigmas with the settings of `scheduler`.

    If `flow_shift` is None, it keeps the `flow_shift` (or `shift`) of `scheduler`.
    """
    from diffusers import UniPCMultistepScheduler

    settings = dict(scheduler.config)
    shift = settings.get("flow_shift", settings.get("shift", 1.0)) if flow_shift is None else flow_shift
    return UniPCMultistepScheduler.from_config(
        settings, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def noise_levels(
    path: str, family: str, steps: int, flow_shift: float | None, tokens: int
) -> list[float] | None:
    """Returns the noise level at the start of each step, 1 for noise, as a pipeline will plan them.

    `tokens`: of the video, on which the shift may depend. None if that depends on a scheduler that is not in
    a local folder.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, MiniMaxH3Scheduler, UniPCMultistepScheduler

    noise = FAMILIES[family].noise
    if noise == "mochi":
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        return [float(level) for level in linear_quadratic_schedule(steps, MOCHI_THRESHOLD)]
    file = Path(path) / "scheduler" / "scheduler_config.json"
    if not file.is_file() and flow_shift is None:
        return None
    settings = read_object(file) if file.is_file() else {}
    shift = settings.get("flow_shift", settings.get("shift", 1.0)) if flow_shift is None else flow_shift
    if noise == "unipc":
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        scheduler = UniPCMultistepScheduler.from_config(settings, **flow)
        scheduler.set_timesteps(steps)
    elif noise == "own":
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(settings, shift=shift)
        scheduler.set_timesteps(steps)
    elif noise == "minimax_h3":
        scheduler = MiniMaxH3Scheduler(shift)
        scheduler.set_timesteps(steps + 1)  # counts the level at the end
    elif noise == "edm":  # levels s of x + s noise, whose share of the noise is s / (1 + s)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(settings)
        scheduler.register_to_config(**COSMOS_SIGMAS)
        scheduler.set_timesteps(sigmas=[step / max(steps - 1, 1) for step in range(steps)])
        scheduler.sigmas /= 1 + scheduler.sigmas
    else:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(settings, shift=shift)
        at = scheduler.config  # the logarithm of a shift that depends on the tokens is linear in them
        share = (tokens - at.base_image_seq_len) / (at.max_image_seq_len - at.base_image_seq_len)
        levels = [1 - step / steps for step in range(steps)]
        scheduler.set_timesteps(sigmas=levels, mu=at.base_shift + share * (at.max_shift - at.base_shift))
    return scheduler.sigmas[:steps].tolist()


def check_model(path: str, family: str, files: Collection[str] = ()) -> None:
    """Raises the errors of `load_pipeline`; reads no weights, only the index and the safetensors headers.

    `files`: the transformers whose weights come from a file of their own.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    folder = Path(path)
    index = read_index(path)
    class_name = index.get("_class_name")
    wanted, also = FAMILIES[family].pipeline, FAMILIES[family].also
    both = class_name == also and (family != "wan_i2v" or index.get("expand_timesteps"))  # TI2V-5B
    if class_name != wanted and not both:
        raise ValueError(f"model {path} must hold a {wanted} (family {family!r}), got {class_name}")
    if is_local(path):
        _check_components(folder, index, files)


def read_index(path: str) -> dict:
    """Returns model_index.json of a folder or hub id; FileNotFoundError or ValueError if there is none.

    In its place may be the index of a modular pipeline; it is returned in the same form, without the parts
    that are not loaded.
    """
    index = _read_index(Path(path)) if is_local(path) else _fetch_index(path)
    plain = {name: _library_and_class(value) for name, value in index.items() if name != WITH_REFERENCES}
    return plain if any(isinstance(value, list) and len(value) == 3 for value in index.values()) else index


def _library_and_class(value: Any) -> Any:
    """Returns the two names that an entry of a modular index holds behind them; other values as they are."""
    about = value[2] if isinstance(value, list) and len(value) == 3 else None
    return about.get("type_hint") if isinstance(about, dict) else value


def is_local(path: str) -> bool:
    """Returns whether `path` means a local folder: it or its parent exists, or it is not `owner/name`."""
    parent = os.path.dirname(path)  # os.path, as a name may be longer than a file system takes
    return os.path.exists(path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or os.path.isdir(parent)


def _read_index(folder: Path) -> dict:
    files = [folder / name for name in INDEXES]
    file = next((file for file in files if file.is_file()), files[0])
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model folder {folder} does not exist; give a folder in diffusers format or a hub id"
        )
    if not file.is_file():
        raise FileNotFoundError(
            f"model folder {folder} has no model_index.json; give a folder in diffusers format"
        )
    return read_object(file)


def _fetch_index(path: str) -> dict:
    from diffusers import DiffusionPipeline, ModularPipeline

    kind = ModularPipeline if path in MODULAR else DiffusionPipeline
    try:
        return kind.load_config(path, revision=REVISIONS.get(path))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"model {path} is no local folder and cannot be read from the hub ({reason}); check the name"
        ) from error


def parts_named(index: Mapping[str, Any]) -> set[str]:
    """Returns the parts that a model_index.json names."""
    return {name for name, kind in index.items() if isinstance(kind, list) and kind and kind[0] is not None}


def has_experts(index: Mapping[str, Any]) -> bool:
    """Returns whether a model_index.json is of a model of two experts (Wan2.2 A14B)."""
    return index.get("boundary_ratio") is not None or NAMES[1] in parts_named(index)


def absent_expert(path: str, index: Mapping[str, Any], files: Collection[str] = ()) -> str:
    """Returns the transformer that a model of two experts lacks; "" if it has both, or one.

    `index`: its model_index.json. A local folder lacks a transformer without a folder of its own, unless it
    is among `files`.
    """
    named, local = parts_named(index), is_local(path)
    there = [
        name
        for name in NAMES
        if name in files or (name in named and (not local or (Path(path) / name).is_dir()))
    ]
    return next(name for name in NAMES if name not in there) if has_experts(index) and len(there) == 1 else ""


def _check_components(folder: Path, index: dict, files: Collection[str]) -> None:
    """Raises an error for a component without a folder, or a safetensors file whose header does not fit."""
    parts = sorted(parts_named(index) - {absent_expert(str(folder), index, files), *files})
    for part in parts:
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"model folder {folder} lacks {part}/, which its model_index.json names; download it again"
            )
    for file in sorted(file for part in parts for file in (folder / part).rglob("*.safetensors")):
        read_tensors(file)
