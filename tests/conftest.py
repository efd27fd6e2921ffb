"""Settings for all tests: no network, few threads, fixed seeds; which of them run, and where."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator

NETWORK = os.environ.get("FLOWACCEL_TEST_NETWORK") == "1"
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 1)  # the models are tiny: more threads only wait for each other

# Read when the libraries are imported, so set before.
if not NETWORK:
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Without it MKL's products differ in the last digit with the alignment of their operands, and what is read from a file
# lies elsewhere than what was made in memory: bit for bit with a fresh process would be a matter of luck.
os.environ.setdefault("MKL_CBWR", "AUTO")
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # also for the processes that tests start

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import tiers  # noqa: E402

torch.set_num_threads(THREADS)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=tiers.TIERS, default="default", help="which tests to run; see tests/tiers.py")


@pytest.hookimpl(tryfirst=True)  # the tiers are those of all tests that were found, whatever -k leaves of them
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort into tiers and, for several workers, into groups; skip, with the reason, what this machine cannot run."""
    found = tiers.sort_into_tiers(items)
    config.stash[tiers.DEFAULT] = found["default"]
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_network = pytest.mark.skip(reason="needs the network: set FLOWACCEL_TEST_NETWORK=1")
    for item in items:
        item.add_marker(pytest.mark.xdist_group(tiers.worker_group(item)))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("network") and not NETWORK:
            item.add_marker(no_network)
    if any("::" in argument for argument in config.args):  # a test that was named runs whatever its tier
        return
    tier = config.getoption("--tier")
    chosen = set(found[tier] + (found["default"] if tier == "full" else []))
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with tiers.nothing_costly(item):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with tiers.nothing_costly(item):
        yield


@pytest.fixture(autouse=True)
def seeds() -> int:
    """Seed the global generators before each test, so that no test depends on the ones that ran before it."""
    seed = 0
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope="session")
def process() -> tiers.Process:
    """Run Python in a process of its own: `process("-c", source, "argument")`. A test that starts processes in another
    way asks for this fixture all the same, as its tier is told by it."""

    def run(*command: object, code: int = 0, **options: object) -> subprocess.CompletedProcess[str]:
        settings = {"capture_output": True, "text": True, "timeout": 600, "check": False} | options
        ended = subprocess.run([sys.executable, *map(str, command)], **settings)
        assert ended.returncode == code, ended.stderr[-3000:]
        return ended

    return run


@pytest.fixture(scope="session")
def compiler() -> None:
    """Say that a test compiles by a C++ compiler: its tier is told by that."""
