"""The interpreters that measure: this one's and the peers', each in a process of its own."""

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
from mmadapters import tasks

PEERS = {"peft": "peft", "adapters": "AdapterHub's adapters"}

# A peer's interpreter has no mmadapters, and the folder that ours stands in may hold other packages
# that must not come before its own: the packages are found by their folders alone.
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


class Refused(RuntimeError):
    """A worker could not do one thing, and is ready for the next."""


@dataclass(eq=False)
class Environment:
    """A worker process, and what it is.

    Attributes:
        name: for tables: "here", or the peers that it is there for.
        libraries: whose cases run in it: "own" (all of ours), "peft", "adapters".
        packages: their versions.
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
        """Starts a worker and asks what it has.

        Raises:
            ValueError: there is no such interpreter, or it cannot run a worker.
        """
        folders = [str(Path(str(m.__file__)).parent) for m in (mmadapters, tasks)]
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
                f"{python} cannot measure, it needs torch and transformers or timm: {error}"
            ) from None
        made.packages = made.facts["packages"]
        return made

    def ask(self, what: str, **arguments: Any) -> Any:
        """What a method of `worker.Worker` gives.

        Raises:
            Refused: it raised; in its words.
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
            raise Refused(answer["problem"])
        return answer["value"]

    def stop(self) -> None:
        """Lets the process end."""
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
    """This interpreter's worker, then one for each of `peers` that has a peer not yet there.

    Raises:
        ValueError: an interpreter cannot measure, or has no peer.
    """
    started: list[Environment] = []
    try:
        wanted = dict(PEERS)
        for python in (sys.executable, *peers):
            made = Environment.start(python)
            started.append(made)
            found = [peer for peer in wanted if peer in made.packages]
            if len(started) > 1 and not any(peer in made.packages for peer in PEERS):
                raise ValueError(f"{python} has neither {' nor '.join(PEERS)}")
            made.libraries = (*(("own",) if len(started) == 1 else ()), *found)
            named = [f"{peer} {made.packages[peer]}" for peer in found]
            made.name = "here" if len(started) == 1 else ", ".join(named)
            for peer in found:
                del wanted[peer]
        yield [environment for environment in started if environment.libraries]
    finally:
        for environment in started:
            environment.stop()
