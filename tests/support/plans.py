"""Plans of runs for models that are numbers only, and the models and presets that tests plan with."""

import pytest

from scripts.run import plan
from scripts.run.config import Config
from scripts.run.hub_models import HUB_MODELS
from scripts.run.model_info import ModelInfo
from scripts.run.plan import RunPlan, make_plan

FULL, TINY = "configs/wan2.1_t2v_14b.yaml", "configs/wan_tiny.yaml"
FOURTEEN = HUB_MODELS["Wan-AI/Wan2.1-T2V-14B-Diffusers"]
HUNYUAN = HUB_MODELS["hunyuanvideo-community/HunyuanVideo"]
MOCHI = HUB_MODELS["genmo/mochi-1-preview"]
TOY = ModelInfo(layers=6, heads=4, head_dim=48, ffn=512, patch=(1, 1, 1), vae_base=8)


def plan_of(
    config: Config,
    model: ModelInfo | None = None,
    device: str | None = None,
    *,
    processes: int = 1,
    dry_run: bool = True,
) -> RunPlan:
    """Plans a run, by default as a dry run, which leaves the memory of this machine alone.

    Args:
        model: numbers that are planned with, whatever the configuration names; None: the model of it.
        device: "cpu" or "cuda", which need not be here: its kernels and libraries are taken to be there.
    """
    with pytest.MonkeyPatch.context() as patch:
        if model is not None:
            patch.setattr(plan, "find_model", lambda options: options.path)
            patch.setattr(plan, "read_model_info", lambda path: model)
        if device is not None:
            patch.setattr(plan, "find_device", lambda wanted: device)
        if device == "cuda":
            patch.setattr(plan, "missing_kernels", lambda *call, **options: iter(()))
            patch.setattr(plan, "missing_libraries", lambda *options: iter(()))
        return make_plan(config, processes=processes, dry_run=dry_run)
