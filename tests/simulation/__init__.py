"""Whole jobs in one thread: coordinator, workers and servers on a simulated ring, network and clock, from one seed."""
