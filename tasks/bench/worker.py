"""Measures cases in this process; as a process of its own, it answers requests in lines of JSON.

A request is {"do": name, ...}, where the name is a method of `Worker`. The answer is {"value": ...}
or {"problem": text}. Answers go to standard output; the output of libraries goes to standard error.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import sys
import warnings
from typing import Any

import torch

from mmadapters.errors import first_line

from ..core.machine import versions
from .cases import Case
from .encoders import Encoder, make_inputs, measure_towers
from .stepping import Runner, WorkerSetup, prepare

PACKAGES = ("torch", "timm", "transformers", "open_clip_torch", "peft", "adapters")


class Worker:
    """Answers the requests to one interpreter."""

    def __init__(self) -> None:
        self.setup: WorkerSetup | None = None
        self.runners: dict[int, Runner] = {}

    def facts(self) -> dict[str, Any]:
        """Returns versions, the number of threads, and the accelerator's name or None."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {
            "python": platform.python_version(),
            "packages": versions(PACKAGES),
            "accelerator": device,
            "threads": torch.get_num_threads(),
        }

    def set_encoder(
        self,
        *,
        name: str,
        options: dict[str, Any],
        device: str,
        precision: str,
        seconds: float,
        size: int,
        threads: int | None,
    ) -> list[dict[str, Any]]:
        """Sets the encoder of the next cases; returns the sizes of its towers."""
        if threads is not None:
            torch.set_num_threads(threads)
        encoder = Encoder(name=name, options=options).make()
        self.setup = WorkerSetup(
            encoder=encoder,
            device=torch.device(device),
            precision=precision,
            seconds=seconds,
            size=size,
        )
        towers = measure_towers(encoder, make_inputs(encoder, 1, seconds=seconds))
        return [tower.to_dict() for tower in towers]

    def open(self, *, key: int, case: dict[str, Any]) -> dict[str, Any]:
        """Prepares a case; returns its parameters and memory."""
        assert self.setup is not None
        torch.manual_seed(0)
        runner = prepare(Case(**case), self.setup)
        self.runners[key] = runner
        return {"parameters": runner.parameters, "kept": runner.kept, "peak": runner.peak}

    def time(self, *, key: int) -> float:
        """Returns the seconds of one call in another turn."""
        assert self.setup is not None
        return self.runners[key].turn(self.setup.device)

    def close(self) -> None:
        """Frees all cases."""
        self.runners.clear()
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def quiet() -> None:
    """Silences the warnings of libraries, which do not concern the measurement."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def answered(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """Answers a request, or says why it failed; one failure must not end the other cases."""
    try:
        return {"value": getattr(worker, request.pop("do"))(**request)}
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        name, line = type(error).__name__, first_line(error)
        return {"problem": name if line == name else f"{name}: {line}"}


def serve() -> None:
    """Answers requests from standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    quiet()
    worker = Worker()
    for line in sys.stdin:
        answers.write(json.dumps(answered(worker, json.loads(line))) + "\n")
        answers.flush()
