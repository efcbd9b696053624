"""Writes the folder of prepared latents shard by shard, each whole or not at all."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from scripts.lora.fingerprint import Fingerprint
from scripts.lora.latents import (
    INDEX,
    DamagedIndexError,
    check_fingerprint,
    open_shard,
    read_index,
    shards_of,
    tensors,
)
from scripts.run.errors import UsageError, cannot_write, one_line
from scripts.run.files import claim, remove_leftovers, replacing

MADE_BY = "made_by"  # key of a shard's header: fingerprint and dtype, from which a lost index is made again

Item = tuple[str, dict[str, Tensor]]  # key of a clip or caption, and its tensors by their names in the shard


class LatentShards:
    """Lists the contents of a folder's shards, and adds more shards.

    What a shard does not hold, although the index says so, is left out. A damaged index is made again from
    the shards.

    Attributes:
        latents: shard and shape by key of a clip, also of clips that are no longer wanted.
        texts: shard by key of a caption.
        lost: the shards that are missing or damaged, and the index if it is, with the reasons.
        is_new: whether the folder never held anything.
    """

    def __init__(self, folder: Path, dtype: str, shard_bytes: int) -> None:
        """Reads the index and the headers of the shards; UsageError if the embeddings have another dtype."""
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        self.lost: dict[str, str] = {}
        empty = {"fingerprint": {}, "dtype": dtype, "latents": {}, "texts": {}}
        try:
            self.content = read_index(folder) or empty
        except DamagedIndexError as error:
            self.lost[INDEX] = one_line(error.__cause__ or error)
            self.content = empty | self._from_shards()
        self.latents: dict[str, dict[str, Any]] = self.content["latents"]
        self.texts: dict[str, str] = self.content["texts"]
        self.is_new = not (self.latents or self.texts)
        self._leave_out_what_is_lost()
        if not self.is_new and (before := self.content.get("dtype")) != dtype:
            raise UsageError(
                f"data.latents: got {str(folder)!r}, which was made with model.dtype={before}; use that "
                "dtype, or another folder"
            )

    def _from_shards(self) -> dict[str, Any]:
        """Returns the content of an index, by the headers of all shards that one model made."""
        made: dict[str, Any] = {}
        latents, texts = {}, {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                shapes = tensors(file)
                about = json.loads((open_shard(file).metadata() or {}).get(MADE_BY, "null"))
            except ValueError as error:
                self.lost[file.name] = one_line(error.__cause__ or error)
                continue
            if about is None or about != (made := made or about):
                continue
            if file.name.startswith("text"):
                texts |= dict.fromkeys((name.partition(".")[0] for name in shapes), file.name)
            else:
                latents |= {name: {"shard": file.name, "shape": [*shape]} for name, shape in shapes.items()}
        return {**made, "latents": latents, "texts": texts}

    def _leave_out_what_is_lost(self) -> None:
        here: dict[str, dict[str, tuple[int, ...]]] = {}
        for shard in sorted(shards_of(self.content)):
            try:
                here[shard] = tensors(self.folder / shard)
            except UsageError as error:
                reason = one_line(error.__cause__ or error) if (self.folder / shard).exists() else "missing"
                here[shard], self.lost[shard] = {}, reason
        for key, entry in list(self.latents.items()):
            if here[entry["shard"]].get(key) != tuple(entry["shape"]):
                self.lost.setdefault(entry["shard"], "it lacks clips")
                del self.latents[key]
        held = {shard: {name.partition(".")[0] for name in shapes} for shard, shapes in here.items()}
        for key, shard in list(self.texts.items()):
            if key not in held[shard]:
                self.lost.setdefault(shard, "it lacks captions")
                del self.texts[key]

    def begin(self, fingerprint: Fingerprint, samples: list[dict[str, Any]]) -> None:
        """Writes the wanted samples to the index; UsageError if the folder holds another model's latents."""
        if not self.is_new:
            check_fingerprint(self.folder, self.content["fingerprint"], fingerprint)
        remove_leftovers(self.folder)
        for shard in self.lost.keys() - shards_of(self.content) - {INDEX}:
            (self.folder / shard).unlink(missing_ok=True)
        self.content |= {"fingerprint": fingerprint, "dtype": self.dtype, "samples": samples}
        self._write_index()

    def add_latents(self, items: Iterable[tuple[str, Tensor]]) -> None:
        """Writes clips, latents `[C, F, h, w]` by key, in shards of about `shard_bytes`."""
        used = [entry["shard"] for entry in self.latents.values()]
        for shard, part in self._add("latents", used, ((key, {key: x}) for key, x in items)):
            for key, named in part:
                self.latents[key] = {"shard": shard, "shape": list(named[key].shape)}
            self._write_index()

    def add_texts(self, items: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
        """Writes the tensors of captions by key, in such shards."""
        named = ((key, {f"{key}.{name}": x for name, x in text.items()}) for key, text in items)
        for shard, part in self._add("text", list(self.texts.values()), named):
            self.texts |= dict.fromkeys((key for key, _ in part), shard)
            self._write_index()

    def _add(self, kind: str, used: list[str], items: Iterable[Item]) -> Iterator[tuple[str, list[Item]]]:
        """Writes items to new shards, and yields each shard with its items for the index."""
        first = 1 + max((int(Path(shard).stem.rpartition("-")[2]) for shard in used), default=-1)
        for number, part in enumerate(self._parts(items), first):
            shard = f"{kind}-{number:05d}.safetensors"
            made = {name: self.content[name] for name in ("fingerprint", "dtype")}
            every = {name: x for _, named in part for name, x in named.items()}
            content = save(every, {MADE_BY: json.dumps(made, sort_keys=True)})
            write_whole(self.folder / shard, content)
            yield shard, part

    def _parts(self, items: Iterable[Item]) -> Iterator[list[Item]]:
        part, size = [], 0
        for key, named in items:
            part.append((key, {name: x.cpu().contiguous() for name, x in named.items()}))
            size += sum(x.nbytes for x in named.values())
            if size >= self.shard_bytes:
                yield part
                part, size = [], 0
        if part:
            yield part

    def _write_index(self) -> None:
        text = json.dumps(self.content, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.folder / INDEX, text.encode())


def write_whole(file: Path, content: bytes) -> None:
    """Makes the folder and writes a whole file; UsageError, or DiskFullError, if that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part, part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise cannot_write(
            error,
            f"data.latents: cannot write {str(file)!r} ({error.strerror}); make room, or name a folder that "
            "you may write to, then run the same command to resume: files that were written are whole",
        ) from error


@contextmanager
def locked(folder: Path, key: str = "data.latents") -> Iterator[None]:
    """Makes the folder if it is missing, and locks it for this process while the block runs.

    Raises:
        UsageError: it cannot be made or written, or another process has locked it.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            claimed = stack.enter_context(claim(folder / "folder"))
        except OSError as error:
            raise UsageError(
                f"{key}: got {str(folder)!r}, which cannot be written ({error.strerror}); name a folder you "
                "may write to"
            ) from error
        if not claimed:
            raise UsageError(
                f"{key}: got {str(folder)!r}, but another process is writing to it; use another folder, or "
                "wait until that process ends"
            )
        yield
