"""Load for the cluster simulation: recorded, or generated from published statistics."""
