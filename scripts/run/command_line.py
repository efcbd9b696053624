"""Parses the command line of generation, and chooses a preset if it names none."""

from dataclasses import dataclass, field
from operator import attrgetter
from os.path import isfile
from pathlib import Path

from scripts.run.config import CALL, read_config
from scripts.run.errors import UsageError
from scripts.run.schema import shown

FULL_PRESET, SMALL_PRESET = "configs/wan2.1_t2v_14b.yaml", "configs/wan2.1_t2v_1.3b.yaml"
TINY_PRESET = "configs/wan_tiny.yaml"
FIRST_PRESET = "configs/wan_tiny_4x.yaml"  # without a GPU, if no preset is named: its length shows a gain
SAVING = ("model.offload=group", "model.quantization=fp8", "model.vae_tiling=always")
CHOICE = ("--preset=", "--bundled=", "--reason=")  # of scripts, not for users
OF_A_MODEL = ("model.path=", "model.family=", "model.loras=")
MARGIN = 1.05  # times the predicted peak must be free
# The bundled model takes over these keys of the preset that it replaces. The preset's LoRA would not fit it.
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
    """Holds a parsed command line.

    `config_file` is None if none is named. Then `preset` is used if a GPU has room for it, else `bundled`.
    `reason`: why `config_file` was chosen; the launcher of several processes chooses for them, and says why.
    """

    config_file: str | None = None
    overrides: list[str] = field(default_factory=list)
    help: bool = False
    dry_run: bool = False
    preset: str | None = None
    bundled: str | None = None
    reason: str = "named on the command line"


def parse(argv: list[str], call: str = CALL, *, stands_in: bool = True) -> Command:
    """Parses arguments; UsageError for an unknown option, a second config file, a key without a value.

    `call`: the call form of the program; `stands_in`: whether it takes the options of `CHOICE`.
    """
    command = Command()
    for word in argv:
        if word in ("--help", "-h"):
            command.help = True
        elif word == "--dry-run":
            command.dry_run = True
        elif stands_in and word.startswith(CHOICE):
            name, _, value = word.removeprefix("--").partition("=")
            setattr(command, name, value)
        elif word.startswith("-"):
            hint = "write keys without dashes, as in generation.seed=1; options: --dry-run, --help"
            raise UsageError(f"unknown option {word!r}; {hint}")
        elif "=" in word and not isfile(word):  # isfile takes a prompt of any length
            command.overrides.append(word)
        elif command.config_file is None:
            command.config_file = word
        else:
            both = f"{command.config_file!r} and {word!r}"
            raise UsageError(f"got {both}; name one config file at most, usage: {call}")
    return command


def choose_config(command: Command) -> tuple[str, list[str], str]:
    """Returns (config file, overrides, reason): the file that is named, else the choice of `choose_preset`.

    If `--preset=` comes without a `--bundled=`, the bundled Wan takes over its schedule.

    Raises:
        UsageError: an override names a model, which a bundled model's sizes would not suit.
    """
    if command.config_file is not None:
        return command.config_file, command.overrides, command.reason
    full = command.preset or FULL_PRESET
    bundled = command.bundled or (TINY_PRESET if command.preset else FIRST_PRESET)
    for preset in (full, bundled):
        read_config(preset, [])
    config_file, overrides, reason = choose_preset(command.overrides, full, bundled)
    if config_file != bundled or command.preset is None:
        return config_file, overrides, reason
    model_keys = [word.partition("=")[0] for word in command.overrides if word.startswith(OF_A_MODEL)]
    if model_keys:
        raise UsageError(
            f"{model_keys[0]}: a bundled model would replace {command.preset} here; name a configuration "
            f"for your model, such as {command.preset}"
        )
    if command.bundled is not None:
        return config_file, command.overrides, f"{reason}; stands in for {command.preset}"
    without = " and without its LoRA" if read_config(command.preset, []).model.loras else ""
    stands_in = f"stands in for {command.preset}, with its schedule{without}"
    return config_file, [*schedule_of(command.preset), *command.overrides], f"{reason}; {stands_in}"


def schedule_of(preset: str) -> list[str]:
    """Returns the schedule of a preset as overrides for the bundled model, with a separate video folder."""
    config = read_config(preset, [])
    schedule = [f"{key}={shown(attrgetter(key)(config))}" for key in SCHEDULE]
    return [*schedule, f"output.path={config.output.path}_tiny"]


def choose_preset(
    overrides: list[str], full: str = FULL_PRESET, bundled: str = TINY_PRESET
) -> tuple[str, list[str], str]:
    """Returns (preset, overrides, reason) of the first step of a ladder that GPU and host have room for.

    The steps are `full` as it is; `full` with group offload, fp8 weights and a tiled VAE; for Wan 14B, the
    1.3B model in the same two ways; the bundled model.

    Raises:
        UsageError: there is a GPU, and no preset takes an override.
    """
    import torch

    if [word for word in overrides if word.startswith("model.device=")][-1:] == ["model.device=cpu"]:
        return bundled, overrides, "model.device=cpu"
    if not torch.cuda.is_available():
        return bundled, overrides, "no CUDA device here"
    from scripts.run.memory import gib
    from scripts.run.preset_needs import memory_needs
    from scripts.run.system import room

    gpu, free, host = torch.cuda.get_device_name(), room("cuda"), room("cpu")
    needs = []
    for preset, more, title in ladder(full, overrides):
        need, host_need = (MARGIN * need for need in memory_needs(read_config(preset, [*more, *overrides])))
        if need <= free and host_need <= host:
            why = f"; {'; '.join(needs)}" if needs else ""
            return preset, [*more, *overrides], f"{title} needs {gib(need)} of {gib(free)} on {gpu}{why}"
        short = (
            f"{gib(need)} of {gib(free)} on the GPU" if need > free else f"{gib(host_need)} of host memory"
        )
        needs.append(f"{title} would need {short}")
    return bundled, overrides, f"{gpu} has {gib(free)} free; {'; '.join(needs)}"


def ladder(full: str, overrides: list[str]) -> list[tuple[str, list[str], str]]:
    """Returns (preset, further overrides, title) of each step.

    Keys that the user gives are left alone, saving keys that do not go together with them are left out, and
    a model that the user names has no smaller one.
    """
    from scripts.run.option_checks import refusals

    given, saving = {word.partition("=")[0] for word in overrides}, []
    for word in SAVING:
        together = read_config(full, [*overrides, *saving, word])
        if word.partition("=")[0] not in given and not any(refusals(together)):
            saving.append(word)
    presets = {full: "Wan 14B" if full == FULL_PRESET else Path(full).stem}
    if full == FULL_PRESET and not any(word.startswith(OF_A_MODEL) for word in overrides):
        presets[SMALL_PRESET] = "Wan 1.3B"
    steps = []
    for preset, title in presets.items():
        steps.append((preset, [], title))
        if saving and read_config(preset, []).model.quantization == "none":
            steps.append((preset, saving, f"{title} with {' '.join(saving)}"))
    return steps
