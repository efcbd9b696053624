"""Reads prepared latents for training, and orders them in batches.

A folder holds `index.json` and shards: `latents-00000.safetensors` with a tensor a clip, and
`text-00000.safetensors` with the tensors of the captions, each caption once.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from radial_attn.models.training.flow import Text
from scripts.lora.fingerprint import FORMAT, Fingerprint
from scripts.run.errors import UsageError, one_line
from scripts.run.files import read_text, user_path
from scripts.run.tables import parse_json

INDEX = "index.json"
SHARD = re.compile(r"(latents|text)-\d{5,9}\.safetensors")
OPEN_FILES = 16
AGAIN = "run the same scripts/prepare_latents.sh command again, which makes what is missing"
SAMPLE = {"name": str, "caption": str, "frames": int, "height": int, "width": int, "key": str}

Bucket = tuple[int, int, int]  # latent frames, rows and columns


@dataclass(frozen=True)
class Sample:
    """Holds one clip with its caption.

    Attributes:
        name: the video's, with the number of the clip's first frame if the video has several clips.
        latent_shape: `(C, F, h, w)`.
        shard, key: the file and the tensor in it.
    """

    name: str
    caption: str
    frames: int
    height: int
    width: int
    latent_shape: tuple[int, ...]
    shard: str
    key: str

    @property
    def bucket(self) -> Bucket:
        return self.latent_shape[1:]


def text_key(caption: str) -> str:
    """Returns the key of a caption's tensors."""
    return hashlib.sha256(caption.encode()).hexdigest()[:24]


class LatentStore:
    """Reads the samples of a folder on demand.

    Attributes:
        samples: in the order of the videos.
        fingerprint: of the model that made them.
        file: opens a shard, or returns it if it is one of the last few.
    """

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder = folder
        self.fingerprint: Fingerprint = content["fingerprint"]
        self.samples = []
        for entry in content["samples"]:
            stored = content["latents"][entry["key"]]
            self.samples.append(Sample(**entry, latent_shape=tuple(stored["shape"]), shard=stored["shard"]))
        self._texts: dict[str, str] = content["texts"]
        self.file = lru_cache(OPEN_FILES)(lambda shard: open_shard(folder / shard))

    @classmethod
    def open(cls, folder: str | Path) -> "LatentStore":
        """Opens a folder; UsageError if it has no index, is unfinished, or has broken files."""
        folder = user_path(folder)
        content = read_index(folder)
        if content is None:
            raise UsageError(f"data.latents: got {str(folder)!r}, which has no {INDEX}; {AGAIN}")
        wanted = [entry["key"] for entry in content["samples"]]
        done = sum(key in content["latents"] for key in wanted)
        captions = {text_key(caption) for caption in ["", *(e["caption"] for e in content["samples"])]}
        if not wanted or done < len(wanted) or captions - content["texts"].keys():
            raise UsageError(
                f"data.latents: got {str(folder)!r}, which is unfinished ({done} of {len(wanted)} clips); "
                "run the same scripts/prepare_latents.sh command to resume"
            )
        store = cls(folder, content)
        here = {shard: tensors(folder / shard) for shard in shards_of(content)}
        for sample in store.samples:
            if here[sample.shard].get(sample.key) != sample.latent_shape:
                raise UsageError(f"data.latents: {folder / sample.shard} lacks {sample.name}; {AGAIN}")
        for key in captions:
            if not any(name.startswith(f"{key}.") for name in here[content["texts"][key]]):
                raise UsageError(f"data.latents: {folder / content['texts'][key]} lacks a caption; {AGAIN}")
        return store

    @property
    def empty_text(self) -> Text:
        """Returns the text of the prompt '', which replaces captions that are left out."""
        return self._text("")

    def load(self, i: int) -> tuple[Tensor, Text]:
        """Returns latents `[C, F, h, w]` of sample `i`, and its caption as the pipeline's call takes it."""
        sample = self.samples[i]
        return self.file(sample.shard).get_tensor(sample.key), self._text(sample.caption)

    def digest(self, numbers: Sequence[int]) -> str:
        """Returns sixteen hex digits that identify these samples in this order."""
        keys = [(i, self.samples[i].key, self.samples[i].caption) for i in numbers]
        return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]

    def check(self, wanted: Fingerprint) -> None:
        """Raises UsageError if another model made the latents; names the parts that differ."""
        check_fingerprint(self.folder, self.fingerprint, wanted)

    def _text(self, caption: str) -> Text:
        key = text_key(caption)
        file = self.file(self._texts[key])
        names = [name for name in file.keys() if name.startswith(f"{key}.")]  # noqa: SIM118
        return {name.removeprefix(f"{key}."): file.get_tensor(name) for name in names}


class DamagedIndexError(UsageError):
    """Reports an index of latents that cannot be read."""


def read_index(folder: Path) -> dict[str, Any] | None:
    """Returns the content of the index, None without one.

    Raises:
        DamagedIndexError: it cannot be read as an index.
        UsageError: it has another format.
    """
    file = folder / INDEX
    if not file.exists():
        return None
    try:
        content = parse_json(read_text(file))
        version = content["fingerprint"]["format"]
        if lacking := {"latents", "samples", "texts"} - content.keys():
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
        for key, entry in content["latents"].items():
            if not SHARD.fullmatch(entry["shard"]) or not all(isinstance(x, int) for x in entry["shape"]):
                raise ValueError(f"its entry {key} is damaged")
        for entry in content["samples"]:
            if entry.keys() != SAMPLE.keys() or not all(isinstance(entry[x], SAMPLE[x]) for x in SAMPLE):
                raise ValueError("a sample is damaged")
        if not all(map(SHARD.fullmatch, content["texts"].values())):
            raise ValueError("a text is damaged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedIndexError(
            f"data.latents: {file} is not an index of latents ({one_line(error)}); {AGAIN}"
        ) from error
    if version != str(FORMAT):
        raise UsageError(
            f"data.latents: {file} has format {version}, must be {FORMAT}; prepare the videos in another "
            "folder with scripts/prepare_latents.sh, or remove this one first"
        )
    return content


def shards_of(content: Mapping[str, Any]) -> set[str]:
    """Returns the files that an index names."""
    return {entry["shard"] for entry in content["latents"].values()} | set(content["texts"].values())


def tensors(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a shard's tensors by name; UsageError if it is missing or not whole."""
    shard = open_shard(file)
    return {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}  # noqa: SIM118


def open_shard(file: Path) -> Any:
    """Opens a safetensors file without reading its tensors; UsageError if it is missing or not whole."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"data.latents: {file} cannot be read ({one_line(error)}); {AGAIN}") from error


def check_fingerprint(folder: Path, present: Fingerprint, wanted: Fingerprint) -> None:
    """Raises UsageError if fingerprints differ; names the parts that differ."""
    other = [part for part, value in wanted.items() if present.get(part) != value]
    if other:
        raise UsageError(
            f"data.latents: got {str(folder)!r}, whose latents were made with another {' and '.join(other)} "
            "than model.path and model.family name; use the model they were made with, or another folder"
        )


class BucketSampler:
    """Makes batches of samples of one bucket, in an order that depends on seed and step alone.

    An epoch takes every bucket in a shuffled order. If a bucket's size is no multiple of the batch, its last
    batch is filled from the beginning of that order.
    """

    def __init__(self, buckets: Mapping[Bucket, Sequence[int]], batch: int, seed: int) -> None:
        self.buckets = {bucket: list(members) for bucket, members in sorted(buckets.items())}
        self.batch, self.seed = batch, seed
        self._epoch = lru_cache(maxsize=2)(self._batches)

    @property
    def batches(self) -> int:
        """Counts the batches of an epoch."""
        return sum(-(-len(members) // self.batch) for members in self.buckets.values())

    def batch_at(self, step: int) -> list[int]:
        """Returns the samples of a step, counted from 0: a batch of one bucket."""
        epoch, index = divmod(step, self.batches)
        return self._epoch(epoch)[index]

    def _batches(self, epoch: int) -> list[list[int]]:
        batches = []
        for members in self.buckets.values():
            order = self._shuffled(members, f"{epoch}")
            for start in range(0, len(order), self.batch):
                batches.append([order[(start + i) % len(order)] for i in range(self.batch)])
        return [batches[index] for index in self._shuffled(range(len(batches)), f"{epoch} batches")]

    def _shuffled(self, numbers: Sequence[int], purpose: str) -> list[int]:
        """Shuffles numbers by digests, so the order is the same with every version of every library."""

        def digest(number: int) -> bytes:
            return hashlib.sha256(f"{self.seed} {purpose} {number}".encode()).digest()

        return sorted(numbers, key=digest)
