"""Measuring a machine by kvtier's own parts: memory, GPU and drive, each against the best plain rate."""
