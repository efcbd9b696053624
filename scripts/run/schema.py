"""Reads, checks and documents a configuration whose schema is dataclasses.

Precedence, lowest first: the defaults of the dataclasses, the file (YAML or JSON), `key=value` arguments.
"""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from reprlib import Repr
from typing import Any, ClassVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scripts.run.errors import UsageError, nearest_key, one_line, reason_of
from scripts.run.files import read_text, user_path
from scripts.run.tables import parse_json

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    int: "a whole number",
    int | None: "a whole number",
    float: "a number",
    float | None: "a number",
    int | str: "a positive whole number or 'block'",
}
NULL_OR_MERGE = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
ZERO = "0"  # as `share`: the share may be 0
NUMBERS = (float, float | None, int | float | str)
PLAIN = {"choices": (), "low": None, "words": (), "share": None, "parse": None, "replaces": ()}  # of a key

SHORT = Repr()  # of a value in a message
SHORT.maxstring = SHORT.maxother = 300


def key(
    default: Any,
    help: str,
    choices: tuple = (),
    low: float | None = None,
    *,
    words: tuple[str, ...] = (),
    share: str | None = None,
    form: str = "",
    parse: Callable[[Any], Any] | None = None,
    replaces: tuple[str, ...] = (),
) -> Any:
    """Makes the field of a configuration key.

    Args:
        help: the meaning, in one line.
        choices: the allowed values; low: the smallest allowed number.
        words: texts that a key of numbers also takes.
        share: for a number above 0 up to 1, says which other values the key takes.
        parse: makes the value of a key of several forms, which `form` names.
        replaces: the keys that any value but the default replaces, so that they must be left out.
    """
    meta = {"help": help, "choices": choices, "low": low, "words": words, "share": share}
    meta |= {"form": form, "parse": parse, "replaces": replaces}
    return field(default=default, metadata=PLAIN | meta)


def listing(help: str, form: str, parse: Callable[[Any], list]) -> dict[str, Any]:
    """Makes the metadata of a key that holds a list; `form` says what it takes, `parse` makes the entries."""
    return PLAIN | {"help": help, "parse": parse, "form": form}


def literal(text: str) -> str:
    """Escapes text, so that OmegaConf interpolates nothing in it."""
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", text)


def find_path(name: str) -> Path:
    """Returns `name` from the current directory, or from the repository root if only that has it."""
    path = user_path(name)
    return ROOT / path if not os.path.exists(path) and os.path.exists(ROOT / path) else path


class TextLoader(yaml.SafeLoader):
    """Reads YAML with every value as text, which its key's type then parses; only null becomes None."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in NULL_OR_MERGE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Makes a mapping; ConstructorError for a key that is there twice."""
        seen = set()
        for name in (name for name, _ in node.value if isinstance(name, yaml.ScalarNode)):
            if name.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name.value!r} twice", name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> Any:
    """Reads a YAML file, or a JSON file such as the record beside a video, whose `config` it then returns.

    Numbers and true and false of YAML stay text.

    Raises:
        OSError, ValueError: the file cannot be read; the message has the line.
    """
    text = read_text(path)
    if path.suffix.lower() == ".json":
        content = parse_json(text)
        return content["config"] if isinstance(content, dict) and "config" in content else content
    try:
        return yaml.load(text, TextLoader)
    except yaml.MarkedYAMLError as error:
        mark, reason = error.problem_mark or error.context_mark, error.problem or error.context
        raise ValueError(f"line {mark.line + 1}: {reason}" if mark else str(reason)) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


@dataclass(frozen=True)
class Schema:
    """Reads and checks a dataclass of groups; each group is a dataclass of keys made by `key` or `listing`.

    Attributes:
        root: the dataclass of groups.
        presets: glob pattern of the bundled YAML files, from the repository root.
        absent: says of keys that another schema has why this one has none.
    """

    root: type
    presets: str = "configs/*.yaml"
    absent: dict[str, str] = field(default_factory=dict)

    def keys(self) -> dict[str, Any]:
        """Maps each dotted key to its dataclass field, in order."""
        groups = ((group.name, group.default_factory) for group in fields(self.root))
        return {f"{name}.{entry.name}": entry for name, group in groups for entry in fields(group)}

    def read(self, config_file: str, overrides: Sequence[str]) -> Any:
        """Returns the resolved configuration, an instance of `root`.

        Args:
            config_file: YAML file, relative to the current directory or the repository root.
            overrides: `group.key=value` strings. Text is taken literally, but `null` is None if the key may
                be None.

        Raises:
            UsageError: the file is missing or unreadable, a key is unknown, a value has the wrong type, or is
                given besides a key that replaces it.
        """
        config = OmegaConf.structured(self.root)
        content, given = self._read_file(config_file), self._read_overrides(overrides)
        self._drop_replaced(content, given)
        self._update(config, content, source=config_file)
        self._update(config, given, source="command line")
        try:
            return OmegaConf.to_object(config)
        except OmegaConfBaseException as error:
            raise UsageError(f"{config_file}: {one_line(error)}") from error

    def allowed(self, name: str) -> str:
        """Describes the values that a key takes."""
        entry = self.keys()[name]
        meta = entry.metadata
        if meta["choices"]:
            return ", ".join(shown(choice) for choice in meta["choices"])
        if meta["parse"]:
            return meta["form"]
        if meta["share"] == ZERO:
            return "a number from 0 to 1"
        if meta["share"]:
            return f"{meta['share']}, or a number above 0 up to 1"
        text, low = KINDS.get(entry.type, "text"), meta["low"]
        above = "above" if entry.type in (float, float | None) and low == 0 else "of at least"
        text = text if low is None else f"{text} {above} {low:g}"
        return f"{text}, or null" if entry.type in (float | None, int | None) else text

    def check(self, config: Any) -> None:
        """Raises UsageError for a value outside its choices or its share, or below its smallest number."""
        for name, entry in self.keys().items():
            value = attrgetter(name)(config)
            try:
                str(value).encode()
            except UnicodeEncodeError as error:  # lone surrogates stand for bytes that were not UTF-8
                raise UsageError(f"{name}: got {value!r}, must be text that UTF-8 can encode") from error
            if not _fits(value, entry):
                raise self._refusal(name, value)

    def _refusal(self, name: str, value: Any) -> UsageError:
        """Returns the error for a value that a key does not take."""
        verb = "allowed:" if self.keys()[name].metadata["choices"] else "must be"
        return UsageError(f"{name}: got {SHORT.repr(value)}, {verb} {self.allowed(name)}")

    def help_lines(self) -> list[str]:
        """Returns a line for each key: default, meaning, allowed values."""
        lines = ["keys (default; meaning; allowed values):"]
        for name, entry in self.keys().items():
            detail = f"{entry.metadata['help']} [{self.allowed(name)}]"
            if entry.default is MISSING:
                default = ",".join(entry.default_factory()) or "[]"
            else:
                default = shown(entry.default)
            lines.append(f"  {f'{name}={default}':<45} {detail}")
        return lines

    def preset_lines(self) -> list[str]:
        """Returns a line for each bundled file: its name and its first comment, which says what to expect."""
        lines = []
        for name in self._presets():
            expectation = (ROOT / name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            lines.append(f"  {name:<30} {expectation}")
        return lines

    def _presets(self) -> list[str]:
        return [preset.relative_to(ROOT).as_posix() for preset in sorted(ROOT.glob(self.presets))]

    def _read_file(self, config_file: str) -> dict[str, dict]:
        """Returns the values of a file by group and key; text that is not of a list is parsed by its key."""
        path, groups = find_path(config_file), ", ".join(group.name for group in fields(self.root))
        if not path.is_file():
            names = ", ".join(self._presets())
            raise UsageError(f"config file {config_file!r} not found; bundled files: {names}")
        try:
            content = read_mapping(path)
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"config file {config_file!r} cannot be read: {reason_of(error)}") from error
        if not isinstance(content, dict):
            kind = "is empty" if content is None else f"holds a {type(content).__name__}"
            raise UsageError(f"config file {config_file!r} {kind}, must hold groups of keys: {groups}")
        for group, values in content.items():
            if not isinstance(values, dict):
                wrong = f"config file {config_file!r}: {group!r} is not a group of keys"
                if group in self.keys():
                    first, _, leaf = group.partition(".")
                    raise UsageError(f"{wrong}; write {first!r}, and {leaf!r} below it, indented")
                nearest = nearest_key(str(group), self.keys())
                raise UsageError(f"{wrong}; allowed: {groups}; did you mean {nearest!r}?")
            for leaf, value in values.items():
                if isinstance(value, str):
                    values[leaf] = self._parse_value(f"{group}.{leaf}", value, null=None)
        return content

    def _drop_replaced(self, content: dict[str, dict], given: dict[str, dict]) -> None:
        """Removes from a file's values those that a key of the command line replaces.

        Raises UsageError for a value beside the key that replaces it: a value on the command line, or, if the
        key is in the file too, a value there that is not the default. (A record holds every default.)
        """
        known = self.keys()
        for name, entry in known.items():
            group, _, leaf = name.partition(".")
            here, file = given.get(group, {}), content.get(group, {})
            value = here.get(leaf, file.get(leaf, entry.default))
            for other in entry.metadata["replaces"] if value != entry.default else ():
                part, default = other.partition(".")[2], known[other].default
                before = default if leaf in here else file.get(part, default)
                if part in here or before != default:
                    got = SHORT.repr(here.get(part, before))
                    raise UsageError(f"{other}: got {got}, but {name}={value} replaces it; leave it out")
                file.pop(part, None)

    def _read_overrides(self, overrides: Sequence[str]) -> dict[str, dict]:
        content: dict[str, dict] = {}
        for override in overrides:
            name, _, value = override.partition("=")
            group, _, leaf = name.partition(".")
            content.setdefault(group, {})[leaf] = self._parse_value(name, value)
        return content

    def _parse_value(self, name: str, value: str, null: str | None = "null") -> Any:
        """Parses a value by its key's type: text literally (no YAML or interpolation), numbers in decimal.

        `null`: the text that stands for None, if the key may be None.
        """
        entry = self.keys().get(name)
        kind, meta = (str, {}) if entry is None else (entry.type, entry.metadata)
        if kind in (str | None, float | None, int | None) and value == null:
            return None
        if meta.get("parse"):
            return value
        if kind in (str, str | None) or value in meta.get("words", ()):
            return literal(value)
        read = yaml.safe_load if kind is bool else float if kind in NUMBERS else int
        try:
            return read(value)
        except (ValueError, yaml.YAMLError) as error:
            raise self._refusal(name, value) from error

    def _update(self, config: DictConfig, content: dict[str, dict], source: str) -> None:
        known = self.keys()
        for group, values in content.items():
            for leaf, value in values.items():
                name = f"{group}.{leaf}" if leaf else str(group)
                if name not in known:
                    hint = self.absent.get(name) or f"did you mean {nearest_key(name, known)!r}?"
                    raise UsageError(f"unknown key {name!r} ({source}); {hint}")
                parse = known[name].metadata["parse"]
                if known[name].type is bool and not isinstance(value, bool):  # OmegaConf takes 2 as true
                    raise self._refusal(name, value)
                try:
                    OmegaConf.update(config, name, parse(value) if parse else value)
                except OmegaConfBaseException as error:
                    raise self._refusal(name, value) from error


def _fits(value: Any, entry: Any) -> bool:
    """Returns whether a value is one of the key's choices, in its share, or not below its smallest number."""
    meta = entry.metadata
    if meta["choices"] and value not in meta["choices"]:
        return False
    if meta["share"] and value not in (None, *meta["words"]):
        return isinstance(value, int | float) and (0 < value <= 1 or (meta["share"] == ZERO and value == 0))
    low = meta["low"]
    if isinstance(value, int) and abs(value) >= 2**63:  # no library takes more
        return False
    if low is None or value is None:
        return True
    above = low == 0 and entry.type in (float, float | None)  # 0 is no value of such a key
    return math.isfinite(value) and (value > low if above else value >= low)


def shown(value: Any) -> str:
    """Returns a default as it is written on the command line."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or "''"
