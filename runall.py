#!/usr/bin/env python3
"""Run the notebooks in batch: every combination of the values given, each notebook in a process of its own.

examples:
  python runall.py                                        every notebook at its defaults (quick profile, no download)
  python runall.py --only 02_awm --budget 10 50 200 --seed 0 1 2 --workers 2
  python runall.py --only 02_awm --dataset cifar10 --budget 500 1/class
  python runall.py --only 02_awm --profile paper --dataset gtsrb --budget 5% --attack badnets blended --dry-run
  python runall.py --seed 0 1 2 --status                  what is done, running, failed, missing, and the time left
  python runall.py --seed 0 1 2 --scheduler tcp://host:8786   on a Dask cluster that is there already (see CLUSTER.md)

A finished run is skipped the next time, unless its notebook, its parameters, the rows in figures/ that it reads or bdlib
changed.  A killed run loses only what was in flight: give the same command again.

Exit: 0 all well, 1 a run failed or a file could not be used, 2 the arguments are wrong, 130 Ctrl-C.
"""

import argparse
import ast
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bdlib import checks, files, grid, names, page, profiles, results, runs, schedule, sources
from bdlib.grid import Run
from bdlib.job import Outcome
from bdlib.live import Live
from bdlib.places import home, project_root, require_writable

NOTEBOOKS = project_root() / "notebooks"
console = Console()


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(words)
    try:
        options.out = files.place(options.out or home())
        if files.on_disk(options.out):
            options.out = options.out.resolve()
        else:
            files.require_reachable(options.out)
        return (collect if options.collect else plan_and_do)(options)
    except ValueError as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        say("[bold]stopped.[/] What was finished is kept; the same command goes on from there.")
        return 130
    except OSError as error:
        complain(f"{error}. What was finished is kept; the same command goes on from there.")
        return 1


def plan_and_do(options: argparse.Namespace) -> int:
    if not (whole := planned(options)):
        return 2
    if options.status or options.dry_run:
        (show_status if options.status else show_plan)(whole, options)
        return 0
    return carry_out(whole, options)


def carry_out(whole: list[Run], options: argparse.Namespace) -> int:
    """Run what is not finished, then write the rows, the figures and the page of everything that is; the exit code."""
    require_writable(home() / "store")
    runs.claim(options.out, mixed=options.mix_versions)
    waiting, finished = to_do(whole, runs.Listing(options.out), options)
    try:
        ended = run_each(waiting, options)
    finally:
        rows = write_results(whole, options.out)
    failed = sum(not outcome.well for outcome in ended)
    if not rows.empty:
        console.print(means_table(rows))
    counts = f"{len(ended) - failed} done now, {finished} finished before, {failed} failed"
    left = len(whole) - finished - len(ended)
    say(f"{len(whole)} runs: {counts}" + (f", {left} not started" if left else ""))
    if not rows.empty:
        say(f"rows: {escape(str(options.out / 'results.csv'))}   figures: {escape(str(options.out / 'figures'))}")
    say(
        f"page: {escape(str(options.out / 'index.html'))}   notebooks: {escape(str(options.out))}/NOTEBOOK/RUN/executed.ipynb"
    )
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    datasets, networks, attacks = map(", ".join, (sources.NAMES, names.NETWORKS, names.ATTACKS))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--only", nargs="+", metavar="NOTEBOOK", help=f"notebooks to run: {', '.join(all_notebooks())} (default: all)"
    )
    p.add_argument("--dataset", nargs="+", help=f"{datasets}, or folder:PATH")
    p.add_argument("--arch", nargs="+", help=f"{networks}; with :WIDTH for another width: preact_resnet18:8")
    p.add_argument("--attack", nargs="+", help=f"{attacks}; blended:FILE; with _a2a behind it all-to-all")
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
        help="quick: minutes on two CPU cores (default); paper: the papers' protocol, wants a GPU; paper_fast: likewise, with a "
        "shorter training of the backdoored network",
    )
    p.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="any other parameter of the notebooks: --set ablations=True",
    )
    p.add_argument(
        "--out",
        default=None,
        help="folder, or URL on an object store, for executed notebooks, rows and figures (default: runs)",
    )
    p.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="runs at once here (default: one a GPU, or one for OMP_NUM_THREADS or two cores)",
    )
    p.add_argument(
        "--scheduler", metavar="ADDRESS", help="hand the runs to this Dask scheduler's workers: tcp://host:8786"
    )
    p.add_argument("--shard", type=shard, metavar="I/N", help="the I-th of N parts; a model's runs stay in one part")
    p.add_argument("--timeout", type=minutes, metavar="MINUTES", help="end a run that takes longer, as failed")
    p.add_argument(
        "--keep-going",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with the others after a failed run (default), or stop there",
    )
    again = p.add_mutually_exclusive_group()
    again.add_argument("--force", action="store_true", help="run again what is finished")
    again.add_argument("--only-failed", action="store_true", help="run only what failed the last time")
    p.add_argument("--mix-versions", action="store_true", help="use an --out that another version of bdlib wrote to")
    look = p.add_mutually_exclusive_group()
    look.add_argument(
        "--dry-run", action="store_true", help="check everything, show what would run and how long; run nothing"
    )
    look.add_argument("--status", action="store_true", help="count what is done, running, failed, missing; run nothing")
    look.add_argument(
        "--collect",
        action="store_true",
        help="all rows below --out, of any grid, into all_rows.csv and all_rows.parquet; run nothing",
    )
    return p


def budget(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r}")
    return int(part), int(parts)


def planned(options: argparse.Namespace) -> list[Run]:
    """The runs asked for; none, after saying everything that is wrong, if they may not start."""
    profiles.require(options.profile)
    axes = {name: getattr(options, name) for name in grid.AXES}
    whole = grid.plan(notebooks(options.only), options.profile, axes, extra_parameters(options.set), options.out)
    for line in (wrong := checks.complaints(whole)):
        complain(line)
    if options.shard and not wrong:
        return grid.shard(whole, *options.shard)
    return [] if wrong else whole


def to_do(whole: list[Run], there: runs.Listing, options: argparse.Namespace) -> tuple[list[Run], int]:
    """The runs that are to be started, and how many of the others are finished."""
    if options.force:
        return whole, 0
    known = runs.states(whole, there)
    left = [run for run in whole if known[run.folder].word != "done"]
    waiting = [run for run in left if known[run.folder].word == "failed"] if options.only_failed else left
    return waiting, len(whole) - len(left)


def all_notebooks() -> dict[str, Path]:
    return {path.stem: path for path in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))}


def notebooks(only: list[str] | None) -> list[Path]:
    found = all_notebooks()
    unknown = [name for name in only or [] if name not in found]
    if unknown:
        raise ValueError(f"--only must name notebooks out of {', '.join(found)}, got {', '.join(unknown)}")
    if twice := grid.repeated(only or []):
        raise ValueError(f"--only names notebooks twice: {', '.join(twice)}")
    return [found[name] for name in only or found]


def extra_parameters(pairs: list[str]) -> dict[str, object]:
    extra = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {pair!r}")
        if name in extra:
            raise ValueError(f"given twice for the same run: --set {name}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        extra[name] = value if isinstance(value, bool | int | float) else text  # no parameter is anything but these
    return extra


def run_each(waiting: list[Run], options: argparse.Namespace) -> list[Outcome]:
    """Run them with a live display; how those ended that did."""
    outcomes: list[Outcome] = []
    if not waiting:
        return outcomes
    limit = options.timeout * 60 if options.timeout else None
    threads = schedule.threads(options.workers, options.scheduler)
    with schedule.cluster(options.workers, options.scheduler) as client, Live(console, len(waiting)) as live:
        say(f"Dask's dashboard: {client.dashboard_link}")
        if options.force:
            runs.forget(waiting)
        ended = schedule.run_all(
            waiting,
            client,
            threads=threads,
            timeout=limit,
            on_start=live.starts,
            on_model=partial(say_model, live),
            tell=live.tell,
        )
        with closing(ended):
            for run, outcome in ended:
                outcomes.append(outcome)
                live.run_ended()
                page.of_notebook(run.folder)
                say_outcome(run, outcome)
                if not outcome.well and not options.keep_going:
                    break
    return outcomes


def say_model(live: Live, name: str, outcome: Outcome) -> None:
    live.model_ended()
    ended = "[green]made[/]    " if outcome.well else "[red]FAILED[/]  "
    say(f"{ended}{escape(name)}  {outcome.seconds:.0f} s{'' if outcome.well else ': ' + escape(outcome.error)}")


def say_outcome(run: Run, outcome: Outcome) -> None:
    again = " (second try)" if outcome.tries > 1 else ""
    if outcome.well:
        say(f"[green]done[/]    {escape(run.name)}  {outcome.seconds:.0f} s{again}")
    else:
        say(f"[red]FAILED[/]  {escape(run.name)}  {outcome.seconds:.0f} s{again}: {escape(outcome.error)}")
        if outcome.log:
            say(f"        log: {escape(str(run.folder.parents[1] / outcome.log))}")


def show_plan(whole: list[Run], options: argparse.Namespace) -> None:
    """The manifest: every run that would start, with the time that runs like it took."""
    there = runs.Listing(options.out)
    (waiting, finished), past = to_do(whole, there, options), runs.estimates(there)
    for run in waiting:
        seconds = runs.estimate(run, past)
        print(f"would run  {run.name}" + (f"  about {clock(seconds)}" if seconds else ""))
    print(f"{len(waiting)} runs to do, {finished} finished before; nothing was started")
    print(time_left(waiting, past, options))


def show_status(whole: list[Run], options: argparse.Namespace) -> None:
    there = runs.Listing(options.out)
    known = runs.states(whole, there)
    for word in runs.WORDS:
        print(f"{word:8} {sum(state.word == word for state in known.values())}")
    for run in whole:
        state = known[run.folder]
        if state.word in ("running", "failed"):
            print(f"{state.word}  {run.name}" + (f": {state.error}" if state.error else ""))
    print(time_left([run for run in whole if known[run.folder].word != "done"], runs.estimates(there), options))


def time_left(waiting: list[Run], past: dict, options: argparse.Namespace) -> str:
    """How long these runs take, by the seconds of finished ones."""
    guesses = [runs.estimate(run, past) for run in waiting]
    known = [seconds for seconds in guesses if seconds is not None]
    if guesses and not known:
        return f"time left: unknown, as no run like the {len(waiting)} to do is finished"
    workers = options.workers or schedule.default_workers()
    missing = (
        f", and {len(guesses) - len(known)} runs of which none like them is finished"
        if len(known) < len(guesses)
        else ""
    )
    return f"time left: about {clock(sum(known) / workers)} with {workers} at once{missing}"


def clock(seconds: float) -> str:
    """Hours and minutes, or seconds where there are few."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def collect(options: argparse.Namespace) -> int:
    out, rows = options.out, runs.collect(options.out)
    say(f"{len(rows)} rows: {escape(str(out / 'all_rows.csv'))}, {escape(str(out / 'all_rows.parquet'))}")
    return 0


def write_results(whole: list[Run], out: Path) -> pd.DataFrame:
    """The rows of every finished run of this grid; written to OUT/results.csv, drawn in OUT/figures/, shown in OUT/index.html."""
    from bdlib import report  # brings matplotlib and seaborn: too slow for --help

    there = runs.Listing(out)
    known = runs.states(whole, there)
    pages = set(there.runs_with("executed.html"))
    ended = [run for run in whole if known[run.folder].word in ("done", "failed")]
    # Some may have ended when nobody was there to make their page.
    pages |= {run.place for run in ended if run.place not in pages and page.of_notebook(run.folder)}
    # Once: budgets 20 and 2/class are two runs, and the same rows.
    rows = results.once(runs.rows(run.folder for run in whole if known[run.folder].word == "done"))
    drawn = []
    if not rows.empty:
        results.save(rows, out / "results.csv")
        drawn = report.draw_batch(rows, out / "figures")
    page.write(out, whole, known, rows, pages=pages, figures=drawn)
    return rows


def means_table(rows: pd.DataFrame) -> Table:
    also = [name for name in grid.VARIED if rows[name].nunique() > 1]
    named = (name.replace("_", " ") for name in also)
    heads = ("notebook", "data, attack", *named, "budget", "defense", "ACC", "ASR", "RA", "DER", "n")
    table = Table(*heads, title="percent, means over n seeds", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for row in results.over_seeds(rows).itertuples():
        shares = (f"{100 * value:.1f}" for value in (row.acc, row.asr, row.ra, row.der))
        defense = row.defense if row.variant == "default" else f"{row.defense}, {row.variant}"
        own = (str(getattr(row, name)) for name in (*also, "budget"))
        cells = (row.notebook, f"{row.dataset}, {row.attack}", *own, defense, *shares, str(row.seeds))
        table.add_row(*map(escape, cells))  # else a path's [old] is taken for markup
    return table


def complain(problem: object) -> None:
    print(f"runall.py: {problem}", file=sys.stderr)


def say(line: str) -> None:
    """A line for the terminal, never broken: paths and errors can be copied."""
    console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
