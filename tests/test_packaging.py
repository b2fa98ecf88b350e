"""The distribution: what is packed, what it needs, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNREACHABLE = ("No matching distribution found", "Could not find a version", "Connection")


def pip_or_skip(*arguments: str) -> None:
    """Run a command that needs the package index; skip where that cannot be reached."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    if done.returncode and any(sign in output for sign in UNREACHABLE):
        pytest.skip(f"the package index cannot be reached: {output.strip().splitlines()[-1]}")
    assert done.returncode == 0, output


def run_python(code: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_distribution_holds_the_kernels_inside_the_package_only(tmp_path: Path) -> None:
    # One build makes the source archive from the tree and the wheel from that archive.
    pip_or_skip("build", "--outdir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    (archive,) = tmp_path.glob("*.tar.gz")

    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in packed} == {
        "ml_networks",
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    with tarfile.open(archive) as tar:
        sources = {member.name.split("/", 1)[1] for member in tar.getmembers()}
        assert not any(member.issym() or member.islnk() for member in tar.getmembers())
    assert not any(name.startswith("kernels/") for name in sources)

    tracked = subprocess.run(
        ["git", "ls-files", "kernels", "ml_networks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in tracked:
        inside = f"ml_networks/{name}" if name.startswith("kernels/") else name
        if inside != "ml_networks/kernels":
            assert inside in packed
            assert inside in sources
    assert "ml_networks/py.typed" in packed

    # Beside the PyPI package `kernels` both can be imported. Without `site` no editable install of
    # this repository is in the way.
    target = tmp_path / "target"
    pip_or_skip("pip", "install", "-q", "--target", str(target), "kernels")
    pip_or_skip("pip", "install", "-q", "--target", str(target), "--no-deps", str(wheel))
    site_packages = Path(pytest.__file__).parent.parent
    paths = run_python(
        f"import sys; sys.path += [{str(target)!r}, {str(site_packages)!r}]\n"
        "import kernels, ml_networks, ml_networks.kernels\n"
        "print(kernels.__file__, kernels.kernelize, ml_networks.kernels.explain)\n"
        "print(ml_networks.kernels.__file__)",
        "-S",
        "-W",
        "ignore",
    )
    assert str(target / "kernels" / "__init__.py") in paths
    assert str(target / "ml_networks" / "kernels" / "__init__.py") in paths


def test_an_editable_install_exposes_no_top_level_kernels() -> None:
    found = run_python(
        "import importlib.util, ml_networks\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(ml_networks.__file__, spec and spec.origin)"
    )
    module, kernels = found.split()
    if Path(module).parent != ROOT / "ml_networks":
        pytest.skip(f"ml-networks is not installed editable from this tree but in {module}")
    assert kernels == "None" or not Path(kernels).is_relative_to(ROOT)


def test_import_is_quick_and_brings_no_framework() -> None:
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "import ml_networks\n"
        "print(time.perf_counter() - start)\n"
        "frameworks = {'torch', 'jax', 'flax', 'triton', 'lightning', 'numpy'}\n"
        "print(*sorted(frameworks & set(sys.modules)))"
    )
    outputs = [run_python(code).splitlines() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in outputs) < 0.3
    assert all(frameworks == "" for _, frameworks in outputs)


BLOCK = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
JAX = {"jax", "jaxlib", "flax", "optax", "distrax", "orbax"}
TORCH = {"torch", "triton", "lightning", "pytorch_lightning", "torchmetrics"}
TRAIN = {"hydra", "omegaconf", "mlxtend", "matplotlib", "pytorch_optimizer", "schedulefree"}
WORKSHOP = {"pandas", "mkdocs", "hypothesis"}


def test_the_torch_side_works_without_jax_and_the_other_extras() -> None:
    blocked = JAX | TRAIN | WORKSHOP | {"lightning", "pytorch_lightning", "triton"}
    output = run_python(
        f"BLOCKED = {blocked!r}{BLOCK}"
        """
import torch
import ml_networks
from ml_networks import LinearConfig, MLPConfig, MLPLayer
from ml_networks.kernels.torch import focal_frequency_loss

mlp = MLPLayer(4, 2, MLPConfig(8, 1, "Tanh", LinearConfig("ReLU")))
print(tuple(mlp(torch.zeros(3, 4)).shape))
images = torch.rand(2, 1, 8, 8, requires_grad=True)
focal_frequency_loss(images, torch.rand(2, 1, 8, 8)).backward()
print(tuple(images.grad.shape))
"""
    )
    assert output.split("\n")[:2] == ["(3, 2)", "(2, 1, 8, 8)"]


def test_the_jax_side_works_without_torch_and_the_other_extras() -> None:
    blocked = TORCH | TRAIN | WORKSHOP
    output = run_python(
        f"BLOCKED = {blocked!r}{BLOCK}"
        """
import jax, jax.numpy as jnp
import ml_networks, ml_networks.jax
from ml_networks.kernels.jax import focal_frequency_loss

images = jax.random.uniform(jax.random.key(0), (2, 1, 8, 8))
print(jax.grad(focal_frequency_loss)(images, jnp.zeros_like(images)).shape)
""",
        "-W",
        "ignore",
    )
    assert output.split("\n")[0] == "(2, 1, 8, 8)"
