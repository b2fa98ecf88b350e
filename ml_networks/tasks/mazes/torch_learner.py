"""The maze loss in torch, and a model in training with torch."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor
from torch.nn import functional as F

from ml_networks.tasks.mazes.data import CLASSES, Mazes, Routes, images_of
from ml_networks.tasks.mazes.learner import DynamicWeights, Tensors, Thoughts
from ml_networks.tasks.mazes.settings import Settings
from ml_networks.torch import (
    ContinuousThoughtMachine,
    HyperContinuousThoughtMachine,
    HyperLoRALinear,
)

__all__ = ["TorchLearner", "maze_loss"]


def maze_loss(
    predictions: Tensor, certainties: Tensor, routes: Tensor, lookahead: int = 5
) -> Tensor:
    r"""The loss of routes with a curriculum that extends by itself (Darlow et al., 2025).

    At every tick the cross entropy is averaged over the first :math:`p + lookahead` steps of the
    route, p the longest beginning of it that is right at any tick. Of each maze counts half the
    loss at the tick where it is lowest, and half that at the most certain tick.

    Parameters
    ----------
    predictions
        Logits (B, route length, classes, ticks).
    certainties
        (B, 2, ticks), the second of them 1 minus the normalised entropy.
    routes
        Classes (B, route length), integers.
    lookahead
        Steps beyond the right beginning.

    Returns
    -------
    Tensor
        The mean over the batch, in nats, a scalar.
    """
    length, ticks = predictions.shape[1], predictions.shape[-1]
    targets = routes[:, :, None, None].expand(-1, -1, 1, ticks)
    losses = -predictions.log_softmax(2).gather(2, targets).squeeze(2)
    right = predictions.argmax(2) == routes[:, :, None]
    beginning = right.long().cumprod(1).sum(1).amax(1)
    steps = torch.arange(length, device=routes.device)
    seen = (steps < beginning[:, None] + lookahead).to(losses.dtype)[:, :, None]
    per_tick = (losses * seen).sum(1) / seen.sum(1)
    ticks_that_count = torch.stack([per_tick.argmin(1), certainties[:, 1].argmax(1)], dim=1)
    return per_tick.gather(1, ticks_that_count).mean()


class TorchLearner:
    """A model with its optimizer, on one device; see :class:`Learner`."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.device = device
        kind = HyperContinuousThoughtMachine if settings.use_hyper else ContinuousThoughtMachine
        self.model = kind.from_config(settings.model_config()).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.losses = torch.zeros((), device=device)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _autocast(self) -> torch.autocast:
        enabled = self.settings.use_amp and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _images(self, mazes: Mazes) -> Tensor:
        images = torch.from_numpy(images_of(mazes.pixels, self.settings.expand_range))
        return images.to(self.device, non_blocking=True)

    def _loss(self, mazes: Mazes) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the predictions (B, route length, 5, T), the certainties."""
        with self._autocast():
            predictions, certainties = self.model(self._images(mazes))[:2]
        predictions = predictions.unflatten(1, (-1, CLASSES))
        routes = torch.from_numpy(mazes.routes).to(self.device, non_blocking=True)
        lookahead = self.settings.cirriculum_lookahead
        loss = maze_loss(predictions, certainties, routes, lookahead)
        return loss, predictions, certainties

    def step(self, mazes: Mazes, number: int) -> None:
        """Take one optimizer step; ``number`` counts them from 0."""
        settings = self.settings
        self.model.train()
        if settings.dropout or settings.dropout_nlm:
            # A run that is resumed drops what the whole run would have dropped.
            torch.manual_seed(zlib.crc32(f"{settings.seed} {number}".encode()))
        loss = self._loss(mazes)[0]
        self.optimizer.zero_grad()
        loss.backward()
        if settings.gradient_clipping > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.gradient_clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate(number)
        self.optimizer.step()
        self.losses += loss.detach()

    def take_losses(self) -> float:
        """The sum of the losses of the steps since this was last asked."""
        total = self.losses.item()
        self.losses.zero_()
        return total

    @torch.no_grad()
    def test(self, mazes: Mazes) -> tuple[float, Routes]:
        """The mean loss, and the routes (B, route length) at each maze's most certain tick."""
        self.model.eval()
        loss, predictions, certainties = self._loss(mazes)
        most_certain = certainties[:, 1].argmax(1)
        chosen = predictions[torch.arange(len(most_certain)), ..., most_certain]
        return loss.item(), chosen.argmax(-1).cpu().numpy()

    def tensors(self) -> Tensors:
        """Weights, moments of the optimizer, and the losses that nobody has asked for yet."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
        return {**tensors, "losses": self.losses}

    def load(self, tensors: Tensors) -> None:
        """Go on from what :meth:`tensors` gave; raises ValueError for anything else."""
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                index, _, key = rest.partition("/")
                states.setdefault(int(index), {})[key] = tensor
        self.load_model(
            {name[6:]: value for name, value in tensors.items() if name.startswith("model/")}
        )
        for number, parameter in enumerate(self.model.parameters()):
            state = states.get(number, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if state and (name not in state or state[name].shape != parameter.shape):
                    raise ValueError(f"optimizer/{number}/{name} is missing or of another shape")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.losses.copy_(tensors["losses"])

    def load_model(self, weights: Tensors) -> None:
        """Take weights; raises ValueError, naming the first, for those that do not fit."""
        # JAX counts no batches, and nothing depends on the count.
        counters = {
            name: value
            for name, value in self.model.state_dict().items()
            if name.endswith("num_batches_tracked")
        }
        try:
            self.model.load_state_dict({**counters, **weights})
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    @torch.no_grad()
    def think(self, mazes: Mazes) -> Thoughts:
        """What the model predicts, looks at and makes of its hyper layers at every tick."""
        self.model.eval()
        layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, HyperLoRALinear)
        }
        inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, given, to=inputs[name]: to.append(given[0].float())
            )
            for name, layer in layers.items()
        ]
        try:
            predictions, certainties, *_, attention = self.model(self._images(mazes), track=True)
        finally:
            for hook in hooks:
                hook.remove()
        return Thoughts(
            predictions=predictions.unflatten(1, (-1, CLASSES)).cpu().numpy(),
            certainties=certainties.cpu().numpy(),
            attention=attention[:, :, :, 0].transpose(1, 0, 2, 3),
            dynamic_weights={
                name: dynamic_weights(layer, torch.stack(inputs[name], dim=1))
                for name, layer in layers.items()
            },
        )


def dynamic_weights(layer: HyperLoRALinear, inputs: Tensor) -> DynamicWeights:
    """What a hyper layer makes of its inputs (B, T, in): its dynamic weights, never written out.

    ``<U V^T, U' V'^T> = sum((U^T U') * (V^T V'))`` needs only rank x rank products.
    """
    context = F.silu(layer.context(inputs))
    gate = layer.to_gate(context).sigmoid()[..., 0]
    u = layer.to_u(context).unflatten(-1, (layer.out_features, layer.rank))
    v = layer.to_v(context).unflatten(-1, (layer.in_features, layer.rank))
    products = [torch.einsum("btir,bsiq->btsrq", x, x) for x in (u, v)]
    inner = (products[0] * products[1]).sum((3, 4)) * (gate[:, :, None] * gate[:, None, :])
    norms = inner.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    scale = (norms[:, :, None] * norms[:, None, :]).clamp_min(torch.finfo(inner.dtype).tiny)
    return DynamicWeights(
        gate=gate.cpu().numpy(),
        strength=(norms / layer.weight.norm()).cpu().numpy(),
        similarity=(inner / scale).clamp(-1, 1).cpu().numpy(),
    )
