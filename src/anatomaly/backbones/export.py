"""A frozen teacher as an ONNX file of standard operators, compared with its own forward before it is written."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from anatomaly._version import __version__
from anatomaly.backbones.teacher import LEVELS, misfit
from anatomaly.backbones.vmamba._scan_onnx import OPSET, expand_scans
from anatomaly.backbones.vmamba.network import VMamba
from anatomaly.errors import ConfigError, NotReadyError, OutputError, ShapeError
from anatomaly.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from onnx import GraphProto, ModelProto, NodeProto
    from torch import Tensor, nn

    from anatomaly.backbones.teacher import Teacher

#: Batches of the comparison; more than one size, because the batch axis of the file is free.
_BATCHES = (1, 3)
_NAMES = tuple(f"level_{level}" for level in range(1, LEVELS + 1))
#: One file holds the weights, and protobuf ends at 2 GiB; the rest is room for the graph.
_MOST_BYTES = 2**31 - 2**26


@dataclass(frozen=True, slots=True)
class ExportedTeacher:
    """What `export_teacher` wrote.

    Attributes:
        file: The ONNX file.
        size: (H, W) of its input.
        opset: Version of the standard operators it needs.
        parity: Largest relative L2 difference of a level between onnxruntime and the teacher's own forward.
        nodes: Number of operators, those inside Scan included.
    """

    file: Path
    size: tuple[int, int]
    opset: int
    parity: float
    nodes: int


def export_teacher(
    teacher: Teacher, file: Path, *, size: tuple[int, int] = (256, 256), tolerance: float = 1e-4
) -> ExportedTeacher:
    """Write a teacher as ONNX: "images" (B, 3, H, W) float32 in [0, 1] -> "level_1" .. "level_4", shallow to deep.

    The teacher's normalisation is part of the graph, B is free, and every operator is a standard one; VMamba's scan
    becomes the operator Scan.  The teacher itself is not touched.

    Args:
        teacher: From `build_backbone`; on any device.
        file: Replaced if it exists; appears whole or not at all.
        size: (H, W) that the teacher takes.
        tolerance: Largest relative L2 difference allowed, per level, between onnxruntime and the teacher on a CPU.

    Raises:
        NotReadyError: A package is missing, or torch cannot export this network.
        ShapeError: The size does not fit the teacher.
        ConfigError: The weights are too large for one file.
        OutputError: The two disagree, or the file cannot be written; nothing is left behind.
    """
    check_packages()
    if expected := misfit([teacher], size):
        raise ShapeError(f"export: {teacher.name}: got size {size[0]}x{size[1]}, expected {expected}. Change the size.")
    check_fits(teacher.state_dict().values(), teacher.name)
    own = copy.deepcopy(teacher).cpu()  # the scan's form is changed below, and the caller's may be in use
    cases = _cases(own, size)
    fix_positions(own, size)
    model = _trace(own, size)
    check_standard(model, teacher.name)
    _describe(model, teacher, size)
    content = model.SerializeToString()
    parity = _parity(content, cases)
    if not parity <= tolerance:  # NaN is refused too
        raise OutputError(
            f"{file}: not written: onnxruntime differs from {teacher.name} by {parity:.1e} (relative L2 of a level), "
            f"expected at most {tolerance:.0e}. Try other versions of torch and onnxruntime."
        )
    write_whole(file, content)
    return ExportedTeacher(file, size, OPSET, parity, sum(1 for _ in _nodes(model.graph)))


def check_packages() -> None:
    """Raise a `NotReadyError` where a package that exports need is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as err:
        raise NotReadyError(f"export: {err.name} is not installed. pip install anatomaly[export]") from err


def check_fits(tensors: Iterable[Tensor], called: str) -> None:
    """Raise a `ConfigError` where tensors are too large for one file."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if weights > _MOST_BYTES:
        raise ConfigError(f"export: {called} has {weights / 2**30:.1f} GiB of weights, one ONNX file holds 2.")


def fix_positions(teacher: Teacher, size: tuple[int, int]) -> None:
    """Resample a vision transformer's positions now: ONNX cannot where one side grows and the other one shrinks."""
    model = getattr(teacher.body, "model", None)
    if getattr(model, "dynamic_img_size", False) and getattr(model, "pos_embed", None) is not None:
        teacher.body.model.set_input_size(img_size=size)


def _trace(teacher: Teacher, size: tuple[int, int]) -> ModelProto:
    """The teacher's forward as ONNX."""
    batch = ({0: torch.export.Dim("batch", min=1)},)
    return trace(teacher, (torch.zeros(2, 3, *size),), [teacher], names=(("images",), _NAMES), free=batch)


def trace(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    teachers: Sequence[Teacher],
    *,
    names: tuple[Sequence[str], Sequence[str]],
    free: tuple[Any, ...],
) -> ModelProto:
    """A module that runs teachers as ONNX of standard operators; leaves their scans as they were.

    Args:
        module: On the CPU, in eval mode.
        inputs: Examples of its inputs.
        teachers: Those that it runs; the first names it in messages.
        names: Of the inputs and of the outputs.
        free: The axes that are not fixed, as `torch.export.export` takes them.

    Raises:
        NotReadyError: torch cannot export it.
    """
    from onnxscript import optimizer

    scans = [teacher.body for teacher in teachers if isinstance(teacher.body, VMamba)]
    called = teachers[0].name if module is teachers[0] else f"this model on {teachers[0].name}"
    try:
        for body in scans:
            body.use_scan("onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations
            program = torch.onnx.export(
                module,
                inputs,
                input_names=list(names[0]),
                output_names=list(names[1]),
                dynamic_shapes=free,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                optimize=False,  # minutes for VMamba; the two steps below do what matters
            )
    except torch.onnx.OnnxExporterError as err:
        reason = " ".join(str(err.__cause__ or err).split())[:200]
        raise NotReadyError(f"export: torch {torch.__version__} cannot export {called}: {reason}") from err
    finally:
        for body in scans:
            body.use_scan("auto")
    assert program is not None  # None is for its old form, dynamo=False
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    return expand_scans(program.model_proto)


def check_standard(model: ModelProto, called: str) -> None:
    """Raise a `NotReadyError` where a graph has operators that are not of the ONNX standard."""
    if foreign := sorted({node.domain for node in _nodes(model.graph)} - {"", "ai.onnx"}):
        raise NotReadyError(f"export: {called} needs operators of {', '.join(foreign)}, expected standard ones.")


def _describe(model: ModelProto, teacher: Teacher, size: tuple[int, int]) -> None:
    """Check the graph and add the facts a reader of the file needs."""
    import onnx

    model.producer_name, model.producer_version = "anatomaly", __version__
    facts = {
        "teacher": teacher.name,
        "weights_hash": teacher.weights_hash,
        "anatomaly": __version__,
        "size": f"{size[0]}x{size[1]}",
        "opset": str(OPSET),
        "input": "float32 RGB in [0, 1]" + (", normalised inside" if teacher.normalise else ""),
        "note": "Research only, not for clinical use.",
    }
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model)


@torch.no_grad()
def _cases(teacher: Teacher, size: tuple[int, int]) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Batches of random images, and what the teacher makes of them."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(batch, 3, *size, generator=generator) for batch in _BATCHES]
    return [(images, teacher(images)) for images in batches]


def _parity(content: bytes, cases: Sequence[tuple[Tensor, tuple[Tensor, ...]]]) -> float:
    """Largest relative L2 difference of a level between onnxruntime and the teacher."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    differences = []
    for images, levels in cases:
        for got, expected in zip(session.run(list(_NAMES), {"images": images.numpy()}), levels, strict=True):
            difference = torch.linalg.vector_norm(torch.from_numpy(got) - expected)
            differences.append(difference / torch.linalg.vector_norm(expected))
    return float(torch.stack(differences).max())  # NaN if one is


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """All operators, those in the bodies of others included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
