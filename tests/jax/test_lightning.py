"""Lightning's loops and checkpoints around JAX state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import ml_networks.jax as ours
from ml_networks import LinearConfig, MLPConfig
from ml_networks.jax import TrainState, train_step
from tests.jax.modules import normal

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("lightning", reason="Lightning is not installed")

# Lightning's own deprecations and advice.
pytestmark = pytest.mark.filterwarnings("ignore::Warning:lightning")


def make(width: int = 8) -> Any:
    class Model(ours.JaxLightningModule):
        def __init__(self) -> None:
            super().__init__()
            layer = LinearConfig("ReLU", dropout=0.1)
            self.net = ours.MLPLayer(
                4, 2, MLPConfig(width, 1, "Tanh", layer), rngs=jax.random.key(0)
            )
            optimizer = ours.get_optimizer("Adam", lr=1e-2)
            self.state = TrainState.create(self.net, optimizer)
            self.step = train_step(self.net, optimizer, lambda net, x: (net(x) ** 2).mean())

        def training_step(self, batch: Any, batch_index: int) -> None:
            self.state, loss = self.step(self.state, jnp.asarray(batch.numpy()))
            self.step_jax()
            self.log_jax_dict({"loss": loss}, "train")

    return Model()


def fit(model: Any, folder: Path, epochs: int, resume: Path | None = None) -> Any:
    data = torch.utils.data.DataLoader(torch.from_numpy(normal(16, 4)), batch_size=8)
    trainer = ours.JaxTrainer(
        max_epochs=epochs,
        callbacks=ours.JaxModelCheckpoint(dirpath=folder, save_last=True),
        logger=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(model, data, ckpt_path=resume)
    return trainer


def test_a_run_of_lightning_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, half, resumed = make(), make(), make()
    trainer = fit(whole, tmp_path / "whole", 2)
    assert (whole.jax_step_count, trainer.global_step) == (4, 4)
    assert "58 parameters, of which 58 train" in capsys.readouterr().out
    assert trainer.callback_metrics["train/loss"] > 0
    fit(half, tmp_path / "half", 1)
    fit(resumed, tmp_path / "half", 2, resume=tmp_path / "half" / "last.ckpt")
    assert resumed.jax_step_count == 4
    pairs = zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True)
    assert all(bool((a == b).all()) for a, b in pairs)
    with pytest.raises(ValueError, match=r"layers.0.linear.bias is float32\[8\] in place of"):
        fit(make(9), tmp_path / "other", 1, resume=tmp_path / "half" / "last.ckpt")


def test_without_lightning_the_error_says_what_to_do() -> None:
    code = (
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if 'lightning' in name else find(name)\n"
        "import ml_networks.jax\n"
        "try: ml_networks.jax.JaxTrainer\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ml-networks[train]" in result.stdout
    assert "train_step" in result.stdout
