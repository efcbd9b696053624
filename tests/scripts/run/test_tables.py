"""Tests of strict tables and JSON."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.run.tables import parse_json, read_csv, read_json_lines, read_table

TEXTS = st.text(st.sampled_from('ab ",\n;\t\u2028\x85\x0b'), max_size=5)


def write(folder: Path, content: str) -> Path:
    (folder / "t").write_bytes(content.encode())
    return folder / "t"


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("a,b\r\nc,d", {1: ["a", "b"], 2: ["c", "d"]}),
        ('a,"b, c"\n\n"d ""e""",\n', {1: ["a", "b, c"], 3: ['d "e"', ""]}),
        ('"a\nb",c\nd,e\n', {1: ["a\nb", "c"], 3: ["d", "e"]}),
        ("\ufeffa\u2028b,c\x85d\x0be\n", {1: ["a\u2028b", "c\x85d\x0be"]}),
        (" a , b\n", {1: [" a ", " b"]}),
        ("", {}),
    ],
)
def test_rows_are_those_of_rfc_4180(tmp_path, content, rows):
    assert read_csv(write(tmp_path, content)) == rows


@given(st.lists(st.lists(TEXTS, min_size=2, max_size=3), max_size=4))
def test_what_python_writes_comes_back(tmp_path_factory, rows):
    stream = io.StringIO()
    csv.writer(stream, quoting=csv.QUOTE_ALL).writerows(rows)
    path = write(tmp_path_factory.getbasetemp(), stream.getvalue())
    assert list(read_csv(path).values()) == rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a,b\nc,d, e\n", "line 2 has 3 cells, but there are 2 columns; put a cell that holds commas in"),
        ("a,b\nc,d\ne\n", "line 3 has 1 cell, but there are 2 columns"),
        ('a,b\nc,"d\ne,f\n', "line 2: a quote opens here and is never closed"),
        ('a,b\nc,d "e"\n', "line 2: a quote stands inside a cell without quotes"),
        ('a,b\nc, "d, e"\n', "line 2: a quote stands inside a cell without quotes"),
        ('a,b\nc,"d\ne,"f\n', "line 3: text follows the quote that closes the cell of line 2"),
        ("a,b\nc\rd,e\n", "line 2: a carriage return"),
        ("a,b,a\n", "two of its columns have the name 'a'"),
        ("a;b\nc;d\n", "separated by semicolons; separate them by commas"),
        ("a\tb\nc\td\n", "separated by tabs"),
        ("a,b\nc,\0\n", "line 2 holds a NUL"),
    ],
)
def test_other_tables_are_refused_with_the_line(tmp_path, content, reason):
    with pytest.raises(ValueError, match=reason):
        read_table(write(tmp_path, content))


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x7f"])
def test_a_mark_inside_a_json_string_stays(tmp_path, mark):
    mark_in_string = mark if mark not in "\x0b\x0c\x1c" else f"\\u{ord(mark):04x}"  # JSON escapes those
    path = write(tmp_path, f'{{"a": "b{mark_in_string}c"}}\r\n\n{{"a": "d"}}')
    assert read_json_lines(path) == {1: {"a": f"b{mark}c"}, 3: {"a": "d"}}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": ', "line 3: Expecting value: column 7"),
        ('{"a": 1, "a": 2}', "line 3: the key 'a' is given twice"),
        ('{"a": {"b": ["x \\ud800 y"]}}', r"line 3: \\ud800 is half of a surrogate pair"),
        ('{"a\\udfff": 1}', r"line 3: \\udfff is half"),
        ("[" * 100_000, "line 3: it is nested too deeply"),
        ("1" * 5000, "line 3: .*digits"),
    ],
)
def test_bad_json_is_refused_with_the_line(tmp_path, line, reason):
    with pytest.raises(ValueError, match=reason):
        read_json_lines(write(tmp_path, f'{{"a": "b"}}\n\n{line}\n{{"a": "c"}}\n'))


def test_a_whole_surrogate_pair_is_a_character():
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    with pytest.raises(ValueError, match="Expecting ',' delimiter: line 2, column 2"):
        parse_json("[1\n 2]")
