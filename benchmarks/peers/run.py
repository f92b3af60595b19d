"""Makes one environment for each peer, measures both sides in it and writes RESULTS.md.

Exits with an error if outputs or gradients differ by more than LIMIT or a case does not hold.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "RESULTS.md"
LIMIT = 1e-5


@dataclass(frozen=True)
class Environment:
    """The environment of a peer and the scripts that run in it.

    Attributes:
        peer: name of the peer's package.
        pinned: requirement of the peer.
        shared: packages that are installed in the version of this interpreter.
        scripts: files in this folder.
    """

    peer: str
    pinned: str
    shared: tuple[str, ...]
    scripts: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return HERE / f".venv-{self.peer}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def make(self, uv: str) -> None:
        """Creates or updates the environment."""
        same = [f"{name}=={version(name)}" for name in (*self.shared, "safetensors")]
        create = [uv, "venv", "-q", "--allow-existing", "-p", sys.executable, str(self.folder)]
        install = [uv, "pip", "install", "-q", "-p", str(self.python), self.pinned, *same]
        for command in (create, install):
            subprocess.run(command, check=True)


# adapters pins transformers to 4.57 and needs torchvision for stochastic depth.
ENVIRONMENTS = (
    Environment(
        peer="adapters",
        pinned="adapters==1.3.0",
        shared=("torch", "torchvision"),
        scripts=("adapterhub.py",),
    ),
    Environment(
        peer="peft",
        pinned="peft==0.21.*",
        shared=("torch", "torchvision", "transformers", "timm", "open_clip_torch"),
        scripts=("peft_cases.py", "peft_traps.py"),
    ),
)


@dataclass
class Report:
    """The measurements in one peer's environment; `comparison.py` describes the fields."""

    peer: str
    versions: dict[str, str] = field(default_factory=dict)
    equalities: list[dict[str, Any]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.peer} {self.versions[self.peer]}"


def measure(environment: Environment) -> Report:
    """Runs the scripts of one environment.

    Raises:
        SystemExit: a script failed; its errors are shown.
    """
    report = Report(environment.peer)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for script in environment.scripts:
        print(f"{environment.peer}: {script}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            measured = Path(folder) / "measured.json"
            command = [str(environment.python), str(HERE / script), str(measured)]
            done = subprocess.run(command, env=variables, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{script} failed\n{done.stderr}")
            content = json.loads(measured.read_text())
        report.versions |= content["versions"]
        report.equalities += content["equalities"]
        report.cases += content["cases"]
    return report


def machine() -> str:
    """Returns the processor and the number of cores."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = named[0] if named else name
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def failures(reports: list[Report]) -> list[str]:
    """Returns a line for each equality or case that does not hold."""
    lines = []
    for report in reports:
        for line in report.equalities:
            for what in ("difference", "gradient"):
                if not line[what] <= LIMIT:
                    lines.append(
                        f"{report.peer}, {line['model']}, {line['method']}: {what} {line[what]:.2g}"
                    )
        lines += [f"{report.peer}: {case['title']}" for case in report.cases if not case["holds"]]
    return lines


def written(reports: list[Report], failed: list[str]) -> str:
    """Formats the results as Markdown."""
    equalities = [(report, line) for report in reports for line in report.equalities]
    largest = max(line["difference"] for _, line in equalities)
    cases = sum(len(report.cases) for report in reports)
    verdict = (
        f"All {len(equalities)} pairs agree: outputs to {largest:.1g} (limit {LIMIT:g}), "
        f"gradients of the adapters to the same limit. All {cases} cases hold."
    )
    if failed:
        verdict = "**Failed:**\n\n" + "\n".join(f"- {line}" for line in failed)
    environments = [
        (report.peer, ", ".join(f"{name} {number}" for name, number in report.versions.items()))
        for report in reports
    ]
    parts = [
        "# Compared with its peers",
        f"Written by `make peers` on {datetime.date.today()}; {machine()}; "
        f"Python {platform.python_version()}. Everything here was measured in that run.",
        verdict,
        table(("environment", "versions"), environments),
        "## The same numbers",
        "Each library adapts a copy of one model with random weights. The peer's adapter gets "
        "random values, which are copied into ours. Effect is the largest change of an output by "
        "the adapter. Difference is the largest difference between the outputs of the two "
        "libraries; relative is the same divided by the largest output. Gradients is the largest "
        "difference of gradients divided by the largest gradient.",
        table(
            (
                "peer",
                "model",
                "method",
                "parameters",
                "effect",
                "difference",
                "relative",
                "gradients",
            ),
            [
                (
                    report.name,
                    line["model"],
                    line["method"],
                    f"{line['parameters']:,}",
                    f"{line['effect']:.2f}",
                    *(f"{line[what]:.2g}" for what in ("difference", "relative", "gradient")),
                )
                for report, line in equalities
            ],
        ),
    ]
    for report in reports:
        if report.cases:
            parts += [
                f"## Where {report.name} does nothing, drifts or errs",
                table(
                    ("case", report.name, "mmadapters"),
                    [(case["title"], case["peer"], case["ours"]) for case in report.cases],
                ),
            ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        sys.exit("uv makes the environments and was not found: run `make setup`")
    for environment in ENVIRONMENTS:
        environment.make(uv)
    reports = [measure(environment) for environment in ENVIRONMENTS]
    failed = failures(reports)
    text = written(reports, failed)
    RESULTS.write_text(text)
    print(text)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
