"""Tests of reading text as it was written, and of whole files."""

import re
import resource
import signal

import pytest
import torch

from scripts.run.files import read_lines, read_text, replacing


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\nb\r\n\nc", {1: "a", 2: "b", 4: "c"}),
        (b"\xef\xbb\xbfa\n", {1: "a"}),
        ("a\u2028b\u0085c\x0bd\x0ce\x1cf\u2029g\n".encode(), {1: "a\u2028b\u0085c\x0bd\x0ce\x1cf\u2029g"}),
        (b"a\n \t\nb", {1: "a", 3: "b"}),
        ("a\n\u200b\ufeff\nb".encode(), {1: "a", 3: "b"}),
    ],
)
def test_a_line_ends_at_lf_or_crlf_only(tmp_path, content, lines):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_lines(tmp_path / "a.txt") == lines


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\nb\xe9\n", r"line 2 is not UTF-8 \(byte 0xe9\), save it as UTF-8"),
        ("a".encode("utf-16"), "it is UTF-16, save it as UTF-8"),
        ("a".encode("utf-32"), "it is UTF-32, save it as UTF-8"),
        (b"a\nb\0\n", "line 2 holds a NUL character"),
        (b"\xed\xa0\x80", "line 1 is not UTF-8"),
    ],
)
def test_other_encodings_are_named(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_text(tmp_path / "a.txt")


def test_a_carriage_return_inside_a_line_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\nb\rc\n")
    with pytest.raises(ValueError, match="line 2 holds a carriage return"):
        read_lines(tmp_path / "a.txt")


@pytest.mark.parametrize("how", ["text", "torch to a file", "torch to a stream"])
def test_a_full_disk_names_the_file_and_leaves_none(tmp_path, how):
    """Files may have at most 100 bytes here."""
    file, before = tmp_path / "a", resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(file))), replacing(file) as part:
            if how == "text":
                part.write_text("a" * 1000)
            elif how == "torch to a file":
                torch.save(torch.zeros(1000), part)
            else:
                with part.open("wb") as stream:
                    torch.save(torch.zeros(1000), stream)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())
