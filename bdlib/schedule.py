"""The grid on Dask: models first, then the notebooks that wait for them, on an embedded cluster or on one that is there already.

A worker only starts processes (`job`), so the embedded cluster's workers are threads of this process; those of another cluster live on
hosts of their own and share the store and the output folder with us.
"""

import functools
import itertools
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress

from bdlib import grid, job
from bdlib.grid import Run
from bdlib.job import Outcome, Tell

PATIENCE = 10  # seconds that a scheduler may take to answer
LOOK = 5  # seconds after which new workers are looked for


def default_workers() -> int:
    """One for each GPU, or one for every OMP_NUM_THREADS cores, where that is not set for every two."""
    return job.gpus() or max(1, job.cores() // (told_threads() or 2))


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
    # Else what it says, at its end, of the connections that it closes itself stands in a reader's terminal.
    logging.getLogger("distributed").setLevel(logging.WARNING)
    with (
        LocalCluster(
            n_workers=count, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0", memory_limit=0
        ) as local,
        # By its address: the client of a LocalCluster calls the dashboard by the host's address, where it does not listen.
        Client(local.scheduler_address) as client,
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
    return told_threads() or max(1, job.cores() // (workers or default_workers()))


def told_threads() -> int | None:
    """OMP_NUM_THREADS, of a list the first number; None where it is not set.  Raises ValueError where it is no number from 1 on."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if first and not (first.isdecimal() and int(first)):
        raise ValueError(f"OMP_NUM_THREADS must be a whole number from 1 on, got {os.environ['OMP_NUM_THREADS']!r}")
    return int(first) if first else None


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
    Dask is given as many tasks as it has threads, none that needs another's result: left to itself it queues tasks where what they
    need lies, and hours long ones stay there while other workers are idle.
    """
    from distributed import wait

    batch = secrets.token_hex(8)
    shared = {model for model, count in Counter(run.model for run in waiting).items() if count > 1}
    pending, running, made = steps(waiting, shared), {}, {}
    source = functools.cache(grid.source)  # one text, and the keys of that text, for the whole grid
    number = itertools.count()

    def submit(kind: str, run: Run) -> None:
        if kind == "model":
            todo, inputs = job.model(run, batch, threads, timeout), (None, None)
        else:
            text = source(run.notebook)
            todo, inputs = job.notebook(run, text, batch, threads, timeout), (text, made.get(run.model))
        future = client.submit(work, todo, *inputs, key=f"{todo.name} {batch}-{next(number)}")
        running[future] = kind, run, todo.name

    client.subscribe_topic(batch, lambda event: tell(event[1]))
    on_start(len(shared))
    try:
        while running or (pending and client.status == "running"):
            free = max(0, max(1, sum(client.ncores().values())) - len(running))
            startable = (
                step for step in pending if step[0] == "model" or step[1].model not in shared or step[1].model in made
            )
            for step in list(itertools.islice(startable, free)):
                pending.remove(step)
                submit(*step)
            # Workers may have come meanwhile, or the scheduler is lost: then its futures are cancelled, and nothing new starts.
            with suppress(TimeoutError, CancelledError):
                wait(list(running), timeout=LOOK, return_when="FIRST_COMPLETED")
            for future in [future for future in running if future.done()]:
                kind, run, name = running.pop(future)
                if kind == "model":
                    made[run.model] = result(future)
                    on_model(name, made[run.model])
                else:
                    yield run, result(future)
    finally:
        with suppress(OSError):  # the scheduler may be gone
            client.unsubscribe_topic(batch)
            client.run(stop, batch)


def steps(waiting: list[Run], shared: set[tuple]) -> list[tuple[str, Run]]:
    """What is to do, in order: ("notebook", run), and before the first run of each shared model ("model", that run)."""
    planned, seen = [], set()
    for run in waiting:
        if run.model in shared - seen:
            seen.add(run.model)
            planned.append(("model", run))
        planned.append(("notebook", run))
    return planned


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
