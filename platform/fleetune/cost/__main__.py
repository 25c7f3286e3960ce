"""``python -m fleetune.cost``: what the traces predict beside what others measured."""

from fleetune.cost.validation import table

print(table())
