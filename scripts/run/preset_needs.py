"""Predicts what a preset needs, before it is chosen."""

from dataclasses import replace

from scripts.run.config import Config
from scripts.run.families import calls_per_step
from scripts.run.hub_models import find_model, read_model_info
from scripts.run.memory import host_bytes, peak_memory
from scripts.run.option_checks import check_options
from scripts.run.plan import check_model_options


def memory_needs(config: Config) -> tuple[float, float]:
    """Predicts the bytes of GPU and host memory that a configuration needs on a GPU; reads no weights.

    Raises UsageError for values, sizes and models that no machine takes. Dense steps and layers are not
    checked, as they take no memory.
    """
    attention = replace(config.attention, dense_steps=0, dense_layers=0, dense_last_steps=0)
    config, generation = replace(config, attention=attention), config.generation
    check_options(config)
    model = read_model_info(find_model(config.model))
    check_model_options(config, model)
    calls = calls_per_step(config.model.family, generation)
    options = {"calls": calls, "block_size": attention.block_size, "device": "cuda"}
    gpu = peak_memory(model, generation.size, config.model, **options)
    return gpu.total, host_bytes(model, config.model)
