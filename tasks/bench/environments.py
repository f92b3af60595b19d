"""The interpreters that measure, ours and those of the peers, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmadapters

PEERS = {"peft": "peft", "adapters": "AdapterHub's adapters"}

# A peer's interpreter has no mmadapters. The folder that contains ours may hold other packages that
# must not replace those of the peer, so both of ours are loaded from their own folders.
_START = """
import importlib.util, sys
for name, folder in zip(("mmadapters", "mmadapters.tasks"), sys.argv[1:]):
    spec = importlib.util.spec_from_file_location(
        name, folder + "/__init__.py", submodule_search_locations=[folder]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
from mmadapters.tasks.bench.worker import serve
serve()
"""


class WorkerError(RuntimeError):
    """A worker could not answer one request; it is ready for the next."""


@dataclass(eq=False)
class Environment:
    """A worker process and the packages of its interpreter.

    Attributes:
        python: path of the interpreter.
        log: file with the standard error of the process.
        name: its name in tables: "here", or the peers that it measures.
        libraries: libraries whose cases it runs: "own" (all of ours), "peft", "adapters".
        packages: versions of the installed packages.
        facts: the answer of `worker.Worker.facts`.
    """

    python: str
    process: subprocess.Popen[str]
    log: Any
    name: str = ""
    libraries: tuple[str, ...] = ()
    packages: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, python: str) -> Environment:
        """Starts a worker and asks for its packages.

        Raises:
            ValueError: there is no such interpreter, or it cannot run a worker.
        """
        library, application = Path(str(mmadapters.__file__)).parent, Path(__file__).parents[1]
        folders = [str(library), str(application)]
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `stop`
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        try:
            process = subprocess.Popen(
                [python, "-c", _START, *folders],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=variables,
            )
        except OSError as error:
            raise ValueError(f"{python} cannot be started: {error.strerror}") from None
        made = cls(python, process, log)
        try:
            made.facts = made.ask("facts")
        except RuntimeError as error:
            raise ValueError(
                f"{python} cannot measure; it needs torch and transformers or timm: {error}"
            ) from None
        made.packages = made.facts["packages"]
        return made

    def ask(self, what: str, **arguments: Any) -> Any:
        """Calls a method of `worker.Worker` in the process and returns its result.

        Args:
            what: name of the method.

        Raises:
            WorkerError: the method raised; the message is its own.
            RuntimeError: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker of {self.python} ended: {self._last_words()}")
        answer = json.loads(line)
        if "problem" in answer:
            raise WorkerError(answer["problem"])
        return answer["value"]

    def stop(self) -> None:
        """Ends the process."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()

    def _last_words(self) -> str:
        self.process.wait(10)
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1] if lines else f"exit code {self.process.returncode}"


@contextmanager
def environments(peers: Sequence[str]) -> Iterator[list[Environment]]:
    """Starts the worker of this interpreter and one for each interpreter that has another peer.

    Args:
        peers: paths of interpreters.

    Raises:
        ValueError: an interpreter cannot measure, or has no peer.
    """
    started: list[Environment] = []
    try:
        wanted = dict(PEERS)
        for python in (sys.executable, *peers):
            made = Environment.start(python)
            started.append(made)
            new = [peer for peer in wanted if peer in made.packages]
            if len(started) > 1 and not any(peer in made.packages for peer in PEERS):
                raise ValueError(f"{python} has neither {' nor '.join(PEERS)}")
            made.libraries = (*(("own",) if len(started) == 1 else ()), *new)
            named = [f"{peer} {made.packages[peer]}" for peer in new]
            made.name = "here" if len(started) == 1 else ", ".join(named)
            for peer in new:
                del wanted[peer]
        yield [environment for environment in started if environment.libraries]
    finally:
        for environment in started:
            environment.stop()
