"""Makes the peers' environments, runs `mmadapters bench` and saves its report here under a name.

    python benchmarks/bench/run.py CPU [options of mmadapters bench]

Exits with an error if a figure misses its target.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from serving.run import peers  # noqa: E402


def main() -> None:
    name, *options = sys.argv[1:] or ["CPU"]
    beside = Path(sys.executable).parent
    for environment in peers().ENVIRONMENTS:
        environment.make(str(beside / "uv"))
        options += ["--peers", str(environment.python)]
    with tempfile.TemporaryDirectory() as folder:
        command = [str(beside / "mmadapters"), "bench", *options, "--check", "--out", folder]
        done = subprocess.run(command)
        for made in Path(folder).iterdir():
            data = made.read_bytes().replace(b"(bench.png)", f"({name}.png)".encode())
            (HERE / f"{name}{made.suffix}").write_bytes(data)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
