"""Saves checkpoints of LoRA training, resumes from them, and writes the adapter that users load."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from radial_attn.models.lora.files import read_header
from radial_attn.models.training.adapter import FILE, adapter_settings, save_adapter
from scripts.lora.checkpoint import Checkpoints
from scripts.lora.step import Run

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
BEST = "best"


def keep(run: Run, checkpoints: Checkpoints, step: int) -> None:
    """Writes a checkpoint after `step` steps, and the adapter as it is then."""
    optimizer = get_optimizer_state_dict(run.transformer, run.optimizer.optimizer, options=WHOLE)
    values = {name: value.detach().cpu() for name, value in run.trained.items()}
    if run.accelerator.is_main_process:
        state = {"step": step, "trained": values, "optimizer": optimizer, "average": run.average}
        state |= {"skipped": run.skipped, "in_a_row": run.in_a_row, "best": run.best}
        checkpoints.save(step, state)
        write_adapter(run, checkpoints.folder, step)
    run.accelerator.wait_for_everyone()


def restore(run: Run, checkpoints: Checkpoints) -> int:
    """Loads the newest checkpoint into the run, and returns the step to resume from; 0 without one."""
    state = checkpoints.load()
    if run.accelerator.is_main_process:
        checkpoints.write_config()
    if state is None:
        return 0
    _put(run, state["trained"])
    set_optimizer_state_dict(run.transformer, run.optimizer.optimizer, state["optimizer"], options=WHOLE)
    if run.average is not None:  # begins with the adapter if the run had no mean before
        mean = state["average"] or state["trained"]
        run.average = {name: x.to(run.accelerator.device) for name, x in mean.items()}
    run.skipped, run.in_a_row, run.best = state["skipped"], state["in_a_row"], state["best"]
    file = checkpoints.folder / FILE
    if run.accelerator.is_main_process:
        written = read_header(file).trained.get("step") if file.is_file() else None
        if written != state["step"]:  # the run stopped between checkpoint and adapter
            write_adapter(run, checkpoints.folder, state["step"])
    return state["step"]


def save_best(run: Run, folder: Path, loss: float, step: int) -> None:
    """Keeps the adapter whose validation loss is the lowest so far, in the folder `best`."""
    if not loss < run.best:  # true also if the loss is not finite
        return
    run.best = loss
    if run.accelerator.is_main_process:
        (folder / BEST).mkdir(parents=True, exist_ok=True)
        write_adapter(run, folder / BEST, step)


def write_adapter(run: Run, folder: Path, step: int) -> None:
    """Writes the adapter that users load: the mean, if one is kept."""
    values = run.trained if run.average is None else run.average
    save_adapter(folder / FILE, values, adapter_settings(run.plain), run.about | {"step": step})


@contextmanager
def mean_adapter(run: Run) -> Iterator[None]:
    """Replaces the adapter by its mean while the block runs, if one is kept."""
    if run.average is None:
        yield
        return
    before = {name: x.detach().clone() for name, x in run.trained.items()}
    _put(run, run.average)
    try:
        yield
    finally:
        _put(run, before)


def _put(run: Run, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in run.trained.items():
            value.copy_(values[name])
