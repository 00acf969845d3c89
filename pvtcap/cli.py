"""The ``pvtcap`` command. Imports are inside the commands: ``pvtcap --help`` loads no torch.

A PvtcapError becomes one line on standard error and exit code 2; what a library says of the machine (``libraryerrors``)
a line and exit code 1; anything else is a bug and keeps its traceback. A training run that was asked to stop, and can
go on, ends with exit code 75.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from pvtcap import __version__, evaluationcommands, modelcommands, processes
from pvtcap.errors import MachineError, PvtcapError
from pvtcap.imports import quick_imports
from pvtcap.libraryerrors import explaining

app = typer.Typer(
    name="pvtcap",
    help="Train and evaluate image captioners on WebDataset shards, on one CPU or many GPU nodes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done; 1 doctor, audit or verify found something, the machine failed, or a bug; 2 a mistake, "
    "which one line explains; 75 asked to stop, with a checkpoint to go on from; 128 + N ended by signal N.",
)

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def main() -> None:
    """Run the command line; the entry point of ``pvtcap`` and ``python -m pvtcap``."""
    try:
        with explaining(None):
            app()
    except SystemExit as end:  # typer ends so, well or not
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except PvtcapError as error:
        if not error.told:
            rank = os.environ.get("RANK", "0")
            print(f"pvtcap: error{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr, flush=True)
        # Slurm's launcher queues a job again whose machine failed, and none that is a mistake.
        code = 1 if isinstance(error, MachineError) else 2
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # Other ranks may sit in a collective that will never end, and so may this one's threads.
            sys.stdout.flush()
            os._exit(code)
    except KeyboardInterrupt:
        code = 130
    if "RANK" in os.environ:
        processes.leave(code)
    sys.exit(code)


@app.command(context_settings=PASS_ON)
def shards(context: typer.Context) -> None:
    """Build shards (BUILDER … --out DIR), index others' tars (index DIR), or look at them (info DIR, verify DIR).

    --help lists the builders.
    """
    from pvtcap import recipes, shardcommands

    words = context.args
    if not words or words[0] in ("-h", "--help"):
        names = sorted(path.stem.replace("_", "-") for path in (recipes.root() / "shards").glob("*.py"))
        typer.echo("usage: pvtcap shards BUILDER [OPTIONS] --out DIR")
        for name in shardcommands.COMMANDS:
            typer.echo(f"       pvtcap shards {name} DIR [OPTIONS]")
        typer.echo(f"\nbuilders: {', '.join(names)}\n\n'pvtcap shards WORD --help' explains each.")
    elif words[0] in shardcommands.COMMANDS:
        shardcommands.COMMANDS[words[0]](words[1:])
    else:
        script = recipes.find_builder(words[0], also=shardcommands.COMMANDS)
        sys.argv = [f"pvtcap shards {words[0]}", *words[1:]]
        runpy.run_path(str(script), run_name="__main__")


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped one: flickr30k.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    resume: Annotated[
        str, typer.Option(help="auto: go on if the run folder has a checkpoint; none; or a PATH.")
    ] = "auto",
) -> None:
    """Train; also under torchrun and srun, with the same words."""
    from pvtcap.configfile import load

    try:
        loaded = load(config, overrides or [])
    except PvtcapError as error:
        error.told = os.environ.get("RANK", "0") != "0"  # all ranks read the same words: one says what is wrong
        raise
    from pvtcap.preemption import Notice, exit_code_to_resume
    from pvtcap.processes import begin_server

    with (
        explaining(loaded.run.dir / "errors"),
        Notice(loaded.train.stop_after_minutes) as notice,  # before what follows, which takes seconds
    ):
        if loaded.data.workers:
            begin_server(["pvtcap.stream"])  # decoding processes need torch, too, and nothing of DeepSpeed
        with quick_imports():
            from pvtcap import train as training
            from pvtcap.dist import World
            from pvtcap.evaluate import BackgroundEvaluation
            from pvtcap.stallwatch import StallWatch

        with (
            World.start() as world,
            StallWatch(loaded.run.dir, world.rank, world.size, minutes=loaded.train.stall_minutes) as watch,
            BackgroundEvaluation(loaded, world, beat=watch.beat) as evaluation,
        ):
            finished = training.run(loaded, world, resume=resume, evaluation=evaluation, notice=notice, watch=watch)
    if not finished:
        raise typer.Exit(exit_code_to_resume())


app.command()(evaluationcommands.evaluate)
app.command()(evaluationcommands.score)
app.command()(evaluationcommands.compare)


@app.command()
def features(
    config: Annotated[str, typer.Argument(help="The YAML file to train with, or the name of a shipped one.")],
    data: Annotated[Path, typer.Option(help="ShardSet folder of photos.")],
    out: Annotated[Path, typer.Option(help="A new folder, or that of a run that was stopped.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    views: Annotated[int, typer.Option(min=1, help="The whole photo, and so many less one random crops of it.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp16; or int8, in half the bytes.")] = "fp16",
) -> None:
    """Store the frozen encoder's output for each photo, to train from: neither photos nor encoder are needed then.

    Also under torchrun, any number of ranks. Set data.train and data.val to the folders it makes.
    """
    from pvtcap.configfile import load
    from pvtcap.errors import ConfigError

    if dtype not in ("fp16", "int8"):
        raise ConfigError("unknown type of features", where="--dtype", got=dtype, wanted="fp16 or int8")
    loaded = load(config, overrides or [])
    from pvtcap.processes import begin_server

    if loaded.data.workers:
        begin_server(["pvtcap.photoviews"])
    with quick_imports():
        from pvtcap import features as making
        from pvtcap.dist import World

    # A rank that is done waits for the others, which may have the larger shards: not for half an hour only.
    with World.start(timeout_minutes=24 * 60) as world:
        how = making.FeatureOptions(num_views=views, dtype="fp16" if dtype == "fp16" else "int8")
        manifest = making.run(loaded, data, out, world, how)
    if world.is_first:
        size = sum(entry.size_bytes for entry in manifest.shards)
        counts = f"{manifest.num_samples:,} samples in {len(manifest.shards):,} shards, {size:,} bytes"
        typer.echo(f"{out}: {counts}: {manifest.features}")


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print it for scripts.")] = False,
) -> None:
    """Say from a run's ledger which samples it has seen: each once an epoch? Exit code 1 if not."""
    from rich.console import Console

    from pvtcap import audit as auditing

    report = auditing.audit(run)
    if json:
        Console().print_json(data=report.to_json())
    else:
        auditing.print_report(report, Console(highlight=False, soft_wrap=True))
    if not report.is_clean:
        raise typer.Exit(1)


modelcommands.add_to(app)  # caption, export, fetch-weights


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="The YAML file to train with, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value …")] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Processes a node.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print it for scripts.")] = False,
) -> None:
    """Say what a run will be: batches, steps, memory by ZeRO stage, checkpoints, and the line to submit it."""
    from rich.console import Console

    with quick_imports():
        from pvtcap import plan as planning
        from pvtcap.configfile import load

    loaded = load(config, overrides or [])
    found = planning.plan(loaded, " ".join([config, *(overrides or [])]), nodes, gpus_per_node)
    if as_json:
        Console().print_json(data=found.to_json())
    else:
        planning.print_plan(found, loaded, Console(highlight=False, markup=False, soft_wrap=True))


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option(help="Where runs are written: its disk is looked at.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print it for scripts.")] = False,
) -> None:
    """Say what this machine has and lacks, and what to do; exit code 1 if training cannot start here."""
    from rich.console import Console

    from pvtcap import doctor as examining

    findings = examining.examine(folder)
    if as_json:
        Console().print_json(data=examining.report(findings))
    else:
        examining.print_findings(findings, Console(highlight=False, soft_wrap=True))
    if any(one.level == "bad" for one in findings):
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, finished or not.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Show one or several runs as an HTML page: curves, scores, what differs between them, what happened."""
    from pvtcap import runreport

    text = runreport.page([runreport.read(run) for run in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    typer.echo(out)


@app.command(context_settings=PASS_ON, hidden=True)
def nodecheck(context: typer.Context) -> None:
    """Print what this node sees of what a command needs, as JSON: launch/slurmnode.py compares the nodes."""
    import json

    from pvtcap import nodecheck as checking

    typer.echo(json.dumps(checking.check(context.args)))


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Such as configs/flickr30k.yaml or launch/local.sh.")],
    to: Annotated[Path, typer.Argument(help="A folder or a new name.")] = Path(),
) -> None:
    """Copy a shipped builder, launcher or configuration, to change it."""
    from pvtcap import recipes

    typer.echo(recipes.copy(name, to))


@app.command()
def where(name: Annotated[str, typer.Argument(help="Such as launch/local.sh.")]) -> None:
    """Print where a shipped file lies, in a checkout or an installed wheel."""
    from pvtcap import recipes

    typer.echo(recipes.find(name))


def _version(wanted: bool) -> None:
    if wanted:
        from pvtcap import recipes

        revision = recipes.git_revision()
        typer.echo(f"pvtcap {__version__}" + (f" ({revision})" if revision else ""))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of pvtcap itself."""
