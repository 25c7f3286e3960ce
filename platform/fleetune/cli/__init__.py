"""The command line: ``fleetune COMMAND``."""

from fleetune.cli.entry import app, main

__all__ = ["app", "main"]
