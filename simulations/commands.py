"""The command line. Here: `fedtune simulate`, `compare`, `plan`, `strategies`, `report`, `export`; the commands of deployment
stand in server/commands.py, server/keys_commands.py, client/commands.py, doctor.py and up.py. Heavy imports wait until needed.

Exit codes: 0 done, 1 the run failed, 2 something that the user must mend, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from rich.console import Console

from client import commands as of_the_client
from fedtune import __version__
from fedtune.errors import FedtuneError, RunFolderError, UserError
from fedtune.paths import app_root, job_file
from server import commands as of_the_server
from server import keys_commands as of_keys
from simulations import doctor as of_the_doctor
from simulations import up as of_one_machine

if TYPE_CHECKING:
    from fedtune.job import Job
    from server.records import Watcher

app = typer.Typer(
    name="fedtune", no_args_is_help=True, add_completion=False, suggest_commands=False, pretty_exceptions_enable=False
)
HELP_ASKED = getattr(click.exceptions, "NoArgsIsHelpError", ())  # before click 8.2 the help is shown without an error
LONGEST = 2000  # characters of an error
SCENARIOS = app_root() / "simulations" / "scenarios"


class Engine(StrEnum):
    process = "process"
    flower = "flower"


def main() -> None:
    """Run the command line; every error that is ours ends in one line."""
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)  # peft's, about a name in transformers
    with one_line_errors():
        sys.exit(app(standalone_mode=False))


@contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        _complain(error, 2)
    except FedtuneError as error:
        _complain(error, 1)
    except HELP_ASKED as asked:
        asked.show()
        sys.exit(asked.exit_code)
    except click.ClickException as error:  # an option or an argument that there is not
        context = getattr(error, "ctx", None)
        more = f"`{context.command_path} --help`" if context else "`fedtune --help`"
        _complain(UserError(f"{error.format_message().rstrip('.')}; {more} shows what there is"), error.exit_code)


@contextmanager
def said_when_stopped(kept: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C ends in one line; typer alone would end without a word."""
    try:
        yield
    except KeyboardInterrupt as stop:
        typer.echo(f"fedtune: stopped; {kept()}", err=True)
        raise typer.Exit(130) from stop


def _complain(error: FedtuneError, code: int) -> None:
    from server.report_units import one_line

    typer.echo(f"fedtune: {one_line(str(error), LONGEST)}", err=True)  # it may hold words of a library, or of strangers
    sys.exit(code)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Federated fine-tuning of language models: simulate many clients here, or run the same job across machines."""
    if show:
        typer.echo(f"fedtune {__version__}")
        raise typer.Exit


@app.command()
def simulate(
    job: Annotated[str, typer.Argument(help="A job file, or the name of a scenario that is shipped: demo.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; absent is runs/<name of the job>.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for any key of the job, as often as needed.")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="process: all clients in this process; flower: Flower's, on Ray.")
    ] = Engine.process,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that is in the run folder.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that is in the run folder; begin one where there is none.")
    ] = False,
) -> None:
    """Run a job with all its clients on this machine."""
    from fedtune.job import load_job

    checked = load_job(job_file(job), set_ or [])
    folder = out or Path("runs") / checked.name
    if resume and overwrite:
        raise UserError("--resume goes on with the run that is there, --overwrite takes it away: type one of them")
    from server.run_folder import holds_run
    from server.table import LiveTable
    from server.tensorboard import TensorBoard
    from server.watchers import Several

    if resume and not holds_run(folder):
        typer.echo(f"no run in {folder}: it begins")
    free = nullcontext() if resume else _free(folder, overwrite)
    with said_when_stopped(partial(_what_is_left, folder)), free, LiveTable(Console()) as table, TensorBoard(folder) as events:
        _run(checked, folder, engine, Several([table, events]), resume)
    of_the_server.say_where(folder)


@app.command()
def compare(
    job: Annotated[str, typer.Argument(help="A job file, or the name of a scenario that is shipped.")],
    strategies: Annotated[
        str, typer.Option(help="Strategies or variants of the job, with commas; absent is all its variants, or all strategies.")
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each: job.seed is 0, 1, …")] = 3,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for any key of the job, as often as needed.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; absent is runs/<name of the job>-compare.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Cells at a time; absent is as many as cores and memory allow.")
    ] = None,
) -> None:
    """Play strategies on the same data and cohorts, and put them into one table and one page. Finished cells are kept."""
    from simulations.sweep import plan as plan_cells
    from simulations.sweep_run import sweep

    names = [name.strip() for name in strategies.split(",") if name.strip()]
    planned = plan_cells(job_file(job), names, seeds, set_ or [], out)
    with said_when_stopped(lambda: "finished cells are kept; the same command plays the others"):
        whole = sweep(planned, processes, Console())
    if not whole:
        raise typer.Exit(1)


@app.command()
def plan(
    job: Annotated[str, typer.Argument(help="A job file, or the name of a scenario that is shipped.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value for any key of the job.")] = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say who would train what in round 1, in how much memory and time, for how many bytes. Nothing trains."""
    from fedtune.job import load_job

    checked = load_job(job_file(job), set_ or [])
    from simulations.plan import plan_job
    from simulations.plan_table import Progress, plan_table

    with said_when_stopped(lambda: "nothing was changed"), Progress() as progress:
        planned = plan_job(checked, progress)
    if json:
        import json as codec

        typer.echo(codec.dumps(planned.as_json(), indent=1))
    else:
        Console().print(plan_table(planned))


@app.command()
def strategies(
    job: Annotated[
        str | None, typer.Option(help="Count the bytes for this job: a job file, or the name of a scenario.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value for any key of the job.")] = None,
) -> None:
    """List the methods that a job can name: what each does, what it can do, and what it sends."""
    from fedtune.job import load_job
    from simulations.strategies_table import strategies_table

    checked = load_job(job_file(job), set_ or []) if job else None
    Console().print(strategies_table(checked))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write the report of a run again: report.html in its folder."""
    from server.report import write_report

    typer.echo(f"report: {write_report(folder)}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a run whose method trains the whole model.")],
    out: Annotated[Path | None, typer.Option(help="New folder; absent is one in the run folder.")] = None,
    as_: Annotated[
        str, typer.Option("--as", help="model: whole; difference: to the base; adapter: the difference as LoRA, not exact.")
    ] = "model",
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")] = "float32",
    round: Annotated[int | None, typer.Option(min=1, help="Absent is the last.")] = None,
) -> None:
    """Write what a run made of the model's own weights: the model, its difference to the base, or an adapter close to it."""
    from simulations.export import Form, export_run

    with said_when_stopped(lambda: "nothing was exported"):
        typer.echo(export_run(run, out, Form(as_, rank, dtype, round)))


def _run(job: Job, folder: Path, engine: Engine, watcher: Watcher, resume: bool) -> None:
    from simulations import engine as in_process

    if engine is Engine.process:
        in_process.simulate(job, folder, watcher, resume)
        return
    from simulations.flower_engine import run_with_flower

    in_process.require_comparable(job)
    run_with_flower(job, folder, watcher, resume)
    if job.compare:
        in_process.compare_with(in_process.resident_trainer(job, watcher), folder, watcher)


def _what_is_left(folder: Path) -> str:
    from server.run_folder import holds_run

    return f"the run in {folder} goes on with --resume" if holds_run(folder) else "nothing was begun"


@contextmanager
def _free(folder: Path, overwrite: bool) -> Iterator[None]:
    """The run folder is free inside. A run that was there comes back if none takes its place: a bad job loses nothing."""
    from server.run_folder import require_free

    if not (overwrite and folder.exists()):
        require_free(folder)
        yield
        return
    if not (folder / "job.toml").is_file():
        raise RunFolderError(f"{folder} is not a run folder, so --overwrite does not touch it; name another with --out")
    aside = folder.absolute().with_name(f".{folder.absolute().name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    try:
        yield
    finally:
        if (folder / "job.toml").is_file():
            shutil.rmtree(aside)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)


for commands in (of_the_server, of_keys, of_the_client, of_the_doctor, of_one_machine):
    commands.add_to(app)
