"""Who in the cluster holds which block and conversation. Pure: no Ray, no clock, no I/O."""
