"""Sentences of the report's page."""

KEYS = (
    "Space plays and pauses wherever the focus is in this part; the arrow keys go from frame to frame on "
    "the slider."
)
DIFFERENCE = (
    "The difference is the absolute difference of the two, {} times as bright: black where they are equal. "
)
FIDELITY = (
    "PSNR, SSIM and LPIPS of each video against the reference of the same prompt and seed, means over all "
    "videos. Recall is the share of the dense softmax mass on keys that the mask keeps; output MSE is that "
    "of the attention output. Density is the kept share of token pairs, in radial calls and, with warm-up, "
    "in all. A dash stands for a number that was not measured."
)
MASK = (
    "Point at the picture, or focus it and use the arrow keys: the line below names the pair of frames, "
    "their band and the share of their token pairs that the mask keeps."
)
HEADS = (
    "What the mask would keep of each head’s attention in the reference run. Point at a cell, or focus the "
    "map and use the arrow keys."
)
DECAY = (
    "Mean post-softmax attention of sampled query rows by distance in time and in space; thin lines are "
    "single heads, the dashed line is the fit y = exp(−a x + b). The axis of attention is logarithmic, so an "
    "exponential is a straight line."
)
COST = "Operations of attention, dense and radial, on logarithmic axes; n log n is fitted to radial."
MISSING = "No {} among these runs; bash scripts/{} makes them."
