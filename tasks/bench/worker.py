"""Measures cases in this process; started by itself, it does what lines of JSON ask for.

A line is {"do": name, ...}; the answer {"value": ...} or {"problem": text}. Names are the methods
of `Worker`. Answers go to what was standard output, and whatever libraries print to standard error.
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

from ..core.errors import first_line
from ..core.machine import versions
from .cases import Case
from .encoders import Encoder, make_inputs, measure_towers
from .stepping import Place, Runner, prepare

PACKAGES = ("torch", "timm", "transformers", "open_clip_torch", "peft", "adapters")


class Worker:
    """The cases of one interpreter."""

    def __init__(self) -> None:
        self.place: Place | None = None
        self.runners: dict[int, Runner] = {}

    def facts(self) -> dict[str, Any]:
        """Versions, and the accelerator's name if there is one."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {
            "python": platform.python_version(),
            "packages": versions(PACKAGES),
            "accelerator": device,
            "threads": torch.get_num_threads(),
        }

    def settle(
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
        """Names the encoder of the cases to come; gives its towers."""
        if threads is not None:
            torch.set_num_threads(threads)
        encoder = Encoder(name=name, options=options).make()
        self.place = Place(
            encoder=encoder,
            device=torch.device(device),
            precision=precision,
            seconds=seconds,
            size=size,
        )
        towers = measure_towers(encoder, make_inputs(encoder, 1, seconds=seconds))
        return [tower.to_dict() for tower in towers]

    def open(self, *, key: int, case: dict[str, Any]) -> dict[str, Any]:
        """Makes a case ready; gives what is known of it but its time."""
        assert self.place is not None
        torch.manual_seed(0)
        runner = prepare(Case(**case), self.place)
        self.runners[key] = runner
        return {"parameters": runner.parameters, "kept": runner.kept, "peak": runner.peak}

    def time(self, *, key: int) -> float:
        """Seconds of one call."""
        assert self.place is not None
        return self.runners[key].turn(self.place.device)

    def close(self) -> None:
        """Forgets all cases."""
        self.runners.clear()
        gc.collect()
        torch.compiler.reset()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def quiet() -> None:
    """Libraries' warnings are not about what is measured."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def answered(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """What a request gives, or why it fails: one library's trouble must not end the others'."""
    try:
        return {"value": getattr(worker, request.pop("do"))(**request)}
    except Exception as error:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        name, line = type(error).__name__, first_line(error)
        return {"problem": name if line == name else f"{name}: {line}"}


def serve() -> None:
    """Answers lines until there are no more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    quiet()
    worker = Worker()
    for line in sys.stdin:
        answers.write(json.dumps(answered(worker, json.loads(line))) + "\n")
        answers.flush()
