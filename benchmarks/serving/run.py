"""Runs `measure.py` in peft's environment and writes RESULTS.md.

Exits with an error if a figure misses its limit.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"


def peers() -> Any:
    """Imports the module that makes the peers' environments."""
    spec = importlib.util.spec_from_file_location("peers", HERE.parent / "peers" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    made = peers()
    uv = str(Path(sys.executable).with_name("uv"))
    environment = next(e for e in made.ENVIRONMENTS if e.peer == "peft")
    environment.make(uv)
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.json"
        subprocess.run(
            [str(environment.python), str(HERE / "measure.py"), str(measured)],
            env={**os.environ, "PYTHONPATH": str(HERE.parents[1]), "HF_HUB_OFFLINE": "1"},
            check=True,
        )
        figures = json.loads(measured.read_text())
    seconds = figures["seconds"]

    def ratio(case: str, base: str) -> float:
        return seconds[case] / seconds[base]

    milliseconds, size = figures["load_ms"]
    limits = [
        (
            f"{key}: 8 adapters in a batch of 32, over one",
            ratio(f"{key}, Route of 8", f"{key}, one"),
            1.15,
        )
        for key in ("seq_bn", "double_seq_bn", "lora")
    ]
    limits += [
        (f"{key}: Fuse of 2, over one", ratio(f"{key}, Fuse of 2", f"{key}, one"), 1.25)
        for key in ("seq_bn", "double_seq_bn")
    ]
    limits += [
        ("switch between adapters of 24 sites, ms", figures["switch_ms"], 0.1),
        (f"load_adapter of {size / 1e6:.1f} MB, ms", milliseconds, 20.0),
    ]
    peer = ratio("peft lora, mixed batch of 8", "peft lora, one")
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    parts = [
        "# Several adapters on one encoder",
        f"Written by `make serving` on {datetime.date.today()}; {made.machine()}; {versions}; "
        f"{figures['threads']} threads. ViT-S/16, 224 pixels, batch 32, fp32, medians of one run.",
        made.table(
            ("what", "measured", "at most"),
            [(what, f"{value:.3g}", f"{limit:g}") for what, value, limit in limits]
            + [("peft: 8 LoRAs in a batch of 32, over one", f"{peer:.3g}", "")],
        ),
        made.table(
            ("forward", "seconds", "over the bare encoder"),
            [
                (name, f"{value:.3f}", f"{ratio(name, 'bare'):.2f}")
                for name, value in seconds.items()
            ],
        ),
    ]
    text = "\n\n".join(parts) + "\n"
    RESULTS.write_text(text)
    print(text)
    missed = [what for what, value, limit in limits if value > limit]
    sys.exit(f"missed: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
