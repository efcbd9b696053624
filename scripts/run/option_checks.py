"""Which keys for small GPUs and for speed go together; what does not is refused before weights load."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from scripts.run.config import Config
from scripts.run.errors import UsageError

LIBRARIES = {  # value of a key -> module, and what installs it
    "int8": ("torchao", "pip install --no-deps 'torchao>=0.15'"),
    "nf4": ("bitsandbytes", "pip install --no-deps 'bitsandbytes>=0.46'"),
    "model": ("accelerate", "pip install 'accelerate>=1.10,<2'"),
    "sequential": ("accelerate", "pip install 'accelerate>=1.10,<2'"),
}
ONE_CALL = ("hunyuan_video", "hunyuan_video_i2v", "mochi")  # a step calls the transformer once
LOADED = ("int8", "nf4")  # weights that are never whole once they are loaded


def check_combinations(config: Config, device: str, experts: int = 1, dry_run: bool = False) -> list[str]:
    """Raises UsageError for keys that do not go together, or that this machine cannot serve.

    A dry run without a GPU, where none was asked for, may plan for another machine: it gets notes instead of
    what only this machine is in the way of.
    """
    for line in refusals(config, experts):
        raise UsageError(line)
    found = list(missing_here(config, device))
    elsewhere = dry_run and device == "cpu" and config.model.device == "auto"
    if found and not elsewhere:
        raise UsageError(found[0])
    return [f"not on this machine: {line}" for line in found]


def economy_options(config: Config) -> dict[str, Any]:
    """The keys as the keyword arguments of `radial_attn.models.pipeline.efficiency.economize`."""
    model = config.model
    names = ("offload", "quantization", "compile", "vae_tiling")
    return {name: getattr(model, name) for name in names} | {"stream": model.cache == "none"}


def cache_options(config: Config) -> dict[str, Any]:
    """The keys as the keyword arguments of `radial_attn.models.pipeline.caches.cached`."""
    model, attention = config.model, config.attention
    return {
        "kind": model.cache,
        "steps": config.generation.steps,
        "dense_steps": attention.dense_steps,
        "dense_last_steps": attention.dense_last_steps,
        "threshold": model.cache_threshold,
        "ratios": model.cache_ratios,
    }


def missing_here(config: Config, device: str) -> Iterator[str]:
    """What device and installed libraries do not serve."""
    model = config.model
    if model.offload != "none" and device == "cpu":
        yield f"model.offload: got {model.offload!r}, which needs a GPU; allowed on the CPU: none"
    if model.quantization == "nf4" and device == "cpu":
        yield "model.quantization: got 'nf4', which needs a GPU; allowed on the CPU: none, fp8, int8"
    for key in ("offload", "quantization"):
        value = getattr(model, key)
        module, remedy = LIBRARIES.get(value, ("", ""))
        if module and find_spec(module) is None:
            yield f"model.{key}: got {value!r}, which needs {module}; install it with: {remedy}"


def refusals(config: Config, experts: int = 1) -> Iterator[str]:
    """A line for each pair of keys that does not work together on any machine, with the reason."""
    yield from _cache_refusals(config, experts)
    yield from _storage_refusals(config)


def _cache_refusals(config: Config, experts: int) -> Iterator[str]:
    model, cache = config.model, config.model.cache
    got = f"model.cache: got {cache!r}"
    if cache == "pab" and model.compile == "blocks":
        yield (
            f"{got}, allowed with model.compile=blocks: none, first_block, taylorseer, mag; pab counts steps "
            "inside the blocks, which would be compiled anew for each"
        )
    if cache == "pab" and model.family not in ONE_CALL and config.generation.guidance_scale > 1:
        yield (
            f"{got}, allowed with family {model.family} and guidance: none, first_block, taylorseer, mag; "
            "pab keeps one output a layer and would mix the two calls of a step (or set "
            "generation.guidance_scale=1)"
        )
    if cache != "none" and model.family == "wan_vace":
        yield f"{got}, allowed with family wan_vace: none; its control is added between the blocks"
    if cache == "mag" and experts > 1:
        yield f"{got}, allowed with two experts: none, first_block, taylorseer; mag counts one's steps"
    if cache != "none" and config.attention.check == "reference":
        yield (
            f"attention.check: got 'reference', allowed with model.cache={cache}: auto, off, nan; "
            "a layer that is skipped has nothing to compare"
        )
    yield from _ratio_refusals(config)


def _ratio_refusals(config: Config) -> Iterator[str]:
    ratios, wanted = config.model.cache_ratios, config.model.cache == "mag"
    if not wanted and ratios is not None:
        yield f"model.cache_ratios: got {ratios!r}, allowed with model.cache={config.model.cache}: null"
    if wanted and not _are_ratios(ratios):
        yield (
            f"model.cache_ratios: got {ratios!r}, allowed with model.cache=mag: the model's own ratios with "
            "commas between them, or calibrate, which prints them after a run that skips nothing"
        )


def _are_ratios(text: str | None) -> bool:
    from radial_attn.models.pipeline.caches import read_ratios

    if text == "calibrate":
        return True
    try:
        return bool(read_ratios(text))
    except ValueError:
        return False


def _storage_refusals(config: Config) -> Iterator[str]:
    model = config.model
    got = f"model.quantization: got {model.quantization!r}"
    if model.quantization in LOADED and model.loras:
        yield f"{got}, allowed with LoRAs: none, fp8; they are checked against and added to whole weights"
    if model.quantization in LOADED and model.offload == "group":
        yield f"{got}, allowed with model.offload=group: none, fp8; such weights move as whole parts only"
    if model.quantization != "none" and model.offload == "sequential":
        yield f"{got}, allowed with model.offload=sequential: none; both replace a layer's weights as it runs"
    if model.quantization == "fp8" and model.compile == "blocks":
        yield f"{got}, allowed with model.compile=blocks: none, int8, nf4; each cast would break the graph"
    if model.offload == "sequential" and model.compile == "blocks":
        yield (
            "model.offload: got 'sequential', allowed with model.compile=blocks: none, model, group; "
            "each layer's move would break the graph"
        )
