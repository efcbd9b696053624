"""The command line of LoRA training: what the words mean, and what `--dry-run` prints."""

from dataclasses import dataclass
from pathlib import Path

from scripts.lora.config import SCHEMA, LoraTrainConfig
from scripts.run import command_line as command
from scripts.run.errors import UsageError

CALL = "bash scripts/wan_lora_train.sh CONFIG.yaml [key=value ...] [--dry-run] [--help]"


@dataclass
class Command:
    """What was asked for; `text` where it is only to be printed."""

    config: LoraTrainConfig | None = None
    text: str | None = None


def parse(argv: list[str]) -> Command:
    """Raises UsageError for anything that is no configuration, `key=value`, --dry-run or --help."""
    words = command.parse(argv, CALL, stands_in=False)
    if words.help:
        lines = [f"usage: {CALL}", "", "presets:", *SCHEMA.preset_lines(), "", *SCHEMA.help_lines()]
        return Command(text="\n".join(lines))
    if words.config_file is None:
        raise UsageError(f"one configuration, got none; usage: {CALL}")
    config = SCHEMA.read(words.config_file, words.overrides)
    SCHEMA.check(config)
    return Command(config, text=dry_run(config) if words.dry_run else None)


def dry_run(config: LoraTrainConfig) -> str:
    """What the run would take; no weights are read, and the latents need not be there yet."""
    from scripts.lora.plan import describe_training, plan_training

    lines = describe_training(plan_training(config))
    data = Path(config.data.latents).expanduser()
    return lines if data.is_dir() else f"{lines}\n{'note':<10} {data} is not there yet: prepare_latents.sh"
