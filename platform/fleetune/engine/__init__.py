"""The engine: the round loop, where work runs, and what a run needs to go on."""
