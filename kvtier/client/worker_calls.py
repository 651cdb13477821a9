"""One request of a worker to its node: sent, and its answer or failure made into what the caller sees."""

from __future__ import annotations

from typing import Any, TypeVar

from kvtier.client.attachment import Attachment
from kvtier.client.link import Link, Prepared
from kvtier.client.page_use import PageUse
from kvtier.errors import DaemonNotFound, KvtierError, MalformedMessage, ProtocolError
from kvtier.messages.calls import Failed, Message, ParkStarted, RestoreStarted
from kvtier.messages.wire import ChannelTimeout, expect

Answer = TypeVar("Answer", bound=Message)
Started = TypeVar("Started", ParkStarted, RestoreStarted)


class WorkerCalls:
    """The requests over one link. timeout_s: in which the node answers, or is taken for lost."""

    def __init__(self, link: Link, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._link = link

    def begin(
        self,
        attachment: Attachment | None,
        use: PageUse[Any],
        request: tuple[Message, type[Started]],
        limit_s: float,
    ) -> None:
        """Send a request whose outcome comes by events; what the node cannot do now ends the use at once."""
        message, kind = request
        prepared = self._link.prepare(message)
        if attachment is None or not self._link.connected:
            use.end("daemon_unavailable", self._link.reason or "not attached")
            return
        if not attachment.agent.add(use):
            self._link.fail(attachment.era, DaemonNotFound("the events connection was lost"))
            use.end("daemon_unavailable", self._link.reason)
            return
        try:
            answer = self.exchange(prepared, attachment, limit_s, kind)
        except DaemonNotFound as error:
            attachment.agent.end(use, "daemon_unavailable", str(error))
        except KvtierError:
            # A refusal comes before anything was done.
            use.said_released()
            attachment.agent.forget(use)
            raise
        except BaseException:
            attachment.agent.end(use, "cancelled", "the call was interrupted")
            raise
        else:
            use.begun(answer.job, answer.receipt)

    def exchange(
        self, prepared: Prepared, attachment: Attachment, limit_s: float, kind: type[Answer]
    ) -> Answer:
        """The node's answer, or what it refuses the request with; DaemonNotFound for every other failure."""
        try:
            answer = self._link.exchange(prepared, limit_s, attachment.era)
            if not isinstance(answer, kind | Failed):
                raise MalformedMessage(f"the daemon answered with {type(answer).__name__}")
        except ProtocolError as error:
            self._link.fail(attachment.era, error)
            raise DaemonNotFound(str(error)) from error
        except ChannelTimeout as error:
            # Also when the time went by waiting for another call: nothing on this connection takes that long.
            if limit_s >= self.timeout_s:
                self._link.fail(attachment.era, error)
            raise
        return expect(answer, kind, self._link.settings.path)


def cancel(attachment: Attachment | None, use: PageUse[Any]) -> None:
    """The caller wants it no longer; without an attachment it has ended already."""
    if attachment is not None:
        attachment.agent.end(use, "cancelled", "cancelled by the caller")


def copies_here(attachment: Attachment | None) -> bool:
    """Whether this process runs the copies. Without an attachment nobody does."""
    return attachment is None or attachment.mode == "worker"
