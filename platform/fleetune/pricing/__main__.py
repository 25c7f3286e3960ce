"""``python -m fleetune.pricing``: what the traces predict beside what others measured."""

from fleetune.pricing.validation import table

print(table())
