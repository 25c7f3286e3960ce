"""fleetune: which way of fine-tuning a language model across many small devices is worth it, and what it costs."""

__version__ = "0.1.0"
