"""MotifVideo: calls without an image or a mask of the text, and its decoder."""

from types import SimpleNamespace

import pytest
import torch

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


@pytest.mark.parametrize("image", [True, False])
def test_text_may_be_padded_on_either_side(image):
    """Text has no positions: sparse output is that of the same text padded on the right, bit for bit."""
    transformer, right = motif_transformer(), motif_inputs(lengths=(4, 11))
    right = right if image else {name: x for name, x in right.items() if name != "image_embeds"}
    text = {name: right[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}
    left = right | {name: torch.cat((x[:1].roll(7, 1), x[1:])) for name, x in text.items()}
    assert left["encoder_attention_mask"][0].tolist() == 7 * [0] + 4 * [1]
    expected = run(transformer, left)
    with apply_radial_attention(transformer, FULL, backend="blocks"):
        assert_near(run(transformer, left), expected)
    with apply_radial_attention(transformer, SPARSE, backend="blocks"):
        assert torch.equal(run(transformer, left), run(transformer, right))
    with apply_radial_attention(transformer, SPARSE, dense_steps=1, backend="blocks"):
        assert torch.equal(run(transformer, left), expected)


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
