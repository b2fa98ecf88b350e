"""Write golden checkpoints: what the published ml-networks 0.2.6 computes, case by case.

Run it with a Python in which that version is installed (and torch and safetensors)::

    python tests/golden/make.py                 # every recipe
    python tests/golden/make.py layers vision   # some of them

**Recipes.** ``tests/golden/recipes/<recipe>.py`` holds ``CASES: dict[str, Build]``. A
``build(ml)`` gets a namespace with the names of ``ml_networks``, ``ml_networks.torch`` and its
submodules, either 0.2.6's or this repository's, and returns

``(module, inputs, keywords)`` or ``(module, inputs, keywords, call)``

where ``module`` is an ``nn.Module`` or a function, ``inputs`` a tuple of tensors and
``call(module, *inputs, **keywords)`` what is run, by default ``module(*inputs, **keywords)``. Only
constructor calls that are valid in both may be used, without dropout or sampling, and sizes
should be tiny. Outputs may be tensors, or tuples, dicts and dataclasses of them. Values that
0.2.6 computes wrongly are left out, and the recipe says so.

**Files.** Each case becomes ``tests/golden/data/<recipe>.<case>.safetensors``:

``state/*``
    the state dict, float32; parameters are moved off their initial values, so that a norm is not
    the identity;
``input/*``, ``cotangent/*``
    inputs and the cotangents of the outputs;
``output/*``, ``grad/parameter/*``, ``grad/input/*``
    one forward and backward pass in training mode, computed in float64 and rounded to float32;
``after/*``
    the buffers that this pass changed (running statistics);
``eval/*``
    outputs in evaluation mode after it;
``error/float32/*``, ``error/bfloat16/*``
    one number for each tensor above: the largest deviation from it when 0.2.6 runs in that
    type. A type in which 0.2.6 cannot run is missing. These are the measure for this
    library's own deviations (:func:`tolerances`).

The metadata has the names of the parameters in 0.2.6's order, by which optimizers save their
state.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent
DATA = FOLDER / "data"
PUBLISHED = "0.2.6"

Build = Callable[[Any], tuple[Any, ...]]


class Library:
    """Every public name of the installed ml_networks' torch side, as attributes."""

    _MODULES = ("torch", "", "config")
    _SUBMODULES = (
        "torch.layers",
        "torch.activations",
        "torch.unet",
        "torch.hypernetworks",
        "torch.distributions",
    )

    def __getattr__(self, name: str) -> Any:
        for module in (*self._MODULES, *self._SUBMODULES):
            home = importlib.import_module(f"ml_networks.{module}".rstrip("."))
            if hasattr(home, name):
                return getattr(home, name)
        raise AttributeError(name)


def recipes() -> dict[str, dict[str, Build]]:
    """Return ``{recipe: CASES}`` for every file in ``recipes/``."""
    found = {}
    for path in sorted((FOLDER / "recipes").glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"golden_recipe_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = module.CASES
    return found


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield ``(dotted name, tensor)`` for each tensor in nested tuples, dicts, dataclasses."""
    if isinstance(value, Tensor):
        yield name or "0", value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from flatten(entry, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from flatten(entry, f"{name}.{i}".lstrip("."))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from flatten(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().clone().to(dtype) if value.is_floating_point() else value


def run(
    built: tuple[Any, ...], cotangents: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Run a built case forward and backward in ``dtype``; return its tensors, detached.

    Parameters
    ----------
    built
        What the recipe's ``build`` returned. Its module is not changed.
    cotangents
        Cotangents of the floating outputs by name. Missing ones are drawn and added.
    dtype
        Type of parameters, inputs and cotangents.
    """
    module, inputs, keywords, *rest = built
    call = rest[0] if rest else lambda function, *args, **kw: function(*args, **kw)
    is_module = isinstance(module, nn.Module)
    if is_module:
        module = copy.deepcopy(module).to(dtype).train()
    before = {k: v.clone() for k, v in module.named_buffers()} if is_module else {}
    inputs = [
        _cast(x, dtype).requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
        for x in inputs
    ]
    outputs = dict(flatten(call(module, *inputs, **keywords)))
    differentiable = {k: v for k, v in outputs.items() if v.requires_grad}
    for name, output in differentiable.items():
        if name not in cotangents:
            cotangents[name] = torch.randn(output.shape)
    if differentiable:
        torch.autograd.backward(
            list(differentiable.values()),
            [cotangents[name].to(v.dtype) for name, v in differentiable.items()],
        )
    result = {f"output/{k}": v.detach() for k, v in outputs.items()}
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and x.grad is not None:
            result[f"grad/input/{i}"] = x.grad
    if is_module:
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                result[f"grad/parameter/{name}"] = parameter.grad
        for name, buffer in module.named_buffers():
            if not torch.equal(buffer, before[name]):
                result[f"after/{name}"] = buffer
        with torch.no_grad():
            module.eval()
            for name, output in flatten(call(module, *inputs, **keywords)):
                result[f"eval/{name}"] = output.detach()
    return result


def deviation(value: Tensor, reference: Tensor) -> Tensor:
    """Return the largest absolute difference from ``reference``, computed in float64."""
    if not reference.numel():
        return torch.zeros((), dtype=torch.float32)
    return (value.double() - reference.double()).abs().max().float()


def tolerances(
    reference: dict[str, Tensor], tensors: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """Return how far each result in ``dtype`` may be from ``reference``.

    Twice as far as 0.2.6 itself is, plus four units in the last place of the largest entry among
    all outputs, all gradients or all buffers: rounding errors pass from one to the other (the
    gradient of a bias before a batch norm is nothing but the rounding of larger numbers), and a
    tensor in which 0.2.6 happens to be exact leaves no room for another order of summation.
    Tensors for which 0.2.6 has no error in this type have no tolerance.
    """
    label = str(dtype).removeprefix("torch.")
    scale: dict[str, float] = {}
    for key, value in reference.items():
        kind = key.partition("/")[0]
        largest = float(value.double().abs().max()) if value.numel() else 0.0
        scale[kind] = max(scale.get(kind, 0.0), largest)
    allowed = {}
    for key in reference:
        error = tensors.get(f"error/{label}/{key}")
        if error is not None:
            rounding = 4 * torch.finfo(dtype).eps * scale[key.partition("/")[0]]
            allowed[key] = 2 * float(error) + rounding
    return allowed


def make(recipe: str, name: str, build: Build, library: Library) -> Path:
    """Build one case, run it and write its file."""
    torch.manual_seed(zlib.crc32(f"{recipe}.{name}".encode()))
    built = build(library)
    module, inputs = built[0], built[1]
    state = {}
    if isinstance(module, nn.Module):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        state = {k: v.clone() for k, v in module.state_dict().items()}
    cotangents: dict[str, Tensor] = {}
    reference = {
        k: _cast(v, torch.float32) for k, v in run(built, cotangents, torch.float64).items()
    }
    tensors = {f"state/{k}": v for k, v in state.items()}
    tensors |= {f"input/{i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    tensors |= {f"cotangent/{k}": v for k, v in cotangents.items()}
    tensors |= reference
    for dtype in (torch.float32, torch.bfloat16):
        label = str(dtype).removeprefix("torch.")
        try:
            values = run(built, cotangents, dtype)
        except (RuntimeError, TypeError, ValueError) as error:
            print(f"  {recipe}.{name}: 0.2.6 does not run in {label}: {str(error)[:80]!r}")
            continue
        for key, value in values.items():
            tensors[f"error/{label}/{key}"] = deviation(value, reference[key])
    path = DATA / f"{recipe}.{name}.safetensors"
    order = [n for n, _ in module.named_parameters()] if isinstance(module, nn.Module) else []
    metadata = {
        "ml-networks": PUBLISHED,
        "torch": torch.__version__,
        "parameters": json.dumps(order),
    }
    contiguous = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    save_file(contiguous, str(path), metadata)
    return path


def main(wanted: list[str]) -> None:
    installed = importlib.metadata.version("ml-networks")
    if installed != PUBLISHED:
        raise SystemExit(
            f"golden files come from ml-networks {PUBLISHED}; this Python has {installed}"
        )
    DATA.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    found = recipes()
    for recipe in wanted or found:
        if recipe not in found:
            raise SystemExit(f"no recipe {recipe!r}; there are {', '.join(found)}")
        for name, build in found[recipe].items():
            path = make(recipe, name, build, Library())
            print(f"{path.name}: {path.stat().st_size / 1e3:.1f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
