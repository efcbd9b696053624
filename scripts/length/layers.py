"""Step times of models too large to run whole: what one of several GPUs computes that share a video's tokens.

With Ulysses one of `SHARE` GPUs attends with its part of the heads to all tokens, and does the rest of each
layer for its part of the tokens. Both are timed by themselves, with random weights and checkpointing as the
training presets have it: attention as the op alone; the rest as the time that one more layer adds to a model
of one layer (each kind has one) on a video of about a part of the frames, less dense attention there. A step
is then the sum over the model's layers. The exchange between GPUs, embeddings, head and the adapter's update
are left out: both kinds of attention have them alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radial_attn import TokenGrid, radial_attention
from radial_attn.attention import choose_backend
from radial_attn.kernels.contract import Call
from radial_attn.models.training.adapter import add_adapter
from radial_attn.models.training.flow import predict_velocity
from scripts.benchmarks.cases import CASES, HUNYUAN_BLOCKS, WAN_BLOCKS
from scripts.benchmarks.timing import medians_in_turn
from scripts.run.system import hardware, pairs, versions

SHARE = 8
KINDS = ("training", "inference")


@dataclass(frozen=True)
class Layers:
    """One model.

    Attributes:
        name: its class in diffusers; family: of `radial_attn.models.training.flow`.
        cases: of `scripts.benchmarks.cases.CASES` by video frames.
        goals: how many times faster than dense a training step shall be, by the paper and by video frames.
        blocks: `(option of its configuration, list of modules, how many)` of each kind of layer.
        dense_layers: as the training presets have them.
        options: of its configuration, other than the defaults.
    """

    name: str
    family: str
    cases: dict[int, str]
    goals: dict[int, float]
    blocks: tuple[tuple[str, str, int], ...]
    text_tokens: int
    dense_layers: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return sum(count for _, _, count in self.blocks)


MODELS = {
    "wan-14b": Layers(
        "WanTransformer3DModel", "wan", {161: "wan-161"}, {161: 1.93}, WAN_BLOCKS, text_tokens=512
    ),
    "hunyuan": Layers(
        "HunyuanVideoTransformer3DModel",
        "hunyuan_video",
        {253: "hunyuan-253", 509: "hunyuan-509"},
        {253: 2.8, 509: 4.4},
        HUNYUAN_BLOCKS,
        text_tokens=256,
    ),
}


@dataclass(frozen=True)
class Setting:
    """How layers are timed: rank of the adapter, counted turns, where and in which data type."""

    rank: int = 128
    repeats: int = 3
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    @property
    def place(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}


@dataclass(frozen=True)
class Times:
    """Seconds, by kind of step: of attention in a layer (dense, radial), and of the rest of all layers."""

    attention: dict[str, tuple[float, float]]
    rest: dict[str, float]
    density: float
    tokens: int
    backend: str

    def step(self, kind: str, depth: int, dense_layers: int) -> tuple[float, float]:
        """Seconds of a step, dense and radial."""
        dense, radial = self.attention[kind]
        mixed = dense_layers * dense + (depth - dense_layers) * radial
        return depth * dense + self.rest[kind], mixed + self.rest[kind]


def layer_times(spec: Layers, frames: int, setting: Setting) -> Times:
    """Attention and the rest of the layers of a video, as one of `SHARE` GPUs has them."""
    case = CASES[spec.cases[frames]]
    grid, heads, width = case.grid, max(1, case.heads // SHARE), case.width
    part = TokenGrid(max(1, round(grid.frames / SHARE)), grid.height, grid.width, grid.text)
    call = Call(torch.device(setting.device), setting.dtype, width, gradients=True, mask=case.mask)
    backend = choose_backend(call)
    attends = {"dense": _dense, "radial": partial(radial_attention, mask=case.mask, backend=backend)}
    whole = attention_seconds(attends, (grid.tokens, heads, width), setting)
    short = attention_seconds({"dense": _dense}, (part.tokens, case.heads, width), setting)
    blocks, scale = block_seconds(spec, part, setting), grid.tokens / SHARE / part.tokens
    rest = {}
    for kind in KINDS:
        own = (count * (blocks[kind][option] - short[kind]["dense"]) for option, _, count in spec.blocks)
        rest[kind] = scale * sum(own)
    attention = {kind: (whole[kind]["dense"], whole[kind]["radial"]) for kind in KINDS}
    return Times(attention, rest, case.mask.density, grid.tokens, backend)


def attention_seconds(
    attends: dict[str, Callable], shape: tuple[int, int, int], setting: Setting
) -> dict[str, dict[str, float]]:
    """Seconds of the op by kind of step and name: a training step runs forward twice and backward once.

    `shape`: tokens, heads and width of a head.
    """
    query, key, value, gradient = (torch.randn(1, *shape, **setting.place) for _ in range(4))
    inputs = [x.requires_grad_() for x in (query, key, value)]

    def forward(attend: Callable) -> None:
        with torch.no_grad():
            attend(*inputs)

    def both(attend: Callable) -> None:
        torch.autograd.grad(attend(*inputs), inputs, gradient)

    found = {}
    for name, call in (("forward", forward), ("both", both)):
        runs = {kind: partial(call, attend) for kind, attend in attends.items()}
        found[name] = medians_in_turn(runs, setting.repeats, setting.device)
    training = {name: found["forward"][name] + found["both"][name] for name in attends}
    return {"training": training, "inference": found["forward"]}


def block_seconds(spec: Layers, grid: TokenGrid, setting: Setting) -> dict[str, dict[str, float]]:
    """Seconds that one more layer of each kind adds, dense, by kind of step and option."""
    ones = {option: 1 for option, _, _ in spec.blocks}
    base = _model_seconds(spec, ones, grid, setting)
    more = {option: _model_seconds(spec, ones | {option: 2}, grid, setting) for option in ones}
    return {kind: {option: more[option][kind] - base[kind] for option in ones} for kind in KINDS}


def _model_seconds(
    spec: Layers, counts: dict[str, int], grid: TokenGrid, setting: Setting
) -> dict[str, float]:
    """Seconds of both kinds of step of a model with so many layers, dense."""
    place = setting.place
    model = _build(spec, counts, place)
    add_adapter(model, rank=setting.rank, alpha=setting.rank)
    model.enable_gradient_checkpointing()
    noisy = torch.randn(1, model.config.in_channels, grid.frames, 2 * grid.height, 2 * grid.width, **place)
    sigma, text = torch.full((1,), 0.5, device=place["device"]), _text(spec, model, place)
    cast = partial(torch.autocast, place["device"], place["dtype"], enabled=place["dtype"] != torch.float32)

    def inference() -> None:
        model.eval()
        with torch.no_grad(), cast():
            predict_velocity(model, spec.family, noisy, sigma, text)

    def training() -> None:
        model.train()
        with cast():
            predict_velocity(model, spec.family, noisy, sigma, text).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    runs = {"training": training, "inference": inference}
    return medians_in_turn(runs, setting.repeats, setting.device)


def _build(spec: Layers, counts: dict[str, int], place: dict[str, Any]) -> torch.nn.Module:
    """Made where it will run, in the data type that it will have: nothing is moved."""
    import diffusers

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(place["dtype"])
    try:
        with torch.device(place["device"]):
            return getattr(diffusers, spec.name)(**counts, **spec.options)
    finally:
        torch.set_default_dtype(before)


def _text(spec: Layers, model: torch.nn.Module, place: dict[str, Any]) -> dict[str, Tensor]:
    if spec.family == "wan":
        return {"prompt_embeds": torch.randn(1, spec.text_tokens, model.config.text_dim, **place)}
    return {
        "prompt_embeds": torch.randn(1, spec.text_tokens, model.config.text_embed_dim, **place),
        "pooled_prompt_embeds": torch.randn(1, model.config.pooled_projection_dim, **place),
        "prompt_attention_mask": torch.ones(1, spec.text_tokens, **place),
    }


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's own attention on `[B, S, H, D]`, without a mask."""
    heads = [x.transpose(1, 2) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2)


def layers_report(command: str, spec: Layers, lengths: list[int], setting: Setting) -> str:
    """Measures every length; the Markdown file."""
    head = ["frames", "tokens", "density", "backend"]
    for kind in KINDS:
        head += [f"{kind}: attention of a layer, dense, ms", "radial, ms", "rest of all layers, s"]
        head += ["step, dense, s", "step, radial, s", "faster"]
    rows, goals = [], []
    for frames in lengths:
        times = layer_times(spec, frames, setting)
        cells = [str(frames), str(times.tokens), f"{times.density:.3f}", times.backend]
        for kind in KINDS:
            slow, fast = times.step(kind, spec.depth, spec.dense_layers)
            cells += [f"{1e3 * seconds:.1f}" for seconds in times.attention[kind]]
            cells += [f"{seconds:.2f}" for seconds in (times.rest[kind], slow, fast)] + [
                f"{slow / fast:.2f}x"
            ]
            if kind == "training" and frames in spec.goals:
                goals.append(_goal(frames, slow / fast, spec.goals[frames]))
        rows.append("| " + " | ".join(cells) + " |")
    machine = pairs(versions(), hardware(setting.device))
    about = (
        f"{spec.name} with random weights, {spec.depth} layers of which {spec.dense_layers} stay dense, rank "
        f"{setting.rank}: what one of {SHARE} GPUs computes in a step that share a video's tokens (scripts/"
        f"length/layers.py says how), dense attention by torch. Medians of {setting.repeats} turns."
    )
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows]
    text = ["# Step times by layer", "", f"    {command}", "", *table, "", about, "", *goals, "", machine, ""]
    return "\n".join(text)


def _goal(frames: int, found: float, wanted: float) -> str:
    end = "reached" if found >= wanted else "not reached"
    return f"- {frames} frames, training: {wanted:g}x wanted, {found:.2f}x found, {end}"
