"""Finds what is not normal in medical images after seeing only normal ones.

``Detector.default().set_support(normal_files).predict(files)`` yields one `Prediction` per image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anatomaly._version import __version__

if TYPE_CHECKING:
    from anatomaly.backbones import build_backbone as build_backbone
    from anatomaly.backbones.teacher import Teacher as Teacher
    from anatomaly.config import FitConfig as FitConfig
    from anatomaly.config import MethodConfig as MethodConfig
    from anatomaly.data.manifest import Manifest as Manifest
    from anatomaly.data.manifest import load_manifest as load_manifest
    from anatomaly.data.readers import read_image as read_image
    from anatomaly.detector.calibrate import calibrate as calibrate
    from anatomaly.detector.calibrate import calibrate_on_support as calibrate_on_support
    from anatomaly.detector.detector import Detector as Detector
    from anatomaly.detector.official import import_checkpoint as import_checkpoint
    from anatomaly.evaluation.evaluate import evaluate as evaluate
    from anatomaly.methods import build_method as build_method
    from anatomaly.methods.table import METHODS as METHODS
    from anatomaly.methods.table import MethodRecord as MethodRecord
    from anatomaly.presets import load_preset as load_preset
    from anatomaly.results.folder import predict_to_folder as predict_to_folder
    from anatomaly.training.fit import fit as fit
    from anatomaly.types import Calibration as Calibration
    from anatomaly.types import Comparison as Comparison
    from anatomaly.types import Image as Image
    from anatomaly.types import Method as Method
    from anatomaly.types import Prediction as Prediction
    from anatomaly.types import Sample as Sample
    from anatomaly.types import SupportBank as SupportBank

#: Public names and where they live; resolved on first use, so that `import anatomaly` stays free of torch.
_PUBLIC = {
    "Calibration": "anatomaly.types",
    "Comparison": "anatomaly.types",
    "Detector": "anatomaly.detector.detector",
    "FitConfig": "anatomaly.config",
    "Image": "anatomaly.types",
    "METHODS": "anatomaly.methods.table",
    "Manifest": "anatomaly.data.manifest",
    "Method": "anatomaly.types",
    "MethodConfig": "anatomaly.config",
    "MethodRecord": "anatomaly.methods.table",
    "Prediction": "anatomaly.types",
    "Sample": "anatomaly.types",
    "SupportBank": "anatomaly.types",
    "Teacher": "anatomaly.backbones.teacher",
    "build_backbone": "anatomaly.backbones",
    "build_method": "anatomaly.methods",
    "calibrate": "anatomaly.detector.calibrate",
    "calibrate_on_support": "anatomaly.detector.calibrate",
    "evaluate": "anatomaly.evaluation.evaluate",
    "fit": "anatomaly.training.fit",
    "import_checkpoint": "anatomaly.detector.official",
    "load_manifest": "anatomaly.data.manifest",
    "load_preset": "anatomaly.presets",
    "predict_to_folder": "anatomaly.results.folder",
    "read_image": "anatomaly.data.readers",
}
__all__ = [
    "METHODS",
    "Calibration",
    "Comparison",
    "Detector",
    "FitConfig",
    "Image",
    "Manifest",
    "Method",
    "MethodConfig",
    "MethodRecord",
    "Prediction",
    "Sample",
    "SupportBank",
    "Teacher",
    "__version__",
    "build_backbone",
    "build_method",
    "calibrate",
    "calibrate_on_support",
    "evaluate",
    "fit",
    "import_checkpoint",
    "load_manifest",
    "load_preset",
    "predict_to_folder",
    "read_image",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'anatomaly' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
