"""The progress bar of a video."""

import io

from tqdm import tqdm

from scripts.run.config import read_config
from scripts.run.sampler import Sampler
from tests.support.plans import TINY, plan_of


def test_the_bar_says_that_it_compiles():
    plan, stream = (
        plan_of(read_config(TINY, ["model.compile=blocks", "attention.dense_steps=1"])),
        io.StringIO(),
    )
    sampler = Sampler(plan)
    with tqdm(total=3, file=stream) as bar:
        sampler._announce(bar, 0)
        assert bar.postfix == "compiling for dense steps" and "compiling for dense" in stream.getvalue()
        sampler.begun.add("dense")
        sampler._announce(bar, 1)
        assert bar.postfix == "compiling for radial steps"
        sampler.begun.add("radial")
        bar.set_postfix_str("radial")
        sampler._announce(bar, 2)
        assert bar.postfix == "radial"
