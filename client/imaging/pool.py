"""How are thousands of files read on several processors, and what if a decoder takes its process down with it?

Work goes in small chunks to a few fresh processes and comes back in order. When a process dies, the chunks that were
under way are tried again one item at a time, and the item that kills its process again is given up by name: a file
that crashes a C library costs that file and never the agent. A process ends with the one that started it, even when
that is killed. Where no process can be started at all, the work is done here.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

_In = TypeVar("_In")
_Out = TypeVar("_Out")

MOST_PROCESSES = 8
WORTH_IT = 2000
"""Fewer items than this are done here: starting processes takes seconds."""


def processes_for(items: int, asked: int | None = None) -> int:
    """How many processes to use: those asked for, or the processor's cores where there is enough to do; 0 is none."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_PROCESSES) if items >= WORTH_IT and cores > 1 else 0


def each(
    work: Callable[[_In], _Out], items: Sequence[_In], given_up: Callable[[_In], _Out], processes: int, chunk: int
) -> Iterator[_Out]:
    """`work` of every item, in order.

    Args:
        work: a function that other processes can import; it must not raise.
        given_up: what stands for an item on which the process died.
        processes: how many; 0 works here, without protection against crashes.
        chunk: items sent at a time.
    """
    if processes == 0 or not items:
        yield from map(work, items)
        return
    waiting = deque(tuple(items[start : start + chunk]) for start in range(0, len(items), chunk))
    while waiting:
        under_way: deque[tuple[tuple[_In, ...], Future[list[_Out]]]] = deque()
        with _executor(processes) as executor:
            if not _works(executor):
                break
            try:
                while waiting or under_way:
                    while waiting and len(under_way) <= 2 * processes:
                        part = waiting[0]
                        under_way.append((part, executor.submit(_all, work, part)))
                        waiting.popleft()
                    results = under_way[0][1].result()
                    under_way.popleft()
                    yield from results
            except BrokenProcessPool:
                waiting.extendleft(part for part, _ in reversed(under_way))
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise
        suspects = [item for _ in under_way for item in waiting.popleft()]
        yield from _one_by_one(work, deque(suspects), given_up)
    for part in waiting:
        yield from map(work, part)


def _works(executor: ProcessPoolExecutor) -> bool:
    """A program that its children cannot import (one typed in, for example) has none, and no file is to blame."""
    try:
        return executor.submit(_nothing).result()
    except (BrokenProcessPool, OSError):
        return False


def _nothing() -> bool:
    return True


def _one_by_one(work: Callable[[_In], _Out], items: deque[_In], given_up: Callable[[_In], _Out]) -> Iterator[_Out]:
    while items:
        with _executor(1) as executor:
            try:
                while items:
                    result = executor.submit(work, items[0]).result()
                    items.popleft()
                    yield result
            except BrokenProcessPool:
                yield given_up(items.popleft())


def _all(work: Callable[[_In], _Out], part: Sequence[_In]) -> list[_Out]:
    return [work(item) for item in part]


def _executor(processes: int) -> ProcessPoolExecutor:
    # Fresh processes, since forking one with threads, locks and torch in it is not safe.
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_obey)


def _obey() -> None:
    """The parent decides when to stop, and its end is the end: a process left over would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
