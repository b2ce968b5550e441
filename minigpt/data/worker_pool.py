"""Calls a function for many items in several processes. Shared data is sent to each process only once.

Processes are spawned, not forked, because torch's threads do not survive a fork. Every process ends when
its parent ends.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from typing import Any, TypeVar

from minigpt.console.terminal import ProgressLine
from minigpt.errors import InputError

__all__ = ["run_in_processes"]

Item = TypeVar("Item")
Result = TypeVar("Result")

_shared: Any = None  # in a spawned process: the shared data from the parent process


def run_in_processes(
    work: Callable[[Any, Item], Result],
    shared: Any,
    items: Sequence[Item],
    sizes: Sequence[int],
    *,
    workers: int,
    title: str,
) -> Iterator[Result]:
    """Yield work(shared, item) for each item, in any order. An error in one item ends all processes.

    Args:
        work: a function at module level, so that other processes can import it.
        shared: the first argument of `work`; it is sent to each process only once.
        sizes: number of bytes of each item, for the progress display.
        workers: largest number of processes; 1: only the current process; 0: one per core.

    Raises:
        InputError: if a process was killed.
    """
    workers = min(workers or os.cpu_count() or 1, len(items))
    done = 0
    with ProgressLine(f"{title}, MB", sum(sizes) // 1_000_000, patience=2.0) as progress:
        if workers <= 1:
            for item, size in zip(items, sizes):
                yield work(shared, item)
                done += size
                progress.update(done // 1_000_000)
            return
        before = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, _begin, (shared,))
        try:
            size_of = {pool.submit(_call, work, item): size for item, size in zip(items, sizes)}
            for future in as_completed(size_of):
                yield future.result()
                done += size_of[future]
                progress.update(done // 1_000_000)
        except BaseException as error:
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            if isinstance(error, BrokenProcessPool):
                raise InputError(
                    f"{title}: a process was killed, most often for want of memory; what is finished is "
                    "kept: free some memory and run the command again"
                ) from None
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(shared: Any) -> None:
    """Initialise a worker process. It ignores Ctrl-C, which its parent handles. It ends with its parent."""
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(work: Callable[[Any, Item], Result], item: Item) -> Result:
    return work(_shared, item)
