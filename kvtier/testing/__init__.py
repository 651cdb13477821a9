"""Conformance suites and models for anyone who writes a part of kvtier. Needs pytest and hypothesis."""
