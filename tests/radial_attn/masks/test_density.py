"""Density as the input: what is solved for is what the mask has, in the documented order."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from radial_attn import RadialConfig, TokenGrid, radial_mask
from radial_attn.__main__ import main
from radial_attn.masks import density
from radial_attn.masks.density import (
    TOLERANCE,
    decay_factors,
    density_of,
    estimate,
    resolve_density,
    solve_density,
)
from radial_attn.masks.density_curve import changes, curve_lines, density_curve
from radial_attn.masks.draw import draw_mask
from radial_attn.models import apply_radial_attention
from tests.support.long import all_but
from tests.support.tiny import wan_inputs, wan_transformer

WAN = RadialConfig(0.2, neighbour="half")
TINY = RadialConfig(block_size=16, decimation_width="block")
GRIDS = {
    "Wan2.1, 69 frames": (TokenGrid(18, 48, 80), WAN),
    "Wan2.1, 161 frames": (TokenGrid(41, 45, 80), WAN),
    "HunyuanVideo, 117 frames": (TokenGrid(30, 48, 80, text=256), RadialConfig(0.95, sink=False)),
    "HunyuanVideo, 253 frames": (TokenGrid(64, 45, 80), RadialConfig()),
    "HunyuanVideo, 509 frames": (TokenGrid(128, 45, 80), RadialConfig()),
    "Mochi, 163 frames": (TokenGrid(28, 30, 53), RadialConfig()),
    "odd": (TokenGrid(13, 23, 31, text=77), RadialConfig(block_size=64)),
    "odd, small": (TokenGrid(13, 5, 7), TINY),
    "bundled": (TokenGrid(9, 8, 8), TINY),
    "bundled, long": (TokenGrid(33, 8, 8), TINY),
    "one frame": (TokenGrid(1, 16, 16), RadialConfig()),
    "two frames": (TokenGrid(2, 16, 16), RadialConfig()),
    "frames under a block": (TokenGrid(20, 4, 4), RadialConfig()),
}
REAL = ["Wan2.1, 69 frames", "HunyuanVideo, 117 frames", "HunyuanVideo, 509 frames", "Mochi, 163 frames"]
TARGETS = [0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9]
DEFAULT = TokenGrid(18, 48, 80)


def off(grid: TokenGrid, config: RadialConfig, target: float) -> float:
    return abs(density_of(grid, config) / target - 1)


def promised(message: str) -> list[float]:
    """Returns the densities that an error lists: the range, or the range and the nearest."""
    steps = r"density must be within 2% of (\S+) or (\S+), the nearest for .* \((\S+) to (\S+) in steps\)"
    match = re.match(steps, message) or re.match(r"density must be (\S+)(?: to (\S+))? for ", message)
    return [float(number) for number in match.groups() if number]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("target", all_but(TARGETS[::3], TARGETS))
def test_the_mask_has_the_density_or_the_error_says_which_there_are(name, target, monkeypatch):
    """Allows the forty masks that its docstring promises, and a hundred in a gap."""
    (grid, config), masks = GRIDS[name], []
    monkeypatch.setattr(density, "density_of", lambda *mask: masks.append(mask) or density_of(*mask))
    try:
        solved = solve_density(grid, config, target)
    except ValueError as error:
        message = str(error)
    else:
        assert 1 <= len(masks) <= (100 if name == "bundled" and target < 0.43 else 40)
        assert off(grid, solved, target) <= TOLERANCE
        assert replace(solved, **{key: getattr(config, key) for key in ("block_size", "pattern")}) == solved
        return
    assert name not in REAL and message.endswith(f", got {target}")
    there = promised(message)
    for other in there:
        assert off(grid, solve_density(grid, config, other), other) <= TOLERANCE
    assert (min(there) < target < max(there)) == ("within 2%" in message)


@pytest.mark.parametrize("name", [*REAL, "odd, small", "bundled, long"])
def test_only_the_decay_factor_changes_where_it_suffices(name):
    """Takes the densities of the authors' family on this grid, from its sparse end to its dense one."""
    grid, config = GRIDS[name]
    decays = decay_factors(grid, config)
    for part in (0, 0.1, 0.3, 0.5, 0.8, 1):
        target = density_of(grid, replace(config, decay_factor=decays[int(part * (len(decays) - 1))]))
        solved = solve_density(grid, config, target)
        assert off(grid, solved, target) <= TOLERANCE
        if target < 1:  # 1 is wanted exactly
            assert replace(solved, decay_factor=config.decay_factor) == config


def test_below_the_floor_the_options_give_way_in_order():
    """Wan2.1-14B at 69 frames: no decay factor gives less than 26 %."""
    floor = density_of(DEFAULT, replace(WAN, decay_factor=1e-6))
    assert floor == pytest.approx(0.2634, abs=1e-4)
    configs = [solve_density(DEFAULT, WAN, target) for target in (0.26, 0.23, 0.18, 0.15, 0.12, 0.093)]
    assert {solved.decay_factor for solved in configs} == {0.125}
    assert [solved.neighbour == "half" for solved in configs] == [True, False, False, False, False, False]
    assert [solved.decimation_width == 128 for solved in configs[:3]] == [True, True, False]
    assert [solved.sink for solved in configs] == [True, True, True, True, False, False]
    assert all(0.03 < solved.neighbour < 0.5 for solved in configs[1:])
    assert changes(configs[1], WAN) == f"decay_factor 0.125, neighbour {configs[1].neighbour:g}"


def test_above_the_family_the_neighbour_widens_and_frames_come_back():
    wide = solve_density(DEFAULT, WAN, 1)
    assert wide.neighbour != "half" and density_of(DEFAULT, wide) == 1
    grid, config = GRIDS["HunyuanVideo, 509 frames"]
    assert density_of(grid, replace(config, decay_factor=1e6)) < 0.68
    assert solve_density(grid, config, 0.67).decimation_width == 128
    assert solve_density(grid, config, 0.9).decimation_width == 64
    assert density_of(grid, solve_density(grid, config, 1.0)) == 1


@settings(max_examples=60)
@given(
    st.builds(
        TokenGrid, st.integers(1, 20), st.integers(1, 9), st.integers(1, 11), st.sampled_from([0, 0, 17])
    ),
    st.builds(
        RadialConfig,
        decay_factor=st.sampled_from([0.1, 1.0, 3.0]),
        block_size=st.sampled_from([16, 32]),
        sink=st.booleans(),
        neighbour=st.sampled_from(["full", "half", 0.3]),
        decimation_width=st.sampled_from([1, 16, 50, 128, "block"]),
    ),
    st.floats(0.02, 1),
)
def test_any_grid_is_solved_or_refused_truly(grid, config, target):
    try:
        solved = solve_density(grid, config, target)
    except ValueError as error:
        for other in promised(str(error)):
            assert off(grid, solve_density(grid, config, other), other) <= TOLERANCE
    else:
        assert off(grid, solved, target) <= TOLERANCE


@pytest.mark.parametrize("width", all_but([1, 128], [1, 16, 64, 128, 256, "block"]))
@pytest.mark.parametrize("sink", [True, False])
def test_neither_range_nor_steps_depend_on_the_start(width, sink):
    """With blocks of 16 in frames of 64, a block each way at frame distances 1, 2, 4 and 8 is 0.4352."""
    grid, start = TokenGrid(9, 8, 8), RadialConfig(1.0, 16, sink, decimation_width=width)
    with pytest.raises(ValueError, match=r"density must be 0\.1111 to 1 for"):
        solve_density(grid, start, 0.1)
    for target in (0.235, 0.25, 0.284, 0.3, 0.33, 0.36, 0.4, 0.42):
        assert off(grid, solve_density(grid, start, target), target) <= TOLERANCE
    with pytest.raises(ValueError, match=r"of 0\.2099 or 0\.2346, the nearest .* \(0\.1111 to 1 in steps\)"):
        solve_density(grid, start, 0.22)


def test_text_counts():
    grid = TokenGrid(18, 8, 16, text=512)
    config = RadialConfig(block_size=16, decimation_width="block")
    text = 1 - (grid.video_tokens / grid.tokens) ** 2
    with pytest.raises(ValueError, match=r"density must be 0\.\d+ to 1 for 18 x 8 x 16 and 512 text tokens"):
        solve_density(grid, config, text)
    assert off(grid, solve_density(grid, config, text + 0.2), text + 0.2) <= TOLERANCE


def test_each_grid_is_solved_for_itself():
    config = replace(WAN, density=0.3)
    for grid in (DEFAULT, TokenGrid(21, 30, 52)):
        mask = radial_mask(grid, config)
        assert mask.density == pytest.approx(0.3, rel=TOLERANCE)
        assert radial_mask(grid, config) is mask
        assert radial_mask(grid, resolve_density(grid, config)) is mask
    assert radial_mask(DEFAULT, replace(config, pattern="dense")).is_dense
    assert resolve_density(DEFAULT, WAN) is not None and resolve_density(DEFAULT, WAN) == WAN


def test_the_estimate_is_near():
    for name in REAL:
        grid, config = GRIDS[name]
        for decay in (0.01, 0.3, 1.0, 4.0, 20.0):
            tried = replace(config, decay_factor=decay)
            assert estimate(grid, tried) == pytest.approx(density_of(grid, tried), rel=0.17)


@pytest.mark.parametrize("target", [0, -0.1, 1.1, float("nan"), "0.3", None, True])
def test_bad_targets_are_named(target):
    with pytest.raises(ValueError, match="density must be"):
        solve_density(DEFAULT, WAN, target)


def test_the_dense_pattern_has_no_density_to_solve_for():
    with pytest.raises(ValueError, match="pattern must be 'radial' to solve for a density, got 'dense'"):
        solve_density(DEFAULT, replace(WAN, pattern="dense"), 0.3)


@pytest.mark.parametrize("name", ["Wan2.1, 69 frames", "bundled", "one frame", "frames under a block"])
def test_the_curve_rises_and_says_what_changed(name):
    grid, config = GRIDS[name]
    curve = density_curve(grid, config)
    assert [share for share, _ in curve] == sorted({density_of(grid, point) for _, point in curve})
    assert len(curve) <= 11
    assert curve_lines(grid, replace(config, density=0.3)) == curve_lines(grid, config)


def test_the_curve_of_another_pattern_is_that_of_its_masks():
    """Points that it has no mask for are left out."""
    grid, harmonic = TokenGrid(9, 8, 8), RadialConfig(0.5, 16, neighbour="full", decimation_width=64)
    harmonic = replace(harmonic, pattern="harmonic")
    curve, whole = density_curve(grid, harmonic), density_curve(grid, replace(harmonic, pattern="radial"))
    assert 1 < len(curve) < len(whole)
    assert [share for share, _ in curve] == [radial_mask(grid, point).density for _, point in curve]
    assert any(share != density_of(grid, point) for share, point in curve)


def test_a_transformer_runs_at_the_density_of_each_size():
    transformer, densities = wan_transformer(), []
    config = RadialConfig(block_size=16, decimation_width="block", density=0.75)
    with apply_radial_attention(transformer, config, backend="blocks") as handle, torch.no_grad():
        for frames in (6, 9):
            transformer(**wan_inputs(frames=frames))
            densities.append(handle.report()["density"])
    assert densities == pytest.approx([0.75, 0.75], rel=TOLERANCE)


def test_a_picture_of_a_wanted_density():
    title = draw_mask(TokenGrid(12, 6, 10), replace(TINY, density=0.5)).axes[0].get_title(loc="left")
    assert 49 <= float(re.search(r"density ([\d.]+) %", title).group(1)) <= 51


def test_the_command_prints_curve_or_table(capsys):
    shape = ["--frames=18", "--height=48", "--width=80", "--decay-factor=0.2", "--neighbour=half"]
    main(["density", *shape])
    printed = capsys.readouterr().out
    assert printed.startswith("density  options\n") and "0.2634   decay_factor 0.125\n" in printed
    main(["density", *shape, "--target", "0.2", "0.01"])
    table = capsys.readouterr().out.splitlines()
    assert table[2] == "| 0.2 | 0.2016 | 0.125 | 0.061 | 128 | true |"
    assert table[3].startswith("| 0.01 | density must be 0.05556 to 1 for ")
    assert len({line.count("|") for line in table}) == 1
