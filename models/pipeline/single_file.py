"""Loads a transformer from one file: safetensors or GGUF, in its authors' layout, ComfyUI's or diffusers'.

diffusers' `from_single_file` maps names by fixed sizes (HunyuanVideo 3072 wide, Mochi of 48 layers), does not
apply the scales of 8-bit weights, and leaves out tensors that it does not know. So names are mapped here, by
the tables of LoRA files, and each tensor of the file is used or named in an error.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..lora.keys import Part, Shape, layer_names, listed
from ..runtime.transformers import NAMES
from .weights import AGAIN, INTEGERS, Stored, read_tensors

CLASSES = (  # those whose names are known
    "WanTransformer3DModel",
    "WanVACETransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "WanAnimateTransformer3DModel",
    "MochiTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
    "SkyReelsV2Transformer3DModel",
    "ChronoEditTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel",
    "CosmosTransformer3DModel",
    "MiniMaxH3Transformer3DModel",
    "Kandinsky5Transformer3DModel",  # of which all have the same names
)
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "model.", "transformer.", "net.")
# In a file with a prefix: parts of the pipeline that come from its folder all the same.
OTHERS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.", "clip_vision.")
OTHERS += ("audio_vae.", "vocoder.", "text_embedding_projection.")
# Behind the prefix, by class: other parts of the pipeline, counters of training, and computed tables.
BESIDE = {
    "LTX2VideoTransformer3DModel": r"(video|audio)_embeddings_connector\.",
    "CosmosTransformer3DModel": r"accum_|pos_embedder\.|.*\._extra_state$",
    "WanAnimateTransformer3DModel": r"motion_encoder\..*\.kernel$",
    "MiniMaxH3Transformer3DModel": r"rope\.inv_freq$",
}
PRUNED = "adaln_t_table"  # of ComfyUI's smaller files of MiniMax-H3
# Of 8-bit weights, in ComfyUI's older and newer spelling. Scales of inputs serve 8-bit products alone.
SCALES, INPUT_SCALES = (".scale_weight", ".weight_scale"), (".scale_input", ".input_scale")
MARK, ABOUT = "scaled_fp8", ".comfy_quant"
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")
PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
GGUF, GGUF_SHAPE = b"GGUF", "comfy.gguf.orig_shape."
OTHER_TYPE = "use a file in fp16, bf16 or fp8, or a GGUF from Q2_K to Q8_0"
INSTALL = "pip install 'gguf>=0.17'"


class Source(NamedTuple):
    """Says where a parameter of a shape comes from: key of the tensor, its rows, key of its scale or ""."""

    key: str
    part: Part
    shape: Shape
    scale: str


@dataclass(frozen=True)
class SingleFile:
    """Holds a file whose tensors are exactly those of a transformer.

    Attributes:
        tensors: as the file stores them, by key; of GGUF with the shape of the values.
        sources: for each parameter of the transformer.
        packed: parameters that stay as GGUF stores them; each layer unpacks its own when it runs.
    """

    file: Path
    tensors: Mapping[str, Stored]
    sources: Mapping[str, Source]
    packed: frozenset[str]

    @property
    def is_gguf(self) -> bool:
        return _is_gguf(self.file)

    @property
    def types(self) -> list[str]:
        """Returns the types of the weights, as the file names them."""
        return sorted({self.tensors[source.key].dtype for source in self.sources.values()})

    @property
    def elements(self) -> int:
        """Counts the weights that are loaded in the data type of the run."""
        shapes = {source.key: self.tensors[source.key].shape for source in self._of(packed=False)}
        return sum(map(math.prod, shapes.values()))

    @property
    def packed_bytes(self) -> int:
        """Counts the bytes of the weights that stay packed."""
        if not self.packed:
            return 0
        import gguf

        total = 0
        for key in {source.key for source in self._of(packed=True)}:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.tensors[key].dtype]]
            total += math.prod(self.tensors[key].shape) // block * size
        return total

    def _of(self, *, packed: bool) -> Iterable[Source]:
        return (source for name, source in self.sources.items() if (name in self.packed) == packed)

    def load(self, path: str, name: str, dtype: torch.dtype, quantization: Any = None) -> torch.nn.Module:
        """Returns the transformer with the weights of the file, configured as `name` of the model at `path`.

        Weights get `dtype`, and float32 in modules that diffusers keeps so, with their scales multiplied in.

        Args:
            quantization: diffusers' configuration that stores weights in fewer bits; None if some are packed.
        """
        cls, config, folder = configuration(path, name)
        kept = () if quantization is not None else cls._keep_in_fp32_modules or ()
        types = {x: torch.float32 if set(kept) & set(x.split(".")) else dtype for x in self.sources}
        state = self._read_gguf(types) if self.is_gguf else self._read_safetensors(types)
        if self.packed:
            from diffusers import GGUFQuantizationConfig

            quantization = GGUFQuantizationConfig(compute_dtype=dtype)
        if quantization is not None:
            where = {"config": path, "subfolder": folder}
            options = {"torch_dtype": dtype, "quantization_config": quantization}
            return cls.from_single_file(state, **where, **options)
        from accelerate import init_empty_weights

        with init_empty_weights():  # buffers, which no file holds, are made
            model = cls.from_config(config)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _read_safetensors(self, types: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        from safetensors import safe_open

        state, by_key = {}, {}
        for name, source in self.sources.items():
            by_key.setdefault(source.key, []).append(name)
        with safe_open(self.file, framework="pt") as content:
            for key, names in by_key.items():
                tensor, scale = content.get_tensor(key), self.sources[names[0]].scale
                if scale:  # one number, or one a row
                    scales = content.get_tensor(scale).float()
                    tensor = tensor.float() * scales.reshape(-1, *[1] * (tensor.ndim - 1))
                for name in names:
                    state[name] = _rows(tensor, self.sources[name].part).to(types[name])
        return self._shaped(state)

    def _read_gguf(self, types: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
        from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

        read, state = {tensor.name: tensor for tensor in _open_gguf(self.file).tensors}, {}
        for name, source in self.sources.items():
            kind, tensor = read[source.key].tensor_type, torch.from_numpy(read[source.key].data.copy())
            if name not in self.packed and tensor.dtype == torch.uint8:
                tensor = dequantize_gguf_tensor(GGUFParameter(tensor, quant_type=kind))
                tensor = torch.Tensor(tensor).reshape(self.tensors[source.key].shape)
            rows = _rows(tensor, source.part)
            if name in self.packed:
                state[name] = GGUFParameter(rows, quant_type=kind)
            else:
                state[name] = rows.to(types[name])
        return self._shaped(state)

    def _shaped(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns plain tensors in the shape of their parameters, which may have other axes of 1."""
        return {
            name: value if name in self.packed else value.reshape(self.sources[name].shape).contiguous()
            for name, value in state.items()
        }


def _rows(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """Returns the rows of a tensor that a part takes, in its order."""
    return torch.cat([tensor[start:end] for start, end in part.rows]) if part.rows else tensor


def find_single_file(file: str | Path, path: str, name: str) -> SingleFile:
    """Returns the file for the transformer `name` of the model at `path`; reads no weights.

    Raises the errors of `match_file`, and FileNotFoundError if the model has no configuration of it.
    """
    cls, config, _ = configuration(path, name)
    with torch.device("meta"):
        return match_file(file, cls.from_config(config))


def configuration(path: str, name: str) -> tuple[Any, dict[str, Any], str]:
    """Returns class and configuration of a transformer, and its folder; a lacking second one is as the first.

    Raises FileNotFoundError if there is no configuration.
    """
    import diffusers

    files = [folder for folder in (name, NAMES[0]) if (Path(path) / folder / "config.json").is_file()]
    folder = files[0] if files else name
    try:
        config = diffusers.WanTransformer3DModel.load_config(path, subfolder=folder)
    except OSError as error:
        raise FileNotFoundError(
            f"{path} has no {folder}/config.json, which a file of weights needs; download it"
        ) from error
    return getattr(diffusers, config["_class_name"]), config, folder


def match_file(file: str | Path, model: torch.nn.Module) -> SingleFile:
    """Returns which tensor of a file each parameter of `model` takes; reads no weights.

    `model` needs no data. Tensors of a VAE and of text encoders beside the transformer are left alone.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it is GGUF, and the package gguf is not installed.
        ValueError: the file is broken or of another model, lacks a tensor, has one more or one of another
            shape, or stores weights in a way that is not known. The message names file and tensor.
    """
    file, cls = Path(file), type(model).__name__
    if cls not in CLASSES:
        raise ValueError(
            f"{file}: the weights of a {cls} are read from its folder only, not from one file; known: "
            f"{', '.join(CLASSES)}"
        )
    tensors, formats = read_header(file)
    prefix = next((x for x in PREFIXES if any(key.startswith(x) for key in tensors)), "")
    own = {key: x for key, x in tensors.items() if not _is_beside(key, prefix, cls)}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    sources = _sources(own, prefix, shapes)
    if 2 * len(sources) < len(shapes):
        theirs, ours = listed(list(own), 2), listed(list(shapes), 2)
        raise ValueError(
            f"{file} is of another model: {theirs} in place of {ours} of {cls}; name a file of this model, "
            "or load the model of this file"
        )
    _check_types(file, own, sources, {key.removeprefix(prefix): x for key, x in formats.items()}, prefix)
    for name, source in sources.items():
        here, wanted = own[source.key].shape, source.part.of(shapes[name])
        if [size for size in here if size != 1] != [size for size in wanted if size != 1]:
            raise ValueError(
                f"{file} has {source.key} of shape {list(here)}, but {cls} needs {list(wanted)}; name a file "
                "of this model, or load the model of this file"
            )
    if missing := [name for name in shapes if name not in sources]:
        count = f"{len(missing)} tensors" if len(missing) > 1 else "1 tensor"
        raise ValueError(f"{file} lacks {count} of {cls}, in diffusers' names: {listed(missing, 3)}; {AGAIN}")
    used = {key for source in sources.values() for key in (source.key, source.scale)}
    scaled = {source.key.rpartition(".")[0] for source in sources.values() if source.scale}
    used |= {f"{layer}{ending}" for layer in scaled for ending in (*INPUT_SCALES, ABOUT)}
    if strange := sorted(own.keys() - used - {MARK, prefix + MARK}):
        raise ValueError(
            f"{file} holds {listed(strange, 3)}, but {cls} has no place for it; name a file of this model"
        )
    packed = (name for name, source in sources.items() if _stays_packed(model, name, source, own[source.key]))
    return SingleFile(file, own, sources, frozenset(packed))


def _is_beside(key: str, prefix: str, cls: str) -> bool:
    """Tells whether a tensor is of something else than the transformer of this class."""
    outside = bool(prefix) and key.startswith(OTHERS)
    return outside or (cls in BESIDE and re.match(BESIDE[cls], key.removeprefix(prefix)) is not None)


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, dict[str, Any]]]:
    """Returns the tensors of a file, and what ComfyUI's newer files say of a layer's 8 bits, by its name.

    Raises FileNotFoundError, ImportError or ValueError as `match_file`.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file; name a safetensors or GGUF file")
    if _is_gguf(file):
        return _read_gguf_header(file), {}
    if file.suffix.lower() not in (".safetensors", ".sft"):
        raise ValueError(f"{file} is neither safetensors nor a whole GGUF file; {AGAIN}, or name another")
    from safetensors import safe_open

    tensors, formats = read_tensors(file), {}
    with safe_open(file, framework="pt") as content:
        try:
            about = json.loads((content.metadata() or {}).get("_quantization_metadata", "{}"))
            formats |= about.get("layers", {})
            for key in (key for key in tensors if key.endswith(ABOUT)):
                formats[key.removesuffix(ABOUT)] = json.loads(bytes(content.get_tensor(key).tolist()))
            formats = {layer: dict(settings) for layer, settings in formats.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} says in no known way how it is quantised ({error}); {AGAIN}") from error
    return tensors, formats


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(GGUF)) == GGUF


def _open_gguf(file: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"{file} is a GGUF file, which needs gguf; install it with: {INSTALL}") from error
    try:
        return GGUFReader(file)
    except (ValueError, LookupError, ArithmeticError, TypeError) as error:
        raise ValueError(f"{file} is not a whole GGUF file ({error}); {AGAIN}") from error


def _read_gguf_header(file: Path) -> dict[str, Stored]:
    """Returns the tensors of GGUF with the shapes of their values, of which some have been flattened."""
    reader, tensors = _open_gguf(file), {}
    for tensor in reader.tensors:
        shape, original = tensor.shape.tolist()[::-1], reader.get_field(f"{GGUF_SHAPE}{tensor.name}")
        if original is not None:
            shape = [int(original.parts[index][0]) for index in original.data]
        tensors[tensor.name] = Stored(file, tuple(shape), tensor.tensor_type.name)
    return tensors


def _sources(tensors: Mapping[str, Stored], prefix: str, shapes: Mapping[str, Shape]) -> dict[str, Source]:
    """Returns the source of each parameter that a tensor of the file is named after."""
    layers, sources = layer_names(shapes), {}
    for key in tensors:
        layer, dot, kind = key.removeprefix(prefix).rpartition(".")
        if kind in ("weight", "bias", "scale"):  # the core of ComfyUI calls the weight of some norms a scale
            ending = ".bias" if kind == "bias" else ".weight"
        else:
            layer, ending = f"{layer}{dot}{kind}", ""
        scales = [scale for x in SCALES if (scale := key.rpartition(".")[0] + x) in tensors]
        for part in layers.get(layer, ()):
            name = part.layer if part.layer in shapes else part.layer + ending
            if name in shapes:
                scale = scales[0] if scales and ending == ".weight" else ""
                sources[name] = Source(key, part, shapes[name], scale)
    return sources


def _check_types(
    file: Path,
    tensors: Mapping[str, Stored],
    sources: Mapping[str, Source],
    formats: Mapping[str, Mapping[str, Any]],
    prefix: str,
) -> None:
    """Raises ValueError for a type that is not known, scales that do not fit, and a pruned file.

    `formats`: settings of layers, by names without the prefix.
    """
    if prefix + PRUNED in tensors:
        raise ValueError(f"{file} is pruned: it has {PRUNED}, no time embedder; take the whole file")
    if _is_gguf(file):
        from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

        known = {"F64", "F32", "F16", *(kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES)}
    else:
        known = set(PLAIN)
    some_scaled = any(source.scale for source in sources.values())
    for source in sources.values():
        (_, shape, kind), layer = tensors[source.key], source.key.rpartition(".")[0]
        about = formats.get(layer.removeprefix(prefix), {}) if source.key.endswith(".weight") else {}
        is_small = kind.startswith("F8")
        if kind not in known or about.get("format", EIGHT_BITS[0]) not in EIGHT_BITS or about.get("convrot"):
            name = about.get("format", kind)
            raise ValueError(f"{file} has {source.key} as {name}, which is not read; {OTHER_TYPE}")
        if some_scaled and is_small and not source.scale:
            raise ValueError(f"{file} lacks {layer}{SCALES[0]}, the scale of its 8-bit weight; {AGAIN}")
        if not source.scale:
            continue
        size = math.prod(tensors[source.scale].shape)
        if not is_small or size not in (1, shape[0]) or tensors[source.scale].dtype in INTEGERS:
            raise ValueError(
                f"{file} has {source.scale} of shape {list(tensors[source.scale].shape)} for a weight of "
                f"{list(shape)} in {kind}, which is not read; {OTHER_TYPE}"
            )


def _stays_packed(model: torch.nn.Module, name: str, source: Source, stored: Stored) -> bool:
    """Returns whether diffusers multiplies by a packed weight: that of a linear layer, not of a fp32 one."""
    layer, _, kind = name.rpartition(".")
    if (
        stored.dtype in PLAIN
        or kind != "weight"
        or set(model._keep_in_fp32_modules or ()) & set(name.split("."))
    ):
        return False
    is_matrix = isinstance(model.get_submodule(layer), torch.nn.Linear)
    return is_matrix and stored.shape == source.part.of(source.shape)
