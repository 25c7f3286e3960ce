"""``fleetune plan``: what a job will cost each device, round by round, without training and without weights."""
