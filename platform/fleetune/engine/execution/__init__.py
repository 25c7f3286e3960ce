"""Where work is carried out: in this process, or by a pool of workers on Ray."""
