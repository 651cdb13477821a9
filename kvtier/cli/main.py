"""Entry point of the `kvtier` command: runs it, and says what is missing when an extra is not installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import Final, NoReturn

from kvtier.cli import exits

# Which extra brings a module that the base installation lacks.
EXTRAS: Final[dict[str, str]] = {
    "click": "cli",
    "rich": "cli",
    "aiofiles": "daemon",
    "prometheus_client": "daemon",
    "ray": "daemon",
    "cryptography": "encryption",
    "lz4": "disk",
    "numba": "sim",
    "zstandard": "sim",
    "tokenizers": "transformers",
    "torch": "transformers",
    "transformers": "transformers",
}


def require(*extras: str) -> None:
    """Raise ModuleNotFoundError for the first module of these extras that is not installed.

    For commands that use them in processes of their own, where a failure would be harder to read.
    """
    for module, extra in EXTRAS.items():
        if extra in extras and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def main() -> NoReturn:
    """Run the command that sys.argv names; never returns."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        from kvtier.cli.app import run_app

        return run_app(arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS or "--debug" in arguments:
            raise
        print(
            f"kvtier: this command needs the Python package '{missing}', which is not installed "
            f"(pip install 'kvtier[{EXTRAS[missing]}]')",
            file=sys.stderr,
        )
        return exits.USAGE
