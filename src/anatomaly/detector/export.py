"""A whole model as an ONNX file, from the network's input to map and score, compared with `Detector` first.

What torch cannot trace of a method stands in the method, under `torch.compiler.is_compiling()`.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from anatomaly._version import __version__
from anatomaly.backbones.export import check_fits, check_packages, check_standard, fix_positions, trace
from anatomaly.backbones.vmamba._scan_onnx import OPSET
from anatomaly.errors import ConfigError, OutputError, ShapeError
from anatomaly.files import write_whole
from anatomaly.scoring import anomaly_map, geometric_mean, image_score, level_scores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from onnx import ModelProto
    from torch import Tensor

    from anatomaly.detector.detector import Detector
    from anatomaly.types import Method, Scoring

#: Largest difference allowed: of a score as a share of it, and of a map as a share of the highest value of all maps.
SCORE_TOLERANCE = MAP_TOLERANCE = 1e-3
#: What scores and maps count at least: one of nearly 0 is rounding.  Two scores nearer than `_ROUNDING` have no order.
_LEAST, _ROUNDING = 1e-2, 1e-5
_OUTPUTS = ("map", "score")


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """What `export_model` wrote.

    Attributes:
        file: The ONNX file.
        facts: What the JSON file beside it says.
        images: Number of images it was compared on.
        score_difference: Largest difference of a score between onnxruntime and the detector, as a share of the score.
        map_difference: Largest difference of a pixel, as a share of the highest value of all maps.
        openvino_difference: As `score_difference`, of OpenVINO; NaN where it cannot run the file, None where it is not
            installed.
    """

    file: Path
    facts: Mapping[str, Any]
    images: int
    score_difference: float
    map_difference: float
    openvino_difference: float | None = None


class _Chain(nn.Module):
    """(B, 3, H, W) images in [0, 1] -> maps (B, H, W) and scores (B,), of functions that torch can trace.

    Args:
        method: On the CPU, in eval mode.
        scoring: Blur and pooling.
        support: What `method.embed_support` returned; not used where `forward` is given support images.
        size: (H, W).
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, method: Method, scoring: Scoring, support: Mapping[str, Tensor], size: tuple[int, int]) -> None:
        super().__init__()
        self.method, self.scoring, self.size = method, scoring, size
        self.teachers = nn.ModuleList(method.teachers.values())  # they are no submodules of the method
        self.names = tuple(support)
        for i, name in enumerate(self.names):
            self.register_buffer(f"support_{i}", support[name].float().contiguous())
        if scoring.blur:
            for axis, side in zip(("rows", "columns"), size, strict=True):
                self.register_buffer(axis, blur_matrix(side, scoring.blur))

    def forward(self, images: Tensor, support_images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps (B, H, W) and scores (B,), as `scoring.predict_tensor` has them."""
        support = {name: getattr(self, f"support_{i}") for i, name in enumerate(self.names)}
        if support_images is not None:
            support = self.method.embed_support(self.method.extract_support(support_images))
        comparisons = self.method.compare(self.method.encode(self.method.extract(images)), support)
        maps = anomaly_map(comparisons, self.size)
        if self.scoring.blur:
            maps = self.rows @ maps @ self.columns.T
        if self.scoring.levels == "sum":
            return maps, image_score(maps, self.scoring)
        return maps, geometric_mean(level_scores(comparisons, self.scoring), [each.scale for each in comparisons])


def blur_matrix(side: int, sigma: float) -> Tensor:
    """What `scoring.blur` does along one axis, as a (side, side) matrix: borders mirrored, the tails cut off alike."""
    from scipy.ndimage import gaussian_filter1d

    return torch.from_numpy(gaussian_filter1d(np.eye(side), sigma, axis=0)).float()


def export_model(
    detector: Detector,
    file: Path,
    images: Sequence[NDArray[np.float32]],
    *,
    support: Sequence[NDArray[np.float32]] | None = None,
) -> ExportedModel:
    """Write a model with its support as ONNX, and beside it, as `<file>.json`, how images are prepared for it.

    "images" (B, 3, H, W) float32 in [0, 1] -> "map" (B, H, W) and "score" (B,), B free.  The support is part of the
    file, or another input, "support" (K, 3, H, W).

    Args:
        detector: With its support, on any device, in fp32.
        file: Replaced if it exists; appears whole or not at all.
        images: What onnxruntime and the detector are compared on, each (3, H, W) in [0, 1], at least one.
        support: The prepared images of the detector's own support, to have the support as an input.

    Raises:
        NotReadyError: A package or the support is missing, or torch cannot export this model.
        ConfigError: There is no image to compare on, the weights are too large for one file, or the detector or its
            bank is of bf16.
        ShapeError: An image is not of the model's size.
        OutputError: The two disagree, or a file cannot be written; nothing is left behind.
    """
    check_packages()
    bank, size = detector.ready(), detector.preprocessing.size
    if not images:
        raise ConfigError("export: got no images, expected at least 1 to compare on. Give --images.")
    if wrong := next((each.shape for each in images if each.shape != (3, *size)), None):
        raise ShapeError(f"export: got an image of {wrong}, expected {(3, *size)}. Prepare it as the model does.")
    if "bf16" in (detector.precision, bank.precision):
        raise ConfigError("export: got a model or bank of bf16, expected fp32. Encode the supports in fp32.")
    expected = _judged(detector, images)  # first: a method may know its numbers from a comparison
    method = copy.deepcopy(detector.method).to("cpu")  # the scan's form is changed, and the caller's may be in use
    tensors = {name: tensor.cpu() for name, tensor in bank.tensors.items()}
    chain = _Chain(method, detector.scoring, {} if support is not None else tensors, size).cpu().eval()
    check_fits(chain.state_dict().values(), detector.facts.name)
    for teacher in method.teachers.values():
        fix_positions(teacher, size)
    inputs: tuple[Tensor, ...] = (torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)),)
    given: dict[str, NDArray[np.float32]] = {}
    if support is not None:
        given = {"support": np.stack(support)}
        inputs = (*inputs, torch.from_numpy(given["support"]))
    free = ({0: torch.export.Dim("batch", min=1)}, *({} for _ in given))
    names = (("images", *given), _OUTPUTS)
    with torch.no_grad():
        model = trace(chain, inputs, list(method.teachers.values()), names=names, free=free)
    check_standard(model, detector.facts.name)
    facts = _facts(detector, given)
    found = _run(_described(model, facts), images, given)
    score, pixel = check_agreement(file, found, expected)
    facts["compared"] = {"images": len(images), "score_difference": score, "map_difference": pixel}
    content = _described(model, facts)
    openvino = _compare_openvino(content, images, given, expected[1])
    write_whole(file, content)
    write_whole(file.with_name(f"{file.name}.json"), json.dumps(facts, indent=2) + "\n")
    return ExportedModel(file, facts, len(images), score, pixel, openvino)


def _facts(detector: Detector, given: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    """What a user of the file must know; no names of files, which may be those of patients."""
    bank, (h, w) = detector.ready(), detector.preprocessing.size
    return {
        "format": 1,
        "anatomaly": __version__,
        "method": detector.facts.name,
        "model_hash": detector.model_hash,
        "opset": OPSET,
        "inputs": {"images": ["B", 3, h, w], **{name: list(each.shape) for name, each in given.items()}},
        "outputs": {"map": ["B", h, w], "score": ["B"]},
        "preprocessing": asdict(bank.preprocessing),
        "scoring": asdict(detector.scoring),
        "support": {"task": bank.task, "shots": bank.shots, "digest": bank.digest, "inside": not given},
        "map_range": list(bank.map_range),
        "note": "Research only, not for clinical use.",
    }


def _described(model: ModelProto, facts: Mapping[str, Any]) -> bytes:
    """The checked graph with the facts a reader needs, as the content of a file."""
    import onnx

    model.producer_name, model.producer_version = "anatomaly", __version__
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    onnx.helper.set_model_props(model, text)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


#: Images at a time, in the comparison.
_PART = 8


def _judged(detector: Detector, images: Sequence[NDArray[np.float32]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Maps (N, H, W) and scores (N,) of the detector."""
    parts = [images[start : start + _PART] for start in range(0, len(images), _PART)]
    scored = [detector.compare(detector.encode(part), detector.ready()) for part in parts]
    maps, scores = (torch.cat([getattr(each, name) for each in scored]).cpu().numpy() for name in ("maps", "scores"))
    return maps, scores


def _run(
    content: bytes, images: Sequence[NDArray[np.float32]], given: Mapping[str, NDArray[np.float32]]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Maps (N, H, W) and scores (N,) of onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    parts = [np.stack(images[start : start + _PART]) for start in range(0, len(images), _PART)]
    found = [session.run(list(_OUTPUTS), {"images": part, **given}) for part in parts]
    maps, scores = (np.concatenate(each) for each in zip(*found, strict=True))
    return maps, scores


def _compare_openvino(
    content: bytes,
    images: Sequence[NDArray[np.float32]],
    given: Mapping[str, NDArray[np.float32]],
    expected: NDArray[Any],
) -> float | None:
    """`ExportedModel.openvino_difference`, in fp32 on the CPU."""
    try:
        import openvino
    except ImportError:
        return None
    try:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(content, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        parts = [np.stack(images[start : start + _PART]) for start in range(0, len(images), _PART)]
        scores = np.concatenate([compiled({"images": part, **given})["score"] for part in parts])
    except RuntimeError:  # an operator that it lacks
        return math.nan
    return _largest(np.abs(scores - expected), np.abs(expected))


def check_agreement(
    file: Path, found: tuple[NDArray[Any], NDArray[Any]], expected: tuple[NDArray[Any], NDArray[Any]]
) -> tuple[float, float]:
    """Compare maps (N, H, W) and scores (N,) with those of the detector.

    Returns:
        The largest difference of a score, as a share of it, and of a map, as a share of the highest value of all.

    Raises:
        OutputError: A score differs by more than 0.001 of itself, a pixel by more than 0.001 of the highest one, or
            the images come in another order; differences up to 1e-5 are allowed anywhere.
    """
    (maps, scores), (true_maps, true_scores) = found, expected
    score = _largest(np.abs(scores - true_scores), np.abs(true_scores))
    pixel = _largest(np.abs(maps - true_maps), np.abs(true_maps).max())
    order = np.argsort(true_scores, kind="stable")
    swapped = int((np.diff(scores[order]) < -_ROUNDING).sum())
    if not (score <= SCORE_TOLERANCE and pixel <= MAP_TOLERANCE and not swapped):  # NaN is refused too
        raise OutputError(
            f"{file}: not written: onnxruntime differs from the model by {score:.1e} of a score, {pixel:.1e} of the "
            f"highest map value and {swapped} ranks, expected at most {SCORE_TOLERANCE:.0e}, {MAP_TOLERANCE:.0e} and "
            "0. Try other versions of torch and onnxruntime."
        )
    return score, pixel


def _largest(differences: NDArray[Any], whole: Any) -> float:
    """Of differences as shares of a whole, which counts as 0.01 at least; NaN if one is."""
    return float((differences / np.maximum(whole, _LEAST)).max())
