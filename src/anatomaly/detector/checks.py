"""Whether a model runs and a bank fits it, tried once when they are loaded instead of in the middle of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from anatomaly.backbones.teacher import misfit, small_size
from anatomaly.errors import NotReadyError, ShapeError, WeightsError
from anatomaly.scoring import compare_tensor, embed_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from anatomaly.types import Method, Preprocessing, Scoring, SupportBank


def check_model(method: Method, preprocessing: Preprocessing, scoring: Scoring, where: str) -> None:
    """Judge one small made-up image.

    Args:
        method: In eval mode.
        preprocessing: Its size has to suit the teachers.
        scoring: From maps to scores.
        where: The bundle, for messages.

    Raises:
        NotReadyError: The teachers take no images of this size.
        WeightsError: What comes out is not finite: some weights are too large.
    """
    teachers = list(method.teachers.values())
    if expected := misfit(teachers, preprocessing.size):
        height, width = preprocessing.size
        raise NotReadyError(
            f"{where}: is damaged (preprocessing.size: got {height} x {width}, expected {expected}.) "
            "Copy the whole bundle again."
        )
    size = small_size(teachers)
    try:
        support, encoded = embed_tensor(method, _image(method, size))
        scored = compare_tensor(method, encoded, support, size=size, scoring=scoring)
    except ShapeError as err:
        raise NotReadyError(f"{where}: its teachers and its method do not fit ({err})") from err
    if not bool(torch.isfinite(scored.maps).all()):
        raise WeightsError(
            f"{where}: gives maps that are not finite numbers; its weights are damaged. Copy the whole bundle again."
        )


def check_bank(bank: SupportBank, method: Method) -> None:
    """Hold a bank's tensors to those the method makes of an image of its size.

    Raises:
        NotReadyError: A tensor is missing, unknown, of another shape or type, or holds a number that is not finite.
    """
    expected, _ = embed_tensor(method, _image(method, bank.preprocessing.size))
    where = f"support bank {bank.task!r}"
    advice = "Encode the supports again with this model."
    if bank.tensors.keys() != expected.keys():
        got, made = (", ".join(sorted(names)) or "nothing" for names in (bank.tensors, expected))
        raise NotReadyError(f"{where}: holds {got[:200]!r}, expected {made}. {advice}")
    for name, tensor in bank.tensors.items():
        wanted = (bank.shots, *expected[name].shape[1:])
        if tuple(tensor.shape) != wanted:
            raise NotReadyError(f"{where}: {name} is {tuple(tensor.shape)}, expected {wanted}. {advice}")
        if tensor.dtype not in _kinds(expected[name], bank.precision):
            raise NotReadyError(f"{where}: {name} is of type {tensor.dtype}, expected {expected[name].dtype}. {advice}")
        if not bool(torch.isfinite(tensor).all()):
            raise NotReadyError(f"{where}: {name} holds numbers that are not finite. {advice}")


def _kinds(expected: Tensor, precision: str | None) -> set[torch.dtype]:
    """Types that a tensor may have; which ones bf16 makes differs between a CPU and a GPU."""
    halves = expected.is_floating_point() and precision != "fp32"
    return {expected.dtype, *([torch.bfloat16, torch.float32] if halves else [])}


def _image(method: Method, size: tuple[int, int]) -> Tensor:
    """One image of a slope, (1, 3, H, W) in [0, 1], on the method's device."""
    device = next(iter(method.teachers.values())).mean.device
    return torch.linspace(0, 1, 3 * size[0] * size[1], device=device).view(1, 3, *size)
