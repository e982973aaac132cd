"""The `Detector`: a model that carries `scoring.predict_tensor` to files, supports and saved banks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anatomaly.config import check_preprocessing, check_scoring
from anatomaly.data.layouts import rows_of
from anatomaly.data.loading import load_batches
from anatomaly.data.origin import note_beside
from anatomaly.data.readers import read_sample
from anatomaly.data.transforms import resolve_intensity, restore_map
from anatomaly.detector.bank_file import load_bank, save_bank
from anatomaly.detector.bundle import (
    BUILT_IN,
    Bundle,
    load_calibrations,
    load_teacher,
    load_weights,
    read_bundle,
    save_bundle,
    save_calibrations,
)
from anatomaly.detector.checks import check_bank, check_model
from anatomaly.detector.conformal import beside, best_fit, with_p_value
from anatomaly.detector.device import choose_device
from anatomaly.detector.facts import TEACHERS, model_hash
from anatomaly.detector.places import compare_placed, places_of, supports_of
from anatomaly.detector.support import bank_without_images, groups_of, judge_each_other, read_support, support_samples
from anatomaly.errors import ConfigError, NotReadyError
from anatomaly.methods import build_method
from anatomaly.scoring import compare_tensor, embed_tensor, encode_tensor
from anatomaly.types import Calibration, Intensity, Prediction, Preprocessing, Scoring, SupportBank

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher
    from anatomaly.data.loading import Loaded
    from anatomaly.data.transforms import Prepared
    from anatomaly.detector.facts import ModelFacts
    from anatomaly.scoring import Precision, Scored
    from anatomaly.types import Method, Sample


class Detector:
    """A model ready to judge images: ``Detector.default().set_support(images).predict(paths)``.

    Args:
        method: Teacher and student.
        preprocessing: The one way from a file to the model's input.
        scoring: Blur and pooling.
        facts: What it says of itself: `ModelFacts.of(config.method, method)`.
        task_intensity: Intensity rules of known tasks that differ from `preprocessing.intensity`.
        device: Where to compute.
        precision: "fp32", or "bf16" (faster on CPUs with AVX-512 bf16 or AMX and on GPUs, far slower on others).
        calibrations: From `detector.calibrate.calibrate`; `predict` takes p-values from the one that fits, if any does.
    """

    def __init__(
        self,
        method: Method,
        *,
        preprocessing: Preprocessing,
        scoring: Scoring,
        facts: ModelFacts,
        task_intensity: Mapping[str, Intensity] | None = None,
        device: str = "auto",
        precision: Precision = "fp32",
        calibrations: Sequence[Calibration] = (),
    ) -> None:
        check_preprocessing(preprocessing)
        check_scoring(scoring, preprocessing.size)
        self.device = torch.device(choose_device(device, precision))
        self.method = method.to(self.device).eval()
        torch.nn.ModuleList(self.method.teachers.values()).to(self.device)
        self.preprocessing = preprocessing
        self.task_intensity = dict(task_intensity or {})
        self.scoring = scoring
        self.facts = facts
        self.precision: Precision = precision
        self.bank: SupportBank | None = None
        self.model_hash = model_hash(facts, method)
        self.calibrations = tuple(calibrations)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        device: str = "auto",
        precision: Precision = "fp32",
        teacher_weights: str | None = None,
        global_teacher_weights: str | None = None,
        teachers: Sequence[Teacher] | None = None,
    ) -> Detector:
        """Load a bundle made by `fit` or `anatomaly import`.

        Args:
            bundle: The folder.
            device: "auto", "cpu" or "cuda".
            precision: "fp32" or "bf16".
            teacher_weights: File to take the teacher's weights from instead of where the bundle says.
            global_teacher_weights: Likewise for the second teacher of PDD.
            teachers: The frozen backbones, where they are your own (`Teacher.of_module`).

        Raises:
            NotReadyError: The folder is not a bundle, its settings are out of range or do not fit each other, or its
                calibration is damaged.
            WeightsError: The teacher's weights cannot be had, are not those the student was trained with, or give
                numbers that are not finite.
        """
        folder = Path(bundle)
        told, weights_hash = read_bundle(folder)
        facts, files = told.facts, (teacher_weights, global_teacher_weights)
        frozen = [
            load_teacher(folder, role, told, weights, own)
            for role, told, weights, own in zip(TEACHERS, facts.teachers, files, teachers or (None, None), strict=False)
        ]
        method = build_method(facts.name, frozen, facts.method.settings)
        load_weights(folder, method, expected=weights_hash)
        detector = cls(
            method,
            preprocessing=told.preprocessing,
            scoring=told.scoring,
            facts=facts,
            task_intensity=told.task_intensity,
            device=device,
            precision=precision,
            calibrations=load_calibrations(folder),
        )
        check_model(detector.method, told.preprocessing, told.scoring, str(folder))
        return detector

    @classmethod
    def default(cls, **options: Any) -> Detector:
        """The built-in model, which learned from no medical image; options and errors are those of `load`."""
        return cls.load(BUILT_IN, **options)

    def save(self, bundle: str | Path) -> None:
        """Write a bundle; a teacher's weights go in only if they came from a user's own file.

        Raises:
            OutputError: The folder cannot be written.
        """
        told = Bundle(self.facts, self.preprocessing, self.scoring, self.task_intensity)
        save_bundle(Path(bundle), self.method, told)
        if self.calibrations:
            self.save_calibrations(bundle)

    def set_support(
        self,
        images: Iterable[str | Path | Sample],
        *,
        task: str = "task",
        intensity: Intensity | None = None,
        near: float | None = None,
    ) -> Detector:
        """Encode K normal images of a task once; later `predict` calls compare with them.

        Args:
            images: Files or manifest rows, K >= 1, all normal.
            task: Name of the task.
            intensity: Rule for this task's files where it differs from the training data's (another modality or unit);
                "percentile" becomes a fixed range on these images.
            near: Of supports that are slices of volumes (`data.cuts`): as in `SupportBank`.

        Returns:
            This detector, so that calls can be chained; the immutable bank is `.bank`.

        Raises:
            ReadError: A support image cannot be read.
            ConfigError: There is no image, the same image twice, only blank ones, or the method has no support.
        """
        self.bank = self.make_bank(images, task=task, intensity=intensity, near=near)
        return self

    def make_bank(
        self,
        images: Iterable[str | Path | Sample],
        *,
        task: str = "task",
        intensity: Intensity | None = None,
        near: float | None = None,
    ) -> SupportBank:
        """Like `set_support`, but only return the bank."""
        self._check_takes_support()
        samples = support_samples(images, task)
        rule = intensity or self.task_intensity.get(task, self.preprocessing.intensity)
        fixed = resolve_intensity(rule, map(read_sample, samples))
        preprocessing = replace(self.preprocessing, intensity=fixed)
        read = read_support(samples, preprocessing)
        tensors, encoded = embed_tensor(self.method, read.inputs.to(self.device), precision=self.precision)
        how: Any = {"patients": groups_of(samples), "places": places_of(samples), "near": near}
        size, scoring = self.preprocessing.size, self.scoring
        own = judge_each_other(self.method, encoded, tensors, size=size, scoring=scoring, **how)
        return SupportBank(
            tensors=tensors,
            task=task,
            names=tuple(sample.name for sample in samples),
            sha256=read.sha256,
            preprocessing=preprocessing,
            model_hash=self.model_hash,
            map_range=own.map_range,
            precision=self.precision,
            normal_scores=own.normal_scores,
            attention_shares=own.attention_shares,
            origins=read.origins,
            **how,
        )

    def _check_takes_support(self) -> None:
        if not self.method.needs_support:
            raise ConfigError(
                f"support: {self.facts.name} learned what is normal in training and compares with no "
                "support images. Leave out --support and --bank."
            )

    def set_task(self, task: str, *, intensity: Intensity | None = None) -> Detector:
        """What `set_support` is for a method without support: from here the task's rule and colour scale hold."""
        self.bank = self.empty_bank(task, intensity=intensity)
        return self

    def empty_bank(self, task: str, *, intensity: Intensity | None = None) -> SupportBank:
        """Like `set_task`, but only return the bank; a `ConfigError` where the method needs support images."""
        return bank_without_images(self, task, intensity)

    def save_support(self, file: str | Path) -> None:
        """Save the current bank to one safetensors file.

        Raises:
            NotReadyError: There is no support yet.
            OutputError: The file cannot be written.
        """
        save_bank(self.ready(), Path(file))

    def load_support(self, file: str | Path) -> Detector:
        """Use a saved bank.

        Raises:
            ConfigError: The method has no support.
            NotReadyError: The file is not a bank, is damaged, or was made with another model or preprocessing.
        """
        self._check_takes_support()
        self.bank = self.accept(load_bank(Path(file)))
        return self

    def accept(self, bank: SupportBank) -> SupportBank:
        """Return the bank, moved to this detector's device, or refuse it.

        Raises:
            NotReadyError: It was made with another model or preprocessing, or its tensors are not such a model's.
        """
        if bank.model_hash != self.model_hash:
            raise NotReadyError(
                f"support bank {bank.task!r}: made with model {bank.model_hash[:12]}..., this is "
                f"{self.model_hash[:12]}... Encode the supports again with this model."
            )
        if replace(bank.preprocessing, intensity=self.preprocessing.intensity) != self.preprocessing:
            raise NotReadyError(
                f"support bank {bank.task!r}: made at {bank.preprocessing.size} ({bank.preprocessing.resize}), this "
                f"model works at {self.preprocessing.size} ({self.preprocessing.resize}). Encode the supports again."
            )
        check_bank(bank, self.method)
        return replace(bank, tensors={key: tensor.to(self.device) for key, tensor in bank.tensors.items()})

    def calibrate_with(self, calibration: Calibration, *, replace_all: bool = False) -> Detector:
        """Take a calibration up; an earlier one of the same setting that is better stays, and stays in use.

        Args:
            calibration: The new one, in place of those of the same setting and kind on no more units.
            replace_all: In place of all of the same setting.
        """
        self.calibrations = beside(self.calibrations, calibration, replace_all=replace_all)
        return self

    def save_calibrations(self, bundle: str | Path) -> None:
        """Write the calibrations into this model's bundle; `load` finds them there.

        Raises:
            OutputError: The file cannot be written.
        """
        save_calibrations(self.calibrations, Path(bundle))

    def setting(self, bank: SupportBank) -> Calibration:
        """Everything that scores against this bank depend on, as a calibration without scores."""
        return Calibration(
            task=bank.task,
            kind="held-out",
            guarantee="exact",
            unit="image",
            scores=(),
            images=(),
            sha256=(),
            model_hash=self.model_hash,
            bank_digest=bank.digest,
            preprocessing=bank.preprocessing,
            scoring=self.scoring,
            precision=self.precision,
        )

    def find_calibration(self) -> tuple[Calibration | None, str]:
        """The calibration that fits the current support, and one line to say about it.

        Returns:
            The calibration, or None; the line says why there is none and is empty where there never was one.

        Raises:
            NotReadyError: There is no support yet.
        """
        return best_fit(self.calibrations, self.setting(self.ready()))

    def predict(
        self, items: Iterable[str | Path | Sample], *, batch_size: int = 16, task: str = "task"
    ) -> Iterator[Prediction]:
        """Judge files against the current support, in order; an unreadable one carries `error` and ends nothing.

        Args:
            items: Files (a volume gives one prediction per slice) or manifest rows.
            batch_size: Images per forward pass; changes no score, as `scoring.predict_tensor` promises.
            task: Task name of items given as files.

        Raises:
            NotReadyError: There is no support yet.
        """
        bank = self.ready()
        if batch_size < 1:
            raise ConfigError(f"predict: batch_size is {batch_size}, expected at least 1.")
        started = time.perf_counter()
        for batch in load_batches(rows_of(items, task=task), bank.preprocessing, batch_size=batch_size):
            yield from self.judge(batch, since=started)
            started = time.perf_counter()

    def judge(self, batch: Sequence[Loaded], *, since: float) -> list[Prediction]:
        """One `Prediction` for each image that `data.loading` read, in order; all cost their share of time `since`."""
        bank, (calibration, _) = self.ready(), self.find_calibration()
        scored = iter(self._score([(each.sample, each.prepared) for each in batch if each.prepared], bank))
        told = [next(scored) if one.prepared else Prediction(one.sample, np.nan, error=one.error) for one in batch]
        seconds = (time.perf_counter() - since) / len(batch)
        return [replace(with_p_value(each, bank, calibration), seconds=seconds) for each in told]

    def encode(self, inputs: Sequence[NDArray[np.float32]]) -> Sequence[Tensor]:
        """Encode prepared (3, H, W) inputs once, to be compared with any number of banks."""
        stack = torch.from_numpy(np.stack(inputs)).to(self.device)
        return encode_tensor(self.method, stack, precision=self.precision)

    def compare(self, encoded: Sequence[Tensor], bank: SupportBank, rows: Sequence[Sample] = ()) -> Scored:
        """Maps, scores and weights of encoded images against one bank; one of slices has to know their `rows`."""
        how: Any = {"size": self.preprocessing.size, "scoring": self.scoring}
        if not bank.places:
            return compare_tensor(self.method, encoded, bank.tensors, **how)
        return compare_placed(self.method, encoded, bank.tensors, supports=supports_of(rows, bank), **how)

    def _score(self, items: Sequence[tuple[Sample, Prepared]], bank: SupportBank) -> list[Prediction]:
        if not items:
            return []
        rows = [sample for sample, _ in items]
        scored = self.compare(self.encode([prepared.input for _, prepared in items]), bank, rows)
        maps, scores = scored.maps.cpu().numpy(), scored.scores.tolist()
        weights = None if scored.weights is None else scored.weights.float().cpu().numpy()
        return [
            Prediction(
                sample=sample,
                score=scores[i],
                anomaly_map=restore_map(maps[i], prepared.image.size, bank.preprocessing),
                image=prepared.display,
                support_weights=None if weights is None else weights[i],
                spacing=prepared.image.spacing,
                note=note_beside(prepared.image, bank.origins),
                sha256=sample.key(prepared.image.sha256),
            )
            for i, (sample, prepared) in enumerate(items)
        ]

    def ready(self) -> SupportBank:
        """The current bank; a method without support starts with an empty one.

        Raises:
            NotReadyError: There is none yet.
        """
        if self.bank is None and not self.method.needs_support:
            self.set_task("task")
        if self.bank is None:
            raise NotReadyError("Detector: no support yet. Call set_support(images) or load_support(file) first.")
        return self.bank
