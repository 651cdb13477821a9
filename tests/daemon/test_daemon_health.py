"""Whether the node is alive does not hang on whether its core has time for a question."""

import urllib.error
import urllib.request

import pytest

pytest.importorskip("prometheus_client")

from kvtier.config.load import load
from kvtier.daemon import endpoints


@pytest.mark.parametrize(
    ("still_s", "status"), [(0.0, 200), (5.0, 200), (endpoints.STILL_MOST_S, 503), (100.0, 503)]
)
def test_alive_is_a_loop_that_turns_though_the_core_answers_nothing(still_s, status):
    config = load(overrides={"metrics.port": 0})
    server = endpoints.serve_endpoints(config, lambda question: None, lambda: still_s)
    try:
        with urllib.request.urlopen(f"{server.url}/healthz") as answer:
            got = answer.status
    except urllib.error.HTTPError as problem:
        got = problem.code
        problem.close()
    finally:
        server.close()
    assert got == status
