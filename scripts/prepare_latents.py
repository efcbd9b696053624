"""Encodes videos and captions for LoRA training: `python -m scripts.prepare_latents CONFIG [key=value ...]`.

With `--dry-run` it only checks the videos and prints the clips that it would make. After any stop the same
command resumes, and ends with the same files. Exit codes: 0 done; 2 stopped, one line on stderr says why;
130 interrupted.
"""

import sys

from scripts.lora.config import read_arguments
from scripts.run.errors import GenerationError, UsageError
from scripts.run.processes import interrupted, no_reader

CALL = "bash scripts/prepare_latents.sh CONFIG.yaml [key=value ...] [--dry-run] [--help]"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        arguments = read_arguments(sys.argv[1:] if argv is None else argv, CALL)
        if arguments is not None:
            from scripts.lora.prepare import prepare_latents

            config, dry_run = arguments
            prepare_latents(config, dry_run=dry_run)
    except BrokenPipeError:
        return no_reader()
    except (UsageError, GenerationError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted("the files that were written are whole; run the same command to resume")
    return 0


if __name__ == "__main__":
    sys.exit(main())
