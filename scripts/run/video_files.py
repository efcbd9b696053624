"""Reads video files as a player shows them: upright, in their true aspect and colours, each frame once."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryFile
from typing import Any

import av
import av.logging
import numpy as np
from av.stream import Disposition
from PIL import Image

from scripts.run.image_files import file_kind, upright

SUFFIXES = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    *(".wmv", ".asf", ".flv", ".3gp", ".ogv", ".mxf", ".vob", ".dv"),
)
READER = 3  # version; raise it if a file gives other frames than before
RATES = (24, 25, 30, 48, 50, 60, 8, 10, 12, 15, 16, 20, 100, 120)
STEP = (0.5, 1.5)  # least and greatest time between two frames of a constant rate, in frames
DRIFT = 1.0  # most that a frame may be off its place at a constant rate, in frames
RARE = 0.1  # share of the steps up to which others are called jumps in a constant rate
TAIL = 0.2  # seconds that a file may end before the duration it states
FROM_ZERO = ("matroska,webm", "asf")  # formats whose duration counts from time 0, not from the start
WIDEST = 8  # most that a pixel may be wider than high, or higher than wide
RGB, BT709, UNSPECIFIED, BT601, BT2020 = 0, 1, 2, 6, 9  # these and the next numbers are those of ITU-T H.273
HDR = {16: "HDR (PQ)", 18: "HDR (HLG)"}
WIDE = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)
TURNS = {  # (a, b, c, d) of the display matrix, which moves (x, y) to (ax + cy, bx + dy)
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # ffmpeg's own decoders of these leave alpha out
DEINTERLACE = "mode=send_frame:deint=interlaced"
SIDEWAYS = {turn for (a, *_), turn in TURNS.items() if a == 0}


@dataclass(frozen=True)
class VideoInfo:
    """Holds the number of frames, frames a second (0 for one frame), and the size in pixels as shown.

    `coding`: codec and pixel format, as `h264 yuv420p`.
    """

    frames: int
    fps: float
    height: int
    width: int
    coding: str = ""


def is_video_name(path: Path) -> bool:
    """Returns whether a file is a video by its name; hidden files, as `._a.mp4` of macOS, are none."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def probe_video(path: Path) -> VideoInfo:
    """Decodes a whole file once, to count its frames and check them.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no video, is damaged, breaks off, its frame rate is not constant, or its colours
            cannot be converted.
    """
    about, times = (), []
    with _opened(path) as (container, stream, reports):
        for frame in _frames(container, stream, reports):
            times.append(float(frame.pts * frame.time_base))
            if not about:
                about = (*_shown_size(frame, stream), frame.format.name)
                with closing(_converted(path, stream, iter([frame]))) as images:
                    next(images)
        rate = constant_rate(times, float(stream.time_base), [stream.guessed_rate, stream.average_rate])
        height, width, pixels = about
        coding = f"{stream.codec_context.codec.canonical_name} {pixels}"
    return VideoInfo(len(times), rate, height, width, coding)


def sound_seconds(path: Path) -> float:
    """Returns the seconds of sound that a file states, 0 without any; raises as `probe_video`."""
    with _opened(path) as (container, _, _):
        return max(
            (float(s.duration * s.time_base) for s in container.streams.audio if s.duration), default=0.0
        )


def read_video(path: Path) -> Iterator[Image.Image]:
    """Yields the frames of a file in the order of their times, as 8-bit RGB.

    Rotation and aspect are applied, interlaced frames made progressive, HDR tone-mapped to BT.709, and
    transparent pixels composited on black. Raises as `probe_video`, for the rate at the end.
    """
    times: list[float] = []

    def timed(frames: Iterator[Any]) -> Iterator[Any]:
        for frame in frames:
            times.append(float(frame.pts * frame.time_base))
            yield frame

    with _opened(path) as (container, stream, reports):
        yield from _converted(path, stream, timed(_frames(container, stream, reports)))
        constant_rate(times, float(stream.time_base))


def constant_rate(times: list[float], tick: float, stated: Sequence[Fraction | None] = ()) -> float:
    """Returns frames a second of frames at these times, 0 for one frame.

    A rate that is stated by the file, or usual, is taken if it explains all times to within a tick.

    Args:
        times, tick: in seconds.

    Raises:
        ValueError: the times are not those of a constant rate; the message has a remedy.
    """
    if len(times) < 2:
        return 0.0
    steps, usual = np.diff(times), float(np.median(np.diff(times)))
    remedy = f"`ffmpeg -i IN -vf fps={max(1, round(1 / max(usual, 1e-3)))} OUT` mends that"
    jumps = np.flatnonzero((steps <= STEP[0] * usual) | (steps >= STEP[1] * usual))
    if 0 < len(jumps) <= max(1, RARE * len(steps)) < len(steps):
        first, step = jumps[0], steps[jumps[0]]
        kind = f"a gap of {step:.3g}" if step > usual else f"a step of {step:.3g}"
        raise ValueError(
            f"{len(jumps)} of its frames are early or late: {kind} s after frame {first}, at "
            f"{times[first] - times[0]:.2f} s, instead of {usual:.3g}; cut it there, or {remedy} by copies"
        )
    numbers, since = np.arange(len(times)), np.asarray(times) - times[0]
    mean = numbers[-1] / since[-1] if since[-1] > 0 else 0.0
    if len(jumps) or np.ptp(since * mean - numbers) > 2 * DRIFT:
        slow, fast = (1 / max(step, 1e-6) for step in (steps.max(), steps.min()))
        raise ValueError(f"its frame rate varies, {slow:.3g} to {fast:.3g} a second; {remedy}")
    for rate in (*stated, *RATES, *(rate / 1.001 for rate in RATES)):
        if rate and np.abs(since - numbers / float(rate)).max() <= 1.01 * tick:
            return float(rate)
    return float(mean)


@contextmanager
def _listening() -> Iterator[list[tuple[int, str, str]]]:
    """Collects what the libraries of ffmpeg report as errors: level, name of the part, message.

    Raises their own exceptions as ValueError.
    """
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as logs:
            yield logs
    except av.FFmpegError as error:
        raise ValueError(f"its frames cannot be converted ({error.strerror or error})") from error


def _reported(logs: list[tuple[int, str, str]], *parts: str) -> list[str]:
    """Returns the errors of these parts of ffmpeg, each as one line."""
    return [" ".join(text.split()) for _, name, text in logs if name in parts]


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any, list[str]]]:
    """Opens a file and yields its container, its video stream, and the errors met so far."""
    if (kind := file_kind(path)) == "empty":
        raise ValueError("it is empty")
    with path.open("rb") as file:
        with _listening() as logs:
            try:
                options = {"err_detect": "crccheck", "protocol_whitelist": ""}
                container = av.open(file, options=options, metadata_errors="replace")
            except av.FFmpegError as error:
                reason = f"it is no video but {kind}"
                if kind.startswith(("a video", "an unknown")):
                    reason = "no video can be found in it"
                    if any("moov atom not found" in text for *_, text in logs):
                        reason = "its index (moov) is missing, so its recording or copy was not finished"
                raise ValueError(reason) from error
        with container:
            if container.format.name.endswith("_pipe"):
                raise ValueError(f"it is no video but {kind}")
            yield container, _video_stream(container), _reported(logs, container.format.name)


def _video_stream(container: Any) -> Any:
    """Returns the video that players choose, the largest of those marked as default, else of all.

    Raises ValueError if there is none, or its codec is unknown.
    """
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        others = {stream.type for stream in container.streams if stream.type != "video"}
        others |= {"a cover picture"} if container.streams.video else set()
        raise ValueError(f"it has no video, only {' and '.join(sorted(others)) or 'a header'}")
    if any(stream.codec_context is None for stream in videos):
        raise ValueError("its codec is not known to ffmpeg")
    marked = [stream for stream in videos if stream.disposition & Disposition.default]
    return max(marked or videos, key=lambda stream: stream.width * stream.height)


def _frames(container: Any, stream: Any, reports: list[str]) -> Iterator[Any]:
    """Yields the frames of a stream with their times; ValueError as `_decoded`, or if their size changes."""
    size, tick, count = None, -1, 0
    for frame in _decoded(container, stream, reports):
        if container.format.name == "avi":  # states no times to show at; frames come in order, one a tick
            frame.pts = tick + 1 if frame.dts is None else frame.dts
        if frame.pts is None:
            raise ValueError(f"frame {count} has no time; `ffmpeg -i IN OUT.mp4` mends that")
        if size not in (None, (frame.width, frame.height)):
            raise ValueError(f"its size changes at frame {count}, at {frame.time:.2f} s")
        size, tick, count = (frame.width, frame.height), frame.pts, count + 1
        yield frame
    if not count:
        raise ValueError("it has no frames")


def _decoded(container: Any, stream: Any, reports: list[str]) -> Iterator[Any]:
    """Yields the frames of a stream; ValueError if it is damaged or breaks off."""
    packets, frame, packet, demuxed = 0, None, True, container.demux()
    here = ended = start = (stream.start_time or 0) * float(stream.time_base)
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.codec.name in WITH_ALPHA:
        decoder = av.CodecContext.create(WITH_ALPHA[decoder.codec.name], "r")
    decoder.thread_count = 1  # errors are collected by thread
    decoder.options = {"err_detect": "crccheck+explode"}
    parts = container.format.name, decoder.name, decoder.codec.name
    while packet is not None:
        frames, is_cut = [], False
        with _listening() as logs:
            try:
                packet = next(demuxed, None)
                if packet is not None and packet.stream is stream:
                    is_cut = packet.is_corrupt
                    if frame and not packet.size and packet.pts is not None:  # shows the last frame again
                        frame.pts, frames = packet.pts, [frame]
                    else:
                        frames = decoder.decode(packet)
            except av.FFmpegError as error:
                reports = [*reports, error.strerror or "it cannot be decoded"]
        if packet is not None and packet.pts is not None:
            ended = max(ended, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is stream:
                packets, here = packets + 1, float(packet.pts * packet.time_base)
        damage = _reported(logs, *parts) + reports
        if packet is not None and packet.is_discard:  # cut off by an edit list, it may lack what came before
            damage, is_cut, reports = [], False, []
        if damage or is_cut or any(frame.is_corrupt for frame in frames):
            reason = damage[0] if damage else "a part is missing"
            raise ValueError(f"it is damaged at {max(0.0, here - start):.2f} s ({reason})")
        for frame in frames:
            yield frame
    _check_end(container, stream, packets, ended)


def _check_end(container: Any, stream: Any, packets: int, ended: float) -> None:
    """Compares what was read with what the file states; ValueError if a part is missing."""
    if packets < stream.frames and container.format.name != "avi":  # which counts empty packets
        raise ValueError(f"it breaks off after {packets} of {stream.frames} frames")
    start, whole = ((number or 0) / av.time_base for number in (container.start_time, container.duration))
    whole += 0.0 if container.format.name in FROM_ZERO else start
    if ended < whole - max(TAIL, 2 * (ended - start) / max(packets, 1)):  # a last frame may have no duration
        raise ValueError(f"it breaks off at {ended:.2f} of {whole:.2f} s")


def _turn(frame: Any) -> Image.Transpose | None:
    """Returns how a frame must be turned to stand upright, from its display matrix."""
    matrix = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return None
    a, b, _, c, d, *_ = (round(number / 65536) for number in struct.unpack("=9i", matrix))
    if (a, b, c, d) in ((1, 0, 0, 1), (0, 0, 0, 0)):
        return None
    if (a, b, c, d) not in TURNS:
        raise ValueError(f"it is rotated by {frame.rotation} degrees; `ffmpeg -i IN OUT.mp4` turns it")
    return TURNS[a, b, c, d]


def _stretched(frame: Any, stream: Any) -> tuple[int, int]:
    """Returns width and height with square pixels; a side grows, none shrinks."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / WIDEST <= aspect <= WIDEST:
        raise ValueError(f"its pixels are {float(aspect):.3g} times as wide as high, which cannot be right")
    return round(frame.width * max(aspect, 1)), round(frame.height / min(aspect, 1))


def _shown_size(frame: Any, stream: Any) -> tuple[int, int]:
    """Returns height and width as shown."""
    width, height = _stretched(frame, stream)
    return (width, height) if _turn(frame) in SIDEWAYS else (height, width)


def _converted(path: Path, stream: Any, frames: Iterator[Any]) -> Iterator[Image.Image]:
    """Yields frames as shown; those of one kind go through one graph of filters."""
    kind, graph, turn = None, None, None
    for frame in frames:
        colours = frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries
        now = frame.format.name, colours, frame.interlaced_frame
        if kind is None and (frame.color_trc in HDR or frame.color_primaries in WIDE):
            yield from _mapped(path, stream, chain([frame], frames), _turn(frame))
            return
        if now != kind:
            if frame.color_trc in HDR:
                raise ValueError(f"it becomes {HDR[frame.color_trc]} at {frame.time:.2f} s")
            if graph:
                yield from _filtered(graph, None, turn)
            kind, graph, turn = now, _graph(frame, stream), _turn(frame)
        yield from _filtered(graph, frame, turn)
    yield from _filtered(graph, None, turn)


def _graph(frame: Any, stream: Any) -> Any:
    """Makes ffmpeg's filters from frames as decoded to RGB of the shown size."""
    width, height = _stretched(frame, stream)
    matrix = frame.colorspace
    if matrix not in MATRICES:
        raise ValueError(f"its colour matrix (number {matrix} of ITU-T H.273) is not supported")
    is_yuv = not frame.format.is_rgb
    if is_yuv and matrix in (RGB, UNSPECIFIED):
        matrix = BT709 if frame.width >= 1280 or frame.height > 576 else BT601
    has_alpha = any(component.is_alpha for component in frame.format.components)
    size = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={stream.time_base}"
    marks = f"colorspace={matrix if is_yuv else RGB}:range={frame.color_range}"
    steps = [("buffer", f"{size}:{marks}"), ("setparams", f"colorspace={matrix if is_yuv else RGB}")]
    steps += [("bwdif", DEINTERLACE)] * frame.interlaced_frame
    steps += [("scale", f"{width}:{height}:flags=lanczos+accurate_rnd+full_chroma_int")]
    steps += [("format", "rgba" if has_alpha else "rgb24")]
    with _listening():
        graph = av.filter.Graph()
        filters = [graph.add(name, arguments) for name, arguments in steps]
        graph.link_nodes(*filters, graph.add("buffersink")).configure()
    return graph


def _filtered(graph: Any, frame: Any, turn: Image.Transpose | None) -> Iterator[Image.Image]:
    """Pushes a frame, or the end, into a graph and yields the images that are ready."""
    with _listening():
        graph.vpush(frame)
        images = []
        while True:
            try:
                images.append(graph.vpull())
            except (BlockingIOError, EOFError):
                break
    for image in images:
        picture = Image.fromarray(image.to_ndarray())
        picture = upright(picture) if picture.mode == "RGBA" else picture
        yield picture if turn is None else picture.transpose(turn)


def _mapped(
    path: Path, stream: Any, frames: Iterator[Any], turn: Image.Transpose | None
) -> Iterator[Image.Image]:
    """Yields frames of HDR or of wide colours as BT.709: PyAV checks them, ffmpeg's own program maps them.

    The filters zscale and tonemap, which PyAV's build lacks, are used as ffmpeg's users do:
    https://trac.ffmpeg.org/wiki/colorspace. Raises ValueError if the program lacks them.
    """
    from imageio_ffmpeg import get_ffmpeg_exe

    first = next(frames)
    (width, height), name = _stretched(first, stream), HDR.get(first.color_trc)
    primaries, matrix = (BT2020 if n == UNSPECIFIED else n for n in (first.color_primaries, first.colorspace))
    stated = f"color_primaries={primaries}:color_trc={first.color_trc}:colorspace={matrix}"
    filters = [f"setparams={stated}:range={first.color_range or 1}"]
    filters += [f"bwdif={DEINTERLACE}"] * first.interlaced_frame
    filters += ["zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709"]
    filters += ["tonemap=tonemap=hable:desat=0"] * (name is not None)
    filters += [f"zscale=w={width}:h={height}:f=lanczos:t=bt709:m=gbr:r=pc,format=gbrp"]
    command = [get_ffmpeg_exe(), "-v", "error", "-nostdin", "-noautorotate", "-i", f"file:{path}"]
    command += ["-map", f"0:{stream.index}", "-vf", ",".join(filters), "-fps_mode", "passthrough"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    with TemporaryFile() as log, Popen(command, stdout=PIPE, stderr=log) as process:
        try:
            for number, _ in enumerate(chain([first], frames)):
                pixels = process.stdout.read(3 * height * width)
                if len(pixels) < 3 * height * width:
                    process.wait()
                    log.seek(0)
                    lines = log.read().decode(errors="replace").splitlines() or ["no reason is given"]
                    raise ValueError(
                        f"it is {name or WIDE[primaries]}, and ffmpeg did not convert frame {number} to "
                        f"BT.709 ({lines[0]})"
                    )
                picture = Image.frombytes("RGB", (width, height), pixels)
                yield picture if turn is None else picture.transpose(turn)
        finally:
            process.kill()
