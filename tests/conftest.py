"""Fixtures of more than one test file."""

import signal
from pathlib import Path

import pytest

from tests.tiny import wan_pipeline


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Programs that tests start can be interrupted, even where a shell's background job ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Wan pipeline with patch (1, 1, 1), as the bundled model has."""
    folder = tmp_path_factory.mktemp("models") / "wan-random"
    wan_pipeline(patch_size=(1, 1, 1), rope_max_seq_len=1024).save_pretrained(folder)
    return folder
