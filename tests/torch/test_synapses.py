"""The synapses' U-Net by ops, as a GPU runs it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn  # noqa: E402

from ml_networks.torch import HyperSynapseUNET, SynapseUNET  # noqa: E402


@pytest.mark.parametrize("kind", [SynapseUNET, HyperSynapseUNET])
def test_the_ops_equal_the_layers(kind: type[SynapseUNET]) -> None:
    torch.manual_seed(0)
    synapses = kind(40, 4, in_dims=10)
    for parameter in synapses.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(5, 40, requires_grad=True)
    first = {id(parameter) for parameter in synapses.first_projection[0].parameters()}
    wanted = [x, *(p for p in synapses.parameters() if id(p) not in first)]
    assert synapses._is_by_ops()
    results = []
    for way in (synapses.from_first, synapses._by_ops):
        y = way(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    torch.testing.assert_close(*results)


def test_changed_children_run_as_layers() -> None:
    def hooked(synapses: SynapseUNET, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: None)

    def replaced(synapses: SynapseUNET, module: nn.Module) -> None:
        synapses.up_projections[0][3] = nn.ReLU()

    def other_eps(synapses: SynapseUNET, module: nn.Module) -> None:
        synapses.skip_lns[1].eps = 1e-3

    for change in (hooked, replaced, other_eps):
        synapses = SynapseUNET(16, 3, in_dims=10)
        change(synapses, synapses.down_projections[0][2])
        assert not synapses._is_by_ops()
    synapses = SynapseUNET(16, 3, in_dims=10)
    hooked(synapses, synapses.up_projections[1])
    assert not synapses._is_by_ops()
