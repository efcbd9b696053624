"""Videos are read as a player shows them; the ones that are not whole are refused with the reason."""

from pathlib import Path

import numpy as np
import pytest

from scripts.run.video_files import constant_rate, is_video_name, probe_video, read_video
from tests.support.video_cases import H264, ffmpeg, make

RED = "color=0xe61414:s=96x64:r=10:d=0.4"


def frames_of(path: Path) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in read_video(path)]).astype(int)


def reason(path: Path) -> str:
    """Returns why a file is refused; both readers must refuse it with the same words."""
    with pytest.raises(ValueError) as probed:
        probe_video(path)
    with pytest.raises(ValueError) as read:
        list(read_video(path))
    assert str(probed.value) == str(read.value) and "\n" not in str(read.value)
    return str(read.value)


@pytest.fixture(scope="module")
def counting(tmp_path_factory) -> Path:
    """Makes 32 frames at 16 a second, of which the red of each is 8 levels above that of the last."""
    return make(tmp_path_factory.mktemp("videos") / "counting.mp4")


KINDS = {
    "mp4": "-c:v libx264",
    "mov": "-c:v prores",
    "mkv": "-c:v ffv1",
    "webm": "-c:v libvpx -b:v 1M",
    "avi": "-c:v mpeg4 -q:v 2 -bf 2",
    "h264.avi": "-c:v libx264 -pix_fmt yuv420p -bf 3",
    "gif": "",
    "m4v": "-c:v libx264 -f mp4",
    "ts": "-c:v libx264 -pix_fmt yuv420p",
    "mpg": "-c:v mpeg2video -q:v 2",
    "wmv": "-c:v wmv2 -q:v 2",
    "flv": "-c:v flv -q:v 2",
    "3gp": "-c:v mpeg4 -q:v 2",
    "ogv": "-c:v libtheora -q:v 10",
}


@pytest.mark.parametrize("suffix", KINDS)
def test_what_ffmpeg_reads_is_read(suffix, tmp_path):
    path = make(tmp_path / f"a.{suffix}", f"{RED.replace('r=10', 'r=25')}", KINDS[suffix])
    about = probe_video(path)
    assert is_video_name(path) and not is_video_name(tmp_path / f"._a.{suffix}")
    assert (about.frames, about.fps, about.height, about.width) == (10, 25, 64, 96)
    assert np.abs(frames_of(path)[:, 32, 48] - (230, 20, 20)).max() <= (20 if suffix == "gif" else 6)


def test_frames_come_in_order_each_once(counting):
    assert np.abs(np.diff(frames_of(counting)[:, 32, 20, 0]) - 8).max() <= 3
    assert probe_video(counting).coding == "h264 yuv444p"


def test_a_sound_track_that_starts_first_repeats_no_frame(tmp_path, counting):
    """The frames come half a second after the sound."""
    sound = ["-f", "lavfi", "-i", "sine=d=3"]
    late = ["-itsoffset", 0.5, "-i", counting, "-map", "0", "-map", "1", "-c:v", "copy"]
    ffmpeg(*sound, *late, tmp_path / "late.mp4")
    assert np.array_equal(frames_of(tmp_path / "late.mp4"), frames_of(counting))
    assert probe_video(tmp_path / "late.mp4") == probe_video(counting)


@pytest.mark.parametrize("suffix", ["mkv", "webm", "wmv", "ts", "mp4", "flv"])
def test_a_video_may_start_late(suffix, tmp_path):
    path = make(tmp_path / f"a.{suffix}", f"{RED.replace('r=10', 'r=25')},setpts=PTS+3/TB", KINDS[suffix])
    assert probe_video(path).frames == 10


def test_of_several_videos_the_one_that_players_choose_is_read(tmp_path, counting):
    """It is marked as default; without a mark it is the largest."""
    large = make(tmp_path / "large.mp4", RED.replace("96x64", "192x128"))
    both, marks = ["-i", large, "-i", counting, "-map", 0, "-map", 1, "-c", "copy"], {}
    for mark in ("default", "0"):
        file = tmp_path / f"{mark}.mkv"
        ffmpeg(*both, "-disposition:v:0", 0, "-disposition:v:1", mark, file)
        marks[mark] = probe_video(file).height
    assert marks == {"default": 64, "0": 128}


@pytest.mark.parametrize(
    ("options", "first"),
    [(f"{H264} -g 32", 8), ("-c:v libx264 -x264-params open-gop=1:keyint=12:bframes=3 -qp 10", 17)],
)
def test_an_edit_list_is_followed(options, first, tmp_path):
    """The cut begins within a group of frames; those before it are in the file, but never shown."""
    long = make(tmp_path / "long.mp4", options=options)
    ffmpeg("-ss", first / 16, "-i", long, "-c", "copy", tmp_path / "cut.mp4")
    assert np.array_equal(frames_of(tmp_path / "cut.mp4"), frames_of(long)[first:])
    assert probe_video(tmp_path / "cut.mp4").frames == 32 - first


ASPECTS = {"2": (64, 192), "1/2": (128, 96), "16/11": (64, 140)}


@pytest.mark.parametrize("aspect", ASPECTS)
def test_pixels_that_are_not_square_are_stretched(aspect, tmp_path):
    path = make(tmp_path / "a.mp4", f"testsrc2=s=96x64:d=0.2:r=10,setsar={aspect}")
    (about, frames), size = (probe_video(path), frames_of(path)), ASPECTS[aspect]
    assert (about.height, about.width) == frames.shape[1:3] == size
    plain = make(
        tmp_path / "b.mp4", f"testsrc2=s=96x64:d=0.2:r=10,scale={size[1]}:{size[0]}:flags=lanczos,setsar=1"
    )
    assert np.abs(frames - frames_of(plain)).mean() < 3


TURNED = {"90": 3, "180": 2, "270": 1}  # quarter turns against the clock that the matrix asks for


@pytest.mark.parametrize("degrees", TURNED)
def test_a_turned_video_stands_upright(degrees, tmp_path, counting):
    path = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", f"-{degrees}", "-i", counting, "-c", "copy", path)
    upright = np.rot90(frames_of(counting), TURNED[degrees], axes=(1, 2))
    assert np.array_equal(frames_of(path), upright)
    assert (probe_video(path).height, probe_video(path).width) == upright.shape[1:3]


def test_a_mirrored_video_is_mirrored_back(tmp_path, counting):
    ffmpeg("-display_hflip", "-i", counting, "-c", "copy", tmp_path / "selfie.mp4")
    assert np.array_equal(frames_of(tmp_path / "selfie.mp4"), frames_of(counting)[:, :, ::-1])


COLOURS = {  # how a colour is coded, and how that is marked
    "BT.601": ("scale=out_color_matrix=bt601:out_range=tv,format=yuv444p", "-colorspace smpte170m"),
    "BT.709": ("scale=out_color_matrix=bt709:out_range=tv,format=yuv444p", "-colorspace bt709"),
    "full": ("scale=out_color_matrix=bt709:out_range=pc,format=yuv444p", "-colorspace bt709 -color_range pc"),
    "BT.2020 matrix": ("scale=out_color_matrix=bt2020:out_range=tv,format=yuv444p10", "-colorspace bt2020nc"),
    "10 bits": ("scale=out_color_matrix=bt709:out_range=tv,format=yuv420p10", "-colorspace bt709"),
    "BT.601 of Europe": ("scale=out_color_matrix=bt470bg:out_range=tv,format=yuv420p", "-colorspace bt470bg"),
    "small, unmarked": ("scale=out_color_matrix=bt601:out_range=tv,format=yuv444p", ""),
    "HD, unmarked": ("scale=1280:720:out_color_matrix=bt709:out_range=tv,format=yuv420p", ""),
    "RGB": ("format=gbrp", "-c:v libx264rgb"),
    "gray": ("format=gray", ""),
}


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_are_those_that_the_file_states(kind, tmp_path):
    coded, marks = COLOURS[kind]
    source = RED.replace("0xe61414", "0x4a4a4a") if kind == "gray" else RED
    unmarked = "setparams=color_primaries=unknown:color_trc=unknown" + ":colorspace=unknown" * (not marks)
    path = make(
        tmp_path / "a.mkv", f"{source},format=rgb24,{coded},{unmarked}", f"-c:v libx264 -qp 0 {marks}"
    )
    wanted = (0x4A,) * 3 if kind == "gray" else (230, 20, 20)
    assert np.abs(frames_of(path)[0, 32, 48] - wanted).max() <= 3


LINEAR = "format=rgb24,setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc"
HDR = {"PQ": ("smpte2084", (175, 210)), "HLG": ("arib-std-b67", (175, 210))}


@pytest.mark.parametrize("kind", HDR)
def test_hdr_is_tone_mapped(kind, tmp_path):
    """White of 203 cd/m2 becomes a bright grey, below the room for what is brighter; colours stay colours."""
    trc, (low, high) = HDR[kind]
    coded = f"{LINEAR},zscale=t=linear,format=gbrpf32le,zscale=npl=203:p=bt2020:t={trc}:m=bt2020nc:r=tv"
    bars = [f"color={name}:s=32x64:d=0.1:r=10[{name}]" for name in ("white", "red", "gray", "black")]
    source = f"{';'.join(bars)};[white][red][gray][black]hstack=4,{coded},format=yuv420p10le"
    x265 = f"-c:v libx265 -x265-params log-level=error:lossless=1 -color_primaries bt2020 -color_trc {trc}"
    frames = frames_of(make(tmp_path / "a.mp4", source, f"{x265} -colorspace bt2020nc"))
    white, red, gray, black = frames[0, 32, 16::32]
    assert low < white.min() and white.max() < high and np.ptp(white) <= 2
    assert black.max() <= 2 and gray.max() < white.min() - 30
    assert red[0] > 90 and red[1:].max() < red[0] / 2


def test_wide_colours_are_mapped(tmp_path):
    """A red that BT.709 has, written with the primaries of Display P3, comes back."""
    coded = f"{LINEAR},zscale=p=smpte432:m=709:r=tv,format=yuv444p10le"
    marks = "-c:v libx264 -qp 0 -color_primaries smpte432 -color_trc bt709 -colorspace bt709"
    path = make(tmp_path / "a.mkv", f"{RED},{coded}", marks)
    assert np.abs(frames_of(path)[0, 32, 48] - (230, 20, 20)).max() <= 3


def test_hdr_is_refused_by_name_if_ffmpeg_cannot_map_it(tmp_path, monkeypatch):
    path = make(
        tmp_path / "a.mkv", RED, "-c:v libx264 -color_trc smpte2084 -vf setparams=color_trc=smpte2084"
    )
    other = tmp_path / "ffmpeg"
    other.write_text("#!/bin/sh\necho \"No such filter: 'zscale'\" >&2\nexit 1\n")
    other.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(other))
    expected = "it is HDR (PQ), and ffmpeg did not convert frame 0 to BT.709 (No such filter: 'zscale')"
    assert reason(path) == expected


CLEAR = {
    "mov": "-c:v png",
    "prores.mov": "-c:v prores_ks -profile:v 4444 -pix_fmt yuva444p10le",
    "vp9.webm": "-c:v libvpx-vp9 -pix_fmt yuva420p",
    "vp8.webm": "-c:v libvpx -pix_fmt yuva420p -auto-alt-ref 0",
}


@pytest.mark.parametrize("kind", CLEAR)
def test_transparent_pixels_are_on_black(kind, tmp_path):
    source = "color=white:s=96x64:d=0.3:r=10,format=rgba,colorchannelmixer=aa=0.2"
    path = make(tmp_path / f"a.{kind}", source, CLEAR[kind])
    frames = frames_of(path)
    assert len(frames) == probe_video(path).frames == 3
    assert np.abs(frames - 51).max() <= 2


def test_interlaced_frames_are_made_progressive(tmp_path):
    """A bar that moves 8 pixels a field: woven, its edge is a comb."""
    moving = "color=black:s=96x64:r=50:d=0.4,format=yuv444p,geq=lum='235*gt(X,8*mod(N,10))':cb=128:cr=128"
    woven = f"{moving},interlace=scan=tff:lowpass=off"
    path = make(tmp_path / "a.mkv", woven, "-c:v ffv1 -flags +ildct -field_order tt")
    frames = frames_of(path)
    assert len(frames) == probe_video(path).frames == 10
    comb = np.abs(np.diff(frames[2:8, 8:-8, :, 0], axis=1)).max()
    assert comb < 128, "lines of two times stand in one frame"


def test_odd_sizes(tmp_path):
    path = make(tmp_path / "a.mkv", "testsrc=s=51x33:d=0.2:r=10")
    assert (probe_video(path).height, probe_video(path).width) == frames_of(path).shape[1:3] == (33, 51)


def test_a_recording_of_a_browser_is_read_by_its_times(tmp_path):
    """Its file states no rate, and its frames are up to a third of a frame early or late."""
    times = "setpts='N*40+13*sin(N*1.7)',settb=1/1000"
    make(tmp_path / "a.webm", f"testsrc2=s=96x64:r=25:d=2,settb=1/1000,{times}", "-c:v libvpx -fps_mode vfr")
    about = probe_video(tmp_path / "a.webm")
    assert about.frames == len(frames_of(tmp_path / "a.webm")) == 50
    assert abs(about.fps - 25) < 0.3


def spoil(path: Path, into: Path, start: float, size: int = 2000) -> Path:
    """Overwrites a part of a file, from a share of its length."""
    content = bytearray(path.read_bytes())
    at = int(start * len(content))
    content[at : at + size] = np.random.default_rng(0).bytes(size)
    into.write_bytes(content)
    return into


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mpg", "ts", "flv", "gif", "ogv", "mov"])
def test_damage_is_found_and_its_time_named(suffix, tmp_path):
    source = "testsrc2=s=96x64:r=25:d=2,noise=alls=20:allf=t"
    path = make(tmp_path / f"a.{suffix}", source, KINDS[suffix])
    text = reason(spoil(path, tmp_path / f"b.{suffix}", 0.6))
    assert text.startswith("it is damaged at ") and 0.5 <= float(text.split()[4]) <= 1.9, text


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "mpg", "flv", "gif", "mov"])
def test_a_file_that_was_cut_off_is_refused(suffix, tmp_path):
    fast = " -movflags +faststart" if suffix in ("mp4", "mov") else ""
    path = make(tmp_path / f"a.{suffix}", "testsrc2=s=96x64:r=25:d=2", KINDS[suffix] + fast)
    path.write_bytes(path.read_bytes()[: int(0.7 * path.stat().st_size)])
    text = reason(path)
    assert text.startswith(("it is damaged at ", "it breaks off ")), text


def test_frames_that_are_missing_at_the_end_are_counted(tmp_path, counting):
    """The index states more frames than there are; each frame that is there is whole."""
    make(tmp_path / "a.mkv", options=f"{H264} -cluster_time_limit 100")
    content = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(content[: content.rindex(b"\x1f\x43\xb6\x75")])
    assert "File ended prematurely" in reason(tmp_path / "a.mkv") or "breaks off" in reason(
        tmp_path / "a.mkv"
    )


NO_VIDEOS = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "text": (lambda path: path.write_text("hello\n"), "it is no video but text"),
    "picture": (lambda path: make(path, RED, "-frames:v 1 -c:v png -f image2"), "it is no video but PNG"),
    "sound": (lambda path: make(path, "sine=d=1", "-c:a aac"), "it has no video, only audio"),
    "unfinished": (lambda path: cut(make(path)), "its index (moov) is missing"),
    "noise": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "moov"),
    "unknown codec": (lambda path: make(path) and replace(path, b"avc1", b"zzzz"), "codec is not known"),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "it is no video but a pointer of Git LFS (`git lfs pull` fetches the file)",
    ),
    "playlist": (lambda path: path.write_text("ffconcat version 1.0\nfile a.mp4\n"), "no video but text"),
}


def replace(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1500])


@pytest.mark.parametrize("kind", NO_VIDEOS)
def test_what_is_no_video_is_named(kind, tmp_path):
    write, expected = NO_VIDEOS[kind]
    write(tmp_path / "a.mp4")
    assert expected in reason(tmp_path / "a.mp4")


UNEVEN = {
    "varying": ("select='if(lt(n,16),1,not(mod(n,3)))'", ["varies", "5.33 to 16 a second"]),
    "gap": ("select='not(between(n,10,12))'", ["1 of its frames", "a gap of 0.25 s after frame 9", "0.56 s"]),
    "small gap": ("select='not(eq(n,20))'", ["1 of its frames", "a gap of 0.125 s after frame 19"]),
}


@pytest.mark.parametrize("kind", UNEVEN)
def test_uneven_times_are_refused_with_a_remedy_that_works(kind, tmp_path, counting):
    words, parts = UNEVEN[kind]
    ffmpeg("-i", counting, "-vf", words, "-fps_mode", "vfr", *H264.split(), tmp_path / "a.mp4")
    text = reason(tmp_path / "a.mp4")
    assert all(part in text for part in parts), text
    remedy = text.split("`")[1].replace("IN", str(tmp_path / "a.mp4")).replace("OUT", str(tmp_path / "b.mp4"))
    ffmpeg(*remedy.split()[1:])
    assert probe_video(tmp_path / "b.mp4").fps == 16


@pytest.mark.parametrize(
    ("rate", "tick"), [(24, 1e-3), (24000 / 1001, 1e-3), (29.97, 1e-3), (12.5, 1e-3), (60, 1e-3), (25, 4e-2)]
)
def test_a_rate_is_found_in_rounded_times(rate, tick):
    times = [round(number / rate / tick) * tick for number in range(40)]
    assert constant_rate(times, tick) == pytest.approx(rate, rel=2e-5 if rate in (24, 25, 60) else 2e-3)


def test_a_title_of_another_encoding_is_no_reason_to_refuse(tmp_path):
    path = make(tmp_path / "a.mkv", RED, f"{H264} -metadata title=cafe?")
    replace(path, b"cafe?", b"caf\xe9 ")
    assert probe_video(path).frames == 4


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "flv", "avi"])
def test_slow_videos_are_whole(suffix, tmp_path):
    path = make(tmp_path / f"a.{suffix}", RED.replace("r=10:d=0.4", "r=1:d=5"), KINDS[suffix])
    assert (probe_video(path).frames, probe_video(path).fps) == (5, 1)


def test_an_aspect_that_cannot_be_right_is_refused(tmp_path):
    path = make(tmp_path / "a.mp4", f"{RED},setsar=1/30")
    assert reason(path) == "its pixels are 0.0333 times as wide as high, which cannot be right"


def test_one_frame_has_no_rate(tmp_path):
    about = probe_video(make(tmp_path / "a.mp4", RED, "-frames:v 1"))
    assert (about.frames, about.fps) == (1, 0)
