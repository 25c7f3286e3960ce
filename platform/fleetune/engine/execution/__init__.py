"""Carries out the work of a round: in this process, or by a pool of workers on Ray."""
