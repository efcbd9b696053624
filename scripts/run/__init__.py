"""Takes a run from the arguments of a command line to a finished video."""
