"""The command line of generation: what the words mean, and which preset stands in where none is named."""

from dataclasses import dataclass, field
from pathlib import Path

from scripts.config import CALL, read_config
from scripts.errors import UsageError

FULL_PRESET, TINY_PRESET = "configs/wan2.1_t2v_14b.yaml", "configs/wan_tiny.yaml"
MARGIN = 1.05  # of free GPU memory over the predicted peak


@dataclass
class Command:
    """`config_file` is None where the command line names none."""

    config_file: str | None = None
    overrides: list[str] = field(default_factory=list)
    help: bool = False
    dry_run: bool = False


def parse(argv: list[str]) -> Command:
    """Raises UsageError for an unknown option, a second config file, a key without a value."""
    command = Command()
    for word in argv:
        if word in ("--help", "-h"):
            command.help = True
        elif word == "--dry-run":
            command.dry_run = True
        elif word.startswith("-"):
            hint = "write keys without dashes, as in generation.seed=1; options: --dry-run, --help"
            raise UsageError(f"unknown option {word!r}; {hint}")
        elif "=" in word and not Path(word).is_file():
            command.overrides.append(word)
        elif command.config_file is None:
            command.config_file = word
        else:
            both = f"{command.config_file!r} and {word!r}"
            raise UsageError(f"one config file at most, got {both}; usage: {CALL}")
    return command


def choose_preset(overrides: list[str]) -> tuple[str, str]:
    """(preset, why): the 14B preset where a CUDA device has room for it, else the bundled model."""
    import torch

    from scripts.architecture import HUB_MODELS
    from scripts.plan import gib, memory

    if "model.device=cpu" in overrides:
        return TINY_PRESET, "model.device=cpu"
    if not torch.cuda.is_available():
        return TINY_PRESET, "no CUDA device here"
    config = read_config(FULL_PRESET, [])
    need = memory(config, HUB_MODELS[config.model.path], "cuda").total * MARGIN
    gpu = torch.cuda.get_device_properties(0)
    has = f"{gpu.name} has {gib(gpu.total_memory)}, the 14B model needs {gib(need)}"
    return (FULL_PRESET if gpu.total_memory >= need else TINY_PRESET), has
