"""Run in several processes: what several processes share beside the transformer, checked in all of them.

`run_ranks(N, "tests.support.sharing_worker", OUT.json, PART, ...)`: the first process writes a list of
what each one found under the name of each case.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import torch

from radial_attn.models.parallel.groups import Degrees, import_xfuser, start, stop


def main(arguments: list[str]) -> None:
    """Runs the cases of the parts, modules `tests.support.PART_cases`: `measure` takes the group of all."""
    out, *parts = arguments
    start(Degrees(ulysses=int(os.environ["WORLD_SIZE"])), "cpu")
    group = import_xfuser("cpu").get_model_replica_group().device_group
    results = {}
    for part in parts:
        for name, value in importlib.import_module(f"tests.support.{part}_cases").measure(group):
            results[name] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(results[name], value, group=group)
    if torch.distributed.get_rank() == 0:
        Path(out).write_text(json.dumps(results, indent=1))
    stop()


if __name__ == "__main__":
    main(sys.argv[1:])
