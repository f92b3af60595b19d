"""What every test shares: threads, seeds, markers and the folder of data beside the repository."""

import os
import random
from pathlib import Path

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
# Before torch is imported; the processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = str(THREADS)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)

MARKERS = {
    "slow": "takes longer than about 20 s on two cores",
    "gpu": "needs an accelerator; skipped where there is none",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pairs",
        choices=("cover", "all", "mechanisms"),
        help="which pairs of a method and an encoder are tried: a cover of the product (default), "
        "all of it, or one method of each mechanism on every encoder",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    # Tests are drawn up when their modules are imported, also in the workers of xdist.
    if config.getoption("--pairs"):
        os.environ["MMADAPTERS_TEST_PAIRS"] = config.getoption("--pairs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no accelerator"))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Data sets and weights: `MMADAPTERS_SHARED`, else `shared` beside the repository."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MMADAPTERS_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder.name}/: set MMADAPTERS_SHARED to the folder that holds it")
    return folder
