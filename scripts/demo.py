"""Opens a page to try the models: `python -m scripts.demo [--port N] [--share] [--work DIR]`.

It makes each video twice, dense and sparse, and shows both in step, with seconds, density, PSNR and a mask.
Exit codes: 0 done; 2 with one line on stderr; 130 ended by Ctrl-C or SIGTERM.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from scripts.run.errors import OneLineParser, UsageError, exit_code, positive
from scripts.run.processes import processes

GRADIO = "gradio>=6.31,<7"  # as in pyproject.toml, which says why
PORT, PORTS = 7860, 65535


def serve(options: argparse.Namespace) -> None:
    """Shows the page until Ctrl-C or SIGTERM, and runs its jobs in this thread."""
    if processes() > 1:
        raise UsageError(f"got {processes()} processes, but the page needs one; run without torchrun")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        from gradio import __version__ as version
        from gradio.themes import Default
    except ImportError:
        version = "none"
    if not version.startswith("6."):
        remedy = f"{sys.executable} -m pip install '{GRADIO}'"
        raise UsageError(f"the page needs Gradio 6, got {version}; install it: {remedy}")
    from scripts.web.choices import offered
    from scripts.web.jobs import Jobs
    from scripts.web.page import CSS, FONTS, build
    from scripts.web.videos import Studio

    jobs, studio = Jobs(), Studio(offered(), options.work)
    page = build(jobs, studio)
    look = {"theme": Default(**FONTS), "css": CSS, "footer_links": [], "run_history": False}
    where = {"server_name": "127.0.0.1", "server_port": options.port, "share": options.share}
    try:
        _, local, shared = page.launch(prevent_thread_lock=True, quiet=True, **look, **where)
    except OSError as error:
        raise UsageError(f"--port: got {options.port}, which is in use; name another port") from error
    print(f"open {shared or local} in a browser; Ctrl-C ends it", flush=True)
    try:
        jobs.serve()
    finally:
        page.close(verbose=False)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = OneLineParser(prog="scripts/demo.sh", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--port", type=positive, default=PORT, help=f"port on 127.0.0.1 ({PORT})")
    parser.add_argument("--share", action="store_true", help="also open a public link via Gradio's servers")
    parser.add_argument("--work", default="outputs/demo", help="folder for the videos (outputs/demo)")
    options = parser.parse_args(argv)
    if options.port > PORTS:
        parser.error(f"--port: got {options.port}, must be at most {PORTS}")
    if not options.work or Path(options.work).is_file():
        parser.error(f"--work: got {options.work!r}, which is no folder; name one")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parse(argv)
    return exit_code(lambda: serve(options), "the videos that were written are whole")


if __name__ == "__main__":
    sys.exit(main())
