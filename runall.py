#!/usr/bin/env python3
"""Run the notebooks in batch: every combination of the values given, each notebook in a process of its own.

examples:
  python runall.py                                        every notebook at its defaults (quick profile, no download)
  python runall.py --only 02_awm --budget 10 50 200 --seed 0 1 2
  python runall.py --only 02_awm --dataset cifar10 --budget 500 1/class
  python runall.py --only 02_awm --profile paper --dataset gtsrb --budget 5% --attack badnets blended --dry-run

A finished run is skipped the next time, unless its notebook, its parameters or bdlib changed.  A killed run loses only what
was in flight: give the same command again.  Exit: 0 all well, 1 a run failed, 2 the arguments are wrong, 130 Ctrl-C.
"""

import argparse
import ast
import sys
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bdlib import data, grid, models, profiles, results
from bdlib.attacks import catalog
from bdlib.experiment import home, project_root

NOTEBOOKS = project_root() / "notebooks"
console = Console()


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if not (runs := planned(options)):
        return 2
    skipped, waiting = [], []
    for run in runs:
        (skipped if run.finished() and not options.force else waiting).append(run)
    if options.dry_run:
        show_plan(waiting, skipped)
        return 0
    try:
        try:
            failed = run_each(waiting, options)
        finally:
            rows = write_results(runs, options.out)
    except KeyboardInterrupt:
        say("[bold]stopped.[/] What was finished is kept; the same command goes on from there.")
        return 130
    except OSError as error:
        print(f"runall.py: {error}. What was finished is kept; the same command goes on from there.", file=sys.stderr)
        return 1
    if not rows.empty:
        console.print(means_table(rows))
    done = len(waiting) - len(failed)
    say(f"{len(runs)} runs: {done} done now, {len(skipped)} finished before, {len(failed)} failed")
    if not rows.empty:
        say(f"rows: {escape(str(options.out / 'results.csv'))}   figures: {escape(str(options.out / 'figures'))}")
        say(f"notebooks: {escape(str(options.out))}/NOTEBOOK/RUN/executed.ipynb")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    names = ", ".join(all_notebooks())
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", metavar="NOTEBOOK", help=f"notebooks to run: {names} (default: all)")
    p.add_argument("--dataset", nargs="+", help=f"{', '.join(data.NAMES)}, or folder:PATH")
    p.add_argument(
        "--arch", nargs="+", help=f"{', '.join(models.ARCHS)}; with :WIDTH for another width: preact_resnet18:8"
    )
    p.add_argument(
        "--attack", nargs="+", help=f"{', '.join(catalog.names())}; blended:FILE; with _a2a behind it all-to-all"
    )
    p.add_argument(
        "--budget",
        nargs="+",
        type=budget,
        help='clean images: a number, a share ("5%%") or a number per class ("1/class")',
    )
    p.add_argument(
        "--poison-rate", nargs="+", type=float, help="share of the training images that is poisoned, in (0, 1]"
    )
    p.add_argument("--target-label", nargs="+", type=int, help="class that triggered images shall be called")
    p.add_argument("--seed", nargs="+", type=int, help="whole numbers from 0 on")
    p.add_argument(
        "--profile",
        default="quick",
        help="quick: minutes on two CPU cores (default); paper: the papers' protocol, wants a GPU",
    )
    p.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="any other parameter of the notebooks: --set ablations=True",
    )
    p.add_argument(
        "--out", type=Path, default=None, help="folder for executed notebooks, rows and figures (default: runs)"
    )
    p.add_argument("--timeout", type=float, metavar="MINUTES", help="end a run that takes longer, as failed")
    p.add_argument("--dry-run", action="store_true", help="check everything, show what would run, run nothing")
    p.add_argument("--force", action="store_true", help="run again what is finished")
    return p


def budget(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def planned(options: argparse.Namespace) -> list[grid.Run]:
    """The runs asked for; none, after saying everything that is wrong, if they may not start."""
    options.out = (options.out or home()).resolve()
    try:
        profiles.require(options.profile)
        axes = {name: getattr(options, name) for name in grid.AXES}
        runs = grid.plan(notebooks(options.only), options.profile, axes, extra_parameters(options.set), options.out)
        wrong = grid.complaints(runs)
    except ValueError as error:
        runs, wrong = [], [str(error)]
    for line in wrong:
        print(f"runall.py: {line}", file=sys.stderr)
    return [] if wrong else runs


def all_notebooks() -> dict[str, Path]:
    return {path.stem: path for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))}


def notebooks(only: list[str] | None) -> list[Path]:
    found = all_notebooks()
    unknown = [name for name in only or [] if name not in found]
    if unknown:
        raise ValueError(f"--only must name notebooks out of {', '.join(found)}, got {', '.join(unknown)}")
    return [found[name] for name in only or found]


def extra_parameters(pairs: list[str]) -> dict[str, object]:
    extra = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {pair!r}")
        try:
            extra[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            extra[name] = text
    return extra


def run_each(waiting: list[grid.Run], options: argparse.Namespace) -> list[grid.Run]:
    """Run one after the other with a live display; the runs that failed."""
    failed = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as display:
        whole = display.add_task("all runs", total=len(waiting), unit="runs")
        for run in waiting:
            task = display.add_task(run.name, total=1, unit="cells")
            seconds_limit = options.timeout * 60 if options.timeout else None
            well, seconds = grid.execute(
                run, lambda cell, cells, t=task: display.update(t, completed=cell, total=cells or 1), seconds_limit
            )
            display.remove_task(task)
            display.advance(whole)
            if well:
                say(f"[green]done[/]    {escape(run.name)}  {seconds:.0f} s")
            else:
                failed.append(run)
                say(f"[red]FAILED[/]  {escape(run.name)}  {seconds:.0f} s: {escape(grid.last_error(run))}")
                say(f"        log: {escape(str(run.folder / 'log.txt'))}")
    return failed


def show_plan(waiting: list[grid.Run], skipped: list[grid.Run]) -> None:
    for run in waiting:
        say(f"would run  {escape(run.name)}")
    say(f"{len(waiting)} runs to do, {len(skipped)} finished before; nothing was started")


def write_results(runs: list[grid.Run], out: Path) -> pd.DataFrame:
    """The rows of every finished run of this grid; writes them to OUT/results.csv and draws OUT/figures/ from them."""
    from bdlib import report  # brings matplotlib and seaborn: too slow for --help

    rows = results.load(*(run.folder / "rows.csv" for run in runs if run.finished()))
    if not rows.empty:
        results.save(rows, out / "results.csv")
        report.draw_batch(rows, out / "figures")
    return rows


def means_table(rows: pd.DataFrame) -> Table:
    heads = ("notebook", "data, attack", "budget", "defense", "ACC", "ASR", "RA", "DER", "n")
    table = Table(*heads, title="percent, means over n seeds", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for row in results.over_seeds(rows).itertuples():
        shares = (f"{100 * value:.1f}" for value in (row.acc, row.asr, row.ra, row.der))
        defense = row.defense if row.variant == "default" else f"{row.defense}, {row.variant}"
        table.add_row(row.notebook, f"{row.dataset}, {row.attack}", str(row.budget), defense, *shares, str(row.seeds))
    return table


def say(line: str) -> None:
    """A line for the terminal, never broken: paths and errors can be copied."""
    console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
