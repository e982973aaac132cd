"""A whole model as a MONAI bundle: a folder that `python -m monai.bundle run` runs without this package."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anatomaly._version import __version__
from anatomaly.detector import monai_scripts
from anatomaly.detector.export import ExportedModel, export_model
from anatomaly.errors import OutputError
from anatomaly.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from anatomaly.detector.detector import Detector

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"
#: Versions that a bundle was run with; those that are installed here are named instead.
_RUN_WITH = {"monai": "1.6.1", "onnxruntime": "1.32.0", "pillow": "12.0.0", "pytorch-ignite": "0.5.5"}


def export_monai(detector: Detector, folder: Path, images: Sequence[NDArray[np.float32]]) -> ExportedModel:
    """Write a model with its support as a MONAI bundle.

    `models/model.onnx` is that of `export_model`, refused unless it agrees with the detector; around it stand
    `configs/metadata.json`, `configs/inference.json`, `scripts/`, `docs/README.md` and `LICENSE`.

    Args:
        detector: With its support.
        folder: Made here; one that is not empty is refused.
        images: As in `export_model`.

    Raises:
        OutputError: The folder is not empty, or a file cannot be written; and what `export_model` raises.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: is there and not an empty folder. Choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("configs", "models", "scripts", "docs"):
        (folder / name).mkdir(exist_ok=True)
    done = export_model(detector, folder / "models" / "model.onnx", images)
    for name, told in (("metadata", _metadata(detector, done)), ("inference", _INFERENCE)):
        write_whole(folder / "configs" / f"{name}.json", json.dumps(told, indent=2) + "\n")
    write_whole(folder / "scripts" / "__init__.py", Path(monai_scripts.__file__).read_bytes())
    write_whole(folder / "docs" / "README.md", _README.format(method=detector.facts.name))
    write_whole(folder / "LICENSE", _LICENSE.format(teachers=", ".join(t.name for t in detector.facts.teachers)))
    return done


def _metadata(detector: Detector, done: ExportedModel) -> dict[str, Any]:
    """What MONAI's schema asks for; no names of files, which may be those of patients."""
    height, width = detector.preprocessing.size
    plane = {"dtype": "float32", "is_patch_data": False, "modality": "n/a"}
    images = {
        **plane,
        "type": "image",
        "format": "magnitude",
        "num_channels": 3,
        "spatial_shape": [height, width],
        "value_range": [0, 1],
        "channel_def": {"0": "red or grey", "1": "green or grey", "2": "blue or grey"},
    }
    one: dict[str, Any] = {**plane, "format": "magnitude", "num_channels": 1, "value_range": []}
    score = {**one, "type": "probabilities", "spatial_shape": [], "channel_def": {"0": "image score, unbounded"}}
    found = {**one, "type": "image", "spatial_shape": [height, width], "channel_def": {"0": "anomaly map, unbounded"}}
    packages = {name: _version(name, checked) for name, checked in _RUN_WITH.items()}
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by anatomaly {__version__}"},
        "monai_version": packages.pop("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": packages,
        "name": f"anatomaly {detector.facts.name}",
        "task": "Anomaly detection in one kind of image, by comparison with normal images",
        "description": f"{detector.facts.name} with {detector.ready().shots} normal images inside: a map and a score.",
        "authors": "the user of anatomaly who exported it",
        "copyright": "see LICENSE",
        "intended_use": "Research only, not for clinical use.",
        "anatomaly": dict(done.facts),
        "network_data_format": {"inputs": {"image": images}, "outputs": {"map": found, "score": score}},
    }


def _version(package: str, otherwise: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return otherwise


_INFERENCE = {
    "imports": ["$import glob"],
    "bundle_root": ".",
    "dataset_dir": "images",
    "output_dir": "$@bundle_root + '/eval'",
    "device": "cpu",
    "datalist": "$[{'image': file} for file in sorted(glob.glob(@dataset_dir + '/*.png'))]",
    "network_def": {"_target_": "scripts.OnnxModel", "file": "$@bundle_root + '/models/model.onnx'"},
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {
                "_target_": "LoadImaged",
                "keys": "image",
                "reader": "PILReader",
                "reverse_indexing": False,
                "ensure_channel_first": True,
            },
            {"_target_": "scripts.Prepared", "facts": "$@bundle_root + '/models/model.onnx.json'"},
        ],
    },
    "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 8, "num_workers": 0},
    "inferer": {"_target_": "SimpleInferer"},
    "postprocessing": {"_target_": "Compose", "transforms": [{"_target_": "scripts.Saved", "folder": "@output_dir"}]},
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network_def",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
    },
    "run": ["$@evaluator.run()"],
}

_README = """# A model of anatomaly as a MONAI bundle

Method {method}, with its normal images inside. Research only, not for clinical use.

    pip install monai pytorch-ignite fire onnxruntime pillow
    python -m monai.bundle run --config_file configs/inference.json --dataset_dir FOLDER

Run it in this folder. FOLDER holds 8-bit grey or RGB PNG files of the kind the model was made for. `eval/scores.csv`
has their scores, `eval/*.npy` their maps at the network's size. Higher is more anomalous. The scores are those of
`anatomaly predict` within 0.001; p-values are not in a bundle.

There is no `models/model.pt`: the model is ONNX, and `scripts/` runs it in onnxruntime on the CPU.
The numbers in `models/model.onnx` are made of the normal images: treat it like a saved support bank.
"""

_LICENSE = """scripts/, configs/ and docs/: Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0,
copyright the anatomaly developers.

models/model.onnx holds weights of {teachers}, which stand under the licence of whoever published them,
and numbers made of the normal images that it was exported with.
"""
