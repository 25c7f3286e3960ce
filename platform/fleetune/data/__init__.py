"""Data: where examples come from, how they become tokens, and how they are spread over the clients."""
