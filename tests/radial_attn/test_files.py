"""Files that are written whole or not at all."""

import os

import pytest

from radial_attn.files import LONGEST, whole_file


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_the_permissions_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        with whole_file(tmp_path / "a.json") as part:
            part.write_text("new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(type(error)), whole_file(file) as part:
        part.write_text("half")
        assert file.read_text() == "old"
        raise error
    assert os.listdir(tmp_path) == ["a.json"] and file.read_text() == "old"


def test_a_name_of_the_greatest_length(tmp_path):
    file = tmp_path / ("ä" * (LONGEST // 2) + "x")
    with whole_file(file) as part, whole_file(file) as other:
        assert part != other
        part.write_text("first")
        other.write_text("second")
    assert file.read_text() == "first" and len(os.listdir(tmp_path)) == 1
