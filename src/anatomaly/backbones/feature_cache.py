"""Frozen features, computed once per image and teacher and kept by content: in memory first, then on disk.

An entry is one teacher's pyramid of one image.  Its name is a digest of everything that decides its values (file and
frame, preprocessing, teacher, precision), so an entry is never stale and two methods with the same teacher share it.

On disk an entry is ``<folder>/<2 hex digits>/<digest>.safetensors``, float16.  A file appears whole under its name or
not at all, and the names depend on the content alone, so any number of processes may use one folder without locks; what
a killed one leaves behind is swept later.  A file's modification time says when it was last used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from anatomaly.backbones.feature_files import Disk
from anatomaly.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from anatomaly.backbones.feature_files import Entry, Shapes
    from anatomaly.types import Features, Preprocessing, Sample

    #: Images (b, 3, H, W), on the teachers' device, of these positions of the asked images.
    Load = Callable[[Sequence[int]], Tensor]

logger = logging.getLogger(__name__)

#: Part of every entry's name; raise it when reading, preprocessing or a teacher's code changes what features come out.
FORMAT = 1
_LARGEST = 65504.0  # of float16
_EXCHANGED = 8  # entries of every process that are under way at a time


class Teacher(Protocol):
    """What the store needs to know of a frozen backbone."""

    @property
    def name(self) -> str:
        """Name in `BACKBONES`."""
        ...

    @property
    def normalise(self) -> bool:
        """Whether the teacher scales its input."""
        ...

    @property
    def weights_hash(self) -> str:
        """Digest of names and values of all weights."""
        ...

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Pyramid of (b, 3, H, W) images, shallow to deep, each (b, C, h, w)."""
        ...


def image_key(sample: Sample, preprocessing: Preprocessing) -> str:
    """Identity of an image as the teachers see it.

    Args:
        sample: With its digest; path, task, split and label do not count.
        preprocessing: What turns the file into an input tensor, with the image's own intensity rule.

    Returns:
        Hex digest of the file's digest, the frame and the preprocessing.

    Raises:
        ValueError: The digest is missing, or the rule is "percentile", whose pixels depend on the other images.
    """
    if sample.sha256 is None:
        raise ValueError(f"image_key: {sample.name} has no sha256. Call Manifest.with_hashes first.")
    if preprocessing.intensity.rule == "percentile":
        raise ValueError(f"image_key: {sample.name} has a percentile rule. Call transforms.resolve_intensity first.")
    return _digest(sample.sha256, sample.frame, asdict(preprocessing))


class FeatureCache:
    """Features of images by content; what is not there yet is computed and kept as far as the budgets reach.

    Nothing in memory is ever replaced, and on disk nothing that was used since this store was made: a run that goes
    over more images than fit finds the same ones again in every epoch, instead of pushing each out before its next use.

    Args:
        memory_bytes: Budget of the memory.
        folder: Folder on disk, or None.  With a folder all values are rounded to float16 when they are computed, so
            that results do not depend on where an entry came from; without one they are kept as computed.
        disk_bytes: Budget of the folder, for all processes that use it together.
        precision: "bf16" runs the teachers under autocast; the context of the caller does not count.
        device: Where features are returned.
        size: (H, W) of all images, where there is one: entries on disk are then held to the shapes it gives.

    Attributes:
        memory_hits: Entries found in memory so far; an entry counts once per call.
        disk_hits: Entries read from disk.
        misses: Entries computed.
        memory_used: Bytes of the entries in memory.

    Note: a GPU may compute other last bits for the same image in another batch.  Call `fill` first, in a fixed order.
    """

    def __init__(
        self,
        *,
        memory_bytes: float,
        folder: Path | None = None,
        disk_bytes: float = 0,
        precision: Literal["fp32", "bf16"] = "fp32",
        device: str | torch.device = "cpu",
        size: tuple[int, int] | None = None,
    ) -> None:
        self._size = size
        self._shapes: dict[str, Shapes] = {}
        self.precision = precision
        self.device = torch.device(device)
        self.memory_hits = self.disk_hits = self.misses = self.memory_used = 0
        self._memory: dict[str, Entry] = {}
        self._memory_bytes = memory_bytes
        self._disk = None if folder is None else Disk(folder, disk_bytes)

    @property
    def hits(self) -> int:
        """Entries found in memory or on disk so far."""
        return self.memory_hits + self.disk_hits

    def get(
        self, teachers: Mapping[str, Teacher], images: Sequence[str], load: Load, *, levels: slice = slice(None)
    ) -> Features:
        """Features of a batch; only what is missing is loaded and computed, in one call per teacher.

        Args:
            teachers: By their name in the method's features.
            images: B keys from `image_key`, at least one; the same one may come again.
            load: Called once with the positions in `images` of the missing ones, or not at all.
            levels: Which levels to return; all are kept.

        Returns:
            By teacher, float32 (B, C, h, w) levels on the store's device, in channels-last memory.

        Raises:
            ConfigError: With a folder, a value that float16 does not hold.
            ValueError: No images, another number of images loaded than asked for, or images of several sizes.
        """
        if not images:
            raise ValueError("FeatureCache.get: got no images, expected at least one.")
        entries, _ = self._entries(teachers, images, load)
        return {
            role: [self._batch(parts) for parts in zip(*(found[image][levels] for image in images), strict=True)]
            for role, found in entries.items()
        }

    def fill(self, teachers: Mapping[str, Teacher], images: Sequence[str], load: Load, *, batch_size: int = 32) -> None:
        """Compute what is missing, in order, as long as it can be kept; arguments and errors are those of `get`."""
        if self._disk is None and self._memory_bytes <= 0:
            return
        for start in range(0, len(images), batch_size):

            def load_part(positions: Sequence[int], start: int = start) -> Tensor:
                return load([start + position for position in positions])

            if not self._entries(teachers, images[start : start + batch_size], load_part)[1]:
                return

    def exchange(self, gather: Callable[[Any], Sequence[Any]]) -> None:
        """Keep what the stores of other processes hold in memory, as far as the budget reaches; each calls this.

        Args:
            gather: Gives every process's argument to all of them.
        """
        own = list(self._memory.items())
        for start in range(0, max(gather(len(own))), _EXCHANGED):
            for entries in gather(own[start : start + _EXCHANGED]):
                for name, entry in entries:
                    self._keep_in_memory(name, entry)

    def _entries(
        self, teachers: Mapping[str, Teacher], images: Sequence[str], load: Load
    ) -> tuple[dict[str, dict[str, Entry]], bool]:
        """Entries by teacher and image, and whether all that had to be computed could be kept."""
        positions = {image: i for i, image in reversed(list(enumerate(images)))}  # the first of equal ones
        names = {role: self._names(teacher, positions) for role, teacher in teachers.items()}
        entries = {role: self._stored(by_image, teachers[role]) for role, by_image in names.items()}
        missing = [i for image, i in positions.items() if any(image not in found for found in entries.values())]
        if not missing:
            return entries, True
        missing.sort()
        inputs = load(missing)
        if len(inputs) != len(missing):
            raise ValueError(f"FeatureCache: load returned {len(inputs)} images, expected {len(missing)}.")
        kept = True
        for role, found in entries.items():
            mine = [i for i, position in enumerate(missing) if images[position] not in found]
            computed = self._compute(teachers[role], inputs if len(mine) == len(inputs) else inputs[mine])
            for i, entry in zip(mine, computed, strict=True):
                image = images[missing[i]]
                found[image] = entry
                kept &= self._keep(names[role][image], entry)
        return entries, kept

    def _names(self, teacher: Teacher, images: Iterable[str]) -> dict[str, str]:
        """The name of every image's entry."""
        suffix = _digest(FORMAT, teacher.name, teacher.normalise, teacher.weights_hash, self.precision)
        return {image: hashlib.sha256(f"{image}{suffix}".encode()).hexdigest() for image in images}

    def _stored(self, names: Mapping[str, str], teacher: Teacher) -> dict[str, Entry]:
        """Those entries that are in memory or on disk, by image."""
        found = {image: self._find(name, teacher) for image, name in names.items()}
        return {image: entry for image, entry in found.items() if entry is not None}

    def _find(self, name: str, teacher: Teacher) -> Entry | None:
        entry = self._memory.get(name)
        if entry is not None:
            self.memory_hits += 1
            return entry
        entry = None if self._disk is None else self._disk.read(name, lambda: self._shapes_of(teacher))
        if entry is not None:
            self.disk_hits += 1
            self._keep_in_memory(name, entry)
        return entry

    @torch.no_grad()
    def _shapes_of(self, teacher: Teacher) -> Shapes:
        """Shapes of this teacher's levels as entries hold them; empty where images have no common size."""
        if self._size is None:
            return []
        if teacher.weights_hash not in self._shapes:
            pyramid = teacher(torch.zeros(1, 3, *self._size, device=self.device))
            self._shapes[teacher.weights_hash] = [(*level.shape[2:], level.shape[1]) for level in pyramid]
        return self._shapes[teacher.weights_hash]

    @torch.no_grad()
    def _compute(self, teacher: Teacher, images: Tensor) -> list[Entry]:
        """The images' entries on the teacher's device; views of the batch."""
        if not len(images):
            return []
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            pyramid = teacher(images)
        if self._disk is not None:
            pyramid = [_rounded(level, f"{teacher.name}: level {i}") for i, level in enumerate(pyramid, start=1)]
        self.misses += len(images)
        return list(zip(*(level.permute(0, 2, 3, 1).contiguous().unbind() for level in pyramid), strict=True))

    def _keep(self, name: str, entry: Entry) -> bool:
        in_memory = self._keep_in_memory(name, entry)
        on_disk = self._disk is not None and self._disk.write(name, entry)
        return in_memory or on_disk

    def _keep_in_memory(self, name: str, entry: Entry) -> bool:
        if name in self._memory:  # one teacher may have two roles
            return True
        size = sum(level.nbytes for level in entry)
        if self.memory_used + size > self._memory_bytes:
            return False
        # A copy: the entry may be a view that would keep its whole batch alive.
        self._memory[name] = [torch.empty_like(level, device="cpu").copy_(level) for level in entry]
        self.memory_used += size
        return True

    def _batch(self, parts: Sequence[Tensor]) -> Tensor:
        """Stack one level of B images, (h, w, C) of any dtype each, into float32 (B, C, h, w)."""
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"FeatureCache.get: levels of shapes {sorted(shapes)} in one batch, expected one shape.")
        batch = torch.empty((len(parts), *parts[0].shape), device=self.device)  # (B, h, w, C)
        for image, part in zip(batch, parts, strict=True):
            image.copy_(part.to(self.device, non_blocking=True))  # stored bytes travel, and become float32 over there
        return batch.permute(0, 3, 1, 2)


def _digest(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _rounded(level: Tensor, where: str) -> Tensor:
    """A level in float16."""
    low, high = (float(value) for value in torch.aminmax(level))  # NaN where there is one
    if not (low >= -_LARGEST and high <= _LARGEST):
        raise ConfigError(
            f"{where} has values in [{low:g}, {high:g}], expected numbers within {_LARGEST:g}, the range of float16 in "
            "which features are stored on disk. Switch the disk cache off."
        )
    return level.half()
