"""The command line of generation: what the words mean, and which preset stands in where none is named."""

from dataclasses import dataclass, field
from pathlib import Path

from scripts.config import CALL, read_config
from scripts.errors import UsageError

FULL_PRESET, TINY_PRESET = "configs/wan2.1_t2v_14b.yaml", "configs/wan_tiny.yaml"
MARGIN = 1.05  # of free memory over the predicted peak
NO_DENSE = ("attention.dense_steps=0", "attention.dense_layers=0", "attention.dense_last_steps=0")


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
    """(preset, why): the 14B preset where GPU and host have room for it, else the bundled model.

    Raises:
        UsageError: where there is a GPU, an override that no preset takes.
    """
    import torch

    if [word for word in overrides if word.startswith("model.device=")][-1:] == ["model.device=cpu"]:
        return TINY_PRESET, "model.device=cpu"
    if not torch.cuda.is_available():
        return TINY_PRESET, "no CUDA device here"
    from scripts.record import room

    gpu, host = needed(overrides)
    name = torch.cuda.get_device_name()
    return pick({name: (room("cuda"), gpu), "the host": (room("cpu"), host)})


def needed(overrides: list[str]) -> tuple[float, float]:
    """Bytes of GPU and host that the 14B preset with these overrides needs, with a margin.

    Dense steps and layers take no memory; whether they suit the preset is known when it is chosen.
    """
    from scripts.architecture import read_architecture
    from scripts.plan import host_bytes, memory
    from scripts.validate import check_sizes, check_values, resolve_model

    config = read_config(FULL_PRESET, [*overrides, *NO_DENSE])
    check_values(config)
    model = read_architecture(resolve_model(config))
    check_sizes(config, model)
    return MARGIN * memory(config, model, "cuda").total, MARGIN * host_bytes(config, model)


def pick(memories: dict[str, tuple[float, float]]) -> tuple[str, str]:
    """(preset, why) from the bytes that are free and those that the 14B preset needs, of each memory."""
    from scripts.plan import gib

    enough = all(free >= need for free, need in memories.values())
    texts = [f"{name} has {gib(free)} free of {gib(need)}" for name, (free, need) in memories.items()]
    return (FULL_PRESET if enough else TINY_PRESET), f"{', '.join(texts)} that the 14B preset needs"
