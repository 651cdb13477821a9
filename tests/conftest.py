"""All tests: hypothesis makes the same examples in every run, wherever and beside whatever it runs."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

# Neither what an earlier run found nor the time that anything takes makes a difference.
settings.register_profile(
    "seeded",
    derandomize=False,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("repeatable", settings.get_profile("seeded"), derandomize=True)


def pytest_configure(config: pytest.Config) -> None:
    """Draw from one seed, unless another one is asked for; tests that derandomize themselves keep theirs."""
    if not config.getoption("hypothesis_profile"):
        settings.load_profile("repeatable" if config.getoption("hypothesis_seed") is None else "seeded")
    # It would draw from the numbers and strings in the source of every module of the project that happens to
    # be imported: other examples for each choice of tests, and for each change of any file.
    providers._get_local_constants = Constants
