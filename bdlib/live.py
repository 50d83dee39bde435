"""What the terminal shows while a grid runs: how many runs are done, and the notebook and cell of every worker.

Not in a terminal nothing moves: a line for each run that ended is all.
"""


class Live:
    """`with Live(console, runs) as live:` shows the bars on a rich console while the block runs."""

    def __init__(self, console, runs: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        count = TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[unit]}")
        times = TimeElapsedColumn(), TimeRemainingColumn(compact=True)
        columns = TextColumn("{task.description}"), BarColumn(bar_width=24), count, *times
        self.progress = Progress(*columns, console=console, transient=True)
        self.runs = self.progress.add_task("all runs", total=runs, unit="runs")
        self.models: int | None = None
        self.workers: dict[str, int] = {}

    def __enter__(self) -> "Live":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def starts(self, models: int) -> None:
        """So many models are shared by several runs, and made first."""
        if models:
            self.models = self.progress.add_task("models", total=models, unit="models")

    def model_ended(self) -> None:
        self.progress.advance(self.models)

    def run_ended(self) -> None:
        self.progress.advance(self.runs)

    def tell(self, at: dict) -> None:
        """A worker is at this cell of so many: {"worker", "name", "cell", "cells"}."""
        from rich.markup import escape

        shown = {
            "description": escape(f"{at['worker']}: {at['name']}"),
            "completed": at["cell"],
            "total": at["cells"] or 1,
        }
        if at["worker"] not in self.workers:
            self.workers[at["worker"]] = self.progress.add_task("", unit="cells")
        self.progress.update(self.workers[at["worker"]], **shown)
