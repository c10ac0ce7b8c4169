"""`ondevice pull NAME`: fetch a model, so that it is here when it is wanted."""

from __future__ import annotations

from pathlib import Path

import click

from . import console


@click.command("pull")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(name, as_json):
    """Fetch NAME: a catalog name, a Hugging Face repo id (owner/name), or one GGUF of a repo (owner/name:FILE.gguf),
    either with @REVISION; a repo that is here already is brought up to date. Prints where it is. Interrupted downloads
    resume."""
    from ..checkpoint import open_checkpoint

    path = fetch(name, refresh=True)
    with open_checkpoint(path) as checkpoint:  # what came must at least open
        facts = {"name": name, "path": str(path), "tensors": len(checkpoint.names), "bytes": checkpoint.nbytes}
    console.json(facts) if as_json else console.answer(str(path))


def fetch(name: str, refresh: bool = False) -> Path:
    """Where the model called `name` is, fetched if need be: what comes from where is said, and how far it is shown."""
    from .. import hub

    with console.progress("Fetching", unit="bytes") as bar:
        return hub.resolve(name, console.status, lambda event: bar.update(event.done, event.total), refresh)
