"""Parses the command line of LoRA training, and writes the text of `--help` and `--dry-run`."""

from dataclasses import dataclass
from pathlib import Path

from scripts.lora.config import SCHEMA, LoraTrainConfig
from scripts.run import command_line as command
from scripts.run.errors import UsageError

CALL = "bash scripts/wan_lora_train.sh CONFIG.yaml [key=value ...] [--dry-run] [--help]"


@dataclass
class Command:
    """Holds the configuration to train with, or the `text` to print instead."""

    config: LoraTrainConfig | None = None
    text: str | None = None


def parse(argv: list[str]) -> Command:
    """Parses arguments; UsageError for others than one configuration, `key=value`, --dry-run and --help."""
    parsed = command.parse(argv, CALL, stands_in=False)
    if parsed.help:
        lines = [f"usage: {CALL}", "", "presets:", *SCHEMA.preset_lines(), "", *SCHEMA.help_lines()]
        return Command(text="\n".join(lines))
    if parsed.config_file is None:
        raise UsageError(f"a configuration is missing; usage: {CALL}")
    config = SCHEMA.read(parsed.config_file, parsed.overrides)
    SCHEMA.check(config)
    return Command(config, text=dry_run(config) if parsed.dry_run else None)


def dry_run(config: LoraTrainConfig) -> str:
    """Describes what the run would take; reads no weights, and the latents need not be there yet."""
    from scripts.lora.plan import describe_training, plan_training

    lines = describe_training(plan_training(config))
    data = Path(config.data.latents).expanduser()
    if not data.is_dir():
        lines += f"\n{'note':<10} {data} is not there yet; run prepare_latents.sh"
    return lines
