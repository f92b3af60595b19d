"""Starts programs in processes that have imported torch, transformers and datasets already.

These imports take ten seconds of a core in every fresh process. Python's fork server makes them
once and runs nothing else, so that it has no thread but that of jemalloc, which may be forked.
Every program is a fork of it with its own standard error and exit code. The processes of a group
get the variables that `torch.distributed.run` would set.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

PRELOADED = (
    *("torch", "torchvision", "torchaudio", "timm", "open_clip", "transformers.trainer"),
    *("accelerate", "datasets", "soundfile", "matplotlib", "torchmetrics"),
    *("mmadapters.tasks.training.trainer", "mmadapters.tasks.jobs.run"),
)


def fork_server() -> ForkServerContext:
    """Returns the context of `multiprocessing` whose processes find `PRELOADED` imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


class Started:
    """The processes of one program, each with the file that its standard error goes to."""

    def __init__(self, processes: Sequence[BaseProcess], errors: Sequence[Path]) -> None:
        self.processes, self.errors = processes, errors

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Waits until all processes have ended.

        Returns the exit code of the first one that failed (minus the signal that killed it), else
        0, and what all of them wrote to their standard error.

        Raises:
            TimeoutError: If a process runs for longer than `timeout` seconds. All are killed.
        """
        for process in self.processes:
            process.join(timeout)
        late = [process for process in self.processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        stderr = "\n".join(path.read_text() for path in self.errors)
        for path in self.errors:
            path.unlink()
        if late:
            raise TimeoutError(f"still running after {timeout} s\n{stderr}")
        codes = [process.exitcode or 0 for process in self.processes]
        failed = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess([], failed, stderr=stderr)


def start(program: Path, *arguments: str, processes: int = 1) -> Started:
    """Starts `python PROGRAM ARGUMENTS` with one thread, in a group of processes if more than 1.

    They have the working directory and the variables that this process has now.
    """
    groups = _group(processes) if processes > 1 else [{}]
    several, errors = [], []
    for group in groups:
        handle, name = tempfile.mkstemp(suffix=".stderr")
        os.close(handle)
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **group}
        several.append(
            fork_server().Process(
                target=_run, args=(str(program), arguments, variables, os.getcwd(), name)
            )
        )
        several[-1].start()
        errors.append(Path(name))
    return Started(several, errors)


def run(
    program: Path, *arguments: str, processes: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Starts a program and waits until it has ended, see `start` and `Started.wait`."""
    return start(program, *arguments, processes=processes).wait(timeout)


def _group(count: int) -> list[dict[str, str]]:
    """Returns what `torch.distributed.run --standalone` sets for each of `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _run(
    program: str,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    folder: str,
    errors: str,
) -> None:
    """Becomes the program: what a process that was just forked does."""
    for number, name in ((1, os.devnull), (2, errors)):
        target = os.open(name, os.O_WRONLY | os.O_CREAT)
        os.dup2(target, number)
        os.close(target)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
