"""The keys of the evaluation, group `evaluate`, and the settings that are compared with dense."""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import yaml

from scripts.run.config import Config
from scripts.run.errors import UsageError
from scripts.run.schema import Schema, key, listing

DENSE = "dense"
GROUPS = ("attention.", "model.")  # of the keys that a setting may change
COMPARE, SCORES, SEEDS, STEPS = (f"evaluate.{name}" for name in ("compare", "scores", "seeds", "steps"))
SETTINGS_FORM = "settings with ; between them, or a list: NAME, or NAME: attention.key=value ..."
SCORES_FORM = "score files with ; between them, or a list: NAME: FILE ..."
NUMBERS_FORM = "whole numbers with commas"


@dataclass
class NamedWords:
    """A setting and its words, or a name and its files."""

    name: str
    words: list[str] = field(default_factory=list)


def named(place: str, form: str) -> Callable[[Any], list[dict[str, Any]]]:
    """A parser of entries `name: words`: text, a list of such texts and mappings, or one mapping.

    It raises UsageError for another form, a name with other signs, and a name that comes twice.
    """

    def parse(value: Any) -> list[dict[str, Any]]:
        found = [_entry(place, form, name, words) for name, words in _pairs(place, form, value)]
        names = [entry["name"] for entry in found]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"{place}: got {name!r} twice, allowed: names that differ")
        return found

    return parse


def _pairs(place: str, form: str, value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, str):
        value = _from_text(place, form, value)
    pairs: list[tuple[Any, Any]] = []
    for entry in value if isinstance(value, list) else [] if value is None else [value]:
        if isinstance(entry, Mapping):
            pairs += entry.items()
        elif isinstance(entry, str):
            name, _, words = entry.partition(":")
            pairs.append((name.strip(), words))
        else:
            raise UsageError(f"{place}: got {entry!r}, allowed: {form}")
    return pairs


def _from_text(place: str, form: str, text: str) -> Any:
    """YAML where it begins with a bracket, else its parts between semicolons."""
    if text.lstrip()[:1] not in ("[", "{"):
        return [part for part in text.split(";") if part.strip() not in ("", "null")]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{place}: got {text!r}, allowed: {form}") from error


def _entry(place: str, form: str, name: Any, words: Any) -> dict[str, Any]:
    try:
        words = shlex.split(words or "") if isinstance(words, str | None) else [str(word) for word in words]
    except (ValueError, TypeError) as error:
        raise UsageError(f"{place}: got {name}: {words!r}, allowed: {form}") from error
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise UsageError(f"{place}: got the name {name!r}, allowed: letters, digits and _ . + -; {form}")
    return {"name": name, "words": [word.replace("${", "\\${") for word in words]}


def numbers(place: str) -> Callable[[Any], list[int]]:
    """A parser of whole numbers from 0 on, each once; UsageError for others."""

    def parse(value: Any) -> list[int]:
        text = str(value).strip().strip("[]")
        found = [part.strip() for part in text.split(",")] if text not in ("", "null", "None") else []
        if not all(part.isdecimal() for part in found) or len(set(found)) < len(found):
            raise UsageError(f"{place}: got {value!r}, allowed: {NUMBERS_FORM}, each once")
        return [int(part) for part in found]

    return parse


@dataclass
class EvaluateConfig:
    prompts: str | None = key(
        None, "text file, one prompt a line, or VBench's JSON; null: the prompts of generation"
    )
    dimensions: str | None = key(None, "of VBench's JSON, with commas: prompts of these only; null: all")
    seeds: list[int] = field(
        default_factory=list,
        metadata=listing("of each prompt; none: generation.seed", NUMBERS_FORM, numbers(SEEDS)),
    )
    compare: list[NamedWords] = field(
        default_factory=list,
        metadata=listing(
            "settings to compare with dense; none: the configuration itself",
            SETTINGS_FORM,
            named(COMPARE, SETTINGS_FORM),
        ),
    )
    rows: int = key(64, "query tokens whose attention is looked at in the dense run; 0: none", low=0)
    steps: list[int] = field(
        default_factory=list,
        metadata=listing(
            "denoising steps, from 1, to look at; none: five from first to last", NUMBERS_FORM, numbers(STEPS)
        ),
    )
    vbench: str = key("off", "names: also under the names that VBench expects", ("off", "names"))
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
    """The configuration of generation in it."""
    return Config(**{group.name: getattr(config, group.name) for group in fields(Config)})


def settings_of(file: str, words: list[str]) -> tuple[EvaluationConfig, dict[str, tuple[list[str], Config]]]:
    """The whole configuration, and each setting's own words and configuration by name, dense first.

    Raises UsageError for what the schema does not take, a setting called dense or equal to dense in
    everything, and other keys than those of a model and of attention.
    """
    config = SCHEMA.read(file, words)
    SCHEMA.check(config)
    compared = config.evaluate.compare or [NamedWords(config.attention.pattern)]
    dense = plain(config)
    dense.attention = replace(dense.attention, pattern=DENSE)
    found = {DENSE: ([f"attention.pattern={DENSE}"], dense)}
    for setting in compared:
        if setting.name == DENSE:
            raise UsageError(f"{COMPARE}: got {DENSE!r}, which is there anyway; allowed: {SETTINGS_FORM}")
        for word in setting.words:
            if "=" not in word or not word.startswith(GROUPS):
                keys = "attention.key=value or model.key=value"
                raise UsageError(f"{COMPARE}: {setting.name} has {word!r}, allowed: {keys}")
        own = SCHEMA.read(file, [*words, *setting.words])
        SCHEMA.check(own)
        if plain(own) == dense:
            raise UsageError(
                f"{COMPARE}: {setting.name} is equal to dense in everything; allowed: {SETTINGS_FORM}"
            )
        found[setting.name] = (setting.words, plain(own))
    return config, found


def observed_steps(config: EvaluationConfig) -> list[int]:
    """Denoising steps, from 1, whose attention is looked at; UsageError for those that there are not."""
    last = config.generation.steps
    wanted = sorted(config.evaluate.steps) or sorted({1 + round(i * (last - 1) / 4) for i in range(5)})
    if wanted[0] < 1 or wanted[-1] > last:
        raise UsageError(f"{STEPS}: got {config.evaluate.steps}, allowed: 1 to {last} (generation.steps)")
    return wanted
