"""Maps diffusers' names of the layers of Wan-Animate to its authors', as far as Wan has none of them."""

CONVS = r"motion_encoder.enc.net_app.convs"
BLOCK = r"motion_encoder\.res_blocks"
NAMES = (
    (r"motion_encoder\.motion_synthesis_weight", "motion_encoder.dec.direction"),
    (r"motion_encoder\.motion_network\.(\d+)", r"motion_encoder.enc.fc.\1"),
    (r"motion_encoder\.conv_in", f"{CONVS}.0.0"),
    (r"motion_encoder\.conv_in\.act_fn", f"{CONVS}.0.1"),
    (r"motion_encoder\.conv_out", f"{CONVS}.8"),
    *((rf"{BLOCK}\.{number}\.conv1", f"{CONVS}.{number + 1}.conv1.0") for number in range(7)),
    *((rf"{BLOCK}\.{number}\.conv1\.act_fn", f"{CONVS}.{number + 1}.conv1.1") for number in range(7)),
    *((rf"{BLOCK}\.{number}\.conv2", f"{CONVS}.{number + 1}.conv2.1") for number in range(7)),
    *((rf"{BLOCK}\.{number}\.conv2\.act_fn", f"{CONVS}.{number + 1}.conv2.2") for number in range(7)),
    *((rf"{BLOCK}\.{number}\.conv_skip", f"{CONVS}.{number + 1}.skip.1") for number in range(7)),
    (r"face_encoder\.(conv1_local|conv2|conv3)", r"face_encoder.\1.conv"),
    (r"face_adapter\.(\d+)\.norm_([qk])", r"face_adapter.fuser_blocks.\1.\2_norm"),
    (r"face_adapter\.(\d+)\.to_q", r"face_adapter.fuser_blocks.\1.linear1_q"),
    (r"face_adapter\.(\d+)\.to_out", r"face_adapter.fuser_blocks.\1.linear2"),
    (r"face_adapter\.(\d+)\.(.+)", r"face_adapter.fuser_blocks.\1.\2"),
)
# One tensor has the rows of both; `#` is the number of a block.
JOINED = {"face_adapter.fuser_blocks.#.linear1_kv": ("face_adapter.#.to_k", "face_adapter.#.to_v")}
