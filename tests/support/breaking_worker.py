"""What the worker of the GPU benchmark runs in its test: it dies, hangs, raises or counts."""

import os
import time


class Breakable:
    """Does what a task says."""

    def __init__(self) -> None:
        self.calls = 0

    def run(self, task: str) -> dict:
        self.calls += 1
        if task == "die":
            os._exit(3)
        if task == "hang":
            time.sleep(3600)
        if task == "raise":
            raise ValueError("no\nsecond line")
        return {"calls": self.calls}
