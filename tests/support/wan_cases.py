"""Runs of a tiny Wan transformer, dense and with a mask."""

import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from radial_attn import RadialConfig, TokenGrid, radial_mask
from tests.support.tiny import wan_inputs


class ReferenceProcessor(WanAttnProcessor):
    """Upstream's own self-attention with a token mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


SPARSE = RadialConfig(decay_factor=0.25, block_size=16, decimation_width=64)


DENSE = RadialConfig(block_size=16, pattern="dense")


GRID = TokenGrid(6, 6, 8)


@torch.no_grad()
def run(transformer, **changes):
    return transformer(**(wan_inputs() | changes)).sample


@torch.no_grad()
def masked_upstream(transformer, grid, layers=slice(None), **changes):
    """Output of the transformer with upstream's attention under the token mask of SPARSE in `layers`."""
    token_mask = radial_mask(grid, SPARSE).token_mask()
    attentions = [block.attn1 for block in transformer.blocks][layers]
    before = [attention.processor for attention in attentions]
    for attention in attentions:
        attention.set_processor(ReferenceProcessor(token_mask))
    output = run(transformer, **changes)
    for attention, processor in zip(attentions, before, strict=True):
        attention.set_processor(processor)
    return output
