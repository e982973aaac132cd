"""Peers: well-known methods of others, judged by our rules on the same images, splits and frozen teacher.

PatchCore, PaDiM and RD4AD are anomalib's own torch models (extra `peers`); what they see (our images, our teacher's
levels) and what becomes of their raw scores is ours.  `knn` is our own floor of two lines.  A peer answers
`evaluation.evaluate.evaluate` as a `Detector` does; to make a bank is, for a peer, to fit.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from anatomaly.benchmark.anomalib_bridge import (
    Given,
    Shapes,
    import_anomalib,
    judge,
    level_names,
    require_anomalib,
    run,
    seeded,
)
from anatomaly.data.loading import load_batches
from anatomaly.data.readers import read_image
from anatomaly.data.transforms import resolve_intensity
from anatomaly.errors import ConfigError, ReadError
from anatomaly.scoring import Scored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher
    from anatomaly.types import Intensity, Preprocessing, Sample

    #: The teacher's four levels of a batch, each (B, C, h, w), shallow to deep.
    Levels: TypeAlias = Sequence[Tensor]
    #: Something fitted: levels and the size (H, W) of the input -> maps (B, H, W) and scores (B,), both raw.
    Fitted: TypeAlias = Callable[[Levels, tuple[int, int]], tuple[Tensor, Tensor]]

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
#: Images per forward pass while fitting; changes no result.
_BATCH = 16
#: Up to so many normal images PatchCore keeps every patch, as is usual in few-shot comparisons.
_FEW = 16
#: What PaDiM's inverse covariances may take; fitting takes three times that.
_MOST_BYTES = 4 * 2**30
#: What anomalib has a decoder for: ResNets of basic blocks and of bottlenecks, whose levels are four times as wide.
_BASIC = ("resnet18", "resnet34")
_DEEP = ("resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d")
RESNETS = (*_BASIC, *_DEEP, "wide_resnet50_2", "wide_resnet101_2")


@dataclass(frozen=True)
class PatchCore:
    """PatchCore (arXiv 2106.08265): distance of each patch to the nearest remembered one; levels 2 and 3.

    Attributes:
        coreset: Share of the patches that greedy k-centre selection keeps, in (0, 1]; up to 16 images keep all.
        neighbours: Remembered patches that weight the image score; 1 takes the largest patch distance as it is.
    """

    coreset: float = 0.1
    neighbours: int = 9
    needs_support = True
    from_anomalib = True

    def check(self, teacher: Teacher, size: tuple[int, int]) -> None:
        """Refuse options out of range."""
        if not 0.0 < self.coreset <= 1.0 or self.neighbours < 1:
            raise ConfigError(
                f"patchcore: got coreset {self.coreset:g} and {self.neighbours} neighbours, expected a share in (0, 1] "
                "and 1 or more."
            )

    def fit(self, batches: Iterable[Levels], *, teacher: Teacher, size: tuple[int, int], seed: int) -> Fitted:
        """Remember the patches of the normal images, or a coreset of them."""
        build = import_anomalib("models.image.patchcore.torch_model").PatchcoreModel
        with seeded(seed, _CPU):
            shapes = Shapes(teacher.channels[1:3])
            model = build(layers=level_names(2), backbone=shapes, pre_trained=False, num_neighbors=self.neighbours)
        model.feature_extractor = Given(2)
        model.train()
        images = 0
        for levels in batches:
            run(model, levels[1:3], size)
            images += len(levels[1])
        patches = torch.vstack(model.embedding_store)  # (patches, C)
        model.embedding_store.clear()
        if images <= _FEW or self.coreset == 1.0:
            model.memory_bank = patches
        elif int(len(patches) * self.coreset) < 1:
            raise ConfigError(f"patchcore: coreset {self.coreset:g} leaves none of {len(patches)} patches. Raise it.")
        else:
            with seeded(seed, patches.device):
                model.memory_bank = _coreset(patches, self.coreset)
        return partial(judge, model.to(patches.device).eval(), slice(1, 3))


def _coreset(patches: Tensor, share: float) -> Tensor:
    """What `PatchcoreModel.subsample_embedding` keeps, which breaks up the heap: gigabytes for 50 images."""
    greedy = import_anomalib("models.components").KCenterGreedy(patches, share)
    greedy.features = greedy.model.fit(patches).transform(patches)
    chosen = [int(torch.randint(len(patches), (1,), device=patches.device))]
    while len(chosen) < greedy.coreset_size:
        greedy.update_distances(chosen[-1])
        chosen.append(int(greedy.get_new_idx()))  # a kept tensor each would lie between the large ones
    return patches[chosen]


@dataclass(frozen=True)
class PaDiM:
    """PaDiM (arXiv 2011.08785): a Gaussian of the features at each position of level 1; levels 1 to 3.

    Attributes:
        features: Channels kept, chosen at random; None takes the paper's 550 for wide_resnet50_2 and 100 for others,
            or all there are if these are fewer.
    """

    features: int | None = None
    needs_support = True
    from_anomalib = True

    def check(self, teacher: Teacher, size: tuple[int, int]) -> None:
        """Refuse more features than the teacher has, and more memory than is sensible."""
        total, count = sum(teacher.channels[:3]), self.count(teacher)
        if not 0 < count <= total:
            raise ConfigError(
                f"padim: got {count} features, levels 1 to 3 of {teacher.name} have {total}, expected 1 to {total}. "
                "Change features."
            )
        h, w = (side // teacher.strides[0] for side in size)
        if (taken := 4 * h * w * count**2) > _MOST_BYTES:
            raise ConfigError(
                f"padim: covariances of {count} features at each of {h}x{w} positions take {taken / 2**30:.1f} GiB, "
                f"expected at most {_MOST_BYTES // 2**30}. Lower features or the input size."
            )

    def count(self, teacher: Teacher) -> int:
        """Number of channels kept."""
        if self.features is not None:
            return self.features
        return min(550 if architecture(teacher.name) == "wide_resnet50_2" else 100, sum(teacher.channels[:3]))

    def fit(self, batches: Iterable[Levels], *, teacher: Teacher, size: tuple[int, int], seed: int) -> Fitted:
        """Estimate mean and covariance (plus 0.01 on the diagonal) at each position; one image has none."""
        build = import_anomalib("models.image.padim.torch_model").PadimModel
        with seeded(seed, _CPU):  # it chooses the channels
            shapes = Shapes(teacher.channels[:3])
            model = build(layers=level_names(3), backbone=shapes, pre_trained=False, n_features=self.count(teacher))
        model.feature_extractor = Given(3)
        model.train()
        for levels in batches:
            run(model, levels[:3], size)
        if (images := sum(map(len, model.memory_bank))) < 2:
            raise ConfigError(f"padim: got {images} normal image, expected at least 2 for a covariance. Give more.")
        model.to(model.memory_bank[0].device).fit()
        return partial(judge, model.eval(), slice(3))


@dataclass(frozen=True)
class ReverseDistillation:
    """RD4AD (arXiv 2201.10703): a decoder trained to give back levels 1 to 3 of normal images.

    Attributes:
        epochs: Passes over the normal images (paper: 200).
        max_steps: End of the training, whatever is left of `epochs`.
        batch_size: Images per step (paper: 16).
        learning_rate: Of Adam with betas 0.5 and 0.99 (paper: 0.005).
    """

    epochs: int = 200
    max_steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 0.005
    needs_support = True
    from_anomalib = True

    def check(self, teacher: Teacher, size: tuple[int, int]) -> None:
        """Refuse options out of range, what anomalib has no decoder for, and inputs too small for it."""
        if min(self.epochs, self.max_steps, self.batch_size) < 1 or not self.learning_rate > 0:
            raise ConfigError(
                f"rd4ad: got epochs {self.epochs}, max_steps {self.max_steps}, batch_size {self.batch_size} and "
                f"learning_rate {self.learning_rate:g}, expected 1 or more, and more than 0."
            )
        name = architecture(teacher.name)
        width = 64 if name in _BASIC else 256
        if name not in RESNETS or teacher.channels[:3] != (width, 2 * width, 4 * width):
            raise ConfigError(
                f"rd4ad: anomalib has no decoder for {teacher.name}, expected one of {', '.join(RESNETS)} (or timm/ "
                "and the name). Reverse distillation with this teacher is method pdd with pdd.two_students, "
                "pdd.shared_students and pdd.mpa false and global_teacher.name none."
            )
        if min(size) < 64:  # the bottleneck would have one cell, of which a batch of one has no statistics
            raise ConfigError(f"rd4ad: the input is {size[0]}x{size[1]}, expected at least 64x64. Change its size.")

    def fit(self, batches: Iterable[Levels], *, teacher: Teacher, size: tuple[int, int], seed: int) -> Fitted:
        """Train bottleneck and decoder; the last step is kept, no image is used to choose another."""
        images = [torch.cat(level) for level in zip(*(levels[:3] for levels in batches), strict=True)]
        count, device = len(images[0]), images[0].device
        folder = "models.image.reverse_distillation"
        loss_of = import_anomalib(f"{folder}.loss").ReverseDistillationLoss()
        with seeded(seed, device), torch.enable_grad():
            model = import_anomalib(f"{folder}.torch_model").ReverseDistillationModel(
                backbone=architecture(teacher.name),
                input_size=size,
                layers=level_names(3),
                anomaly_map_mode=import_anomalib(f"{folder}.anomaly_map").AnomalyMapGenerationMode.ADD,
                pre_trained=False,
            )
            model.encoder = Given(3)
            model.to(device).train()
            parameters = [*model.decoder.parameters(), *model.bottleneck.parameters()]
            optimiser = torch.optim.Adam(parameters, lr=self.learning_rate, betas=(0.5, 0.99))
            steps = min(self.max_steps, self.epochs * -(-count // self.batch_size))
            ends = list(range(self.batch_size, count, self.batch_size))
            batches_of_rows = (rows for _ in range(self.epochs) for rows in torch.randperm(count).tensor_split(ends))
            for step, rows in zip(range(1, steps + 1), batches_of_rows, strict=False):
                loss = loss_of(*run(model, [level[rows.to(device)] for level in images], size))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                if step % max(1, steps // 10) == 0 or step in (1, steps):
                    logger.info("rd4ad: step %d of %d, loss %.4f", step, steps, loss.item())
        return partial(judge, model.requires_grad_(False).eval(), slice(3))


@dataclass(frozen=True)
class MeanNeighbours:
    """The floor: cosine distance of an image's mean feature (level 3) to that of the most similar normal image.

    It knows nothing about places.  Its map asks the same of every cell of the level by itself and is a by-product.
    """

    needs_support = True
    from_anomalib = False

    def check(self, teacher: Teacher, size: tuple[int, int]) -> None:
        """Every teacher and every size will do."""

    def fit(self, batches: Iterable[Levels], *, teacher: Teacher, size: tuple[int, int], seed: int) -> Fitted:
        """Keep the K mean features, of unit length."""
        return partial(_mean_distance, torch.cat([F.normalize(levels[2].mean(dim=(2, 3))) for levels in batches]))


def _mean_distance(means: Tensor, levels: Levels, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """1 - the highest cosine with (K, C) means, in [0, 2]: of each cell, and of the whole image."""
    scores = 1 - (F.normalize(levels[2].mean(dim=(2, 3))) @ means.T).amax(dim=1)
    cells = 1 - torch.einsum("bchw,kc->bkhw", F.normalize(levels[2]), means).amax(dim=1, keepdim=True)
    return F.interpolate(cells, size, mode="bilinear", align_corners=True)[:, 0], scores


def architecture(name: str) -> str:
    """A teacher's architecture: timm/resnet18.a1_in1k -> resnet18."""
    return name.removeprefix("timm/").split(".")[0]


AnyAlgorithm: TypeAlias = PatchCore | PaDiM | ReverseDistillation | MeanNeighbours

#: Name in `benchmark` -> options, and how to fit with them.
PEERS: Mapping[str, type[AnyAlgorithm]] = {
    "patchcore": PatchCore,
    "padim": PaDiM,
    "rd4ad": ReverseDistillation,
    "knn": MeanNeighbours,
}


@dataclass(frozen=True)
class PeerBank:
    """A peer fitted on normal images of one task.

    Attributes:
        preprocessing: With a fixed intensity rule; what test images must go through.
        fitted: What the algorithm learned.
    """

    preprocessing: Preprocessing
    fitted: Fitted


@dataclass(frozen=True)
class Peer:
    """One row of `PEERS` around a frozen teacher, as `evaluation.evaluate.Judge` wants it; `build_peer` makes it.

    Attributes:
        method: What to fit.
        teacher: The frozen backbone, on `device`; always in fp32.
        preprocessing: The one way from a file to the teacher's input.
        seed: Of everything random.
        task_intensity: Intensity rules of tasks that differ from `preprocessing.intensity`.
        device: "cpu" or "cuda".
    """

    method: AnyAlgorithm
    teacher: Teacher
    preprocessing: Preprocessing
    seed: int
    task_intensity: Mapping[str, Intensity]
    device: str

    def empty_bank(self, task: str) -> NoReturn:
        """A `ConfigError`: every peer learns from normal images of the task."""
        raise ConfigError(f"peers: task {task!r} has no normal images to fit on, expected some. Give shots.")

    def make_bank(self, images: Iterable[Sample], *, task: str) -> PeerBank:
        """Fit on normal images: K supports, or all training images of a task.

        Raises:
            ConfigError: There are too few images, or one is labelled anomalous.
            ReadError: An image cannot be read.
        """
        rows = list(images)
        if not rows:
            self.empty_bank(task)
        if anomalous := [row.name for row in rows if row.label == 1]:
            raise ConfigError(f"peers: {anomalous[0]} is labelled anomalous, expected normal images. Leave it out.")
        rule = self.task_intensity.get(task, self.preprocessing.intensity)
        fixed = resolve_intensity(rule, (read_image(row.path, frame=row.frame) for row in rows))
        preprocessing = replace(self.preprocessing, intensity=fixed)
        batches = self._levels(rows, preprocessing)
        with torch.no_grad():
            fitted = self.method.fit(batches, teacher=self.teacher, size=preprocessing.size, seed=self.seed)
        return PeerBank(preprocessing, fitted)

    def encode(self, inputs: Sequence[NDArray[np.float32]]) -> Levels:
        """The teacher's levels of prepared (3, H, W) inputs, to be judged by any number of banks."""
        levels = self.teacher(torch.from_numpy(np.stack(inputs)).to(self.device))
        return [level.contiguous() for level in levels]  # not channels last: anomalib takes views of them

    def compare(self, encoded: Levels, bank: PeerBank) -> Scored:
        """Raw maps and scores of encoded images by one bank; there are no weights."""
        with torch.inference_mode():
            maps, scores = bank.fitted(encoded, self.preprocessing.size)
        return Scored(maps, scores, None)

    def _levels(self, rows: Sequence[Sample], preprocessing: Preprocessing) -> Iterator[Levels]:
        for batch in load_batches(rows, preprocessing, batch_size=_BATCH):
            for item in batch:
                if item.error is not None:
                    raise ReadError(item.error)
            yield self.encode([item.prepared.input for item in batch if item.prepared is not None])


def build_algorithm(name: str, **options: Any) -> AnyAlgorithm:
    """A row of `PEERS` with these options; a `ConfigError` if there is none."""
    if name not in PEERS:
        raise ConfigError(f"peers: unknown name {name!r}, expected one of {', '.join(PEERS)}. Correct it.")
    kind: Any = PEERS[name]
    known = {option.name: option.type.replace("float", "float or int") for option in fields(kind)}
    for option, value in options.items():
        if ("None" if value is None else type(value).__name__) not in known.get(option, ""):
            expected = ", ".join(f"{key} ({types})" for key, types in known.items()) or "none"
            raise ConfigError(f"{name}: got option {option}={value!r}, expected {expected}. Correct or leave it out.")
    algorithm: AnyAlgorithm = kind(**options)
    return algorithm


def build_peer(
    name: str,
    teacher: Teacher,
    *,
    preprocessing: Preprocessing,
    seed: int = 0,
    task_intensity: Mapping[str, Intensity] | None = None,
    device: str = "cpu",
    **options: Any,
) -> Peer:
    """Build a peer; nothing is fitted yet.

    Args:
        name: A name in `PEERS`.
        teacher: The frozen backbone.
        preprocessing: The one way from a file to the teacher's input.
        seed: Of the coreset, the chosen channels, the initial weights and the order of training images.
        task_intensity: Intensity rules of tasks that differ from `preprocessing.intensity`.
        device: "cpu" or "cuda".
        options: Fields of the algorithm, such as `coreset` of patchcore.

    Raises:
        ConfigError: A name or an option is unknown or out of range, or the teacher or the input size will not do.
        NotReadyError: anomalib is not installed.
    """
    method = build_algorithm(name, **options)
    method.check(teacher, preprocessing.size)
    if method.from_anomalib:
        require_anomalib(name)
    return Peer(method, teacher.to(device), preprocessing, seed, dict(task_intensity or {}), device)
