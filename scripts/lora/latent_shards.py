"""The folder of prepared latents as it is written: shard after shard, each whole or not at all."""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
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

Item = tuple[str, dict[str, Tensor]]  # key and the tensors of a clip or caption, by their names in the shard


class LatentShards:
    """What a folder's whole shards hold, and how more come to it.

    Attributes:
        latents: key of a clip -> its shard and shape; also those of clips that are not asked for any more.
        texts: key of a caption -> its shard.
    """

    def __init__(self, folder: Path, dtype: str, shard_bytes: int) -> None:
        """Raises UsageError for a folder that holds something broken, or embeddings in another data type."""
        self.folder, self.dtype, self.shard_bytes = folder, dtype, shard_bytes
        self.content = read_index(folder) or {"fingerprint": {}, "dtype": dtype, "latents": {}, "texts": {}}
        self.latents: dict[str, dict[str, Any]] = self.content["latents"]
        self.texts: dict[str, str] = self.content["texts"]
        if self and (found := self.content.get("dtype")) != dtype:
            raise UsageError(
                f"data.latents: got {str(folder)!r}, which was made with model.dtype={found}; allowed: that, "
                "or another folder"
            )

    def __bool__(self) -> bool:
        return bool(self.latents or self.texts)

    def begin(self, fingerprint: Fingerprint, samples: list[dict[str, Any]]) -> None:
        """Writes down what is to be made; UsageError where the folder holds latents of another model."""
        if self:
            check_fingerprint(self.folder, self.content["fingerprint"], fingerprint)
        self.content |= {"fingerprint": fingerprint, "dtype": self.dtype, "samples": samples}
        self._write_index()

    def add_latents(self, items: Iterable[tuple[str, Tensor]]) -> None:
        """Writes clips, latents `[C, F, h, w]` by key, in shards of about `shard_bytes`."""

        def note(shard: str, part: list[Item]) -> None:
            for key, tensors in part:
                self.latents[key] = {"shard": shard, "shape": list(tensors[key].shape)}

        used = [entry["shard"] for entry in self.latents.values()]
        self._add("latents", used, ((key, {key: x}) for key, x in items), note)

    def add_texts(self, items: Iterable[tuple[str, dict[str, Tensor]]]) -> None:
        """Writes the tensors of captions, likewise."""

        def note(shard: str, part: list[Item]) -> None:
            self.texts |= dict.fromkeys((key for key, _ in part), shard)

        named = ((key, {f"{key}.{name}": x for name, x in text.items()}) for key, text in items)
        self._add("text", list(self.texts.values()), named, note)

    def _add(
        self, kind: str, used: list[str], items: Iterable[Item], note: Callable[[str, list[Item]], None]
    ) -> None:
        number = 1 + max((_number(shard) for shard in used), default=-1)
        for part in self._parts(items):
            shard = f"{kind}-{number:05d}.safetensors"
            self._write(shard, lambda file, part=part: _save(part, file))
            note(shard, part)
            self._write_index()
            number += 1

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
        self._write(INDEX, lambda file: file.write_text(text, encoding="utf-8"))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        """Under a temporary name first; UsageError, or DiskFullError, where that fails."""
        try:
            with replacing(self.folder / name) as file:
                write(file)
        except OSError as error:
            raise (DiskFullError if error.errno in FULL else UsageError)(
                f"data.latents: cannot write {str(self.folder / name)!r} ({error.strerror}); allowed: a "
                "folder with room; what was written before is whole, and the same command goes on from there"
            ) from error


def _number(shard: str) -> int:
    return int(Path(shard).stem.rpartition("-")[2])


def _save(part: list[Item], file: Path) -> None:
    content = save({name: x for _, tensors in part for name, x in tensors.items()})
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def locked(folder: Path, key: str = "data.latents") -> Iterator[None]:
    """The folder, made where it is missing, for this process alone.

    Raises:
        UsageError: it cannot be made or written, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise UsageError(
            f"{key}: got {str(folder)!r}, which cannot be written ({error.strerror}); allowed: a folder you "
            "may write to"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{key}: got {str(folder)!r}, into which another process is writing; allowed: another "
                "folder, or the same when that has ended"
            ) from error
        yield
