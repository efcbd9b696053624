"""The command line of generation: what the words mean, and which preset stands in where none is named."""

from dataclasses import dataclass, field
from os.path import isfile

from scripts.run.config import CALL, read_config
from scripts.run.errors import UsageError

FULL_PRESET, TINY_PRESET = "configs/wan2.1_t2v_14b.yaml", "configs/wan_tiny.yaml"
OF_A_MODEL = ("model.path=", "model.family=", "model.loras=")
MARGIN = 1.05  # of free memory over the predicted peak
NO_DENSE = ("attention.dense_steps=0", "attention.dense_layers=0", "attention.dense_last_steps=0")
# What the bundled model takes over from a preset that has none of its own; its LoRA would not fit.
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
    """`config_file` is None where the command line names none.

    Then `preset` is taken where a GPU has room for it, else `bundled`.
    """

    config_file: str | None = None
    overrides: list[str] = field(default_factory=list)
    help: bool = False
    dry_run: bool = False
    preset: str | None = None
    bundled: str | None = None


def parse(argv: list[str], call: str = CALL, *, stands_in: bool = True) -> Command:
    """Raises UsageError for an unknown option, a second config file, a key without a value.

    `call`: how the program is called; `stands_in`: whether it takes --preset= and --bundled=.
    """
    command = Command()
    for word in argv:
        if word in ("--help", "-h"):
            command.help = True
        elif word == "--dry-run":
            command.dry_run = True
        elif stands_in and word.startswith("--preset="):
            command.preset = word.partition("=")[2]
        elif stands_in and word.startswith("--bundled="):
            command.bundled = word.partition("=")[2]
        elif word.startswith("-"):
            hint = "write keys without dashes, as in generation.seed=1; options: --dry-run, --help"
            raise UsageError(f"unknown option {word!r}; {hint}")
        elif "=" in word and not isfile(word):  # which takes a prompt of any length
            command.overrides.append(word)
        elif command.config_file is None:
            command.config_file = word
        else:
            both = f"{command.config_file!r} and {word!r}"
            raise UsageError(f"one config file at most, got {both}; usage: {call}")
    return command


def choose_config(command: Command) -> tuple[str, list[str], str]:
    """(config file, overrides, why): the one that is named, else `choose_preset`'s.

    Where no preset of its own stands in for `--preset=`, the bundled Wan takes over its schedule.
    """
    if command.config_file is not None:
        return command.config_file, command.overrides, "named on the command line"
    full, bundled = command.preset or FULL_PRESET, command.bundled or TINY_PRESET
    for preset in (full, bundled):
        read_config(preset, [])
    config_file, reason = choose_preset(command.overrides, full, bundled)
    if config_file == full or command.preset is None:
        return config_file, command.overrides, reason
    _check_stand_in(command)
    if command.bundled is not None:
        return config_file, command.overrides, f"{reason}; stands in for {command.preset}"
    without = " and without its LoRA" if read_config(command.preset, []).model.loras else ""
    stands_in = f"stands in for {command.preset}, with its schedule{without}"
    return config_file, [*schedule_of(command.preset), *command.overrides], f"{reason}; {stands_in}"


def _check_stand_in(command: Command) -> None:
    """Raises UsageError where a model of the user's meets the sizes of the bundled one."""
    own = [word.partition("=")[0] for word in command.overrides if word.startswith(OF_A_MODEL)]
    if own:
        raise UsageError(
            f"{own[0]}: a bundled model would stand in for {command.preset} here; name a configuration that "
            f"suits yours, as {command.preset}"
        )


def schedule_of(preset: str) -> list[str]:
    """The schedule of a preset as overrides for the bundled model, and a folder of its own for the videos."""
    config = read_config(preset, [])
    schedule = []
    for key in SCHEDULE:
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        schedule.append(f"{key}={'null' if value is None else value}")
    return [*schedule, f"output.path={config.output.path}_tiny"]


def choose_preset(
    overrides: list[str], full: str = FULL_PRESET, bundled: str = TINY_PRESET
) -> tuple[str, str]:
    """(preset, why): `full` where GPU and host have room for it, else `bundled`.

    Raises:
        UsageError: where there is a GPU, an override that no preset takes.
    """
    import torch

    if [word for word in overrides if word.startswith("model.device=")][-1:] == ["model.device=cpu"]:
        return bundled, "model.device=cpu"
    if not torch.cuda.is_available():
        return bundled, "no CUDA device here"
    from scripts.run.system import room

    gpu, host = needed(overrides, full)
    name = torch.cuda.get_device_name()
    return pick({name: (room("cuda"), gpu), "the host": (room("cpu"), host)}, full, bundled)


def needed(overrides: list[str], full: str = FULL_PRESET) -> tuple[float, float]:
    """Bytes of GPU and host that `full` with these overrides needs, with a margin.

    Dense steps and layers take no memory; whether they suit the preset is known when it is chosen.
    """
    from scripts.run.hub_models import read_model_info
    from scripts.run.plan import host_bytes, memory
    from scripts.run.validate import check_sizes, check_values, resolve_model

    config = read_config(full, [*overrides, *NO_DENSE])
    check_values(config)
    model = read_model_info(resolve_model(config))
    check_sizes(config, model)
    return MARGIN * memory(config, model, "cuda").total, MARGIN * host_bytes(config, model)


def pick(
    memories: dict[str, tuple[float, float]], full: str = FULL_PRESET, bundled: str = TINY_PRESET
) -> tuple[str, str]:
    """(preset, why) from the bytes that are free and those that `full` needs, of each memory."""
    from scripts.run.plan import gib

    enough = all(free >= need for free, need in memories.values())
    texts = [f"{name} has {gib(free)} free of {gib(need)}" for name, (free, need) in memories.items()]
    size = "the 14B preset" if full == FULL_PRESET else full
    return (full if enough else bundled), f"{', '.join(texts)} that {size} needs"
