"""Identifies the model that made latents and text embeddings, by digests that are cheap to compute."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from radial_attn.models.pipeline.load import is_local, parts_named, read_index
from scripts.run.errors import UsageError, one_line
from scripts.run.hub_models import hub_unreachable

FORMAT = 1  # version of the folder of latents, and of how a video becomes latents
PATTERNS = ["model_index.json", "scheduler/*", "vae/*", "text_encoder*/*", "tokenizer*/*"]
UNUSED = ["*.bin", "*.fp16.safetensors", "*.msgpack", "*.onnx"]
TEXT = ("text_encoder", "tokenizer")
VAE_CONFIG = (
    "_class_name",
    "latents_mean",
    "latents_std",
    "patch_size",
    "scaling_factor",
    "shift_factor",
    "temperal_downsample",
)
NOT_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")

Fingerprint = dict[str, str]  # part -> what it is: "format", "family", "vae", "text encoder"


def fingerprint(path: str, family: str) -> Fingerprint:
    """Digests all that latents depend on: VAE weights and scaling, text encoders, tokenizers, family, format.

    A text encoder counts by its configuration, and by names, sizes and headers of its weight files. The
    weights themselves do not count, as they are tens of gigabytes.

    Args:
        path: folder in diffusers format, or hub id; files of a hub id that are missing here are fetched.

    Raises:
        UsageError: a hub id is out of reach, or a file is missing or broken.
    """
    folder = parts_folder(path)
    vae = folder / "vae"
    try:
        return {
            "format": str(FORMAT),
            "family": family,
            "vae": _hexdigest([_config(vae, VAE_CONFIG), *map(_content, _weights(vae))]),
            "text encoder": _hexdigest([_text_part(folder / name) for name in text_parts(folder)]),
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, struct.error) as error:
        reason = one_line(error)
        raise UsageError(
            f"model.path: got {path!r}, which cannot be read ({reason}); get it again"
        ) from error


def parts_folder(path: str) -> Path:
    """Returns the folder of VAE, text encoders and tokenizers: `path`, or the local copy of the hub's model.

    Fetches the copy if it is missing or incomplete; UsageError if the hub cannot be read.
    """
    if is_local(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    failure: Exception = FileNotFoundError("not all of it is there")
    for here in (True, False):
        try:
            copy = Path(
                snapshot_download(
                    path, allow_patterns=PATTERNS, ignore_patterns=UNUSED, local_files_only=here
                )
            )
        except (OSError, ValueError) as error:
            failure = error
            continue
        if is_complete(copy):
            return copy
    raise UsageError(hub_unreachable(path, failure)) from failure


def is_complete(folder: Path) -> bool:
    """Returns whether the weights and tokenizers that the index names are there."""
    if not (folder / "model_index.json").is_file():
        return False
    wanted = [folder / name for name in ("vae", *text_parts(folder))]
    return all(part.is_dir() and (part.name.startswith("tokenizer") or _has_weights(part)) for part in wanted)


def text_parts(folder: Path) -> list[str]:
    """Lists text encoders and tokenizers of the pipeline's index, in order of their names."""
    return [name for name in parts(folder) if name.startswith(TEXT)]


def parts(folder: Path) -> list[str]:
    """Lists the parts that the pipeline's index has, in order of their names."""
    return sorted(parts_named(read_index(str(folder))))


def _has_weights(part: Path) -> bool:
    """Returns whether all files of the shard list are there; without a list, whether any weights are."""
    lists = list(part.glob("*.safetensors.index.json"))
    if not lists:
        return bool(_weights(part))
    try:
        names = {name for file in lists for name in json.loads(file.read_bytes())["weight_map"].values()}
        return all((part / name).is_file() for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _weights(part: Path) -> list[Path]:
    return sorted(file for file in part.glob("*.safetensors") if ".fp16." not in file.name)


def _text_part(part: Path) -> str:
    if part.name.startswith("tokenizer"):
        files = sorted(file for file in part.iterdir() if file.is_file())
        return _hexdigest([part.name, *(f"{file.name} {_content(file)}" for file in files)])
    return _hexdigest([part.name, _config(part, without=NOT_CONFIG), *map(_outline, _weights(part))])


def _config(part: Path, entries: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> str:
    """Returns these entries of config.json as text, or all but those of `without`."""
    content: dict[str, Any] = json.loads((part / "config.json").read_text(encoding="utf-8"))
    kept = {name: content.get(name) for name in entries or content if name not in without}
    return json.dumps(kept, sort_keys=True)


def _outline(file: Path) -> str:
    """Returns name, size and header digest of a safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = stream.read(min(length, file.stat().st_size))
    return f"{file.name} {file.stat().st_size} {hashlib.sha256(header).hexdigest()}"


def _content(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hexdigest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
