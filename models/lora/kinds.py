"""Names adapters that are no plain LoRAs, by their keys and settings: none of them may run as one."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

OTHERS = {  # kind: endings of its keys, as LyCORIS, kohya and peft write them
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoKr": r"lokr_\w+",
    "LoHa": r"hada_\w+",
    "BOFT": r"boft_\w+",
    "OFT": r"oft_\w+",
    "GLoRA": r"[ab][12]\.weight",
    "(IA)3": r"on_input|ia3_l",
    "AdaLoRA": r"lora_E",
    "VeRA": r"vera_\w+",
    "LoCon with a Tucker core": r"lora_mid",
    "set of whole weights": r"(?:set|reshape)_weight",
    "LoRA of scaled 8-bit values": r"scale_(?:weight|input)|(?:weight|input)_scale|comfy_quant|scaled_fp8",
}
STARTS = ("pissa", "olora", "corda", "loftq")  # peft's beginnings that change the model's own weights


def other_kind(keys: Iterable[str], settings: Mapping[str, Any]) -> str:
    """Returns the kind of an adapter with the key or setting that shows it; "" for a plain LoRA.

    `settings`: peft's settings of the adapter, as far as the file or its folder has them.
    """
    for kind, ending in OTHERS.items():
        shown = next((key for key in keys if re.search(rf"(?:^|\.)(?:{ending})(?:\.|$)", key)), None)
        if shown:
            return f"{kind} ({shown})"
    if settings.get("use_dora"):
        return "DoRA (use_dora=true in its settings)"
    name = str(settings.get("peft_type") or "LORA")
    if name != "LORA":
        return f"{name} (peft_type in its settings)"
    start = str(settings.get("init_lora_weights")).lower()
    return f"LoRA on other weights (init_lora_weights={start} in its settings)" * start.startswith(STARTS)
