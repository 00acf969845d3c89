"""The commands that score: ``evaluate``, ``score`` and ``compare``. What they need is imported inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvtcap.errors import ConfigError
from pvtcap.imports import quick_imports

if TYPE_CHECKING:
    from rich.console import Console

    from pvtcap.metrics import Scores

Timeout = Annotated[float, typer.Option(min=1, help="Seconds each metric may take.")]
Memory = Annotated[int, typer.Option(min=64, help="MiB each metric may take.")]
JavaHeap = Annotated[int, typer.Option(min=1, help="MiB of heap for METEOR's, SPICE's and the tokenizer's java.")]


def score(
    files: Annotated[
        list[Path], typer.Argument(help="RESULTS.json REFERENCES.json; with --compare REFERENCES.json alone.")
    ],
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A.json B.json", help="Two RESULTS: by how much is B better?")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for scores.json and captions.jsonl, a line an image with its scores.")
    ] = None,
    subset: Annotated[
        bool, typer.Option(help="Score the captioned images, though there are references of more.")
    ] = False,
    metric: Annotated[
        list[str] | None, typer.Option(help="BLEU, METEOR, ROUGE_L, CIDEr or SPICE; default: all.")
    ] = None,
    training: Annotated[
        Path | None, typer.Option(help="The captions trained on, like REFERENCES: how many of the results are novel?")
    ] = None,
    timeout_s: Timeout = 600.0,
    memory_mib: Memory = 4096,
    java_heap_mib: JavaHeap = 2048,
) -> None:
    """Score captions in COCO's format: no model, no GPU, no ShardSet.

    RESULTS.json is [{"image_id": …, "caption": …}, …], REFERENCES.json {"annotations": [{"image_id": …, "caption":
    …}, …]}. Intervals are 95%, by bootstrap over images.
    """
    from rich.console import Console

    from pvtcap import cocofiles, metrics
    from pvtcap.comparison import PerImage, differences
    from pvtcap.scoretable import difference_table

    wanted = 1 if compare else 2
    if len(files) != wanted or (compare and out):
        words = "--compare A.json B.json REFERENCES.json, without --out" if compare else "RESULTS.json REFERENCES.json"
        raise ConfigError("other files than 'pvtcap score' takes", got=" ".join(map(str, files)), wanted=words)
    references = cocofiles.read_references(files[-1])
    known = cocofiles.read_references(training) if training else None
    reports, found = {}, []
    for path in compare or files[:1]:
        results = cocofiles.read_results(path)
        chosen = cocofiles.to_score(results, references, subset=subset)
        scores = metrics.score(
            chosen,
            results,
            metric or tuple(metrics.METRICS),
            timeout_s=timeout_s,
            memory_mib=memory_mib,
            java_heap_mib=java_heap_mib,
        )
        trained = None if known is None else (caption for captions in known.values() for caption in captions)
        reports[path.stem if path.stem not in reports else str(path)] = {
            "scores": scores.values,
            "intervals": scores.intervals,
            "unavailable": scores.unavailable,
            "tokenizer": scores.tokenizer,
            "statistics": metrics.caption_statistics(results, trained),
            "num_photos": len(results),
            "results": path.name,
            "references": files[-1].name,
        }
        found.append(scores)
        if out is not None:
            _write(out, reports[path.stem], scores, results, chosen)
    console = Console(highlight=False)
    _print_scores(console, reports)
    if compare:
        console.print(difference_table(differences(PerImage.of(found[0]), PerImage.of(found[1])), *reports))
    if out is not None:
        console.print(f"{out}: scores.json, captions.jsonl")


def _write(out: Path, report: dict[str, Any], scores: Scores, results: dict[str, str], references: Any) -> None:
    from pvtcap.comparison import CAPTIONS
    from pvtcap.scoretable import SCORES
    from pvtcap.shardset import write_json

    lines = [
        {
            "image_id": id_,
            "caption": caption,
            "references": references[id_],
            "scores": scores.per_image[id_],
            "statistics": scores.statistics[id_],
        }
        for id_, caption in results.items()
    ]
    out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / CAPTIONS).write_text(text, encoding="utf-8")
    write_json(out / SCORES, report)


def _print_scores(console: Console, reports: Mapping[str, Any], title: str | None = None) -> None:
    from pvtcap.scoretable import reasons, score_table

    console.print(score_table(reports, title))
    for line in reasons(reports):
        console.print(line, markup=False, soft_wrap=True)


def compare(
    evaluations: Annotated[list[str], typer.Argument(help="Evaluation folders, or NAME=FOLDER for the heading.")],
) -> None:
    """Show the scores of several evaluations side by side; of two on the same images also by how much one is better."""
    from rich.console import Console

    from pvtcap.comparison import CAPTIONS, PerImage, differences
    from pvtcap.scoretable import difference_table, read_report

    reports, folders = {}, {}
    for word in evaluations:
        name, equals, folder = word.partition("=")
        path = Path(folder if equals else word)
        name = name if equals else path.name
        reports[name], folders[name] = read_report(path), path
    console = Console(highlight=False)
    _print_scores(console, reports)
    if len(reports) == 2 and all((folder / CAPTIONS).exists() for folder in folders.values()):
        per_image = [PerImage.read(folders[name], reports[name]["scores"]) for name in reports]
        if per_image[0].ids == per_image[1].ids:
            console.print(difference_table(differences(per_image[0], per_image[1]), *reports))


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder: its latest.")],
    data: Annotated[str, typer.Option(help="ShardSet with reference captions: a folder or a URL.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json, scores.json, report.html and pictures.")],
    num_beams: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling, with --num-beams 1.")] = None,
    max_length: Annotated[int | None, typer.Option(min=2)] = None,
    min_length: Annotated[int | None, typer.Option(min=0)] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1)] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    java_heap_mib: Annotated[int | None, typer.Option(min=1, help="MiB of heap for each java.")] = None,
    blank_photos: Annotated[bool, typer.Option(help="Show the model grey pictures instead.")] = False,
    allow_missing: Annotated[
        bool, typer.Option(help="Go on without photos that cannot be read; scores.json names them.")
    ] = False,
    training: Annotated[
        Path | None, typer.Option(help="The ShardSet trained on: how many of the captions are novel?")
    ] = None,
    heat_maps: Annotated[
        bool, typer.Option(help="Show in report.html where the model looked for each word (cross-attention).")
    ] = False,
) -> None:
    """Caption a whole ShardSet and score it, on any number of ranks. Unset options are the checkpoint's.

    Killed, it goes on from what its ranks had captioned when the same command is given again.
    """
    with quick_imports():
        from pvtcap import evaluate as evaluation
        from pvtcap.checkpoint import Checkpoint
        from pvtcap.configfile import evaluating
        from pvtcap.dist import World

    given: dict[str, Any] = {
        "num_beams": num_beams,
        "top_p": top_p,
        "max_length": max_length,
        "min_length": min_length,
        "micro_batch": micro_batch,
        "precision": precision,
        "java_heap_mib": java_heap_mib,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    with World.start() as world:
        how = world.on_first_rank(lambda: evaluating(Checkpoint.open(checkpoint).config, changed))
        report = evaluation.run(
            checkpoint,
            data,
            out,
            world,
            how,
            blank_photos=blank_photos,
            allow_missing=allow_missing,
            training=training,
            heat_maps=heat_maps,
        )
    if report is not None:
        from rich.console import Console

        from pvtcap.scoring import FILES

        title = f"{report['checkpoint']} on {report['data']}" + (", photos blanked" if blank_photos else "")
        console = Console(highlight=False)
        _print_scores(console, {"value": report}, title)
        console.print(f"{out}: {', '.join(name for name in FILES if (out / name).exists())}")
