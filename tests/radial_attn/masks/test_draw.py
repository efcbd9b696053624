import numpy as np
import pytest
from matplotlib.image import imread

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.__main__ import main
from radial_attn.masks.draw import draw_mask, frame_distance, layers

SHAPE = ["--frames=12", "--height=6", "--width=10", "--block-size=16"]


def test_command_draws_a_picture_and_names_the_density(tmp_path, capsys):
    main(["draw", *SHAPE, "--text=20", f"--out={tmp_path / 'mask.png'}"])
    density = radial_mask(TokenGrid(12, 6, 10, text=20), RadialConfig(block_size=16)).density
    printed = capsys.readouterr()
    assert f"density {density:.4f}" in printed.out and not printed.err
    assert imread(tmp_path / "mask.png").std() > 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]


@pytest.mark.parametrize("text", [0, 5, 90])
def test_every_kept_block_has_one_colour(text):
    grid, config = TokenGrid(9, 5, 7, text), RadialConfig(block_size=16, decimation_width="block")
    drawn = layers(grid, config)
    count = sum(layer.member.astype(int) for layer in drawn)
    assert (count == 1).all()
    names = [layer.label for layer in drawn]
    assert names[:4] == [f"{band} frames apart" for band in ("0 or 1", "2 or 3", "4 to 7", "8")]
    assert ("text" in names) == bool(text)


def test_a_picture_of_the_mask_of_another_program(tmp_path, capsys):
    """Its sink has the colours of the distances."""
    shape = ["--frames=9", "--height=8", "--width=16", "--compat=woct0rdho", "--block-size=64"]
    main(["draw", *shape, f"--out={tmp_path / 'mask.png'}"])
    grid, config = TokenGrid(9, 8, 16), RadialConfig(block_size=64, compat="woct0rdho")
    assert f"density {radial_mask(grid, config).density:.4f}" in capsys.readouterr().out
    assert sum(layer.member.astype(int) for layer in layers(grid, config)).max() == 1
    title = draw_mask(grid, config).axes[0].get_title(loc="left")
    assert title.endswith("blocks of 64, decay factor 0.2, as woct0rdho makes it")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["draw", "--compat=kijai", "--no-sink", "--out=a.png"], "sink must be left out with compat='kijai'"),
        (["draw", "--compat=kijai", "--density=0.5", "--out=a.png"], "density must be left out with compat"),
        (["draw", "--compat=kijai", "--out=a.png"], "compat='kijai' needs frames of whole blocks of 128"),
        (
            ["density", "--compat=kijai"],
            "--compat must be none, got 'kijai'; draw prints the density",
        ),
    ],
)
def test_what_the_mask_of_another_program_does_not_take(command, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--frames=3", "--height=5", "--width=5"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_frame_distance_is_that_of_the_nearest_frames():
    """Frames of 24 tokens in blocks of 16: the second block holds the end of frame 0 and the start of 1."""
    distance = frame_distance(TokenGrid(4, 4, 6), 16)
    assert distance[0].tolist() == [0, 0, 1, 2, 2, 3]
    assert np.array_equal(distance, distance.T)


def test_title_and_legend_tell_density_and_options():
    figure = draw_mask(TokenGrid(4, 4, 8, text=3), RadialConfig(0.5, 16, sink=False, neighbour="half"))
    title = figure.axes[0].get_title(loc="left")
    assert "density" in title
    assert "4 frames of 4 × 8 tokens + 3 text" in title
    assert "decay factor 0.5, no sink, neighbour half" in title
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sum(int(label.split(": ")[1].split(" ")[0]) for label in labels[:-1]) == pytest.approx(100, abs=2)
