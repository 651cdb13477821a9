"""Deciding: pure objects that take the time as an argument and do no I/O."""
