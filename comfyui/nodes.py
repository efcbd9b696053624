"""Defines the nodes, for ComfyUI's V3 API, or as the classic mapping of a core that has none."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from radial_attn.dispatch import BACKENDS
from radial_attn.kernels.contract import FAR_FIELDS
from radial_attn.selection import SELECTIONS

from .override import PatchedModel
from .protocol import APPLY_MODEL, ON_CLEANUP, NotServedError, family_of
from .state import Settings

KEY = "radial_attention"  # of the wrapper, the callback and the attachment
CATEGORY = "advanced/radial attention"
ABOUT = {
    "RadialAttention": "Makes a video model's attention sparse: Wan, HunyuanVideo, Mochi, LTX, MiniMax-H3.",
    "RadialAttentionReport": "Says what Radial Attention did in the latest run, and why calls stayed dense.",
}
DISPLAY = {"RadialAttention": "Radial Attention", "RadialAttentionReport": "Radial Attention Report"}


class Input(NamedTuple):
    """Describes an input of a node: its name, ComfyUI's kind, and the options of the widget."""

    name: str
    kind: str
    options: dict[str, Any]


INPUTS = (
    Input(
        "model",
        "MODEL",
        {"tooltip": "A video model. Any other model passes through unchanged."},
    ),
    Input(
        "density",
        "FLOAT",
        {
            "default": Settings.density,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "Share of the attention that is computed: lower is faster and less exact. 1 is dense, "
            "0 takes the mask published for the model.",
        },
    ),
    Input(
        "selection",
        "COMBO",
        {
            "options": list(SELECTIONS),
            "default": Settings.selection,
            "tooltip": "static: the radial mask, the same for all heads. dense_step: each head chooses its "
            "blocks at the last dense step; closer to dense at the same density. profile: the blocks come "
            "from a calibration file.",
        },
    ),
    Input(
        "far_field",
        "COMBO",
        {
            "options": list(FAR_FIELDS),
            "default": Settings.far_field,
            "tooltip": "How the blocks that are left out count. none: not at all. mean: by their mean. "
            "linear: by their mean and a first-order term, the closest to dense.",
        },
    ),
    Input(
        "start_percent",
        "FLOAT",
        {
            "default": Settings.start_percent,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "Up to this fraction of the sampling all attention is dense. The first steps lay out "
            "the video: with few steps (turbo LoRAs) keep at least one dense.",
        },
    ),
    Input(
        "end_percent",
        "FLOAT",
        {
            "default": Settings.end_percent,
            "min": 0.0,
            "max": 1.0,
            "step": 0.01,
            "tooltip": "After this fraction of the sampling all attention is dense. Try 0.9 against flicker.",
        },
    ),
    Input(
        "dense_blocks",
        "STRING",
        {
            "default": Settings.dense_blocks,
            "tooltip": "Transformer blocks that are always dense, such as 0, 1, 38-39. Empty for none.",
        },
    ),
    Input(
        "backend",
        "COMBO",
        {
            "options": list(BACKENDS),
            "default": Settings.backend,
            "tooltip": "The kernel. On a GPU, auto times the kernels that run there, at the first sparse "
            "step, and takes the fastest. If dense attention is as fast, calls stay dense.",
        },
    ),
    Input(
        "min_tokens",
        "INT",
        {
            "default": Settings.min_tokens,
            "min": 0,
            "max": 1_000_000,
            "tooltip": "Shorter sequences stay dense, as sparse attention gains nothing there.",
        },
    ),
    Input(
        "profile",
        "STRING",
        {"default": Settings.profile, "tooltip": "Calibration file, only for selection = profile."},
    ),
)
REPORT_INPUTS = (
    Input("model", "MODEL", {"tooltip": "The model from Radial Attention."}),
    Input("after", "LATENT", {"tooltip": "The sampler's output: the report waits for it."}),
)


def patch_model(model: Any, **settings: Any) -> Any:
    """Returns a clone of a model patcher with radial attention; `settings` are those of `Settings`.

    The clone of a model that makes no video stays dense, with one line in the log. Raises ValueError for a
    setting with a wrong value.
    """
    patched = PatchedModel(Settings(**settings))
    clone = model.clone()
    for remove, kind in (
        (clone.remove_wrappers_with_key, APPLY_MODEL),
        (clone.remove_callbacks_with_key, ON_CLEANUP),
    ):
        remove(kind, KEY)
    clone.set_attachments(KEY, patched)
    try:
        family_of(model.get_model_object("diffusion_model"))
    except NotServedError as error:
        patched.note(str(error))
        return clone
    clone.add_wrapper_with_key(APPLY_MODEL, KEY, patched.apply_model)
    clone.add_callback_with_key(ON_CLEANUP, KEY, patched.clean_up)
    return clone


def report_text(model: Any) -> str:
    """Returns the report of a model patcher as text."""
    patched = model.get_attachment(KEY)
    if patched is None:
        return "Radial Attention is not on this model: connect the output of the node Radial Attention."
    return "\n".join(_lines(patched.report()))


def _lines(report: Mapping[str, Any]) -> list[str]:
    lines = []
    if not set(report["calls"]) - {"dense"}:
        lines.append("No call was sparse.")
    else:
        *sizes, text = report["grid"]
        video = " x ".join(map(str, sizes)) + (f" tokens and {text} of text" if text else " tokens")
        lines.append(f"Radial Attention over {video}, density {report['density']:.3f}")
    calls = ", ".join(f"{count} {name}" for name, count in report["calls"].items())
    lines.append(f"self-attention calls: {calls or 'none'}")
    dense = ", ".join(f"{count} {name}" for name, count in report["stayed_dense"].items() if count)
    lines.append(f"stayed dense: {dense or 'none'}")
    counts = report["model_calls"]
    seconds = [
        f"{name} {value:.3f} s (median of {counts[name]})"
        for name, value in report["seconds"].items()
        if value is not None
    ]
    lines.append(f"a call of the model: {', '.join(seconds) or 'none yet'}")
    for entry in report["tuning"]:
        times = ", ".join(f"{name} {value * 1e3:.2f} ms" for name, value in entry["seconds"].items())
        lines.append(f"measured: {times}; took {entry['backend']}")
    return lines + [f"note: {note}" for note in report["notes"]]


def classic_nodes() -> tuple[dict[str, type], dict[str, str]]:
    """Returns the nodes, and the names to show, as ComfyUI's classic mappings."""
    patch = _classic("RadialAttention", INPUTS, "MODEL", lambda self, **inputs: (patch_model(**inputs),))

    def report(self: Any, model: Any, after: Any) -> dict[str, Any]:
        text = report_text(model)
        return {"ui": {"text": (text,)}, "result": (text,)}

    nodes = {"RadialAttention": patch}
    nodes["RadialAttentionReport"] = _classic("RadialAttentionReport", REPORT_INPUTS, "STRING", report)
    nodes["RadialAttentionReport"].OUTPUT_NODE = True
    return nodes, DISPLAY


def _classic(name: str, inputs: tuple[Input, ...], output: str, execute: Any) -> type:
    """Makes a node class of the classic API."""
    required = {
        entry.name: (entry.options["options"] if entry.kind == "COMBO" else entry.kind, entry.options)
        for entry in inputs
    }
    attributes = {
        "INPUT_TYPES": classmethod(lambda cls: {"required": required}),
        "RETURN_TYPES": (output,),
        "FUNCTION": "execute",
        "CATEGORY": CATEGORY,
        "DESCRIPTION": ABOUT[name],
        "execute": execute,
    }
    return type(name, (), attributes)


def v3_extension() -> Any:
    """Returns the extension of ComfyUI's V3 API; ImportError if the core has none."""
    from comfy_api.latest import ComfyExtension, io, ui

    kinds = {"MODEL": io.Model, "FLOAT": io.Float, "INT": io.Int, "STRING": io.String, "COMBO": io.Combo}
    kinds["LATENT"] = io.Latent

    def schema(name: str, inputs: tuple[Input, ...], output: Any, **options: Any) -> Any:
        made = [kinds[entry.kind].Input(entry.name, **entry.options) for entry in inputs]
        about = {"node_id": name, "display_name": DISPLAY[name], "description": ABOUT[name]}
        return io.Schema(**about, category=CATEGORY, inputs=made, outputs=[output], **options)

    class RadialAttention(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            return schema("RadialAttention", INPUTS, io.Model.Output())

        @classmethod
        def execute(cls, **inputs: Any) -> Any:
            return io.NodeOutput(patch_model(**inputs))

    class RadialAttentionReport(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> Any:
            return schema("RadialAttentionReport", REPORT_INPUTS, io.String.Output(), is_output_node=True)

        @classmethod
        def execute(cls, model: Any, after: Any) -> Any:
            text = report_text(model)
            return io.NodeOutput(text, ui=ui.PreviewText(text))

    class Extension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return [RadialAttention, RadialAttentionReport]

    return Extension()
