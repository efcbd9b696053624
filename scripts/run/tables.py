"""Reads tables and JSON strictly: what cannot be read as it was written is refused, with its line."""

import json
import re
from pathlib import Path
from typing import Any

from scripts.run.files import read_lines, read_text

QUOTED, PLAIN = re.compile(r'"((?:[^"]|"")*)"'), re.compile(r'[^",\r\n]*')
ROW_END = re.compile(r"\r?\n|\Z")
SEPARATORS = {";": "semicolons", "\t": "tabs"}


def parse_json(text: str) -> Any:
    """Reads JSON; ValueError for other text, a key given twice, or half of a surrogate pair."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        check_characters(value)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"{error.msg}: {line}column {error.colno}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice; keep one of them")
    return content


def check_characters(value: Any) -> None:
    """Raises ValueError if a text in a value of JSON holds half of a surrogate pair, which is no text."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for part in value:
            check_characters(part)
    elif isinstance(value, str) and (half := re.search("[\ud800-\udfff]", value)):
        raise ValueError(
            f"\\u{ord(half[0]):04x} is half of a surrogate pair and no character; write the whole pair, or "
            "the character itself"
        )


def read_json_lines(path: Path) -> dict[int, Any]:
    """Reads the JSON of each line that is not blank, by the line's number from 1.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text, or a line is no JSON; the message names the line.
    """
    values = {}
    for number, line in read_lines(path).items():
        try:
            values[number] = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return values


def read_csv(path: Path) -> dict[int, list[str]]:
    """Reads the rows of a CSV file by the numbers of their first lines from 1, without blank lines.

    The form is RFC 4180, with UTF-8 and lines that end at LF or CRLF. A cell that holds a comma, a quote or
    the end of a line stands in quotes, and quotes inside it are doubled.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text or of another form; the message names the line.
    """
    text = read_text(path)
    rows: dict[int, list[str]] = {}
    start = line = 1
    cells: list[str] = []
    at = 0
    while at < len(text) or cells:
        pattern = QUOTED if text.startswith('"', at) else PLAIN
        match = pattern.match(text, at)
        if match is None:
            raise ValueError(f"line {line}: a quote opens here and is never closed")
        cells.append(match[1].replace('""', '"') if pattern is QUOTED else match[0])
        opened, at = line, match.end()
        line += match[0].count("\n")
        if text.startswith(",", at):
            at += 1
            continue
        end = ROW_END.match(text, at)
        if end is None:
            raise ValueError(f"line {line}: {_misplaced(text[at], pattern is QUOTED, opened)}")
        if cells != [""]:
            rows[start] = cells
        cells, at = [], end.end()
        start = line = line + 1
    return rows


def _misplaced(character: str, is_quoted: bool, line: int) -> str:
    """Returns what is wrong if a cell, which began on `line`, is followed by `character`."""
    if is_quoted:
        return f"text follows the quote that closes the cell of line {line}; double quotes inside a cell"
    if character == '"':
        return "a quote stands inside a cell without quotes; put the cell in quotes and double those inside"
    return "a carriage return (CR) stands alone; end lines with LF or CRLF"


def read_table(path: Path) -> dict[int, dict[str, str]]:
    """Reads the rows of a CSV file whose first row names the columns, by their line numbers.

    Raises:
        OSError, ValueError: as `read_csv`; or a column has no name of its own, or a row has more or fewer
            cells than there are columns.
    """
    rows = read_csv(path)
    if not rows:
        return {}
    header = rows.pop(min(rows))
    for separator, name in SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise ValueError(f"its columns are separated by {name}; separate them by commas")
    if twice := [name for name in header if header.count(name) > 1]:
        raise ValueError(f"two of its columns have the name {twice[0]!r}; rename one")
    for line, cells in rows.items():
        if len(cells) != len(header):
            more = "; put a cell that holds commas in quotes" if len(cells) > len(header) else ""
            count = f"{len(cells)} cell{'s' if len(cells) > 1 else ''}"
            raise ValueError(f"line {line} has {count}, but there are {len(header)} columns{more}")
    return {line: dict(zip(header, cells, strict=True)) for line, cells in rows.items()}
