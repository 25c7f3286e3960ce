"""``python -m fleetune.cost``: the closed forms beside traced and published numbers."""

from fleetune.cost.validation import table

print(table())
