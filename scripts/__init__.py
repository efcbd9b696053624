"""Holds the commands: each module here is one. The one that is started first adapts to its terminal."""

import sys

if sys.argv[0] == "-m":  # Python looks for the module of `python -m scripts.NAME`
    from scripts.run.console import adapt

    adapt()
