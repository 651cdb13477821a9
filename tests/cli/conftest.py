"""A daemon that is not there: `connect` answers from a script."""

from dataclasses import dataclass

import pytest

from kvtier.arguments import DEFAULT_TENANT
from kvtier.cli.main import run
from kvtier.receipts import ConversationInfo, ForgetReceipt, ModelInfo, StatusReport, TierInfo, WorkerInfo


@dataclass(frozen=True)
class Outcome:
    """What one run of the command left behind."""

    code: int
    out: str
    err: str


class FakeClient:
    """Answers like a client; notes every call."""

    def __init__(self):
        self.calls = []
        self.closed = False
        self.error = None
        self.report = status_report()
        self.found = [conversation("chat-1"), conversation("chat-2")]
        self.receipt = ForgetReceipt("chat-1", "acme", True, erased_objects=3, erased_bytes=3 << 20)

    def connect(self, path=None, *, token_file=None, timeout_s=5.0):
        self.calls.append(("connect", path, token_file, timeout_s))
        if self.error is not None:
            raise self.error
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def status(self):
        return self.report

    def models(self):
        return [ModelInfo("f" * 64, "llama", 1, 2, 30, 1 << 20, 2 << 20)]

    def retire(self, fingerprint):
        self.calls.append(("retire", fingerprint))
        return ModelInfo("f" * 64, "llama", 0, 2, 30, 1 << 20, 2 << 20, retired=True)

    def conversations(self, *, tenant=""):
        self.calls.append(("conversations", tenant))
        yield from self.found

    def show(self, conversation, *, tenant=DEFAULT_TENANT):
        self.calls.append(("show", conversation, tenant))
        return next((info for info in self.found if info.conversation == conversation), None)

    def forget(self, conversation, *, tenant=DEFAULT_TENANT, timeout_s=60.0):
        self.calls.append(("forget", conversation, tenant))
        return self.receipt


def status_report(ready=True, disk_state="ready"):
    return StatusReport(
        node="n1",
        epoch=3,
        version="0.1.0",
        ready=ready,
        uptime_s=90.0,
        tiers=(
            TierInfo("host", "ready", 1 << 30, 1 << 20, 0, 5),
            TierInfo("disk", disk_state, 1 << 34, 1 << 21, 0, 9, 1, "ok"),
        ),
        workers=(WorkerInfo("w1", "llama", "0+32/0+8", "worker", 123, 0),),
        conversations=2,
        waiting_parks=0,
        counters={"parks": 7.0},
        warnings=("a warning",),
    )


def conversation(name):
    return ConversationInfo(name, "acme", 1, 512, 1, "llama", 1.0, 512, 256, 1 << 20)


@pytest.fixture
def daemon(monkeypatch):
    fake = FakeClient()
    monkeypatch.setattr("kvtier.client.client.connect", fake.connect)
    return fake


@pytest.fixture
def kv(capsys):
    """Runs the command line in this process."""

    def call(*arguments):
        code = run(list(arguments))
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call
