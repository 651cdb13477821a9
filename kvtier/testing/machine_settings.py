"""How the state machines of a node are run: with all tests, for hours by hand, and with the core broken."""

from hypothesis import HealthCheck, Phase, settings

# max_examples and steps of a machine are its own: they say what it takes until it has seen something.
QUICK = settings(max_examples=400, stateful_step_count=40, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=3000, stateful_step_count=80, derandomize=False)
# A control only has to be noticed, not to be made small. Each takes some ten to two hundred examples, as
# measured with many seeds; so this bound is met by none, and test_node_controls has each without any luck.
CONTROL = settings(QUICK, max_examples=6000, phases=[Phase.generate], report_multiple_bugs=False)
