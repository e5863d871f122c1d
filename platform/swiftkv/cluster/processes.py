"""Finds and ends every process of one cluster, and no other process of the machine.

Does not know what the processes do. A cluster is told by two things that its processes inherit: a mark in the
environment (the cluster's folder) and the session of its head, the leader.
Called by: cluster/lifecycle.py.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import psutil

MARK = "SWIFTKV_CLUSTER_FOLDER"
"""The environment variable that every process of a cluster inherits."""

GRACE_S = 3.0
CLEANING_S = 20.0
"""For Python's resource trackers, which take seconds on a machine that others keep busy."""

Result = TypeVar("Result")


def end_processes(leader: int, mark: str) -> list[psutil.Process]:
    """Ends all processes of the cluster, mostly within 5 s; returns those that it could not end.

    They are killed: none has anything to save that a kill would lose (but a gateway the usage of its last five
    seconds), and asked to end, an engine takes longer than anyone waits. Ray's servers go first, or they would start
    their workers again and kill the cleaners.
    """
    everything = find_members(leader, mark)
    servers = {child.pid for child in _children_of(leader)}
    everything.sort(key=lambda process: process.pid not in servers)
    for process in everything:
        # Python's resource trackers end when their processes have, and then remove what those left in /dev/shm:
        # hundreds of MB for an engine. The leader ends by itself when its servers have, and reaps them.
        if process.pid != leader and not _is_resource_tracker(process):
            _quietly(process.kill)
    psutil.wait_procs(everything, timeout=GRACE_S)
    psutil.wait_procs([process for process in everything if _is_resource_tracker(process)], timeout=CLEANING_S)
    return _kill_the_rest(leader, mark)


def find_members(leader: int, mark: str) -> list[psutil.Process]:
    """Every living process of the cluster, whoever its parent is now; never this process or its ancestors.

    Three signs, because each is missing somewhere: the mark (some processes overwrite their environment with
    their title), the leader's session (job drivers have their own), and a parent with a sign.
    """
    leader_is_foreign = psutil.pid_exists(leader) and get_mark(leader) != mark
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        in_session = not leader_is_foreign and _session_of(process.pid) == leader
        if in_session or get_mark(process.pid) == mark:
            found[process.pid] = process
            for child in _quietly(partial(process.children, recursive=True)) or []:
                found[child.pid] = child
    ourselves = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [
        process
        for pid, process in found.items()
        if pid not in ourselves and _quietly(process.status) not in (None, psutil.STATUS_ZOMBIE)
    ]


def get_mark(pid: int) -> str | None:
    """The mark of the process; None without one, or if the process is gone or another user's."""
    environment = _quietly(lambda: psutil.Process(pid).environ())
    return environment.get(MARK) if environment else None


def _kill_the_rest(leader: int, mark: str) -> list[psutil.Process]:
    deadline = time.monotonic() + GRACE_S
    while (left := find_members(leader, mark)) and time.monotonic() < deadline:
        for process in left:
            _quietly(process.kill)
        psutil.wait_procs(left, timeout=0.5)
    return left


def _is_resource_tracker(process: psutil.Process) -> bool:
    return "multiprocessing.resource_tracker" in " ".join(_quietly(process.cmdline) or [])


def _children_of(pid: int) -> list[psutil.Process]:
    return _quietly(lambda: psutil.Process(pid).children()) or []


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _quietly(action: Callable[[], Result]) -> Result | None:
    """The result of `action`, or None if its process is gone or belongs to another user."""
    try:
        return action()
    except psutil.Error:
        return None
