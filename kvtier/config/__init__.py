"""A node's settings: read from a file and arguments, checked, and shown again."""
