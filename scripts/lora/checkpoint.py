"""Saves checkpoints of LoRA training, resumes from them, and writes the log and the adapter that users load.

Random numbers, learning rate and samples of a step depend on the seed and the step's number alone. So a
checkpoint needs the step, the adapter and the optimizer, nothing else.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as state_dicts

from radial_attn.models.lora.files import read_header
from radial_attn.models.lora.keys import listed
from radial_attn.models.training.adapter import FILE, adapter_settings, holds_adapter, save_adapter
from scripts.lora.step import Run
from scripts.run.errors import UsageError, cannot_write, one_line, reason_of
from scripts.run.files import replacing, write_text
from scripts.run.processes import rank
from scripts.run.results import read_tensors

FREE = (  # beginnings of keys that do not change what is learnt
    "output.",
    "validation.videos",
    "validation.steps",
    "validation.guidance_scale",
    "model.device",
    "attention.tune",
    "train.save_every",
    "train.most_skipped",
    "data.folder",
    "data.table",
    "data.latents",
    "data.skip_bad",
    "data.shard_mb",
    "parallel.shard",
)
NEVER = ("model.", "lora.rank", "lora.targets")  # beginnings of keys that no resumed run may change
WHOLE = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True)
BEST = "best"
STATE, CONFIG, LOG = "state.pt", "config.json", "log.jsonl"
STATE_KEYS = {"step", "trained", "optimizer", "average", "skipped", "in_a_row", "best"}
PREFIX = "step_"


class Checkpoints:
    """Saves and loads the checkpoints in a run's folder, `step_000100` and so on."""

    def __init__(self, folder: Path, keys: dict[str, Any], keep: int) -> None:
        """Sets the folder; `keys`: the configuration of the run, flat."""
        self.folder, self.keys, self.keep = folder, keys, keep

    def check_config(self, accept: bool) -> None:
        """Raises UsageError if the folder holds a run with another configuration; names the differences.

        `accept`: whether to allow differences in all keys but those of `NEVER`.
        """
        file = self.folder / CONFIG
        if not file.is_file() and not self.steps():
            return
        try:
            before = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError, RecursionError) as error:
            before = self._keys_of_checkpoint(error)
        keys = sorted(before.keys() | self.keys.keys())
        changed = [key for key in keys if before.get(key) != self.keys.get(key) and not key.startswith(FREE)]
        never = [key for key in changed if key.startswith(NEVER)]
        if refused := never if accept else changed:
            texts = {key: f"{key} {before.get(key)} -> {self.keys.get(key)}" for key in refused}
            if "samples" in texts:
                texts["samples"] = "other clips, captions or held-out samples in data.latents"
            raise UsageError(
                f"output.path: {self.folder} holds a run with other settings ({', '.join(texts.values())}); "
                "use the same settings, or another folder"
                f"{'' if never else ', or output.accept_changes=true'}"
            )

    def _keys_of_checkpoint(self, error: Exception) -> dict[str, Any]:
        """Returns the keys of the run from its newest checkpoint, if `config.json` cannot be read."""
        file, reason = self.folder / CONFIG, reason_of(error)
        state = self._read() or {"keys": self.keys}  # without a checkpoint there is nothing to protect
        if "keys" not in state:
            raise UsageError(
                f"output.path: {file} cannot be read ({reason}), so the run's settings are unknown; use "
                "another folder"
            ) from error
        _note(f"{file} cannot be read ({reason}); it is written again")
        return state["keys"]

    def steps(self) -> list[int]:
        """Returns the steps of the whole checkpoints, ascending."""
        numbers = (path.parent.name.removeprefix(PREFIX) for path in self.folder.glob(f"{PREFIX}*/{STATE}"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint after `step` steps."""
        return self.folder / f"{PREFIX}{step:06d}"

    def save(self, run: Run, step: int) -> None:
        """Writes a checkpoint after `step` steps, whole or not at all, and the adapter; removes old ones.

        Raises:
            UsageError, DiskFullError: it cannot be written.
        """
        parts = run.transformer, run.optimizer.optimizer
        optimizer = state_dicts.get_optimizer_state_dict(*parts, options=WHOLE)
        trained = {name: value.detach().cpu() for name, value in run.trained.items()}
        if run.accelerator.is_main_process:
            state = {"step": step, "trained": trained, "optimizer": optimizer, "average": run.average}
            state |= {"skipped": run.skipped, "in_a_row": run.in_a_row, "best": run.best}
            state |= {"keys": self.keys}
            self._write(step, state)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(old))
            write_adapter(run, self.folder, step)
        run.accelerator.wait_for_everyone()

    def _write(self, step: int, state: dict[str, Any]) -> None:
        folder = self.path(step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / STATE) as part, part.open("wb") as stream:
                torch.save(state, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            with suppress(OSError):  # unless it holds a checkpoint
                folder.rmdir()
            message = f"{folder} cannot be written ({reason_of(error)}); the checkpoint before it is whole"
            raise cannot_write(error, message) from error

    def restore(self, run: Run) -> int:
        """Loads the newest checkpoint into the run, and returns the step to resume from; 0 without one.

        Raises:
            UsageError: there are checkpoints, but none can be read.
        """
        state = self._read(run.trained)
        if run.accelerator.is_main_process:
            for part in self.folder.rglob(".*.part*"):  # of a killed run: this one has the folder's lock
                part.unlink()
            write_text(self.folder / CONFIG, json.dumps(self.keys, indent=2))
        if state is None:
            return 0
        run.set_adapter(state["trained"])
        parts = run.transformer, run.optimizer.optimizer
        state_dicts.set_optimizer_state_dict(*parts, state["optimizer"], options=WHOLE)
        if run.average is not None:  # begins with the adapter if the run had no mean before
            mean = state["average"] or state["trained"]
            run.average = {name: x.to(run.accelerator.device) for name, x in mean.items()}
        run.skipped, run.in_a_row, run.best = state["skipped"], state["in_a_row"], state["best"]
        if run.accelerator.is_main_process:
            file = self.folder / FILE
            values = run.trained if run.average is None else run.average
            if _trained_steps(file) != state["step"] or not holds_adapter(file, values):
                write_adapter(run, self.folder, state["step"])  # the run stopped before it, or it is damaged
        best = self.folder / BEST / FILE
        if math.isfinite(run.best) and _trained_steps(best) is None:
            run.best = math.inf
            _note(f"{best} is missing or damaged; the next validation writes it again")
        return state["step"]

    def _read(self, names: Iterable[str] = ()) -> dict[str, Any] | None:
        """Returns the newest checkpoint that can be read and has these parameters, None if there are none.

        Raises UsageError if none of them can be read.
        """
        damaged = {}
        for step in reversed(self.steps()):
            file = self.path(step) / STATE
            try:
                state = read_tensors(file)
                if not state.keys() >= STATE_KEYS or state["step"] != step:
                    raise ValueError("it is no checkpoint of this step")
                if names and state["trained"].keys() != set(names):
                    raise ValueError("it holds another adapter")
            except ValueError as error:
                damaged[str(file)] = one_line(error)
                continue
            if damaged:
                _note(f"{listed(damaged)} cannot be read; resuming from step {step}")
            return state
        if damaged:
            raise UsageError(
                f"output.path: no checkpoint can be read: {listed(damaged)}; remove their folders to begin "
                "again, or use another folder"
            )
        return None

    def save_best(self, run: Run, loss: float, step: int) -> None:
        """Writes the adapter to the folder `best` if its validation loss is the lowest so far."""
        if not loss < run.best:  # true also if the loss is not finite
            return
        run.best = loss
        if run.accelerator.is_main_process:
            (self.folder / BEST).mkdir(parents=True, exist_ok=True)
            write_adapter(run, self.folder / BEST, step)


def write_adapter(run: Run, folder: Path, step: int) -> None:
    """Writes the adapter that users load: the mean, if one is kept."""
    values = run.trained if run.average is None else run.average
    save_adapter(folder / FILE, values, adapter_settings(run.plain), run.plan.about() | {"step": step})


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Reads the log of a run, an entry a step; leaves out lines that cannot be read, and says so."""
    file = folder / LOG
    lines = file.read_bytes().split(b"\n") if file.is_file() else []
    entries, bad = [], 0
    for line in filter(None, lines):
        try:
            entries.append({"step": int(json.loads(line)["step"])} | json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError):
            bad += 1
    if bad:
        _note(f"{bad} line{'s' if bad > 1 else ''} of {file} cannot be read and left out")
    return entries


def _note(text: str) -> None:
    if rank() == 0:
        print(f"note: {text}", flush=True)


def _trained_steps(adapter: Path) -> int | None:
    """Returns after how many steps an adapter was written; None if it is missing or not whole."""
    try:
        return read_header(adapter).trained.get("step")
    except (OSError, ValueError):
        return None


class Log:
    """Writes a line of JSON for each step, and the same numbers for TensorBoard."""

    def __init__(self, folder: Path, first: int) -> None:
        """Opens the log, and removes entries after step `first`, from which the run resumes."""
        from torch.utils.tensorboard import SummaryWriter

        self._file = folder / LOG
        kept = [entry for entry in read_log(folder) if entry["step"] <= first]
        write_text(self._file, "".join(f"{json.dumps(entry)}\n" for entry in kept))
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the numbers of a step, counted from 1."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes the rest of TensorBoard's numbers."""
        self._board.close()
