"""Python's cycle collector in a process that holds millions of long-lived objects.

A full collection walks every object that the collector tracks: at a million blocks that stops the node's
only thread for more than a second.  What survived one full collection is therefore set aside: reference
counts still free it, and the next full collection walks only what has come since.
"""

from __future__ import annotations

import gc


def set_survivors_aside() -> None:
    """From now on, after every full collection, of this whole process; for a service's own process only.

    A cycle that is set aside while it is in use is not freed when it falls out of use, so what lives long
    must not be in cycles: the node core's objects are not.
    """
    if _freeze not in gc.callbacks:
        gc.callbacks.append(_freeze)


def _freeze(phase: str, info: dict[str, int]) -> None:
    if phase == "stop" and info["generation"] == 2:
        gc.freeze()
