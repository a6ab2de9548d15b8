"""`visionlora cache`: what is kept from run to run, and taking it away."""

from __future__ import annotations

import json
import time
from typing import Annotated, Optional

import typer

from visionlora.cli.console import ConsoleListener
from visionlora.errors import ConfigError

DAY = 24 * 60 * 60


def command(
    clear: Annotated[bool, typer.Option("--clear", help="Take all of it away.")] = False,
    unused_days: Annotated[
        Optional[float], typer.Option(help="Take away what no run has used for so many days.")  # noqa: UP045
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result for programs.")] = False,
) -> None:
    """Show how much is kept of encoded pictures and captions, or take it away: `visionlora cache --unused-days 30`."""
    if clear and unused_days is not None:
        raise ConfigError("--clear takes away everything, --unused-days a part: give one of them.")
    if unused_days is not None and not unused_days >= 0:
        raise ConfigError(f"unused_days is {unused_days:g}; it must be 0 or more.")
    with ConsoleListener(quiet=as_json) as listener:
        from visionlora.data.cache import default_cache_folder
        from visionlora.data.cache_folder import KINDS, entries_of, remove

        folder = default_cache_folder()
        entries = list(entries_of(folder))
        chosen = [e for e in entries if clear or (unused_days is not None and time.time() - e.used > unused_days * DAY)]
        gone = {}
        for done, entry in enumerate(chosen, 1):
            if remove(entry):
                gone[entry.path] = entry.nbytes
            listener.progress("Taking away", done, len(chosen))
    left = [e for e in entries if e.path not in gone]
    sizes = {kind: [e.nbytes for e in left if e.kind == kind] for kind in KINDS}
    if as_json:
        kept = {kind: {"entries": len(own), "bytes": sum(own)} for kind, own in sizes.items()}
        removed = {"entries": len(gone), "bytes": sum(gone.values())}
        typer.echo(json.dumps({"folder": str(folder), "kept": kept, "removed": removed}))
        return
    if clear or unused_days is not None:
        typer.echo(f"Took away {len(gone):,} entries, {size_of(sum(gone.values()))}.")
    if failed := len(chosen) - len(gone):
        typer.echo(f"{failed:,} entries could not be taken away: check the permissions of {folder}.")
    width = max(map(len, KINDS))
    for kind, own in sizes.items():
        if own:
            typer.echo(f"{kind:<{width}}  {len(own):>9,} entries  {size_of(sum(own)):>10}")
    typer.echo(f"{size_of(sum(e.nbytes for e in left))} in {folder} (VISIONLORA_CACHE names another folder).")


def size_of(nbytes: int) -> str:
    """In words.

    >>> size_of(3 * 2**20), size_of(5 * 2**30)
    ('3.0 MiB', '5.0 GiB')
    """
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
