"""What torch answers, also where torch cannot be installed.

With ``ML_NETWORKS_TORCH_SIDE`` naming a folder, an environment with torch writes there what its
side of each test gave, and one without torch (the newest JAX's Python) reads it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ml_networks.io import load_weights, save_weights

HAS_TORCH = importlib.util.find_spec("torch") is not None
Arrays = dict[str, np.ndarray]


@pytest.fixture
def from_torch(request: pytest.FixtureRequest) -> Callable[[Callable[[], Arrays]], Arrays]:
    """``from_torch(compute)``: the named arrays that ``compute``, which needs torch, returns.

    Called at most once in a test.
    """
    folder = os.environ.get("ML_NETWORKS_TORCH_SIDE")
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:24]
    path = Path(folder or ".") / f"{name}.safetensors"

    def arrays(compute: Callable[[], Arrays]) -> Arrays:
        if HAS_TORCH:
            found = compute()
            if folder:
                save_weights(found, path)
            return found
        if not folder or not path.is_file():
            pytest.skip(
                "torch is not installed, and the folder ML_NETWORKS_TORCH_SIDE, which would hold "
                f"what it gives, is {folder or 'not set'}"
            )
        return load_weights(path, "numpy")[0]

    return arrays
