"""What a serving worker or a tool uses to talk to its node: no Ray, no torch."""
