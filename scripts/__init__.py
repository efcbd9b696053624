"""The verbs of the project; each module here is one command."""
