"""Defines the keys of the evaluation, group `evaluate`, and reads the settings to compare with dense."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import yaml

from scripts.run.config import Config
from scripts.run.errors import UsageError
from scripts.run.schema import Schema, TextLoader, key, listing
from scripts.run.values import NUMBERS_FORM, numbers

DENSE = "dense"
GROUPS = ("attention.", "model.")  # a setting may change keys of these groups
COMPARE, SCORES, SEEDS, STEPS = (f"evaluate.{name}" for name in ("compare", "scores", "seeds", "steps"))
SETTINGS_FORM = "settings separated by ; or a list: NAME, or NAME: attention.key=value ..."
SCORES_FORM = "score files separated by ; or a list: NAME: FILE ..."


@dataclass
class NamedWords:
    """Holds a setting and its overrides, or a name and its files."""

    name: str
    words: list[str] = field(default_factory=list)


def named(key_name: str, form: str) -> Callable[[Any], list[dict[str, Any]]]:
    """Makes a parser of entries `name: words`: text, a list of such texts and mappings, or one mapping.

    The parser raises UsageError for another form, a name with other characters, and a repeated name.
    """

    def parse(value: Any) -> list[dict[str, Any]]:
        entries = [_entry(key_name, form, name, words) for name, words in _pairs(key_name, form, value)]
        for name, count in Counter(entry["name"] for entry in entries).items():
            if count > 1:
                raise UsageError(f"{key_name}: got {name!r} twice; give each a name of its own")
        return entries

    return parse


def _pairs(key_name: str, form: str, value: Any) -> list[tuple[Any, Any]]:
    """Reads text as YAML if it begins with a bracket, else splits it at semicolons."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = yaml.load(value, TextLoader)
        except yaml.YAMLError as error:
            raise UsageError(f"{key_name}: got {value!r}, must be {form}") from error
    elif isinstance(value, str):
        value = [part for part in value.split(";") if part.strip() not in ("", "null")]
    pairs: list[tuple[Any, Any]] = []
    for entry in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(entry, Mapping):
            pairs += entry.items()
        elif isinstance(entry, str):
            name, _, words = entry.partition(":")
            pairs.append((name.strip(), words))
        else:
            raise UsageError(f"{key_name}: got {entry!r}, must be {form}")
    return pairs


def _entry(key_name: str, form: str, name: Any, text: Any) -> dict[str, Any]:
    try:
        parts = shlex.split(text or "") if isinstance(text, str | None) else [str(part) for part in text]
    except (ValueError, TypeError) as error:
        raise UsageError(f"{key_name}: got {name}: {text!r}, must be {form}") from error
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise UsageError(f"{key_name}: got the name {name!r}; use letters, digits and _ . + - in names")
    return {"name": name, "words": [part.replace("${", "\\${") for part in parts]}


@dataclass
class EvaluateConfig:
    prompts: str | None = key(
        None, "text file with one prompt per line, or VBench's JSON; null: the prompts of generation"
    )
    dimensions: str | None = key(
        None, "take only prompts of these dimensions of VBench's JSON, separated by commas; null: all"
    )
    seeds: list[int] = field(
        default_factory=list,
        metadata=listing("seeds of each prompt; none: those of generation", NUMBERS_FORM, numbers(SEEDS)),
    )
    compare: list[NamedWords] = field(
        default_factory=list,
        metadata=listing(
            "settings to compare with dense; none: the configuration itself",
            SETTINGS_FORM,
            named(COMPARE, SETTINGS_FORM),
        ),
    )
    rows: int = key(64, "query tokens whose attention is observed in the dense run; 0: none", low=0)
    steps: list[int] = field(
        default_factory=list,
        metadata=listing(
            "denoising steps to observe, from 1; none: five from first to last", NUMBERS_FORM, numbers(STEPS)
        ),
    )
    vbench: str = key("off", "names: also save videos under the names that VBench expects", ("off", "names"))
    scores: list[NamedWords] = field(
        default_factory=list,
        metadata=listing(
            "score files of VBench (eval_results.json) and VisionReward (JSON or CSV) of each setting",
            SCORES_FORM,
            named(SCORES, SCORES_FORM),
        ),
    )


@dataclass
class EvaluationConfig(Config):
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


SCHEMA = Schema(EvaluationConfig)


def plain(config: EvaluationConfig) -> Config:
    """Returns the configuration of generation in it."""
    return Config(**{group.name: getattr(config, group.name) for group in fields(Config)})


def settings_of(file: str, words: list[str]) -> tuple[EvaluationConfig, dict[str, tuple[list[str], Config]]]:
    """Returns the whole configuration, and each setting's words and configuration by name, dense first.

    Raises UsageError for a value that the schema does not take, for a setting that is called dense or equals
    it in everything, and for keys of other groups than model and attention.
    """
    config = SCHEMA.read(file, words)
    SCHEMA.check(config)
    compared = config.evaluate.compare or [NamedWords(config.attention.pattern)]
    dense = plain(config)
    dense.attention = replace(dense.attention, pattern=DENSE)
    settings = {DENSE: ([f"attention.pattern={DENSE}"], dense)}
    for setting in compared:
        if setting.name == DENSE:
            raise UsageError(f"{COMPARE}: got {DENSE!r}, which is always there; remove it or rename it")
        for word in setting.words:
            if "=" not in word or not word.startswith(GROUPS):
                keys = "attention.key=value or model.key=value"
                raise UsageError(f"{COMPARE}: got {word!r} in {setting.name}, must be {keys}")
        changed = SCHEMA.read(file, [*words, *setting.words])
        SCHEMA.check(changed)
        if plain(changed) == dense:
            raise UsageError(
                f"{COMPARE}: {setting.name} equals dense in everything; change a key of attention or model"
            )
        settings[setting.name] = (setting.words, plain(changed))
    return config, settings


def observed_steps(config: EvaluationConfig) -> list[int]:
    """Returns the denoising steps to observe, from 1; UsageError for steps that do not exist."""
    last = config.generation.steps
    wanted = sorted(config.evaluate.steps) or sorted({1 + round(i * (last - 1) / 4) for i in range(5)})
    if wanted[0] < 1 or wanted[-1] > last:
        raise UsageError(f"{STEPS}: got {config.evaluate.steps}, must be 1 to {last} (generation.steps)")
    return wanted
