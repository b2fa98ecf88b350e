#!/usr/bin/env bash
# An environment with the published ml-networks 0.2.6, torch and JAX sides, to measure against.
#   benchmarks/make_peers.sh DIRECTORY
# Everything but its own dependencies has the versions of constraints.txt. A plain
# `pip install ml-networks==0.2.6` would let torchvision replace torch by a CUDA build.
set -euo pipefail
directory=${1:?usage: make_peers.sh DIRECTORY}
constraints=$(cd "$(dirname "$0")/.." && pwd)/constraints.txt

"${PYTHON:-python3}" -m venv "$directory"
install() { "$directory/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
install "$(grep '^torch==' "$constraints")"
install --no-deps ml-networks==0.2.6
install -c "$constraints" einops kornia natsort omegaconf hydra-core pytorch-lightning \
    pytorch-optimizer schedulefree blosc2 rich pillow jax flax optax distrax safetensors
install --no-deps torchvision==0.28.0 torchgeometry

# torchvision's wheel is linked against CUDA. Beside a CPU build of torch its operators do not load,
# and its import then fails on declaring what they return; so the two it names are declared first.
"$directory/bin/python" - <<'PYTHON'
import pathlib
import sysconfig

path = pathlib.Path(sysconfig.get_paths()["purelib"], "torchvision", "_meta_registrations.py")
text = path.read_text(encoding="utf-8")
before = '@torch.library.register_fake("torchvision::nms")'
declared = "\n".join(
    [
        "if not torchvision.extension._has_ops():",
        '    _fragment = torch.library.Library("torchvision", "FRAGMENT")',
        *(
            f'    _fragment.define("{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")'
            for name in ("nms", "qnms")
        ),
    ]
)
if "_fragment" not in text:
    assert before in text, f"{path} is not the one of torchvision 0.28.0"
    path.write_text(text.replace(before, f"{declared}\n\n\n{before}", 1), encoding="utf-8")
PYTHON
"$directory/bin/python" -W ignore -c 'import ml_networks.torch, ml_networks.jax; print("0.2.6 is ready")'
