"""MotifVideo: calls without an image or a mask of the text, and its decoder."""

from types import SimpleNamespace

import pytest

from radial_attn.models import apply_radial_attention
from tests.support.families import FULL, SPARSE, assert_near, run
from tests.support.tiny_motif import motif_inputs, motif_transformer


@pytest.mark.parametrize("left_out", ["image_embeds", "encoder_attention_mask"])
def test_arguments_that_may_be_left_out(left_out):
    transformer, inputs = motif_transformer(), motif_inputs(lengths=(4, 11))
    del inputs[left_out]
    expected = run(transformer, inputs)
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        assert_near(run(transformer, inputs), expected)


def test_a_decoder_stays_dense_and_needs_one_process():
    transformer = motif_transformer()
    with apply_radial_attention(transformer, SPARSE) as handle:
        run(transformer, motif_inputs())
        report = handle.report()
    assert (report["layers"], report["stayed_dense"]["cross_attention"]) == (4, 4 + 1)
    with pytest.raises(ValueError, match=r"1 decoder layers of this MotifVideo .* one process"):
        apply_radial_attention(transformer, SPARSE, parallel=SimpleNamespace(ring=None))
    with apply_radial_attention(transformer, SPARSE):
        run(transformer, motif_inputs())
