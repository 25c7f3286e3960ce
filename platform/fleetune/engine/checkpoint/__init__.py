"""What a run needs to go on: the server's state, and what clients keep."""
