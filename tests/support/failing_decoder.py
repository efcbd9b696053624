"""Run by torchrun: `scripts.generate` whose decoder fails in rank 1, with the words of the command line."""

import sys

import torch

from radial_attn.models.parallel.decoding import ParallelDecode, Tile
from scripts.generate import main


def fail_in_rank_1(shared: ParallelDecode, tile: Tile) -> None:
    """Stands in for the decoding of a tile."""
    if torch.distributed.get_rank() == 1:
        raise ArithmeticError("no tile for you")
    run_tile(shared, tile)


if __name__ == "__main__":
    run_tile, ParallelDecode._run = ParallelDecode._run, fail_in_rank_1
    sys.exit(main())
