"""Processes: how many to start, a map that looks ahead by a bounded number, how workers begin, how ranks end."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, forkserver, get_context, parent_process, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import NoReturn, TypeVar

from pvtcap.errors import ShardError

AGAIN = "Run the same command again with fewer --processes: it goes on."

T = TypeVar("T")
R = TypeVar("R")


def usable_cpus() -> int:
    """How many CPUs this process may use, which under Slurm or in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(
    task: Callable[[T], R],
    items: Iterable[T],
    processes: int,
    do: str = "Run it again with fewer --processes.",
    modules: Sequence[str] = (),
) -> Generator[R, None, None]:
    """``task`` of each item, in the items' order; with 0 or 1 processes this process does it.

    At most two items a process wait or are done ahead of the one given. ``task``, items and results are pickled.
    Raises ShardError when a worker dies; ``do`` is what its line advises. ``modules``: see ``worker_pool``.
    """
    if processes <= 1:
        yield from map(task, items)
        return
    pool = worker_pool(processes, modules)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(task, item))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise worker_died(do) from error
    finally:
        pool.shutdown(cancel_futures=True)


def worker_pool(processes: int, modules: Sequence[str] = ()) -> ProcessPoolExecutor:
    """Processes that begin with ``start_worker``; these ``modules`` are imported once for all of them."""
    return ProcessPoolExecutor(processes, forking_server(modules), initializer=start_worker)


def forking_server(modules: Sequence[str]) -> ForkServerContext:
    """Where to start processes: at a server, begun by who asks it first, that has imported ``modules`` by then.

    Forking this process would copy what does not survive it: threads (torch's, DeepSpeed's, rich's) and CUDA. A process
    that starts from nothing would import torch by itself, for a second and 200 MB.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def begin_server(modules: Sequence[str]) -> None:
    """Let the server that processes will be started at import ``modules`` from now on, beside what this one does."""
    with sheltered():
        forking_server(modules)
        forkserver.ensure_running()


def worker_died(do: str) -> ShardError:
    """What to raise when a pool is broken."""
    return ShardError("a worker process died, for lack of memory perhaps", do=do)


def start_worker() -> None:
    """What a worker process begins with: Ctrl-C is its parent's matter, and so is how long it lives."""
    # Ctrl-C reaches the whole process group; only the main process is to act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


@contextmanager
def sheltered() -> Iterator[None]:
    """Processes started in here are not ended by SIGTERM and SIGUSR1, which Slurm sends to all processes of a job.

    What to do about them is the parent's to say; theirs is to go on until it has. This process ends them when it ends:
    multiprocessing would send SIGTERM and then wait for them, for ever.
    """
    atexit.unregister(_kill_helpers)
    atexit.register(_kill_helpers)  # runs before multiprocessing's, which was registered earlier
    resource_tracker.ensure_running()  # what starts a first process starts it too, and lets SIGTERM in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave(code: int) -> NoReturn:
    """End this process as ``sys.exit`` does, but for taking the interpreter apart.

    gloo's threads outlive ``destroy_process_group`` (torch 2.14), and may hold what the interpreter takes apart: about
    one rank in some hundreds, its work done, was then ended by SIGABRT.
    """
    for child in active_children():
        child.kill()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _kill_helpers() -> None:
    """A decoding process has nothing to lose, and is sheltered from less. Whoever uses us may have others."""
    for child in active_children():
        if child.daemon:
            child.kill()


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
