"""Caches of pipelines whose sequence or guidance is shared, run in tests/support/sharing_worker.py."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch

from radial_attn.models import apply_radial_attention
from radial_attn.models.parallel.groups import Degrees
from radial_attn.models.parallel.ulysses import SequenceParallel
from radial_attn.models.pipeline.caches import cached
from scripts.run.process_groups import Groups, shared_guidance, whole_tokens
from tests.support.families import SPARSE
from tests.support.pipelines import KINDS

STEPS = 6
FRAMES = {"wan": 9, "hunyuan_video": 9, "mochi": 13}
CACHES = {
    "first_block": {},
    "taylorseer": {},
    "mag": {"ratios": "1,0.99,1.01,0.98,1,1", "threshold": 0.06},
    "pab": {},
}
THRESHOLDS = {"wan": 0.12, "hunyuan_video": 0.185, "mochi": 0.42}  # halves of the tokens would disagree
CASES = (
    *(("sequence", "wan", cache) for cache in ("first_block", "taylorseer", "mag")),
    *(("sequence", "hunyuan_video", cache) for cache in ("first_block", "pab")),
    *(("sequence", "mochi", cache) for cache in ("first_block", "taylorseer")),
    *(("guidance", "wan", cache) for cache in ("first_block", "taylorseer", "mag")),
    *(("guidance", "mochi", cache) for cache in ("first_block", "pab")),
)
CALL = {"height": 48, "width": 80, "num_inference_steps": STEPS, "output_type": "latent"}


def latents(family: str, cache: str, shared: Groups) -> tuple[torch.Tensor, dict[str, Any]]:
    """Returns the final latents of a new pipeline, and the report of the cache."""
    kind = KINDS[family]
    pipeline = kind.make()
    more = {"negative_prompt": None, "generator": torch.Generator().manual_seed(0)}
    options = CALL | kind.options | more | {"num_frames": FRAMES[family]}
    settings = {"threshold": THRESHOLDS[family]} | CACHES[cache]
    with ExitStack() as stack:
        stack.enter_context(apply_radial_attention(pipeline, SPARSE, dense_steps=1, parallel=shared.sequence))
        stack.enter_context(shared_guidance(pipeline, family, shared))
        gather = whole_tokens(family, shared)
        use = stack.enter_context(cached(pipeline, cache, STEPS, **settings, gather=gather))
        return pipeline(prompt=["abc"], **options).frames, use.report()


def measure(group: torch.distributed.ProcessGroup) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the relative difference from one process with the same cache, and the calls of each."""
    groups = {
        "sequence": Groups(Degrees(ulysses=2), sequence=SequenceParallel(group)),
        "guidance": Groups(Degrees(cfg=2), guidance=group),
    }
    for shared, family, cache in CASES:
        alone, use = latents(family, cache, Groups())
        together, used = latents(family, cache, groups[shared])
        worst = (together - alone).abs().max() / alone.abs().max()
        results = {"difference": worst.item(), "alone": use, "together": used}
        yield f"cache, shared {shared}: {family}, {cache}", results
