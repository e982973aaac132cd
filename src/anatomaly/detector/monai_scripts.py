"""What configs/inference.json of a MONAI bundle names: needs monai, onnxruntime, numpy and Pillow, not anatomaly.

`anatomaly export --format monai` copies this file into the bundle as scripts/__init__.py.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image


class Prepared:
    """Image of a dictionary, (C, H0, W0) as stored -> (3, H, W) float32 in [0, 1], as told beside the model."""

    def __init__(self, facts: str) -> None:
        self.told = json.loads(Path(facts).read_text())["preprocessing"]

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Replace "image", and keep the name of its file as "file"."""
        picture = data["image"]
        pixels = np.asarray(picture, np.float32)[: 3 if len(picture) >= 3 else 1]  # without alpha
        low, high = self._limits()
        pixels = np.clip((pixels - np.float32(low)) / np.float32(high - low), 0, 1)
        height, width = h, w = self.told["size"]
        if self.told["resize"] == "pad":
            tall, wide = pixels.shape[1:]
            scale = min(height / tall, width / wide)
            h, w = (min(side, max(1, round(n * scale))) for side, n in ((height, tall), (width, wide)))
        top, left = (height - h) // 2, (width - w) // 2
        fitted = np.zeros((3, height, width), np.float32)
        how = Image.Resampling[self.told["interpolation"].upper()]
        planes = [np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((w, h), how)) for plane in pixels]
        fitted[:, top : top + h, left : left + w] = np.clip(planes, 0, 1)
        return {**data, "image": torch.from_numpy(fitted), "file": str(picture.meta["filename_or_obj"])}

    def _limits(self) -> tuple[float, float]:
        """The stored values that become 0 and 1."""
        rule = self.told["intensity"]
        if rule["rule"] == "window":
            return rule["low"] - rule["high"] / 2, rule["low"] + rule["high"] / 2
        return (0, 255) if rule["rule"] == "auto" else (rule["low"], rule["high"])


class OnnxModel(torch.nn.Module):
    """The whole model: (B, 3, H, W) in [0, 1] -> {"map": (B, H, W), "score": (B,)}."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run it on the CPU, wherever the images are."""
        found = self.session.run(["map", "score"], {"images": images.cpu().numpy()})
        return {name: torch.from_numpy(each) for name, each in zip(("map", "score"), found, strict=True)}


class Saved:
    """What is found of an image goes to scores.csv, and its map to NAME.npy, (H, W) float32."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = 0

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Write and pass on."""
        with (self.folder / "scores.csv").open("a" if self.rows else "w", newline="") as file:
            rows = [] if self.rows else [("path", "score")]
            csv.writer(file).writerows([*rows, (data["file"], f"{float(data['pred']['score']):.9g}")])
        np.save(self.folder / f"{self.rows:05d}_{Path(data['file']).stem}.npy", np.asarray(data["pred"]["map"]))
        self.rows += 1
        return data
