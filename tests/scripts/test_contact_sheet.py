"""Contact sheets: which frames they show, and what is said of files that are no videos."""

import imageio
import numpy as np
import pytest

from scripts.contact_sheet import main
from scripts.evaluation.frame_sheet import GAP, sheet


def test_rows_and_frames_are_in_their_places():
    rows = [np.full((3, 4, 6, 3), 10 * (i + 1), np.uint8) for i in range(2)]
    picture = sheet(rows, scale=2)
    assert picture.shape == (2 * 8 + GAP, 3 * 12 + 2 * GAP, 3)
    assert (picture[:8, :12] == 10).all() and (picture[-8:, -12:] == 20).all()
    assert (picture[8 : 8 + GAP] == 255).all()


def test_shows_first_and_last_frame_of_a_video(tmp_path):
    video = tmp_path / "ramp.mp4"
    frames = [np.full((32, 32, 3), 12 * i, np.uint8) for i in range(17)]
    imageio.mimwrite(video, frames, fps=8, quality=10, macro_block_size=1)
    main([str(video), "--out", str(tmp_path / "sheet.png"), "--frames", "3"])
    picture = imageio.imread(tmp_path / "sheet.png").astype(int)
    means = [picture[:, start : start + 32].mean() for start in (0, 32 + GAP, 2 * (32 + GAP))]
    assert means == pytest.approx([0, 96, 192], abs=4)
