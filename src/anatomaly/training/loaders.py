"""Training rows as batches: prepared once, teacher features computed once, drawn as the method learns from them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from anatomaly.backbones.feature_cache import FeatureCache, image_key
from anatomaly.backbones.weights import cache_dir
from anatomaly.data.loading import load_batches
from anatomaly.errors import ReadError
from anatomaly.synthetic.phantom import is_drawn
from anatomaly.training.episodes import Batch, Episodes, EpisodeSampler, as_is
from anatomaly.training.lesion_episodes import LesionEpisodes, StepSampler, synthetic_images
from anatomaly.training.parts import ALONE, Parts, Ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from anatomaly.config import TrainingConfig
    from anatomaly.methods import MethodRecord
    from anatomaly.types import Features, Intensity, Method, Preprocessing, Sample

_READ_BATCH = 32


class Preparation(NamedTuple):
    """How rows of any task become input tensors: geometry, the tasks' own intensity rules, and the device."""

    preprocessing: Preprocessing
    rules: Mapping[str, Intensity]
    device: str

    def of(self, task: str) -> Preprocessing:
        """The preprocessing with the task's own intensity rule."""
        return replace(self.preprocessing, intensity=self.rules.get(task, self.preprocessing.intensity))

    def inputs(self, samples: Sequence[Sample]) -> Iterator[Tensor]:
        """Batches (b, 3, H, W) of the rows in order; neighbouring rows of one task are read together.

        Raises:
            ReadError: A file cannot be read; training on fewer images than asked would go unnoticed.
        """
        start = 0
        while start < len(samples):
            task = samples[start].task
            stop = next((i for i in range(start, len(samples)) if samples[i].task != task), len(samples))
            for batch in load_batches(samples[start:stop], self.of(task), batch_size=_READ_BATCH):
                broken = [item.error for item in batch if item.prepared is None]
                if broken:
                    raise ReadError(f"training: {broken[0]} Remove the file or correct it; see `anatomaly data check`.")
                arrays = [item.prepared.input for item in batch if item.prepared is not None]
                yield torch.from_numpy(np.stack(arrays)).to(self.device)
            start = stop


def training_loader(
    method: Method,
    rows: Sequence[Sample],
    prepare: Preparation,
    settings: TrainingConfig,
    on_progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
    *,
    record: MethodRecord,
    ranks: Ranks = ALONE,
) -> DataLoader[Batch]:
    """Batches of training rows, drawn as the method learns from them (`MethodRecord.learns_from`).

    `on_progress` is called with how many of how many "images" are read.  Of several processes each gets its parts of
    the batches; methods that learn from lesions train in one.
    """
    fetch = _source(method, rows, prepare, settings, on_progress, ranks)
    if record.learns_from == "lesions":
        return _lesion_loader(method, rows, fetch, prepare, settings)
    tasks = [sample.task for sample in rows]
    shots = 0 if record.learns_from == "normals" else settings.shots
    sampler = EpisodeSampler(tasks, shots=shots, resample=settings.resample, seed=settings.seed)
    episodes = Episodes(fetch, support_levels=slice(-1, None) if record.deepest_support else slice(None))
    parts = Parts(sampler, batch_size=settings.batch_size, accumulate=settings.accumulate, ranks=ranks)
    return DataLoader(episodes, batch_sampler=parts, collate_fn=as_is)  # type: ignore[arg-type]  # a part is no list


def _lesion_loader(
    method: Method,
    rows: Sequence[Sample],
    fetch: Callable[[Tensor, slice], Features],
    prepare: Preparation,
    settings: TrainingConfig,
) -> DataLoader[Batch]:
    """Batches with pasted lesions: of the training rows and, unless these are built-in images too, of built-in ones."""
    more, synthetic = synthetic_images(synthetic_images_of(rows, settings), prepare.preprocessing.size)
    parts = torch.split(synthetic, _READ_BATCH) if more else ()  # a transformer takes no batch of no images
    with torch.inference_mode():
        batches = [method.extract(images.to(prepare.device))["teacher"] for images in parts]
    pyramid = [torch.cat(levels) for levels in zip(*batches, strict=True)]

    def load(indices: Sequence[int]) -> Tensor:
        if indices[0] >= len(rows):
            return synthetic[[i - len(rows) for i in indices]]
        return torch.cat(list(prepare.inputs([rows[i] for i in indices])))

    def features(index: Tensor, levels: slice) -> Features:
        if index.flatten()[0] >= len(rows):
            return {"teacher": [level[index - len(rows)].clone() for level in pyramid[levels]]}
        return fetch(index, levels)

    episodes = LesionEpisodes(
        [*(row.task for row in rows), *more],
        load,
        features,
        lambda images: method.extract(images.to(prepare.device)),
        shots=settings.shots,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    return DataLoader(episodes, batch_size=None, sampler=StepSampler())


def all_gather(what: Any) -> list[Any]:
    """What every process of this training has at this place, in the order of their ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, what)
    return found


def synthetic_images_of(rows: Iterable[Sample], settings: TrainingConfig) -> int:
    """Images of each built-in task that join those with lesions: none where the rows are built-in images themselves."""
    drawn = any(is_drawn(file) for file in {row.task: row.path for row in rows}.values())
    return 0 if drawn else settings.synthetic


def _source(
    method: Method,
    rows: Sequence[Sample],
    prepare: Preparation,
    settings: TrainingConfig,
    on_progress: Callable[[int, int, str], None],
    ranks: Ranks,
) -> Callable[[Tensor, slice], Features]:
    """Teacher features of training rows by index, computed once per image as far as the cache's budgets reach.

    Each of several processes computes its share of them and gets those of the others.
    """
    disk = settings.cache_disk_gib * 2**30
    cache = FeatureCache(
        memory_bytes=settings.cache_gib * 2**30,
        folder=cache_dir() / "features" if disk else None,
        disk_bytes=disk,
        precision=settings.precision,
        device=prepare.device,
        size=prepare.preprocessing.size,
    )
    keys = [image_key(row, prepare.of(row.task)) for row in rows]

    def load(positions: Sequence[int]) -> Tensor:
        return torch.cat(list(prepare.inputs([rows[i] for i in positions])))

    own = ranks.own(range(len(rows)))

    def load_and_tell(positions: Sequence[int]) -> Tensor:
        images = load([own[i] for i in positions])
        on_progress(min(len(rows), (positions[-1] + 1) * ranks.size), len(rows), "images")
        return images

    cache.fill(method.teachers, [keys[i] for i in own], load_and_tell)
    if ranks.size > 1:
        cache.exchange(all_gather)

    def fetch(index: Tensor, levels: slice) -> Features:
        flat = index.flatten().tolist()
        wanted = [keys[i] for i in flat]
        found = cache.get(method.teachers, wanted, lambda positions: load([flat[p] for p in positions]), levels=levels)
        return {
            role: [level.reshape(*index.shape, *level.shape[1:]) for level in pyramid]
            for role, pyramid in found.items()
        }

    return fetch
