"""The commands of a trained model and its weights: caption, export, fetch-weights.

Like the command line itself, this module imports what a command needs inside the command.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from pvtcap.imports import quick_imports

CheckpointFolder = Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder: its latest.")]
EncoderWeights = Annotated[
    str | None, typer.Option(help="Where a frozen encoder's weights lie now, if not where they were in the training.")
]
Decoder = Annotated[str | None, typer.Option(help="The same of a frozen decoder.")]
_SHEET_PHOTOS = 200


def add_to(app: typer.Typer) -> None:
    """Give ``app`` this module's commands."""
    app.command()(caption)
    app.command()(export)
    app.command()(fetch_weights)


def caption(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint or run folder, or one of 'export --to hf'.")],
    photos: Annotated[list[Path], typer.Argument(help="Photos, folders, tars; -: a photo or a list on stdin.")],
    num_beams: Annotated[int | None, typer.Option(min=1)] = None,
    max_length: Annotated[int | None, typer.Option(min=2)] = None,
    min_length: Annotated[int | None, typer.Option(min=0)] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Photos captioned at a time.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line: photo, caption, score.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="Also draw a PNG of the photos with their captions.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: a GPU if there is one.")] = None,
    encoder_weights: EncoderWeights = None,
    decoder: Decoder = None,
) -> None:
    """Caption your own photos; prints one line each: name, tab, caption.

    A photo that cannot be read is named on stderr (with --json it has "error"), and the exit code is then 2.
    """
    with quick_imports():
        from pvtcap import sheet as drawing
        from pvtcap.api import Captioner
        from pvtcap.buildreport import photos_progress
        from pvtcap.caption import caption_photos, count_photos, find_photos
        from pvtcap.errors import ShardError

    found = find_photos(photos)
    captioner = Captioner.from_checkpoint(checkpoint, device, encoder_weights=encoder_weights, decoder=decoder)
    how = captioner.search(num_beams=num_beams, max_length=max_length, min_length=min_length, micro_batch=micro_batch)
    entries: list[drawing.Entry] = []
    errors: list[str] = []
    # On a terminal, the captions themselves are the progress.
    bar = nullcontext(lambda _: None) if sys.stdout.isatty() else photos_progress("caption", count_photos(photos))
    with bar as progress:
        for item in caption_photos(captioner, found, how):
            line = item.as_json() if as_json else f"{item.name}\t{item.caption}"
            if item.error is None or as_json:
                typer.echo(line)
            if item.error is not None:
                errors.append(item.error)
            elif sheet is not None and len(entries) < _SHEET_PHOTOS:
                entries.append(drawing.Entry(item.photo, item.caption or "", item.name))
            progress(1)
    if sheet is not None and entries:
        drawing.draw(entries, sheet)
        first = f" (the first {_SHEET_PHOTOS} photos)" if len(entries) == _SHEET_PHOTOS else ""
        typer.echo(f"drawn: {sheet}{first}", err=True)
    if len(errors) > 1:
        for error in errors:
            typer.echo(f"not captioned: {error}", err=True)
        raise ShardError(f"{len(errors):,} photos were not captioned: they are named above")
    if errors:
        raise ShardError(errors[0])


def export(
    checkpoint: CheckpointFolder,
    to: Annotated[str, typer.Option(help="safetensors, combined (blip_pvt_combined.pth), or hf (a folder).")],
    out: Annotated[Path, typer.Option(help="The file or folder to write; it must not exist.")],
    only_trained: Annotated[bool, typer.Option(help="safetensors: leave out what was frozen.")] = False,
    whole_blip: Annotated[
        Path | None, typer.Option(help="combined: a BLIP file or folder whose vision part comes along.")
    ] = None,
    encoder_weights: EncoderWeights = None,
    decoder: Decoder = None,
) -> None:
    """Write a trained model for others: one process, on a CPU, whatever ranks and ZeRO stage trained it."""
    with quick_imports():
        from pvtcap import export as exporting
        from pvtcap.checkpoint import Checkpoint

    written = exporting.export(
        Checkpoint.open(checkpoint),
        to,
        out,
        only_trained=only_trained,
        whole_blip=whole_blip,
        encoder_weights=encoder_weights,
        decoder=decoder,
    )
    typer.echo(written)


def fetch_weights(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped one: flickr30k.")],
    to: Annotated[Path, typer.Option(help="Folder for the files; it may be copied to a machine without network.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
) -> None:
    """Fetch what a configuration takes from the Hugging Face hub, and print the words that use it from there."""
    from pvtcap.configfile import load
    from pvtcap.weightfetch import fetch

    words = fetch(load(config, overrides or []), to)
    if words:
        typer.echo(" ".join(words))
    else:
        typer.echo("nothing to fetch: this configuration takes nothing from the hub", err=True)
