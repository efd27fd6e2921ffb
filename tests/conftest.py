"""Settings for all tests: no network, few threads, fixed seeds."""

from __future__ import annotations

import os
import random

NETWORK = os.environ.get("FLOWACCEL_TEST_NETWORK") == "1"
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 1)  # the models are tiny: more threads only wait for each other

# Read when the libraries are imported, so set before.
if not NETWORK:
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # also for the processes that tests start

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_network = pytest.mark.skip(reason="needs the network: set FLOWACCEL_TEST_NETWORK=1")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("network") and not NETWORK:
            item.add_marker(no_network)


@pytest.fixture(autouse=True)
def seeds() -> int:
    """Seed the global generators before each test, so that no test depends on the ones that ran before it."""
    seed = 0
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed
