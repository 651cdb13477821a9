"""`kvtier config check`, `kvtier config show` and `kvtier config reference`."""

from __future__ import annotations

import click

from kvtier.cli import options


@click.group()
def config() -> None:
    """Check or show the configuration."""


@config.command()
@click.argument("file", type=click.Path(dir_okay=False))
@options.json_option
def check(file: str, as_json: bool) -> None:
    """Check a configuration file. Exit code 2, with the field and the fix, when it is wrong."""
    from kvtier.cli import output

    settings = options.read_config(file)
    if as_json:
        output.print_json({"file": file, "ok": True, "settings": len(settings.origins)})
    else:
        output.print_line(f"{file}: ok, {len(settings.origins)} settings")


@config.command()
@options.config_option
@options.set_option
@click.option("--effective", is_flag=True, help="Every setting, also those left at their default.")
@options.json_option
def show(config_file: str | None, settings: tuple[str, ...], effective: bool, as_json: bool) -> None:
    """Show the settings as TOML, with their meaning and where each comes from."""
    from kvtier.cli import output
    from kvtier.config.load import effective as all_settings
    from kvtier.config.text import to_toml

    config = options.read_config(config_file, settings)
    if not as_json:
        click.echo(to_toml(config, every=effective), nl=False)
        return
    output.print_json(
        {
            name: {"value": setting.value, "origin": setting.origin}
            for name, setting in all_settings(config).items()
            if effective or setting.origin != "default"
        }
    )


@config.command()
def reference() -> None:
    """Print every setting with type, default and meaning, as Markdown."""
    from kvtier.config.text import reference as markdown

    click.echo(markdown(), nl=False)
