"""The cost of local work on a device: FLOPs, memory, time and energy."""
