"""Finds what is not normal in medical images after seeing only normal ones.

``Detector.load("model").set_support(normal_files).predict(files)`` yields one `Prediction` per image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anatomaly._version import __version__

if TYPE_CHECKING:
    from anatomaly.config import FitConfig as FitConfig
    from anatomaly.data.manifest import load_manifest as load_manifest
    from anatomaly.detector.calibrate import calibrate as calibrate
    from anatomaly.detector.detector import Detector as Detector
    from anatomaly.evaluation.evaluate import evaluate as evaluate
    from anatomaly.presets import load_preset as load_preset
    from anatomaly.training.fit import fit as fit
    from anatomaly.types import Prediction as Prediction

#: Public names and where they live; resolved on first use, so that `import anatomaly` stays free of torch.
_PUBLIC = {
    "Detector": "anatomaly.detector.detector",
    "FitConfig": "anatomaly.config",
    "Prediction": "anatomaly.types",
    "calibrate": "anatomaly.detector.calibrate",
    "evaluate": "anatomaly.evaluation.evaluate",
    "fit": "anatomaly.training.fit",
    "load_manifest": "anatomaly.data.manifest",
    "load_preset": "anatomaly.presets",
}
__all__ = [
    "Detector",
    "FitConfig",
    "Prediction",
    "__version__",
    "calibrate",
    "evaluate",
    "fit",
    "load_manifest",
    "load_preset",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'anatomaly' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
