"""`kvtier ls`, `kvtier show` and `kvtier forget`."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import click

from kvtier.arguments import DEFAULT_TENANT
from kvtier.cli import exits, options
from kvtier.receipts import ConversationInfo, ForgetReceipt

tenant_option = click.option(
    "--tenant",
    default=DEFAULT_TENANT,
    show_default=True,
    help="The tenant that the conversation belongs to.",
)


@click.command()
@options.node_options
@click.option("--tenant", default="", help="Only this tenant's conversations.")
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many.")
@options.json_option
def ls(tenant: str, limit: int | None, as_json: bool, **where: Any) -> None:
    """List parked conversations. --json writes one object for each line."""
    from kvtier.cli import output

    with options.open_client(**where) as kv:
        found = itertools.islice(kv.conversations(tenant=tenant), limit)
        if as_json:
            for info in found:
                output.print_json(info)
            return
        now_s = time.time()
        columns = ("TENANT", "CONVERSATION", "TOKENS", "HOST", "DISK", "SIZE", "PARKED", "MODEL")
        output.print_table(columns, (_row(info, now_s) for info in found), numbers=columns[2:7])


@click.command()
@click.argument("conversation")
@tenant_option
@options.node_options
@options.json_option
@click.pass_context
def show(ctx: click.Context, /, conversation: str, tenant: str, as_json: bool, **where: Any) -> None:
    """Show one parked conversation. Exit code 1 when it is not here; --json then writes "found": false."""
    from kvtier.cli import output

    with options.open_client(**where) as kv:
        info = kv.show(conversation, tenant=tenant)
    if as_json:
        nothing = {"conversation": conversation, "tenant": tenant, "found": False}
        output.print_json(nothing if info is None else info)
    elif info is not None:
        output.print_facts(_facts(info, time.time()))
    if info is None:
        print(f"kvtier: {conversation!r} is not parked here", file=sys.stderr)
        ctx.exit(exits.ANSWER_IS_NO)


@click.command()
@click.argument("conversation")
@tenant_option
@options.node_options
@click.option("--yes", is_flag=True, help="Do not ask first.")
@options.json_option
@click.pass_context
def forget(
    ctx: click.Context, /, conversation: str, tenant: str, yes: bool, as_json: bool, **where: Any
) -> None:
    """Erase a conversation, every branch of it.

    Blocks that another conversation of the tenant names too are kept, and counted. Exit code 1 when there
    was no such conversation, or when the erasure is not on the drive yet.
    """
    from kvtier.cli import output

    if not yes and not _confirmed(conversation):
        ctx.exit(exits.ANSWER_IS_NO)
    with options.open_client(**where) as kv, output.working(f"erasing {conversation}"):
        receipt = kv.forget(conversation, tenant=tenant)
    if as_json:
        output.print_json(receipt)
    else:
        output.print_line(_forgotten(receipt))
    ctx.exit(exits.OK if receipt.found and receipt.durable else exits.ANSWER_IS_NO)


def _confirmed(conversation: str) -> bool:
    if not sys.stdin.isatty():
        raise click.UsageError("nobody is there to ask: give --yes to erase without a question")
    return click.confirm(f"Erase {conversation!r} for good?", err=True)


def _row(info: ConversationInfo, now_s: float) -> tuple[str, ...]:
    from kvtier.cli import output

    return (
        info.tenant,
        info.conversation,
        str(info.tokens),
        str(info.host_tokens),
        str(info.disk_tokens),
        output.size(info.bytes),
        f"{output.duration(max(0.0, now_s - info.parked_at_s))} ago",
        info.model,
    )


def _facts(info: ConversationInfo, now_s: float) -> list[tuple[str, str]]:
    from kvtier.cli import output

    facts = [
        ("conversation", info.conversation),
        ("tenant", info.tenant),
        ("model", info.model),
        ("tokens", f"{info.tokens}  (host {info.host_tokens}, disk {info.disk_tokens})"),
        ("size", output.size(info.bytes)),
        ("branches", str(info.branches)),
        ("version", str(info.version)),
        ("share", info.share),
        ("parked", f"{output.duration(max(0.0, now_s - info.parked_at_s))} ago"),
    ]
    if info.returns_at_s is not None:
        facts.append(("expected", f"in {output.duration(info.returns_at_s - now_s)}"))
    if info.keep_until_s is not None:
        facts.append(("worth keeping", f"for {output.duration(info.keep_until_s - now_s)}"))
    if info.cost_per_hour is not None:
        facts.append(("cost", f"{info.cost_per_hour:.3g} an hour, by the node's prices"))
    if info.saves_gpu_s is not None:
        facts.append(("saves", f"{info.saves_gpu_s:.3g} GPU-seconds, expected"))
    return facts


def _forgotten(receipt: ForgetReceipt) -> str:
    from kvtier.cli import output

    if not receipt.found:
        return f"nothing to erase: {receipt.conversation!r} is not parked here"
    text = f"erased {receipt.erased_objects} objects ({output.size(receipt.erased_bytes)})"
    if receipt.kept_shared_objects:
        kept = output.size(receipt.kept_shared_bytes)
        text += f"; kept {receipt.kept_shared_objects} ({kept}) that other conversations name too"
    if not receipt.durable:
        text += f"; NOT yet durable: {receipt.reason} {receipt.detail}".rstrip()
    return text
