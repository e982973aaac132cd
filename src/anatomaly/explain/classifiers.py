"""What a frozen teacher's own classifier looks at: class-activation maps of its deepest features.

A teacher is a feature pyramid; the class head that its weights were trained with is found again here.  Nothing of the
teacher is changed, and no gradient flows through it: the maps need the gradient of the head alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from anatomaly.backbones.teacher import small_size
from anatomaly.backbones.timm_features import create, names_in_whole
from anatomaly.backbones.vmamba.network import VMamba
from anatomaly.backbones.weights import WeightsSource, find_weights, read_state, tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher
    from anatomaly.backbones.timm_features import TimmSpec
    from anatomaly.backbones.vmamba.teacher import VMambaSpec


class ClassActivation(NamedTuple):
    """Where a teacher looks in a batch of images.

    Attributes:
        maps: (B, h, w), float32, >= 0, on the grid of the deepest features; each image has its own unit.
        classes: B indices of the most probable class, or None where there is no class head.
        probabilities: B of them, or None.
    """

    maps: Tensor
    classes: list[int] | None = None
    probabilities: list[float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Classifier:
    """A frozen teacher and, where it can be had, its class head.

    Attributes:
        teacher: The teacher.
        activate: (B, 3, H, W) images in [0, 1] -> the head's input, (B, C, h, w).
        head: (B, C, h, w) -> logits (B, classes); None where there is none, `why` says the reason.
        why: One line, empty with a head.
    """

    teacher: Teacher
    activate: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None
    why: str = ""

    @property
    def kind(self) -> str:
        """Which maps it makes: "grad-cam" with a head, "eigen-cam" without."""
        return "eigen-cam" if self.head is None else "grad-cam"

    def look(self, images: Tensor) -> ClassActivation:
        """Class-activation maps of (B, 3, H, W) images in [0, 1]; H and W multiples of the teacher's last stride."""
        with torch.no_grad():
            activation = self.activate(images).float()
        return ClassActivation(eigen_cam(activation)) if self.head is None else grad_cam(activation, self.head)


def classifier_of(teacher: Teacher, spec: TimmSpec | VMambaSpec) -> Classifier:
    """Find the class head of a teacher's weights.

    Args:
        teacher: From `build_backbone`, on the device where it shall run.
        spec: Its row of `BACKBONES`.

    Raises:
        WeightsError: The weights file of the teacher is gone or has changed.
    """

    def deepest(images: Tensor) -> Tensor:
        levels: tuple[Tensor, ...] = teacher(images)
        return levels[-1]

    body = teacher.body
    if isinstance(body, VMamba):

        def classify(activation: Tensor) -> Tensor:
            cells = body.classifier["norm"](activation.permute(0, 2, 3, 1))  # (B, h, w, C)
            logits: Tensor = body.classifier["head"](cells.mean(dim=(1, 2)))
            return logits

        return Classifier(teacher, deepest, classify)
    if teacher.blocks is not None:
        return Classifier(teacher, deepest, None, "its head does not read a grid of features")
    full, why = _whole_model(teacher, spec)
    if full is None:
        return Classifier(teacher, deepest, None, why)

    def activate(images: Tensor) -> Tensor:
        scaled = (images - teacher.mean) / teacher.std if teacher.normalise else images
        activation: Tensor = full.forward_features(scaled)
        return activation

    def head(activation: Tensor) -> Tensor:
        logits: Tensor = full.forward_head(activation)
        return logits

    with torch.no_grad():
        probe = full.forward_features(torch.zeros(1, 3, *small_size([teacher]), device=teacher.mean.device))
    if not (isinstance(probe, torch.Tensor) and probe.ndim == 4 and probe.shape[1] == full.num_features):
        return Classifier(teacher, deepest, None, "its head does not read a grid of features")
    return Classifier(teacher, activate, head)


def _whole_model(teacher: Teacher, spec: Any) -> tuple[Any, str]:
    """The timm model with its head and the teacher's own weights, or None and the reason."""
    pretrained = spec.source is None and teacher.weights == "auto"
    with torch.random.fork_rng(devices=[]):
        full = create(spec.model, pretrained=pretrained)
    if not full.num_classes:
        return None, "this model has no class head"
    body, own = teacher.body.state_dict(), full.state_dict()
    places = names_in_whole(body, own)
    if len(places) < len(body):
        return None, "its feature pyramid is another network than its classifier"
    state = {places[key]: tensor for key, tensor in body.items()}
    if not pretrained and teacher.weights != "random":
        head = {key: tensor.shape for key, tensor in own.items() if key not in state}
        stored = _stored(teacher, spec, full)
        if any(key not in stored or stored[key].shape != shape for key, shape in head.items()):
            return None, "its weights file holds no class head that fits"
        state |= {key: stored[key] for key in head}
    full.load_state_dict(state, strict=False)
    return full.requires_grad_(False).eval().to(teacher.mean.device), ""


def _stored(teacher: Teacher, spec: TimmSpec, full: Any) -> dict[str, Tensor]:
    """All tensors of the file a teacher's weights came from, under the names of the whole model."""
    explicit = None if teacher.weights == "auto" else Path(teacher.weights)
    file = find_weights(teacher.name, spec.source or WeightsSource("", ""), explicit=explicit)
    state = tensors_of(read_state(file), where=str(file))
    if spec.by_order and not set(teacher.body.state_dict()) <= set(state):
        state = dict(zip(full.state_dict(), state.values(), strict=True))  # the teacher compared number and shapes
    return state


def grad_cam(activation: Tensor, head: Callable[[Tensor], Tensor]) -> ClassActivation:
    """Grad-CAM (arXiv 1610.02391) of the most probable class: relu(sum over c of mean(d logit / d A_c) A_c).

    Args:
        activation: The head's input, (B, C, h, w), without a graph.
        head: (B, C, h, w) -> (B, classes); images must not see their neighbours.

    Example:
        >>> activation = torch.tensor([[[[2.0, 0.0]], [[0.0, 4.0]]]])  # channel 0 on the left, channel 1 on the right
        >>> grad_cam(activation, lambda a: a.mean(dim=(2, 3))).maps  # channel 1 is the top class; its weight is 1 / 2
        tensor([[[0., 2.]]])
    """
    with torch.enable_grad():
        leaf = activation.detach().requires_grad_()
        logits = head(leaf).float()
        top = logits.argmax(dim=1)
        (gradient,) = torch.autograd.grad(logits.gather(1, top[:, None]).sum(), leaf)
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    maps = (weights * activation).sum(dim=1).relu()
    probabilities = logits.detach().softmax(dim=1).gather(1, top[:, None])[:, 0]
    return ClassActivation(maps, top.tolist(), probabilities.tolist())


def eigen_cam(activation: Tensor) -> Tensor:
    """Eigen-CAM (arXiv 2008.00299): the activation projected on its first principal direction, not centred.

    Args:
        activation: (B, C, h, w).

    Returns:
        (B, h, w), float32; the sign is the one that follows the activation's energy (the sum of its squares over C),
        and what is negative then is 0.

    Example:
        >>> where, what = torch.tensor([[1.0, 2.0], [0.5, 4.0]]), torch.tensor([0.6, -0.8])
        >>> eigen_cam((what[:, None, None] * where)[None]).round(decimals=4)
        tensor([[[1.0000, 2.0000],
                 [0.5000, 4.0000]]])
    """
    cells = activation.float().flatten(2).transpose(1, 2)  # (B, h*w, C)
    _, _, directions = torch.linalg.svd(cells, full_matrices=False)
    projected = (cells @ directions[:, :1].transpose(1, 2))[..., 0]  # (B, h*w)
    energy = cells.square().sum(dim=2)
    follows = ((energy - energy.mean(dim=1, keepdim=True)) * projected).sum(dim=1, keepdim=True)
    # Where the energy is the same everywhere there is nothing to follow: the larger side then counts as positive.
    sign = torch.where(follows.abs() > 1e-6 * energy.sum(dim=1, keepdim=True), follows, projected.sum(1, keepdim=True))
    maps: Tensor = (projected * torch.where(sign < 0, -1.0, 1.0)).relu()
    return maps.reshape(len(maps), *activation.shape[2:])
