"""Makes the dense and the sparse video of a request, and compares them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from radial_attn import BlockMask
from radial_attn.masks.draw import draw_mask
from scripts.evaluation.metrics import psnr
from scripts.evaluation.page.clips import Clip, Video, packed
from scripts.evaluation.page.render import picture, player
from scripts.run.describe import describe_start
from scripts.run.errors import UsageError
from scripts.run.files import claim
from scripts.run.outputs import unwritable, video_path, writable_folder, write_pair
from scripts.run.plan import RunPlan
from scripts.run.results import subplots, table
from scripts.run.sampler import Sampler
from scripts.web.choices import DENSE, Models, Request, plans
from scripts.web.jobs import Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AMPLIFY = 4  # brightness of the difference below the sparse video
MOST = 200  # MiB of videos in the page
KEPT_COLOUR, DROPPED_COLOUR = (11, 60, 93), (244, 242, 238)
Tell = Callable[[Status], None]


@dataclass(frozen=True)
class Take:
    """Holds a video: its plan, file and record, its frames uint8 `[T, H, W, 3]`, the mask of a layer."""

    plan: RunPlan
    path: Path
    record: dict[str, Any]
    frames: np.ndarray
    mask: BlockMask | None


@dataclass(frozen=True)
class Shown:
    """Holds what the page shows: a line, notes, the player's HTML, Markdown, a picture as a data: URL."""

    line: str
    notes: tuple[str, ...]
    player: str
    table: str
    mask: str


class Steps(tqdm):
    """Reports every step instead of drawing a bar."""

    def __init__(self, kind: str, total: int, tell: Tell) -> None:
        self._kind, self._tell = kind, tell
        super().__init__(total=total, disable=True)
        self.update(0)

    def update(self, n: float = 1) -> None:
        self.n += n
        at = "decoding" if self.n == self.total else f"step {self.n + 1:g} of {self.total:g}"
        self._tell(Status(f"{self._kind}: {at}", int(self.n), int(self.total)))


@dataclass
class Studio:
    """Makes the videos of requests, one after the other.

    It keeps the pipeline of the last model, and the last dense video, which serves every density.

    Attributes:
        models: those that a request may name.
        folder: folder for the videos.
    """

    models: Models
    folder: str
    _loaded: Sampler | None = field(default=None, repr=False)
    _pipeline: Any = field(default=None, repr=False)
    _dense: Take | None = field(default=None, repr=False)

    def make(self, request: Request, tell: Tell) -> Shown:
        """Makes both videos and returns what to show.

        Raises UsageError or GenerationError with one line; then no file is left half written.
        """
        planned = plans(self.models, request, self.folder)
        plan = planned[request.selection]
        notes = (*plan.warnings, *plan.notes)

        def noted(status: Status) -> None:
            tell(replace(status, notes=notes))

        before, self._dense = self._dense, None
        kept = before is not None and before.plan.config == planned[DENSE].config and before.path.is_file()
        self._dense = before if kept else self._take(DENSE, planned[DENSE], request, noted)
        sparse = self._take(request.selection, plan, request, noted)
        noted(Status("comparing"))
        return shown(self._dense, sparse, request, notes, kept=kept)

    def _take(self, kind: str, plan: RunPlan, request: Request, tell: Tell) -> Take:
        """Makes a video, and writes it with its record."""
        generation, chosen, seconds = plan.config.generation, [], {}
        path = video_path(plan.config, generation.prompt)
        try:
            with writable_folder(plan.config), claim(path) as claimed:
                if not claimed:
                    raise UsageError(f"{path} is being made by another run; try again when it has ended")
                sampler = self._sampler(plan, tell)
                with sampler.reporting_memory():
                    frames, run = sampler.sample_video(
                        self._pipeline,
                        generation.prompt,
                        seconds,
                        bar=Steps(kind, generation.steps, tell),
                        look=lambda handle: chosen.append(handle.chosen(request.layer)),
                    )
                record = sampler.record(generation.prompt, run, seconds)
                write_pair(path, frames, plan.config.output.fps, record, sampler.sound)
        except OSError as error:
            raise unwritable(path, error) from error
        return Take(plan, path, record, frames, *chosen)

    def _sampler(self, plan: RunPlan, tell: Tell) -> Sampler:
        """Returns a sampler of the plan; loads its pipeline unless it is the one in memory."""
        if self._loaded is None or self._loaded.plan.config.model != plan.config.model:
            tell(Status("loading the model"))
            self._loaded = self._pipeline = None
            sampler = Sampler(plan)
            self._pipeline = sampler.load()
            self._loaded = sampler
        return replace(self._loaded, plan=plan)


def shown(dense: Take, sparse: Take, request: Request, notes: tuple[str, ...], *, kept: bool) -> Shown:
    """Compares both videos; `kept`: the dense one is from the previous run."""
    way, density, near = request.selection, sparse.record["density"], psnr(sparse.frames, dense.frames)
    near = "equal" if near == math.inf else f"{near:.1f} dB"
    times = [take.record["seconds"]["denoise"] for take in (dense, sparse)]
    line = f"{way} has {times[0] / times[1]:.2f}x the speed of dense; PSNR {near}, density {density:.3f}"
    videos = [Video(name, take.path, "", {}) for name, take in ((DENSE, dense), (way, sparse))]
    (clip,) = packed([Clip(request.prompt, request.seed, videos, compared=True)], MOST)
    captions = (
        f"{times[0]:.2f} s{'; from the previous run' if kept else ''}",
        f"{times[1]:.2f} s, PSNR {near}",
    )
    for video, caption in zip(clip["videos"], captions, strict=True):
        video["caption"] = caption
    pair, steps = (dense, sparse), sparse.plan.config.generation.steps
    rows = [
        ("denoising", *(f"{seconds:.2f} s" for seconds in times)),
        ("median step", *(f"{median(take.record['step_seconds']):.3f} s" for take in pair)),
        ("dense steps", *(f"{len(take.plan.dense_steps)} of {steps}" for take in pair)),
        ("density of the other steps", None, f"{density:.3f}"),
        ("PSNR to dense", None, near),
    ]
    lines = [*table(f" | {DENSE} | {way}", rows), ""]
    remarks = [line.removeprefix("note: ") for line in describe_start(sparse.plan)]
    lines += [f"- {remark}" for remark in remarks if remark not in notes]
    lines += [f"- file: `{take.path}`" for take in pair]
    figure = drawn(sparse, request.layer, request.head)
    return Shown(line, notes, player(clip, AMPLIFY), "\n".join(lines), picture(figure))


def drawn(take: Take, layer: int, head: int) -> "Figure":
    """Draws the mask of a head: the static one in its bands, or the blocks that the head chose."""
    if take.plan.config.attention.selection == "static":
        return draw_mask(take.plan.grid, take.plan.mask)
    figure, axis = subplots((5.2, 5.4), 1)
    if take.mask is None:
        axis.set_title(f"layer {layer} is dense at every step")
        return figure
    kept = take.mask.blocks[head].cpu().numpy()
    axis.imshow(np.where(kept[..., None], KEPT_COLOUR, DROPPED_COLOUR))
    axis.set(xlabel="key block", ylabel="query block")
    axis.set_title(f"layer {layer}, head {head} keeps {kept.mean():.3f} of its blocks", fontsize=11)
    return figure
