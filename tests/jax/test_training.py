"""Steps of training, whole states on disk, and a whole module's step against torch's Adam."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ml_networks.jax as ours
from ml_networks import ConvConfig, ConvNetConfig, LinearConfig, MLPConfig
from ml_networks.jax import TrainState, restore_checkpoint, save_checkpoint, train_step
from tests.jax.conftest import Arrays
from tests.jax.modules import normal

IMAGES, TARGETS = normal(3, 8, 3, 8, 8), normal(3, 8, 5, seed=1)
ROWS = normal(3, 8, 8, seed=2)


def build(library: Any, dropout: float = 0.0, channels: int = 4, **rngs: Any) -> Any:
    """An encoder with batch norm, layer norm and dropout."""
    conv = ConvConfig("ReLU", 3, 2, 1, norm="batch", dropout=dropout)
    backbone = ConvNetConfig((channels, 6), (conv, conv))
    return library.Encoder(5, (3, 8, 8), backbone, LinearConfig("Tanh", norm="layer"), **rngs)


def encoder(dropout: float = 0.0, **options: Any) -> Any:
    return build(ours, dropout, rngs=jax.random.key(0), **options)


def build_mlp() -> Any:
    """A perceptron with dropout: it compiles faster."""
    layer = LinearConfig("ReLU", norm="layer", dropout=0.5)
    return ours.MLPLayer(8, 5, MLPConfig(6, 1, "Tanh", layer), rngs=jax.random.key(0))


def error(model: Any, x: Any, y: Any) -> Any:
    return ((model(x) - y) ** 2).mean()


def equal(a: Any, b: Any) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and bool((x == y).all()) for x, y in leaves)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Orbax logs through absl, which writes to a stream that pytest has closed by then."""
    before = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.ERROR)
    yield
    logging.getLogger("absl").setLevel(before)


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("Adam", {"lr": 3e-3, "betas": (0.8, 0.9), "weight_decay": 0.01}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ],
)
def test_a_whole_module_trains_as_in_torch(
    name: str, keywords: dict[str, Any], from_torch: Any
) -> None:
    from ml_networks.convert import state_dict, torch_to_jax

    def in_torch() -> Arrays:
        import torch

        import ml_networks.torch

        torch.manual_seed(0)
        module = build(ml_networks.torch)
        found = {f"0/{key}": x.numpy().copy() for key, x in module.state_dict().items()}
        optimizer = getattr(torch.optim, name)(module.parameters(), **keywords)
        for number, (x, y) in enumerate(zip(IMAGES, TARGETS, strict=True), 1):
            loss = error(module, torch.tensor(x), torch.tensor(y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found[f"loss/{number}"] = loss.detach().numpy().copy()
            state = module.state_dict().items()
            found |= {f"{number}/{key}": x.numpy().copy() for key, x in state}
        return found

    theirs = from_torch(in_torch)
    model = encoder()
    torch_to_jax({k[2:]: x for k, x in theirs.items() if k.startswith("0/")}, model)
    optimizer = ours.get_optimizer(name, **keywords)
    state = TrainState.create(model, optimizer)
    step = train_step(model, optimizer, error)
    for number, (x, y) in enumerate(zip(IMAGES, TARGETS, strict=True), 1):
        state, loss = step(state, x, y)
        np.testing.assert_allclose(loss, theirs[f"loss/{number}"], rtol=2e-5)
        ours.update_model(model, state)
        for key, got in state_dict(model).items():
            # Adam divides by the size of the gradient: what a bias before a batch norm gets is
            # the sign of rounding errors, a step of lr either way.
            if "conv.bias" in key:
                continue
            expected = theirs[f"{number}/{key}"]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=key)
    assert int(state.step) == len(IMAGES)


def test_a_step_keeps_statistics_and_draws_anew_and_gives_its_memory_on() -> None:
    model = encoder(dropout=0.5)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = ours.get_optimizer("SGD", lr=0.0)
    state = first = TrainState.create(model, optimizer)
    step = train_step(model, optimizer, error)
    losses = []
    for _ in range(3):
        state, loss = step(state, IMAGES[0], TARGETS[0])
        losses.append(float(loss))
    assert len(set(losses)) == 3
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert float(jnp.abs(state.rest["encoder.conv_layers.0.norm.mean"]).max()) > 0
    assert int(state.rest["encoder.conv_layers.0.dropout.rngs.count"]) == 3
    assert equal(before, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert equal(state.params, TrainState.create(model, optimizer).params)


def test_terms_come_back_and_their_sum_is_minimised() -> None:
    model = build_mlp()
    optimizer = ours.get_optimizer("SGD", lr=0.1)

    def terms(model: Any, x: Any, y: Any) -> dict[str, Any]:
        return {"error": error(model, x, y), "size": 0.1 * jnp.abs(model(x)).mean()}

    def after(loss: Any) -> tuple[Any, Any]:
        state = TrainState.create(model, optimizer)
        return train_step(model, optimizer, loss)(state, ROWS[0], TARGETS[0])

    state, losses = after(terms)
    summed, total = after(lambda *a: sum(terms(*a).values()))
    assert losses.keys() == {"error", "size"}
    np.testing.assert_allclose(sum(losses.values()), total, rtol=1e-6)
    for name, got in state.params.items():
        np.testing.assert_allclose(got, summed.params[name], rtol=1e-5, atol=1e-7)


def test_steps_run_in_a_scan_and_in_a_vmap() -> None:
    optimizer = ours.get_optimizer("Adam", lr=1e-2)
    model = build_mlp()
    step = train_step(model, optimizer, error)
    state = TrainState.create(model, optimizer)
    scanned, losses = jax.lax.scan(lambda s, batch: step(s, *batch), state, (ROWS, TARGETS))
    each = []
    for x, y in zip(ROWS, TARGETS, strict=True):
        state, loss = step(state, x, y)
        each.append(loss)
    np.testing.assert_allclose(losses, jnp.stack(each), rtol=1e-5)
    assert int(scanned.step) == 3
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), TrainState.create(model, optimizer))
    _, losses = jax.vmap(step, (0, None, None))(twice, ROWS[0], TARGETS[0])
    np.testing.assert_allclose(losses, jnp.stack([each[0]] * 2), rtol=1e-5)


def test_frozen_parameters_stay() -> None:
    model = encoder()
    model.freeze_biases()
    optimizer = ours.get_optimizer("SGD", lr=0.1)
    state = first = TrainState.create(model, optimizer)
    kept = {k: np.asarray(v) for k, v in first.rest.items() if "bias" in k}
    assert kept
    assert not any("bias" in name for name in state.params)
    state, _ = train_step(model, optimizer, error)(state, IMAGES[0], TARGETS[0])
    for name, array in kept.items():
        np.testing.assert_array_equal(array, state.rest[name])


def test_evaluation_uses_the_running_statistics_and_leaves_the_state() -> None:
    model = encoder(dropout=0.5)
    optimizer = ours.get_optimizer("Adam", lr=1e-2)
    state = TrainState.create(model, optimizer)
    state, _ = train_step(model, optimizer, error)(state, IMAGES[0], TARGETS[0])
    evaluate = ours.eval_step(model, lambda model, x: model(x))
    got = evaluate(state, IMAGES[1])
    np.testing.assert_array_equal(got, evaluate(state, IMAGES[1]))
    assert not model.encoder.conv_layers[0].norm.use_running_average
    ours.update_model(model, state).eval()
    np.testing.assert_allclose(got, model(IMAGES[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [lambda m, x: m(x).mean(0), lambda m, x: None])
def test_a_loss_that_is_no_scalar_is_refused(loss: Any) -> None:
    optimizer = ours.get_optimizer("SGD")
    state = TrainState.create(encoder(), optimizer)
    with pytest.raises(ValueError, match="must return a scalar"):
        train_step(encoder(), optimizer, loss)(state, IMAGES[0])


def test_a_loss_that_adds_variables_is_refused() -> None:
    def loss(model: Any, x: Any) -> Any:
        model.seen = nnx.BatchStat(x.mean())
        return model(x).mean()

    optimizer = ours.get_optimizer("SGD")
    state = TrainState.create(encoder(), optimizer)
    with pytest.raises(ValueError, match="made or removed variables of Encoder: seen"):
        train_step(encoder(), optimizer, loss)(state, IMAGES[0])


def test_a_restored_run_ends_where_the_whole_run_ends(tmp_path: Path) -> None:
    optimizer = ours.get_optimizer("AdamW", lr=1e-2)
    model = build_mlp()
    step = train_step(model, optimizer, error)

    def run(state: Any, batches: slice) -> Any:
        for x, y in zip(ROWS[batches], TARGETS[batches], strict=True):
            state, _ = step(state, x, y)
        return state

    def fresh() -> Any:
        return TrainState.create(model, optimizer)

    whole = run(fresh(), slice(3))
    half = run(fresh(), slice(1))
    save_checkpoint(tmp_path / "half", fresh())
    save_checkpoint(tmp_path / "half", half)
    restored = restore_checkpoint(tmp_path / "half", fresh())
    assert equal(restored, half)
    assert jax.tree.structure(restored) == jax.tree.structure(half)
    assert equal(run(restored, slice(1, 3)), whole)
    assert not equal(run(fresh(), slice(1, 3)), whole)
    assert len(list((tmp_path / "half").iterdir())) == 1


def test_checkpoints_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    optimizer = ours.get_optimizer("Adam")
    state = TrainState.create(encoder(), optimizer)
    path = tmp_path / "checkpoint"
    save_checkpoint(path, state)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        restore_checkpoint(tmp_path / "none", state)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        restore_checkpoint(tmp_path / "empty", state)
    wider = TrainState.create(encoder(channels=7), optimizer)
    with pytest.raises(ValueError, match=r"conv_layers.0.conv.bias is float32\[4\] in place of"):
        restore_checkpoint(path, wider)
    plain = TrainState.create(encoder(), ours.get_optimizer("SGD"))
    with pytest.raises(ValueError, match=r"optimizer.*is too much"):
        restore_checkpoint(path, plain)
    save_checkpoint(tmp_path / "plain", plain)
    with pytest.raises(ValueError, match=r"optimizer.*is missing"):
        restore_checkpoint(tmp_path / "plain", state)
    with pytest.raises(ValueError, match="does not fit Encoder"):
        ours.update_model(encoder(), wider)


@pytest.mark.parametrize("kept", ["nothing", "half"])
def test_a_torn_checkpoint_is_refused(tmp_path: Path, kept: str) -> None:
    # One array: of several that cannot be read, Orbax leaves all but the first pending.
    state = {"weights": jnp.asarray(normal(1000))}
    save_checkpoint(tmp_path, state)
    (item,) = tmp_path.iterdir()
    if kept == "nothing":
        shutil.rmtree(item / "default")
    else:
        for file in item.rglob("d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="no whole checkpoint"):
        restore_checkpoint(tmp_path, state)


def test_a_save_that_was_cut_short_counts_as_none(tmp_path: Path) -> None:
    state = TrainState.create(encoder(), ours.get_optimizer("Adam"))
    save_checkpoint(tmp_path, state)
    (whole,) = tmp_path.iterdir()
    cut = tmp_path / "1.orbax-checkpoint-tmp-0"  # what Orbax writes into before it renames
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "default" / "d")
    assert equal(restore_checkpoint(tmp_path, state), state)
    save_checkpoint(tmp_path, state)
    assert equal(restore_checkpoint(tmp_path, state), state)
