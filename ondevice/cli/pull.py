"""`ondevice pull NAME`: fetch a model, so that it is here when it is wanted."""

from __future__ import annotations

import click

from . import console


@click.command("pull")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(name, as_json):
    """Fetch NAME: a catalog name, a Hugging Face repo id (owner/repo), or one GGUF of a repo (owner/repo:FILE.gguf).
    Prints where it is. Interrupted downloads resume."""
    from .. import hub
    from ..checkpoint import open_checkpoint

    path = hub.resolve(name, console.status)
    with open_checkpoint(path) as checkpoint:  # what came must at least open
        facts = {"name": name, "path": str(path), "tensors": len(checkpoint.names), "bytes": checkpoint.nbytes}
    console.json(facts) if as_json else console.answer(str(path))
