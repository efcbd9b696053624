"""To be written."""

from ..backends import HALF, Needs

NEEDS = Needs(
    devices=("cuda",),
    dtypes=HALF,
    widths=(64, 128),
    backward=(),
    modules=("spas_sage_attn",),
    install="see third_party",
)
