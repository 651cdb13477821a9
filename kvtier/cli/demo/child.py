"""The demo's processes that run the model: `python -m kvtier.cli.demo.child make|serve|reference JOB`.

Each prints one JSON record a line and leaves its logits in the job's folder as float32 [new tokens,
vocabulary], one file a turn.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvtier.cli.demo.scenario import (
    BLOCK_TOKENS,
    NEW_TOKENS,
    MakeJob,
    Recomputed,
    ReferenceJob,
    ReferenceRecord,
    RoundEnd,
    RoundJob,
    TurnJob,
    TurnRecord,
    Usage,
)
from kvtier.client.client import Embedded, connect
from kvtier.integrations.transformers import ChatSession, Reply, TransformersKV, attach

PARK_TIMEOUT_S = 60.0


def say(record: msgspec.Struct) -> None:
    """One record for the parent."""
    print(msgspec.json.encode(record).decode(), flush=True)


def session(kv: TransformersKV | None, model: Any, job: TurnJob) -> ChatSession:
    """The turn's session: everything in it comes from the transcript and from kvtier."""
    return ChatSession(
        kv,
        model,
        job.conversation,
        encode=no_text,
        decode=str,
        tokens=job.before,
        level="disk",
        share=job.share,
    )


def no_text(text: str) -> Sequence[int]:
    """The demo's messages are tokens already."""
    raise AssertionError(f"unexpected text: {text!r}")


def save_logits(folder: str, job: TurnJob, reply: Reply) -> None:
    """Keep what the turn's tokens were chosen from."""
    assert reply.logits is not None
    np.save(Path(folder) / f"{job.name}.npy", reply.logits.numpy())


def make(job: MakeJob) -> None:
    """Write model and tokenizer."""
    from kvtier.cli.demo.model import make_model

    make_model(Path(job.model), job.seed)


def serve(job: RoundJob) -> None:
    """One turn of each conversation, restored from the daemon, continued, and parked on disk again."""
    from kvtier.cli.demo.model import load_model

    model = load_model(Path(job.model), job.threads, job.device)
    with contextlib.ExitStack() as stack:
        socket = job.socket or stack.enter_context(contextlib.closing(embedded(job.settings))).socket_path
        client = stack.enter_context(contextlib.closing(connect(socket)))
        kv = stack.enter_context(attach(client, model, block_tokens=BLOCK_TOKENS))
        for turn in job.turns:
            say(serve_turn(kv, model, turn, job.logits))
        status = client.status()
        tiers = {t.name: Usage(t.used_bytes, t.capacity_bytes) for t in status.tiers}
        say(RoundEnd(tiers, next((w.place for w in status.workers if w.pid == os.getpid()), "")))
        if job.kill_self:
            os.kill(os.getpid(), signal.SIGKILL)


def embedded(settings: dict[str, str | int]) -> Embedded:
    """A daemon in this process."""
    from kvtier.daemon.embedded import start

    return start(**settings)


def serve_turn(kv: TransformersKV, model: Any, job: TurnJob, folder: str) -> TurnRecord:
    """Restore, continue, park, and wait until the disk has it."""
    chat = session(kv, model, job)
    reply = chat.send(job.message, NEW_TOKENS, capture_logits=True)
    save_logits(folder, job, reply)
    assert reply.park is not None and chat.cache is not None
    park = reply.park.result(PARK_TIMEOUT_S)
    restore = reply.restore
    return TurnRecord(
        conversation=job.conversation,
        round=job.round,
        reply=list(reply.tokens),
        restored_tokens=reply.restored_tokens,
        sources=restore.sources if restore else {},
        restored_bytes=restore.bytes if restore else 0,
        restore_s=restore.seconds if restore else 0.0,
        ttft_s=reply.ttft_s,
        reason=restore.reason if restore else "",
        park_level=park.level,
        park_reason=f"{park.reason} {park.detail}".strip(),
        cache_bytes=sum(layer.keys.nbytes + layer.values.nbytes for layer in chat.cache.layers),
    )


def reference(job: ReferenceJob) -> None:
    """The same turns without kvtier: first what each must equal, then how long computing it all takes."""
    from kvtier.cli.demo.model import load_model

    model = load_model(Path(job.model), job.threads, job.device)
    records = {(record.conversation, record.round): record for record in job.records}
    for name in dict.fromkeys(turn.conversation for turn in job.turns if turn.share == "conversation"):
        run_uninterrupted(model, [t for t in job.turns if t.conversation == name], job.logits)
    run_warm(model, [t for t in job.turns if t.share == "prefix"], records, job.logits)
    for turn in job.turns:
        if turn.before:
            reply = session(None, model, turn).send(turn.message, 1)
            say(Recomputed(turn.conversation, turn.round, reply.ttft_s))


def run_uninterrupted(model: Any, turns: Sequence[TurnJob], folder: str) -> None:
    """One conversation in one process that keeps its cache: what share='conversation' must equal."""
    chat = session(None, model, turns[0])
    for turn in turns:
        reply = chat.send(turn.message, NEW_TOKENS, capture_logits=True)
        save_logits(folder, turn, reply)
        say(ReferenceRecord(turn.conversation, turn.round, list(reply.tokens)))


def run_warm(
    model: Any, turns: Sequence[TurnJob], records: dict[tuple[str, int], TurnRecord], folder: str
) -> None:
    """All conversations over one prefix cache in memory, in the order in which they were served.

    Each turn begins with as many warm tokens as were restored: what share='prefix' must equal.
    """
    from kvtier.cli.demo.warm_prefix import WarmPrefixCache

    warm = WarmPrefixCache(model.config, BLOCK_TOKENS)
    for turn in turns:
        chat = session(None, model, turn)
        restored = records[turn.conversation, turn.round].restored_tokens
        try:
            chat.cache = warm.front([*turn.before, *turn.message], restored)
        except KeyError:
            say(
                ReferenceRecord(
                    turn.conversation, turn.round, [], f"a warm prefix never has {restored} tokens here"
                )
            )
            continue
        reply = chat.send(turn.message, NEW_TOKENS, capture_logits=True)
        warm.store(chat.tokens, chat.cache)
        save_logits(folder, turn, reply)
        say(ReferenceRecord(turn.conversation, turn.round, list(reply.tokens)))


def main(arguments: Sequence[str]) -> int:
    """Run the command on the job in the file."""
    command, path = arguments
    text = Path(path).read_bytes()
    jobs: dict[str, Callable[[], None]] = {
        "make": lambda: make(msgspec.json.decode(text, type=MakeJob)),
        "serve": lambda: serve(msgspec.json.decode(text, type=RoundJob)),
        "reference": lambda: reference(msgspec.json.decode(text, type=ReferenceJob)),
    }
    jobs[command]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
