"""`kvtier size`: how large a model's KV cache is."""

from __future__ import annotations

import click

from kvtier.cli import options


@click.command()
@click.argument("config", type=click.Path(exists=True))
@click.option(
    "--tokens", type=click.IntRange(min=0), default=32768, show_default=True, help="Of a conversation."
)
@click.option(
    "--block-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of a block."
)
@click.option("--kv-dtype", help="Of the KV cache where it is not the model's, such as fp8_e4m3.")
@options.json_option
def size(config: str, tokens: int, block_tokens: int, kv_dtype: str | None, as_json: bool) -> None:
    """Tell how large a model's KV cache is.

    CONFIG is a Hugging Face config.json or the folder that holds it. Needs no daemon.
    """
    from kvtier.cli import output
    from kvtier.model.spec import ModelSpec, size_report

    report = size_report(ModelSpec.from_config(config, kv_dtype=kv_dtype), tokens, block_tokens)
    if as_json:
        output.print_json(report)
        return
    output.print_facts(
        (
            ("model", f"{report.name} ({report.model_type}, KV in {report.dtype})"),
            ("a token", f"{report.bytes_per_token:,} B"),
            (f"a block of {block_tokens}", output.size(report.block_bytes)),
            (f"{tokens:,} tokens", output.size(report.conversation_bytes)),
        )
    )
    columns = ("LAYERS", "KIND", "WINDOW", "BYTES/TOKEN", "KEPT TOKENS", "CONVERSATION")
    output.print_line(" ")
    output.print_table(
        columns,
        (
            (
                str(group.layers),
                group.kind,
                str(group.window_tokens or "-"),
                f"{group.bytes_per_token:,}",
                f"{group.kept_tokens:,}",
                output.size(group.conversation_bytes),
            )
            for group in report.groups
        ),
        numbers=("LAYERS", *columns[2:]),
    )
