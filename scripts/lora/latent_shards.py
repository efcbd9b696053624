"""Writes the folder of prepared latents shard by shard, each whole or not at all."""

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from scripts.lora.fingerprint import Fingerprint
from scripts.lora.latents import INDEX, check_fingerprint, read_index
from scripts.run.errors import DiskFullError, UsageError
from scripts.run.files import replacing

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOCK = ".lock"

Item = tuple[str, dict[str, Tensor]]  # key of a clip or caption, and its tensors by their names in the shard


class LatentShards:
    """Lists the contents of a folder's shards, and adds more shards.

    Attributes:
        latents: shard and shape by key of a clip, also of clips that are no longer wanted.
        texts: shard by key of a caption.
    """

    def __init__(self, folder: Path, dtype: str, shard_bytes: int) -> None:
        """Reads the index; UsageError if it is broken or its embeddings have another dtype."""
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        self.content = read_index(folder) or {"fingerprint": {}, "dtype": dtype, "latents": {}, "texts": {}}
        self.latents: dict[str, dict[str, Any]] = self.content["latents"]
        self.texts: dict[str, str] = self.content["texts"]
        if self and (before := self.content.get("dtype")) != dtype:
            raise UsageError(
                f"data.latents: got {str(folder)!r}, which was made with model.dtype={before}; use that "
                "dtype, or another folder"
            )

    def __bool__(self) -> bool:
        return bool(self.latents or self.texts)

    def begin(self, fingerprint: Fingerprint, samples: list[dict[str, Any]]) -> None:
        """Writes the wanted samples to the index; UsageError if the folder holds another model's latents."""
        if self:
            check_fingerprint(self.folder, self.content["fingerprint"], fingerprint)
        for part in self.folder.glob(".*.part"):  # a killed run left it
            part.unlink()
        self.content |= {"fingerprint": fingerprint, "dtype": self.dtype, "samples": samples}
        self._write_index()

    def add_latents(self, items: Iterable[tuple[str, Tensor]]) -> None:
        """Writes clips, latents `[C, F, h, w]` by key, in shards of about `shard_bytes`."""
        used = [entry["shard"] for entry in self.latents.values()]
        for shard, part in self._add("latents", used, ((key, {key: x}) for key, x in items)):
            for key, tensors in part:
                self.latents[key] = {"shard": shard, "shape": list(tensors[key].shape)}
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
            content = save({name: x for _, tensors in part for name, x in tensors.items()})
            write_whole(self.folder / shard, content)
            yield shard, part

    def _parts(self, items: Iterable[Item]) -> Iterator[list[Item]]:
        part, size = [], 0
        for key, tensors in items:
            part.append((key, {name: x.cpu().contiguous() for name, x in tensors.items()}))
            size += sum(x.nbytes for x in tensors.values())
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
        raise (DiskFullError if error.errno in FULL else UsageError)(
            f"data.latents: cannot write {str(file)!r} ({error.strerror}); make room, or name a folder that "
            "you may write to, then run the same command to resume: files that were written are whole"
        ) from error


@contextmanager
def locked(folder: Path, key: str = "data.latents") -> Iterator[None]:
    """Makes the folder if it is missing, and locks it for this process while the block runs.

    Raises:
        UsageError: it cannot be made or written, or another process has locked it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise UsageError(
            f"{key}: got {str(folder)!r}, which cannot be written ({error.strerror}); name a folder you may "
            "write to"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{key}: got {str(folder)!r}, but another process is writing to it; use another folder, or "
                "wait until that process ends"
            ) from error
        yield
