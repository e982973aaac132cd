"""Scores of 8-bit PNG files from a model.onnx of `anatomaly export`: numpy, onnxruntime and Pillow are all it needs.

Usage: python docs/run_onnx.py model.onnx scan.png ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def prepare(file: str, told: dict) -> np.ndarray:
    """A PNG -> (3, H, W) float32 in [0, 1], as the JSON beside the model says."""
    picture = Image.open(file)
    if picture.mode not in ("L", "RGB"):
        sys.exit(f"{file}: is {picture.mode}, expected 8-bit grey or RGB")
    pixels = np.asarray(picture, np.float32).reshape(picture.height, picture.width, -1)
    rule = told["intensity"]
    low, high = {
        "auto": (0, 255),
        "range": (rule["low"], rule["high"]),
        "window": (rule["low"] - rule["high"] / 2, rule["low"] + rule["high"] / 2),
    }[rule["rule"]]
    pixels = np.clip((pixels - np.float32(low)) / np.float32(high - low), 0, 1)
    height, width = h, w = told["size"]
    if told["resize"] == "pad":
        scale = min(height / picture.height, width / picture.width)
        h, w = (min(side, max(1, round(n * scale))) for side, n in ((height, picture.height), (width, picture.width)))
    top, left = (height - h) // 2, (width - w) // 2
    fitted = np.zeros((3, height, width), np.float32)
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels, -1, 0)]
    resized = [plane.resize((w, h), Image.Resampling[told["interpolation"].upper()]) for plane in planes]
    fitted[:, top : top + h, left : left + w] = np.clip(resized, 0, 1)
    return fitted


model, *files = sys.argv[1:]
facts = json.loads(Path(f"{model}.json").read_text())
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
for file in files:
    maps, scores = session.run(["map", "score"], {"images": prepare(file, facts["preprocessing"])[None]})
    print(f"{scores[0]:.6g}\t{file}")
