"""`kvtier rotate`: another master key for the key store of sealed blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from kvtier.cli import exits

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("directory", type=_FOLDER)
@click.option("--keys-directory", type=_FOLDER, required=True, help="The key store.")
@click.option("--key-file", type=_FILE, required=True, help="Its present master key.")
@click.option("--new-key-file", type=_FILE, required=True, help="The master key that it is to have.")
@click.pass_context
def rotate(
    ctx: click.Context, directory: Path, keys_directory: Path, key_file: Path, new_key_file: Path
) -> None:
    """Give the key store of sealed blocks another master key, while no daemon uses the directory.

    Only the tenants' keys are wrapped anew, in one transaction, and no block is written.  Keep both keys
    until this has ended; after a crash the store opens with one of them.  Exit code 2 when the directory is
    in use or is none of kvtier's, or when the present key is not the key store's.
    """
    from kvtier.cli import output
    from kvtier.cli.app import one_line
    from kvtier.disk.lock import FORMAT, DirectoryLock
    from kvtier.disk.master_key import read_master_key
    from kvtier.disk.vault import Vault
    from kvtier.errors import TierUnavailable

    if not (directory / FORMAT).exists():
        raise click.UsageError(f"{directory} is not a kvtier directory")
    if not Vault.exists(keys_directory):
        raise click.UsageError(f"{keys_directory} holds no key store")
    present, wanted = read_master_key(key_file), read_master_key(new_key_file)
    try:
        held = DirectoryLock(directory)
        try:
            vault = Vault(keys_directory, held.store_id, present)
            try:
                vault.rotate_master(wanted)
            finally:
                vault.close()
        finally:
            held.release()
    except TierUnavailable as problem:
        sys.stderr.write(f"kvtier: {one_line(str(problem))}\n")
        ctx.exit(exits.USAGE)
    output.print_line(f"the key store opens with {new_key_file} from now on: name it in disk.key_file")
