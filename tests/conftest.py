"""Fixtures of more than one test file."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from hypothesis import HealthCheck, settings

from tests.support.lora_cases import make_latents, train, write_config
from tests.support.tiny import wan_pipeline

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Files of minutes: they begin first, so that no process is left alone with one at the end.
LONG = (
    "scripts/test_bundled_models",
    "kernels/triton/test_op",
    "lora/test_sharded",
    "parallel/test_sharing",
    "parallel/test_sequence",
    "run/test_process_groups",
    "length/test_study",
    "lora/test_runs",
    "evaluation/test_evaluate",
    "tests/test_golden",
    "tests/test_killed",
    "tests/test_fuzz",
    "scripts/test_surroundings",
    "training/test_training",
    "run/test_option_checks",
    "run/test_failures",
    "run/test_plan",
    "tests/test_package",
    "lora/test_prepare",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts long files first, the others in their order; skips the tests of GPUs if there is none."""

    def rank(item: pytest.Item) -> int:
        path = item.path.with_suffix("").as_posix()
        return next((number for number, name in enumerate(LONG) if path.endswith(name)), len(LONG))

    items.sort(key=rank)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Lets programs that tests start be interrupted, even if a shell's background job ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Seeds the random numbers and resets diffusers' attention backend, which one model changes for all."""
    torch.manual_seed(0)
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves a random Wan pipeline with patch (1, 1, 1), as the bundled model has; returns its folder."""
    folder = tmp_path_factory.mktemp("models") / "wan-random"
    wan_pipeline(patch_size=(1, 1, 1), rope_max_seq_len=1024).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lora_latents(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepares a few latents of the random pipeline; returns their folder."""
    return make_latents(tiny_model, tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="session")
def lora_config(tiny_model: Path, lora_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a configuration of LoRA training on them."""
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", tiny_model, lora_latents)


@pytest.fixture(scope="session")
def lora_run(lora_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains without any interruption; returns the folder of the run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(lora_config, folder) == 0
    return folder
