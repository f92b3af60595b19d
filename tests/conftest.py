"""What every test shares: threads, seeds, markers and the folder of data beside the repository."""

import gc
import os
import random
from pathlib import Path

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
# Before torch is imported; the processes that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = str(THREADS)
# Both cores are busy with tests; those about workers ask for them.
os.environ.setdefault("MMADAPTERS_WORKERS", "0")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)

MARKERS = {
    "slow": "takes longer than about 20 s on two cores",
    "release": "takes many minutes: only in `make test-all`, beside a smaller test of the same",
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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.accelerator.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no accelerator"))
    if os.environ.get("MMADAPTERS_TEST_PAIRS") != "all":
        for item in items:
            if "release" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: make test-all"))
    items[:] = slow_first(items)


def slow_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Each worker begins with its share of the slow tests, so that none of them waits for one.

    xdist's `worksteal` first gives every worker a stretch of the tests of equal length.
    """
    slow = [item for item in items if "slow" in item.keywords]
    rest = [item for item in items if "slow" not in item.keywords]
    length, more = divmod(len(items), WORKERS)
    ordered: list[pytest.Item] = []
    for worker in range(WORKERS):
        share = slow[worker::WORKERS]
        plain = length + (worker < more) - len(share)
        ordered += share + rest[:plain]
        rest = rest[plain:]
    return ordered + rest


def pytest_collection_finish() -> None:
    """Garbage collections pass over all that was imported and collected until here, and are rarer.

    Every run of transformers' Trainer collects garbage, which takes a second with the objects of
    some ten thousand tests and all libraries. Models are made of many small objects: with the usual
    thresholds a twelfth of the time would go into looking through them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 25, 25)


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
