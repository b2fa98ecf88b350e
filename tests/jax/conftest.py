"""What torch answers, also where torch cannot be installed.

With ``ML_NETWORKS_TORCH_SIDE`` naming a folder, an environment with torch writes there what its
side of each test gives and goes no further, and one without torch (that of ``make
test-jax-latest``) reads it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from ml_networks.io import load_weights, save_weights

HAS_TORCH = importlib.util.find_spec("torch") is not None
FOLDER = os.environ.get("ML_NETWORKS_TORCH_SIDE")
Arrays = dict[str, np.ndarray]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if FOLDER and HAS_TORCH:
        items[:] = [item for item in items if "from_torch" in getattr(item, "fixturenames", ())]


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """Compile without most optimisations: tests run a program once."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


@pytest.fixture
def from_torch(request: pytest.FixtureRequest) -> Callable[[Callable[[], Arrays]], Arrays]:
    """``from_torch(compute)``: the named arrays that ``compute``, which needs torch, returns.

    Called at most once in a test.
    """
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:24]
    path = Path(FOLDER or ".") / f"{name}.safetensors"

    def arrays(compute: Callable[[], Arrays]) -> Arrays:
        if HAS_TORCH:
            found = compute()
            if FOLDER:
                save_weights(found, path)
                pytest.skip(f"torch's side is in {FOLDER}")
            return found
        if not FOLDER:
            pytest.skip("torch is not installed, and ML_NETWORKS_TORCH_SIDE is not set")
        assert path.is_file(), f"{FOLDER} does not hold torch's side of {request.node.nodeid}"
        return load_weights(path, "numpy")[0]

    return arrays
