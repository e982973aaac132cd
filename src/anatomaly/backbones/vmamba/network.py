"""VMamba-Tiny (arXiv 2401.10166): the visual state-space model, as far as two official ImageNet checkpoints need it.

| at H x W             | vanilla v0 (PDD's teacher)        | s1l8 (small state)                   |
|----------------------|-----------------------------------|--------------------------------------|
| patch embedding, / 4 | 4x4 conv stride 4, LN -> 96       | 3x3 conv stride 2, twice, LN -> 96   |
| layers: blocks       | 2, 2, 9, 2                        | 2, 2, 8, 2                           |
| widths               | 96, 192, 384, 768                 | the same                             |
| block                | x + SS2D(LN(x))                   | the same, then x + MLP(LN(x)), 4 x C |
| SS2D                 | inner width 2 C, 16 states, gated | inner width C, 1 state, no gate      |
| between layers, / 2  | 2x2 neighbours, LN, linear        | 3x3 conv stride 2, LN                |
| parameters, top-1    | 22.9 M, 82.2 %                    | 30.2 M, 82.6 %                       |

Tensors are channels last, (B, h, w, C), everywhere inside; names of modules are those of the official state dicts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from anatomaly.backbones.vmamba.cross_scan import cross_selective_scan
from anatomaly.backbones.vmamba.selective_scan import no_autocast
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from anatomaly.backbones.vmamba.selective_scan import Backend

WIDTHS = (96, 192, 384, 768)
#: Sides are filled up to a multiple of this.
STRIDE = 32


@dataclass(frozen=True, slots=True)
class Variant:
    """What the two checkpoints differ in; the table at the top in numbers.

    Attributes:
        depths: Blocks per layer.
        states: N, states per channel of the scan.
        expansion: Inner width of SS2D over the block's width.
        gated: SS2D multiplies by a gate and the block has no MLP; else the other way round.
    """

    depths: tuple[int, int, int, int]
    states: int
    expansion: int
    gated: bool


VARIANTS: Mapping[str, Variant] = {
    "vmamba_tiny": Variant((2, 2, 9, 2), states=16, expansion=2, gated=True),
    "vmamba_tiny_s1l8": Variant((2, 2, 8, 2), states=1, expansion=1, gated=False),
}


class ChannelsLast(nn.Module):
    """(B, C, h, w) -> (B, h, w, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.permute(0, 2, 3, 1)


class ChannelsFirst(nn.Module):
    """(B, h, w, C) -> (B, C, h, w), without a copy."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x.permute(0, 3, 1, 2)


class Neighbours(nn.Module):
    """(B, h, w, C) -> (B, h / 2, w / 2, 4 C): each 2x2 cell's four positions, down the columns first."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)


class SS2D(nn.Module):
    """The 2-D selective scan of VMamba between two linear maps.

    Args:
        width: C, channels of input and output.
        variant: Inner width, states and gate.

    Attributes:
        scan_backend: See `selective_scan`.
    """

    def __init__(self, width: int, variant: Variant) -> None:
        super().__init__()
        inner, rank, states = variant.expansion * width, -(-width // 16), variant.states
        self.rank = rank
        self.gated = variant.gated
        self.scan_backend: Backend = "auto"
        self.in_proj = nn.Linear(width, 2 * inner if variant.gated else inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=variant.gated)
        # The two checkpoints spell the same two projections differently.
        scale = rank**-0.5
        if variant.gated:
            self.x_proj_weight = nn.Parameter(torch.randn(4, rank + 2 * states, inner) * inner**-0.5)
            self.dt_projs_weight = nn.Parameter((torch.rand(4, inner, rank) * 2 - 1) * scale)
        else:
            self.x_proj = nn.Linear(inner, 4 * (rank + 2 * states), bias=False)
            self.dt_projs = nn.Linear(rank, 4 * inner, bias=False)
        # softplus(bias) is between 0.001 and 0.1, evenly in the logarithm; A starts at -1 .. -N (arXiv 2312.00752).
        step = torch.exp(torch.rand(4, inner) * 4.6 - 6.9)
        self.dt_projs_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(4 * inner, 1))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        gate = None
        if self.gated:
            # Two products instead of one that is cut in half: both halves come out contiguous.
            into_scan, into_gate = self.in_proj.weight.chunk(2)
            gate = F.silu(F.linear(x, into_gate))  # (B, h, w, D)
            x = F.linear(x, into_scan)
        else:
            x = self.in_proj(x)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))  # (B, h, w, D)
        inner = x.shape[-1]
        to_rank_and_states, to_step = (
            (self.x_proj_weight.flatten(0, 1), self.dt_projs_weight)
            if self.gated
            else (self.x_proj.weight, self.dt_projs.weight.view(4, inner, self.rank))
        )
        y = cross_selective_scan(
            x,
            F.linear(x, to_rank_and_states).reshape(*x.shape[:3], 4, -1),  # (B, h, w, 4, R + 2N)
            to_step,
            self.dt_projs_bias,
            -torch.exp(self.A_logs.float()).view(4, inner, -1),
            self.Ds.view(4, inner),
            backend=self.scan_backend,
        )
        y = self.out_norm(y)
        projected: Tensor = self.out_proj(y if gate is None else y * gate)
        return projected


class Mlp(nn.Module):
    """Linear to 4 C, GELU, linear back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        mixed: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return mixed


class Block(nn.Module):
    """x + SS2D(LN(x)); with an MLP behind it where the variant has one."""

    def __init__(self, width: int, variant: Variant) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.op = SS2D(width, variant)
        self.mlp = None
        if not variant.gated:
            self.norm2 = nn.LayerNorm(width)
            self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        x = x + self.op(self.norm(x))
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class Layer(nn.Module):
    """Blocks of one width and the step to the next one; behind the last layer there is none."""

    def __init__(self, width: int, depth: int, variant: Variant, *, last: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width, variant) for _ in range(depth)))
        self.downsample: nn.Module = nn.Identity()
        if not last and variant.gated:
            linear = nn.Linear(4 * width, 2 * width, bias=False)
            self.downsample = nn.Sequential(Neighbours(), nn.LayerNorm(4 * width), linear)
        elif not last:
            conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
            self.downsample = nn.Sequential(ChannelsFirst(), conv, ChannelsLast(), nn.LayerNorm(2 * width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, h, w, C) -> before and after the step: (B, h, w, C), (B, h / 2, w / 2, 2 C)."""
        before = self.blocks(x)
        return before, _in_float32(self.downsample, before)


class VMamba(nn.Module):
    """VMamba-Tiny as a feature pyramid; the classifier is there for `classify`.

    Args:
        variant: A name in `VARIANTS`.
        merged: Levels are the layers' outputs after the step to the next one (PDD): 192, 384, 768, 768 channels at
            strides 8, 16, 32, 32.  False takes them before it, as a detector would: 96, 192, 384, 768 at 4, 8, 16, 32.

    Attributes:
        channels: Of the levels, shallow to deep.
        strides: Input pixels per cell of the levels.

    Raises:
        ConfigError: The variant is unknown.
    """

    def __init__(self, variant: str = "vmamba_tiny", *, merged: bool = False) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ConfigError(f"VMamba: unknown variant {variant!r}, expected one of {', '.join(VARIANTS)}.")
        facts = VARIANTS[variant]
        self.merged = merged
        self.channels = (*WIDTHS[1:], WIDTHS[-1]) if merged else WIDTHS
        self.strides = (8, 16, 32, 32) if merged else (4, 8, 16, 32)
        width = WIDTHS[0]
        self.patch_embed = (
            nn.Sequential(nn.Conv2d(3, width, 4, stride=4), ChannelsLast(), nn.LayerNorm(width))
            if facts.gated
            else nn.Sequential(
                *(nn.Conv2d(3, width // 2, 3, stride=2, padding=1), ChannelsLast(), nn.LayerNorm(width // 2)),
                *(ChannelsFirst(), nn.GELU()),
                *(nn.Conv2d(width // 2, width, 3, stride=2, padding=1), ChannelsLast(), nn.LayerNorm(width)),
            )
        )
        self.layers = nn.ModuleList(
            Layer(width, depth, facts, last=width == WIDTHS[-1])
            for width, depth in zip(WIDTHS, facts.depths, strict=True)
        )
        self.classifier = nn.ModuleDict({"norm": nn.LayerNorm(WIDTHS[-1]), "head": nn.Linear(WIDTHS[-1], 1000)})

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the pyramid.

        Args:
            images: (B, 3, H, W), scaled with ImageNet's mean and std.  Sides that are no multiples of 32 are filled up
                with zeros at the right and the bottom, and the levels are cut back.

        Returns:
            Four (B, C_l, ceil(H / stride_l), ceil(W / stride_l)) tensors, shallow to deep, channels-last in memory.
        """
        height, width = images.shape[-2:]
        levels = []
        for (before, after), stride in zip(self._run(images), self.strides, strict=True):
            level = after if self.merged else before
            levels.append(level[:, : -(-height // stride), : -(-width // stride)].permute(0, 3, 1, 2))
        return levels

    def classify(self, images: Tensor) -> Tensor:
        """ImageNet logits, (B, 1000), of images as in `forward`."""
        last = self._run(images)[-1][0]
        logits: Tensor = self.classifier["head"](self.classifier["norm"](last).mean(dim=(1, 2)))
        return logits

    def use_scan(self, backend: Backend) -> VMamba:
        """Choose the scan's backend in all blocks; see `selective_scan`."""
        for module in self.modules():
            if isinstance(module, SS2D):
                module.scan_backend = backend
        return self

    def _run(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(before, after) of every layer, channels last, on the filled-up image."""
        height, width = images.shape[-2:]
        if height % STRIDE or width % STRIDE:
            images = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE))
        x = _in_float32(self.patch_embed, images)  # (B, H / 4, W / 4, 96)
        outputs = []
        for layer in self.layers:
            before, x = layer(x)
            outputs.append((before, x))
        return outputs


def _in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """Run a module that all later blocks add to, in float32 even under autocast: halves the error of bf16 features."""
    with no_autocast(x):
        return module(x.to(torch.promote_types(x.dtype, torch.float32)))  # type: ignore[no-any-return]


#: Names in the first official checkpoints and what they became.
_OLD_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"\.downsample\.norm\.", ".downsample.1."),
    (r"\.downsample\.reduction\.", ".downsample.2."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
)


def official_state(state: Mapping[str, Tensor], model: VMamba) -> dict[str, Tensor]:
    """Bring an official checkpoint to the names and shapes of `VMamba`; values are not changed.

    Args:
        state: Either spelling of the names; 1x1 convolutions may stand for linear maps.
        model: Gives the shapes.
    """
    wanted = model.state_dict()
    renamed: dict[str, Any] = {}
    for key, tensor in state.items():
        for old, new in _OLD_NAMES:
            key = re.sub(old, new, key)
        fits = key in wanted and tensor.ndim > wanted[key].ndim and tensor.numel() == wanted[key].numel()
        squeezed = [size for size in tensor.shape if size != 1]
        if fits and squeezed == [size for size in wanted[key].shape if size != 1]:
            tensor = tensor.reshape(wanted[key].shape)
        renamed[key] = tensor
    return renamed
