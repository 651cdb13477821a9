"""What a service's threads decode first, all at once, is prepared before they start."""

from __future__ import annotations

import json
import subprocess
import sys

# Prints, by class, whether its first answer had msgspec run Python code, which is where another thread may
# get its turn and meet a class that is half prepared.
FIRST_ANSWERS = """
import json, sys
import msgspec
from kvtier.directory import calls
from kvtier.directory.announcements import Answer

class Inner(msgspec.Struct):
    number: int

class Late(msgspec.Struct):
    inner: list[Inner]

def prepares(decode, *given):
    seen = []
    def profile(frame, event, arg):
        seen.append(event == "call" and frame.f_globals.get("__name__", "").startswith("msgspec"))
    sys.setprofile(profile)
    decode(*given)
    sys.setprofile(None)
    return any(seen)

answers = (Answer(number=0), calls.Found([], {}), calls.Page([]), calls.Nodes([]))
bodies = [(type(answer), calls.pack(answer)) for answer in answers]
late = msgspec.msgpack.encode(Late([]))
said = {kind.__name__: prepares(calls.unpack_answer, body, kind) for kind, body in bodies}
said["Late"] = prepares(lambda: msgspec.msgpack.decode(late, type=Late))
print(json.dumps(said))
"""


def test_no_answer_is_prepared_by_the_thread_that_gets_the_first() -> None:
    # A new process: other tests have had answers in this one.
    said = subprocess.run([sys.executable, "-c", FIRST_ANSWERS], capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == {
        "Answer": False,
        "Found": False,
        "Page": False,
        "Nodes": False,
        "Late": True,
    }
