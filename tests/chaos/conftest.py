"""The parts of the chaos run are importable by name, and the network namespaces of the cluster's tests.

The processes that it starts find the same kvtier as the tests, also where it is not installed.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "cluster")]
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH")])
)
