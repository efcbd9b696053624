"""Fixtures of more than one test file."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from tests.support.lora_cases import make_latents, train, write_config
from tests.support.tiny import wan_pipeline

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
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts long files first, with more time for a busy machine; skips the tests of GPUs if there is none."""

    def place(item: pytest.Item) -> int:
        path = item.path.with_suffix("").as_posix()
        return next((number for number, name in enumerate(LONG) if path.endswith(name)), len(LONG))

    items.sort(key=place)
    for item in items:
        if place(item) < len(LONG) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Programs that tests start can be interrupted, even where a shell's background job ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Equal random numbers, and attention of diffusers as it is at first, which one model changes for all."""
    torch.manual_seed(0)
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Wan pipeline with patch (1, 1, 1), as the bundled model has."""
    folder = tmp_path_factory.mktemp("models") / "wan-random"
    wan_pipeline(patch_size=(1, 1, 1), rope_max_seq_len=1024).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lora_latents(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a few prepared latents of the random pipeline."""
    return make_latents(tiny_model, tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="session")
def lora_config(tiny_model: Path, lora_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration of LoRA training on them."""
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", tiny_model, lora_latents)


@pytest.fixture(scope="session")
def lora_run(lora_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of such a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(lora_config, folder) == 0
    return folder
