"""The fakes beside the tests are importable by name, also for the processes that Ray starts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
