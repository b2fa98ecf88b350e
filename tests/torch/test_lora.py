from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ml_networks.torch import HyperLoRALinear, LoRALinear

Layer = LoRALinear | HyperLoRALinear


def lora() -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(7, 5, rank=3, alpha=6.0)
    nn.init.normal_(layer.lora_B)
    return layer


def hyper() -> HyperLoRALinear:
    torch.manual_seed(0)
    layer = HyperLoRALinear(7, 5, rank=3, context_dim=4)
    nn.init.normal_(layer.to_u.weight)
    nn.init.normal_(layer.to_u.bias)
    return layer


def merge(layer: Layer, input: Tensor) -> None:
    layer.merge() if isinstance(layer, LoRALinear) else layer.merge(input)


each = pytest.mark.parametrize("make", [lora, hyper])


def test_lora_is_a_linear_layer_with_a_merged_weight() -> None:
    layer, x = lora(), torch.randn(2, 4, 7)
    weight = layer.weight + 2.0 * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))


def test_hyper_lora_makes_a_weight_for_every_input() -> None:
    layer, x = hyper(), torch.randn(6, 7)
    expected = []
    for row in x:
        c = nn.functional.silu(layer.context(row))
        u, v = layer.to_u(c).view(5, 3), layer.to_v(c).view(7, 3)
        weight = layer.weight + torch.sigmoid(layer.to_gate(c)) * u @ v.T
        expected.append(weight @ row + layer.bias)
    torch.testing.assert_close(layer(x), torch.stack(expected))
    torch.testing.assert_close(layer(x.view(2, 3, 7)), layer(x).view(2, 3, 5))


def test_both_start_as_the_linear_layer() -> None:
    x = torch.randn(4, 7)
    for layer in (LoRALinear(7, 5), HyperLoRALinear(7, 5)):
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected)


def test_only_the_adapter_of_lora_learns() -> None:
    layer = lora()
    layer(torch.randn(4, 7)).sum().backward()
    learns = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert learns == {"lora_A", "lora_B"}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == learns


def test_lora_adapts_an_existing_layer_in_its_memory_and_dtype() -> None:
    linear = nn.Linear(7, 5, dtype=torch.bfloat16)
    layer = LoRALinear.from_linear(linear, rank=2)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    assert torch.equal(layer(x), linear(x))
    assert LoRALinear.from_linear(nn.Linear(7, 5, bias=False)).bias is None


@each
def test_merging_keeps_the_result_and_unmerging_restores_every_bit(
    make: Callable[[], Layer],
) -> None:
    layer, x = make(), torch.randn(7)
    before, weight = layer(x), layer.weight.detach().clone()
    merge(layer, x)
    assert layer.merged
    assert not torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer(x), before)
    with pytest.raises(RuntimeError, match="merged already"):
        merge(layer, x)
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)
    layer.unmerge()


@each
def test_a_checkpoint_is_the_same_merged_or_not(make: Callable[[], Layer]) -> None:
    layer, x = make(), torch.randn(7)
    expected = layer.state_dict()
    expected = {name: value.clone() for name, value in expected.items()}
    merge(layer, x)
    twin = copy.deepcopy(layer)
    found = layer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    layer.load_state_dict(expected)
    assert not layer.merged
    assert twin.merged
    twin.unmerge()
    assert torch.equal(twin.weight, layer.weight)


def test_keys() -> None:
    assert set(LoRALinear(7, 5, 3).state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    shapes = {
        name: tuple(value.shape) for name, value in HyperLoRALinear(7, 5, 3).state_dict().items()
    }
    assert shapes == {
        "weight": (5, 7),
        "bias": (5,),
        "context.weight": (8, 7),
        "context.bias": (8,),
        "to_gate.weight": (1, 8),
        "to_gate.bias": (1,),
        "to_u.weight": (15, 8),
        "to_u.bias": (15,),
        "to_v.weight": (21, 8),
        "to_v.bias": (21,),
    }


def test_bad_arguments_are_named() -> None:
    for make in (LoRALinear, HyperLoRALinear):
        with pytest.raises(ValueError, match="rank is 0"):
            make(7, 5, 0)
    with pytest.raises(ValueError, match="context_dim is 0"):
        HyperLoRALinear(7, 5, 2, 0)
    with pytest.raises(ValueError, match=r"input has shape \(2, 7\)"):
        hyper().merge(torch.randn(2, 7))
    assert "rank=3, alpha=6" in repr(lora())
    assert "rank=3" in repr(hyper())
