"""VMamba for users of timm: importing this module registers the models.

    import anatomaly.timm_models, timm
    timm.create_model("anatomaly_vmamba_tiny", features_only=True, pretrained=True)

Input is scaled with ImageNet's mean and std, as for every timm model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from timm.models import FeatureInfo, register_model
from torch import nn

from anatomaly.backbones import BACKBONES, build_backbone
from anatomaly.backbones.vmamba.network import VMamba
from anatomaly.backbones.vmamba.teacher import VMambaSpec
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class VMambaFeatures(nn.Module):
    """The chosen levels of a VMamba with timm's `feature_info` beside them.

    Args:
        body: The model.
        out_indices: Levels to return, 0 shallow to 3 deep; negative ones count from the deepest.
    """

    def __init__(self, body: VMamba, out_indices: Sequence[int]) -> None:
        super().__init__()
        self.body = body
        levels = [
            {"num_chs": channels, "reduction": stride, "module": f"body.layers.{level}"}
            for level, (channels, stride) in enumerate(zip(body.channels, body.strides, strict=True))
        ]
        self.out_indices = tuple(index % len(levels) for index in out_indices)
        self.feature_info = FeatureInfo(levels, self.out_indices)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one (B, C, h, w) per chosen level."""
        levels = self.body(images)
        return [levels[index] for index in self.out_indices]


def _features(name: str, pretrained: bool, arguments: dict[str, Any]) -> VMambaFeatures:
    if not arguments.pop("features_only", False):
        raise ConfigError(f"anatomaly_{name}: is a feature pyramid. Pass features_only=True.")
    out_indices = arguments.pop("out_indices", (0, 1, 2, 3))
    foreign = set(arguments) - {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
    if foreign:
        raise ConfigError(f"anatomaly_{name}: unknown arguments {', '.join(sorted(foreign))}, expected out_indices.")
    spec = BACKBONES[name]
    assert isinstance(spec, VMambaSpec)
    body = build_backbone(name).body.requires_grad_(True) if pretrained else VMamba(spec.variant)
    return VMambaFeatures(body, out_indices)


@register_model
def anatomaly_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMambaFeatures:
    """VMamba-Tiny, vanilla v0: 96, 192, 384 and 768 channels at strides 4, 8, 16 and 32."""
    return _features("vmamba_tiny", pretrained, kwargs)


@register_model
def anatomaly_vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMambaFeatures:
    """VMamba-Tiny s1l8: the same channels and strides."""
    return _features("vmamba_tiny_s1l8", pretrained, kwargs)
