"""`visionlora plugins`: what installed packages add."""

from __future__ import annotations

import warnings

import typer

from visionlora import plugins


def command() -> None:
    """List what plug-in packages add, and whether it can be imported."""
    found = plugins.installed()
    for plugin in found:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            works = plugins.load(plugin.group, plugin.name) is not None
        state = (
            "ok" if works else str(caught[0].message).rpartition("imported: ")[2] if caught else "cannot be imported"
        )
        typer.echo(f"{plugin.group}  {plugin.name}  {plugin.package} ({plugin.value})  {state}")
    if not found:
        typer.echo("No plug-ins are installed. A package adds them with entry points in these groups:")
        for group, what in plugins.GROUPS.items():
            typer.echo(f"  {group}  {what}")
