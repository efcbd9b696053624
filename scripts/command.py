"""The command line of generation: what the words mean, and which preset stands in where none is named."""

from dataclasses import dataclass, field
from os.path import isfile

from scripts.config import CALL, read_config
from scripts.errors import UsageError

FULL_PRESET, TINY_PRESET = "configs/wan2.1_t2v_14b.yaml", "configs/wan_tiny.yaml"
MARGIN = 1.05  # of free memory over the predicted peak
NO_DENSE = ("attention.dense_steps=0", "attention.dense_layers=0", "attention.dense_last_steps=0")
# What the bundled model takes over from a preset of few steps; its LoRA would not fit.
SCHEDULE = (
    "generation.steps",
    "generation.guidance_scale",
    "generation.flow_shift",
    "attention.dense_steps",
    "attention.dense_layers",
    "attention.dense_last_steps",
)


@dataclass
class Command:
    """`config_file` is None where the command line names none; `preset` then stands in on a GPU with room."""

    config_file: str | None = None
    overrides: list[str] = field(default_factory=list)
    help: bool = False
    dry_run: bool = False
    preset: str | None = None


def parse(argv: list[str]) -> Command:
    """Raises UsageError for an unknown option, a second config file, a key without a value."""
    command = Command()
    for word in argv:
        if word in ("--help", "-h"):
            command.help = True
        elif word == "--dry-run":
            command.dry_run = True
        elif word.startswith("--preset="):
            command.preset = word.partition("=")[2]
        elif word.startswith("-"):
            hint = "write keys without dashes, as in generation.seed=1; options: --dry-run, --help"
            raise UsageError(f"unknown option {word!r}; {hint}")
        elif "=" in word and not isfile(word):  # which takes a prompt of any length
            command.overrides.append(word)
        elif command.config_file is None:
            command.config_file = word
        else:
            both = f"{command.config_file!r} and {word!r}"
            raise UsageError(f"one config file at most, got {both}; usage: {CALL}")
    return command


def choose_config(command: Command) -> tuple[str, list[str], str]:
    """(config file, overrides, why): the one that is named, else `choose_preset`'s.

    Where the bundled model stands in for a preset of its own schedule (`--preset=`), it takes that over.
    """
    if command.config_file is not None:
        return command.config_file, command.overrides, "named on the command line"
    full = command.preset or FULL_PRESET
    config_file, reason = choose_preset(command.overrides, full)
    if config_file == full or command.preset is None:
        return config_file, command.overrides, reason
    without = " and without its LoRA" if read_config(command.preset, []).model.loras else ""
    stands_in = f"stands in for {command.preset}, with its schedule{without}"
    return config_file, [*schedule_of(command.preset), *command.overrides], f"{reason}; {stands_in}"


def schedule_of(preset: str) -> list[str]:
    """The schedule of a preset as overrides for the bundled model, and a folder of its own for the videos."""
    config = read_config(preset, [])
    schedule = []
    for key in SCHEDULE:
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        schedule.append(f"{key}={'null' if value is None else value}")
    return [*schedule, f"output.path={config.output.path}_tiny"]


def choose_preset(overrides: list[str], full: str = FULL_PRESET) -> tuple[str, str]:
    """(preset, why): the 14B preset `full` where GPU and host have room for it, else the bundled model.

    Raises:
        UsageError: where there is a GPU, an override that no preset takes.
    """
    import torch

    if [word for word in overrides if word.startswith("model.device=")][-1:] == ["model.device=cpu"]:
        return TINY_PRESET, "model.device=cpu"
    if not torch.cuda.is_available():
        return TINY_PRESET, "no CUDA device here"
    from scripts.record import room

    gpu, host = needed(overrides, full)
    name = torch.cuda.get_device_name()
    return pick({name: (room("cuda"), gpu), "the host": (room("cpu"), host)}, full)


def needed(overrides: list[str], full: str = FULL_PRESET) -> tuple[float, float]:
    """Bytes of GPU and host that the 14B preset with these overrides needs, with a margin.

    Dense steps and layers take no memory; whether they suit the preset is known when it is chosen.
    """
    from scripts.architecture import read_architecture
    from scripts.plan import host_bytes, memory
    from scripts.validate import check_sizes, check_values, resolve_model

    config = read_config(full, [*overrides, *NO_DENSE])
    check_values(config)
    model = read_architecture(resolve_model(config))
    check_sizes(config, model)
    return MARGIN * memory(config, model, "cuda").total, MARGIN * host_bytes(config, model)


def pick(memories: dict[str, tuple[float, float]], full: str = FULL_PRESET) -> tuple[str, str]:
    """(preset, why) from the bytes that are free and those that the 14B preset needs, of each memory."""
    from scripts.plan import gib

    enough = all(free >= need for free, need in memories.values())
    texts = [f"{name} has {gib(free)} free of {gib(need)}" for name, (free, need) in memories.items()]
    return (full if enough else TINY_PRESET), f"{', '.join(texts)} that the 14B preset needs"
