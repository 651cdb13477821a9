"""What simulating costs: a synthetic day of a million requests on 64 nodes, in this process, on one core.

    python -m benchmarks.simulate                      # a million requests; some minutes, 1 GiB
    python -m benchmarks.simulate --requests 50000 --json

Time is CPU time, so that what else the machine does counts less; memory is the process's highest.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

from kvtier.bench.lines import Line
from kvtier.sim.cluster.cluster import Cluster
from kvtier.sim.cluster.costs import FlopsCost
from kvtier.sim.cluster.scenario import Host, Nodes, Scenario, changed
from kvtier.sim.workload.generate import Generator
from kvtier.sim.workload.settings import Synthetic

_NODES, _WORKERS, _HOST_BYTES = 64, 8, 1 << 40
_AIM_S, _AIM_BYTES, _AIM_REQUESTS = 600.0, 4 << 30, 1_000_000
# About so many sessions make a million requests in a day.
_SESSIONS_A_REQUEST = 0.0615


def measure(requests: int, policy: str) -> Iterator[Line]:
    """One day with so many requests, generated and simulated."""
    load = Synthetic(sessions_per_day=requests * _SESSIONS_A_REQUEST)
    scenario = changed(
        Scenario(),
        nodes=Nodes(count=max(_NODES * requests // _AIM_REQUESTS, 1), workers=_WORKERS),
        host=Host(capacity_bytes=_HOST_BYTES),
    )
    generated_s = _generated_s(load)
    stream = Generator(load, scenario.seed).stream()
    cluster = Cluster(scenario, policy, FlopsCost(scenario.model, scenario.worker), stream.block_tokens)
    wall_s, begun_s = time.perf_counter(), time.process_time()
    cluster.run(stream)
    cpu_s, wall_s = time.process_time() - begun_s, time.perf_counter() - wall_s
    served = cluster.tally.total().requests
    detail = {"requests": served, "nodes": scenario.nodes.count, "policy": policy, "wall_s": round(wall_s, 1)}
    aim_s = _AIM_S * served / _AIM_REQUESTS
    yield Line("simulate a day, CPU", round(cpu_s, 1), "s", aim_s, round(cpu_s / aim_s, 3), detail)
    yield Line("generate it, CPU", round(generated_s, 1), "s")
    yield Line("a request, generated and simulated, CPU", round(1e6 * cpu_s / served, 1), "us")
    yield Line("an event", round(1e6 * (cpu_s - generated_s) / cluster.events.done, 1), "us")
    # Linux counts it in KiB.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield Line("memory, highest", most, "B", _AIM_BYTES, round(most / _AIM_BYTES, 3))


def _generated_s(load: Synthetic) -> float:
    begun_s = time.process_time()
    for _ in Generator(load, 1).turns():
        pass
    return time.process_time() - begun_s


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=_AIM_REQUESTS)
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for line in measure(options.requests, options.policy):
        print(line.json() if options.json else f"{line.name:45} {line.value:>15,} {line.unit}")


if __name__ == "__main__":
    main()
