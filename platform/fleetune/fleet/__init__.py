"""The simulated fleet: devices, networks, and who has which."""
