"""The grid on Dask: models first, then the notebooks that wait for them, on an embedded cluster or on one that is there already.

A worker only starts processes (`job`), so the embedded cluster's workers are threads of this process; those of another cluster live on
hosts of their own and share the store and the output folder with us.
"""

import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from bdlib import grid, job
from bdlib.grid import Run
from bdlib.job import Outcome, Tell

PATIENCE = 10  # seconds that a scheduler may take to answer


def default_workers() -> int:
    """One for each GPU, or one for every two cores."""
    return job.gpus() or max(1, job.cores() // 2)


@contextmanager
def cluster(workers: int | None, scheduler: str | None) -> Iterator:
    """A Dask client of the scheduler at this address, or of an embedded cluster with so many workers.

    Raises ValueError if nobody answers at the address, or if a worker there lacks bdlib or has another version of it.
    """
    from distributed import Client, LocalCluster

    if scheduler:
        try:
            client = Client(scheduler, timeout=PATIENCE)
        except (OSError, ValueError) as error:
            raise ValueError(f"no Dask scheduler answers at {scheduler} ({error})") from error
        with client:
            require_same_version(client)
            yield client
        return
    count = workers or default_workers()
    with (
        LocalCluster(
            n_workers=count, threads_per_worker=1, processes=False, dashboard_address=":0", memory_limit=0
        ) as local,
        Client(local) as client,
    ):
        yield client


def require_same_version(client) -> None:
    """Raises ValueError that names every worker without bdlib, or with another version of it."""
    answers = client.run(grid.package_hash, on_error="return")
    wrong = [
        f"{address}: {type(answer).__name__}: {answer}"
        if isinstance(answer, Exception)
        else f"{address} has another version of bdlib"
        for address, answer in answers.items()
        if answer != grid.package_hash()
    ]
    if wrong:
        raise ValueError(f"workers that cannot take part (install this very bdlib there): {'; '.join(wrong)}")


def threads(workers: int | None, scheduler: str | None) -> int | None:
    """CPU threads of each process: OMP_NUM_THREADS if set, or else a share of the cores; None: a worker elsewhere decides itself."""
    if scheduler:
        return None
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, job.cores() // (workers or default_workers())))


def run_all(
    waiting: list[Run],
    client,
    *,
    threads: int | None,
    timeout: float | None,
    on_start: Callable[[int], None],
    on_model: Callable[[str, Outcome], None],
    tell: Tell,
) -> Iterator[tuple[Run, Outcome]]:
    """Each run with its outcome, as they end; they start in the order given.  Closing the iterator, or Ctrl-C, stops what still runs.

    on_start: is told the number of models; on_model: each model with its outcome; tell: how far the running notebooks are.
    A model that several runs wait for is a task of its own; one that a single run needs is made by that run.
    """
    from distributed import as_completed

    batch = secrets.token_hex(8)
    models, sources, futures = {}, {}, {}
    waiting_for = Counter(run.model for run in waiting)
    client.subscribe_topic(batch, lambda event: tell(event[1]))
    for number, run in enumerate(waiting):
        if waiting_for[run.model] > 1 and run.model not in models:
            todo = job.model(run, batch, threads, timeout)
            models[run.model] = client.submit(
                work, todo, None, None, key=f"{todo.name} {batch}-{number}", priority=-number
            )
            futures[models[run.model]] = todo.name
        if run.notebook not in sources:
            text, _ = grid.source(run.notebook)
            sources[run.notebook] = client.submit(str, text, key=f"{run.notebook.stem} {batch}")
        todo = job.notebook(run, batch, threads, timeout)
        inputs = sources[run.notebook], models.get(run.model)
        futures[client.submit(work, todo, *inputs, key=f"{run.name} {batch}-{number}", priority=-number)] = run
    on_start(len(models))
    try:
        for future in as_completed(list(futures)):
            ended = futures.pop(future)
            if isinstance(ended, Run):
                yield ended, result(future)
            else:
                on_model(ended, result(future))
    finally:
        with suppress(OSError):  # the scheduler may be gone
            client.unsubscribe_topic(batch)
            client.run(stop, batch)


def work(todo: job.Job, source: str | None, model: Outcome | None) -> Outcome:
    """The task: carry the job out on this worker."""
    from distributed import get_worker

    worker = get_worker()
    return job.do(todo, source, model, lambda message: worker.log_event(todo.batch, message))


def result(future) -> Outcome:
    """The future's outcome; a worker that died again and again is one too."""
    try:
        return future.result()
    except Exception as error:
        return Outcome(False, error=f"{type(error).__name__}: {error}")


def stop(batch: str) -> None:
    """End what this worker still runs of a batch."""
    job.stopped.add(batch)
