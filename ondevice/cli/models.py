"""`ondevice models`: what is here, and what the catalog offers."""

from __future__ import annotations

import click

from . import console


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(as_json):
    """List the models that are here (catalog and Hugging Face cache): name, size, quantization, path; and the catalog's
    names that can be fetched."""
    from .. import hub
    from ..catalog import CATALOG

    here = hub.local_models()
    missing = [entry for name, entry in CATALOG.items() if name not in {m.name for m in here}]
    if as_json:
        console.json(
            {
                "models": [
                    {"name": m.name, "path": str(m.path), "bytes": m.nbytes, "quantization": m.quantization}
                    for m in here
                ],
                "available": [
                    {"name": e.name, "bytes": e.size, "about": e.about, "licence": e.licence} for e in missing
                ],
            }
        )
        return
    if here:
        rows = [(m.name, f"{m.nbytes / 1e6:.0f} MB", m.quantization, str(m.path)) for m in here]
        console.table(rows, ("name", "size", "quantization", "path"))
    else:
        console.status("No models are here yet.")
    for entry in missing:
        console.status(f"To fetch: ondevice pull {entry.name}   ({entry.size / 1e6:.0f} MB) {entry.about}")
