"""Checkpoints of LoRA training: written whole or not at all, the last few kept; and the log beside them.

What is drawn at random in a step follows from the seed and the step's number, and so do the learning rate and
the samples: a checkpoint needs the step, the adapter and the optimizer, nothing else.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from scripts.run.errors import DiskFullError, UsageError, one_line
from scripts.run.files import write_text

STATE, CONFIG, LOG = "state.pt", "config.json", "log.jsonl"
PREFIX = "step_"
FULL = (28, 122)  # ENOSPC, EDQUOT


class Checkpoints:
    """The checkpoints in a run's folder, `step_000100` and so on."""

    def __init__(self, folder: Path, keys: dict[str, Any], keep: int) -> None:
        """`keys`: the configuration of the run, flat."""
        self.folder, self.keys, self.keep = folder, keys, keep

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there and whole, ascending."""
        found = (path for path in self.folder.glob(f"{PREFIX}*") if (path / STATE).is_file())
        numbers = (path.name.removeprefix(PREFIX) for path in found)
        return sorted(int(number) for number in numbers if number.isdecimal())

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.folder / f"{PREFIX}{step:06d}"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint and then takes old ones away.

        Raises:
            DiskFullError: no room; the checkpoints of before are whole.
        """
        final = self.path(step)
        part = final.with_name(f".{final.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
            with (part / STATE).open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
        except (OSError, RuntimeError) as error:
            raise _unsaved(final, error) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))

    def load(self, device: str) -> dict[str, Any] | None:
        """The newest checkpoint; None where there is none.

        Raises:
            UsageError: it cannot be read.
        """
        if not (steps := self.steps()):
            return None
        file = self.path(steps[-1]) / STATE
        try:
            return torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # a broken pickle raises whatever it likes
            raise UsageError(
                f"checkpoint {file} cannot be read ({one_line(error)}); remove its folder to go on from the "
                "one before"
            ) from error


def _unsaved(path: Path, error: BaseException) -> UsageError:
    """A write of torch that fails may hide the reason behind an error of its own."""
    number = getattr(error, "errno", None)
    if number is None and isinstance(error.__context__, OSError):
        number = error.__context__.errno
    reason = os.strerror(number) if number else one_line(error)
    kind = DiskFullError if number in FULL else UsageError
    return kind(f"{path} cannot be written ({reason}); the checkpoint before it is whole")


def check_config(
    folder: Path, now: dict[str, Any], *, free: tuple[str, ...], never: tuple[str, ...], accept: bool
) -> None:
    """Raises UsageError where the folder holds a run with another configuration, with the differences.

    Args:
        now: the configuration, flat.
        free, never: beginnings of keys that may differ, and of those that may not even with `accept`.
        accept: takes the other differences.
    """
    file = folder / CONFIG
    if not file.is_file():
        return
    before = _read(file)
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]
    refused = [key for key in changed if not accept or key.startswith(never)]
    if refused:
        listed = ", ".join(f"{key} {before.get(key)} -> {now.get(key)}" for key in refused)
        hint = "" if any(key.startswith(never) for key in refused) else ", or output.accept_changes=true"
        raise UsageError(
            f"output.path: {folder} holds a run with other settings ({listed}); allowed: the same settings, "
            f"another folder{hint}"
        )


def write_config(folder: Path, keys: dict[str, Any]) -> None:
    """Writes a run's configuration into its folder."""
    write_text(folder / CONFIG, json.dumps(keys, indent=2))


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{file} cannot be read ({one_line(error)})") from error


class Log:
    """Lines of JSON, one an entry, and the same numbers for TensorBoard."""

    def __init__(self, folder: Path, first: int) -> None:
        """`first`: the step that the run begins with; what stands there of later ones is taken back."""
        from torch.utils.tensorboard import SummaryWriter

        self._file = folder / LOG
        kept = [line for line in self._lines() if json.loads(line)["step"] <= first]
        write_text(self._file, "".join(f"{line}\n" for line in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)

    def _lines(self) -> list[str]:
        """Whole entries of before: a kill may have cut the last one."""
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        return [line for line in lines if line.endswith("}")]

    def write(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step, counted from 1."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what TensorBoard has not been given yet."""
        self._board.close()
