"""What local work costs on a device: FLOPs, memory, time and energy."""
