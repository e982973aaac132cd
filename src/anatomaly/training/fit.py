"""fit(): train a student on normal images of several tasks and keep the checkpoint that finds pasted lesions best."""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from anatomaly.backbones import build_backbone
from anatomaly.backbones.feature_cache import FeatureCache, image_key
from anatomaly.backbones.weights import cache_dir
from anatomaly.config import differences, with_later_settings
from anatomaly.data.readers import read_image
from anatomaly.data.transforms import resolve_intensity
from anatomaly.detector.bundle import CONFIG, TEACHERS, read_tensors, write_tensors
from anatomaly.detector.detector import Detector, choose_device
from anatomaly.errors import ConfigError
from anatomaly.evaluation.protocols import split_normals
from anatomaly.files import output_error, write_whole
from anatomaly.methods import PatchNearestNeighbours, build_method
from anatomaly.scoring import scale_from_normals
from anatomaly.synthetic.phantom import is_drawn
from anatomaly.training.episodes import Batch, Episodes, EpisodeSampler, as_is
from anatomaly.training.lesion_episodes import LesionEpisodes, StepSampler, synthetic_images
from anatomaly.training.validation import VALIDATION_IMAGES, Preparation, Validation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torch import Tensor

    from anatomaly.backbones.teacher import Teacher
    from anatomaly.config import FitConfig, TrainingConfig
    from anatomaly.data.manifest import Manifest
    from anatomaly.methods import AnyMethod, Trainable
    from anatomaly.types import Features, Intensity, Sample

logger = logging.getLogger(__name__)

_BEST = "best.safetensors"
_READ_BATCH = 32


def fit(manifest: Manifest, out: str | Path, config: FitConfig) -> Detector:
    """Train on a manifest's normal training images and write a bundle.

    A run that was killed goes on where it stopped when called again with the same data and settings.

    Args:
        manifest: Rows of split "train" (normal) are trained on, normal rows of split "val" choose the checkpoint; a
            task without these gives up a share of its training rows.  Rows of split "test" are never touched.
        out: Folder of the bundle; training state and progress go to its subfolder `training`.
        config: All settings.

    Returns:
        The trained detector, without support.

    Raises:
        ConfigError: Too few images for the shots, or `out` holds a run with other settings or data.
        ReadError: A training image cannot be read.
        WeightsError: The teacher's weights cannot be had.
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    device, precision = choose_device(config.training.device), config.training.precision
    manifest = replace(manifest, samples=tuple(row for row in manifest if row.split != "test")).with_hashes()
    train, held_out = split_normals(manifest, validation=config.training.validation, seed=config.training.seed)
    method = build_method(teachers=_teachers(config), seed=config.training.seed, **asdict(config.method))
    if _finished(out, config, manifest):
        logger.info("%s: this run is finished already, nothing to train.", out)
        return Detector.load(out, device=device, precision=precision)
    rules = _resolve(config, train)
    facts = _facts(method, config, manifest, train)
    prepare = Preparation(config.preprocessing, rules, device)
    if not isinstance(method, PatchNearestNeighbours) and config.training.epochs > 0:
        method.to(device)
        for teacher in method.teachers.values():
            teacher.to(device)
        facts["training"] |= _train(method, train, held_out, prepare, out / "training", config)
    detector = Detector(
        method,
        preprocessing=config.preprocessing,
        scoring=config.scoring,
        facts=facts,
        task_intensity=rules,
        device=device,
        precision=precision,
    )
    if not method.needs_support:  # there is no support to take the colour scale from
        detector.facts["map_ranges"] = _map_ranges(detector, held_out, prepare)
    detector.save(out)
    return detector


def _teachers(config: FitConfig) -> list[Teacher]:
    """The frozen backbones a method needs.

    Raises:
        ConfigError: The input size does not fit one of them.
        WeightsError: Their weights cannot be had.
    """
    wanted = {"teacher": config.teacher}
    if config.method.name == "pdd" and config.global_teacher.name != "none":
        wanted["global_teacher"] = config.global_teacher
    teachers = []
    for role, facts in wanted.items():
        teacher = build_backbone(facts.name, weights=facts.weights, normalise=facts.normalise)
        stride = teacher.strides[-1]
        if any(side % stride for side in config.preprocessing.size):
            raise ConfigError(
                f"preprocessing: size {config.preprocessing.size} does not fit {role} {teacher.name}, expected "
                f"multiples of {stride}. Change --preprocessing.size."
            )
        teachers.append(teacher)
    return teachers


def _map_ranges(detector: Detector, held_out: Manifest, prepare: Preparation) -> dict[str, tuple[float, float]]:
    """Per task, the fixed colour scale of maps, from normal images that were not trained on."""
    ranges = {}
    for task in held_out.tasks:
        bank = detector.empty_bank(task)
        rows = held_out.select(task=task).samples[:VALIDATION_IMAGES]
        maps = [
            one
            for images in prepare.inputs(rows)
            for one in detector.compare(detector.encode(list(images.cpu().numpy())), bank).maps.cpu().numpy()
        ]
        ranges[task] = scale_from_normals(maps)
    return ranges


class StudentTraining(lightning.LightningModule):
    """Lightning's view of a method: loss, optimiser, and the best weights so far by validation.

    Args:
        method: Its trainable part is optimised.
        validate: Returns the validation figures of the method as it is; "val_auroc" decides.
        folder: Where the best weights and `progress.jsonl` go.
        config: All settings.
    """

    def __init__(
        self, method: Trainable, validate: Callable[[], dict[str, float]], folder: Path, config: FitConfig
    ) -> None:
        super().__init__()
        self.method = method
        self.validate = validate
        self.folder = folder
        self.config = config.training
        self.best: dict[str, float] = {"val_auroc": -1.0, "best_epoch": -1.0}
        self._started = time.perf_counter()
        self._losses: list[dict[str, Tensor]] = []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with both releases' betas; the schedule moves once an epoch."""
        rate = self.config.learning_rate
        optimizer = torch.optim.Adam(self.method.parameters(), lr=rate, betas=(0.5, 0.999))
        if self.config.schedule == "constant":
            return optimizer
        # A closed form beyond T_max: down to the floor and up again, as PDD's release does over its 100 epochs.
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.config.cosine_epochs, eta_min=0.1 * rate)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_start(self) -> None:
        """Forget epochs that were noted in `progress.jsonl` but not saved any more before the run was killed."""
        file = self.folder / "progress.jsonl"
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            write_whole(file, "".join(lines[: self.current_epoch]).encode())

    def training_step(self, batch: Batch) -> Tensor:
        """Loss of B episodes, whose teacher features come with the batch."""
        losses = self.method.training_loss(batch.query, batch.support)
        self.log_dict(losses, prog_bar=True, batch_size=self.config.batch_size)
        self._losses.append({name: loss.detach() for name, loss in losses.items()})
        return losses["total"]

    def on_train_epoch_end(self) -> None:
        """Append the epoch's figures to `progress.jsonl`; every few epochs validate and keep the best weights."""
        epoch = self.current_epoch
        mean = {name: float(torch.stack([step[name] for step in self._losses]).mean()) for name in self._losses[0]}
        figures: dict[str, float] = {"epoch": epoch, **mean}
        self._losses.clear()
        if (epoch + 1) % self.config.validate_every == 0 or epoch + 1 == self.config.epochs:
            self.method.eval()
            figures |= self.validate()
            self.method.train()
            if self.config.keep_checkpoints:
                write_tensors(self.folder / f"epoch_{epoch}.safetensors", self.method.state_dict())
            if figures["val_auroc"] > self.best["val_auroc"]:
                self.best = {"val_auroc": figures["val_auroc"], "best_epoch": epoch}
                write_tensors(self.folder / _BEST, self.method.state_dict())
            logger.info("epoch %d: loss %.4f, validation AUROC %.4f", epoch, mean["total"], figures["val_auroc"])
        figures["seconds"] = time.perf_counter() - self._started
        self._started = time.perf_counter()
        try:
            with (self.folder / "progress.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(figures) + "\n")
        except OSError as err:
            raise output_error(self.folder / "progress.jsonl", err) from err

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store which epoch was best so far."""
        checkpoint["best"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore which epoch was best so far."""
        self.best = checkpoint["best"]


class WholeCheckpoints(TorchCheckpointIO):
    """Writes each checkpoint whole or not at all; Lightning's own may be cut off where /tmp is on another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Replace the file at `path`; an `OutputError` where it cannot be written."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getvalue())


def _train(
    method: Trainable, train: Manifest, held_out: Manifest, prepare: Preparation, folder: Path, config: FitConfig
) -> dict[str, Any]:
    """Run Lightning's loop, load the best weights into the method and return the best epoch and its figure."""
    settings = config.training
    rows = sorted(train.samples, key=lambda sample: sample.task)  # read task by task; sorting is stable
    loader = _loader(method, rows, prepare, settings)
    validate = Validation(method, train, held_out, prepare, config)
    module = StudentTraining(method, validate, folder, config)
    callbacks: list[Callback] = [ModelCheckpoint(folder, filename="last", enable_version_counter=False)]
    if sys.stderr.isatty():
        callbacks.append(RichProgressBar())
    last = folder / "last.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = lightning.Trainer(
            max_epochs=settings.epochs,
            accelerator="gpu" if prepare.device == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
            gradient_clip_val=settings.gradient_clip or None,
            callbacks=callbacks,
            plugins=WholeCheckpoints(),
            logger=False,
            use_distributed_sampler=False,
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, loader, ckpt_path=last if last.is_file() else None, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C, which it ignores from then on
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
    method.load_state_dict(read_tensors(folder / _BEST))
    return {**module.best, "best_epoch": int(module.best["best_epoch"])}


def _loader(
    method: Trainable, rows: Sequence[Sample], prepare: Preparation, settings: TrainingConfig
) -> DataLoader[Batch]:
    """Batches of training rows, drawn as the method learns from them."""
    fetch = _source(method, rows, prepare, settings)
    if method.learns_from_lesions:
        return _lesion_loader(method, rows, fetch, prepare, settings)
    tasks = [sample.task for sample in rows]
    shots = settings.shots if method.needs_support else 0
    sampler = EpisodeSampler(tasks, shots=shots, resample=settings.resample, seed=settings.seed)
    return DataLoader(Episodes(fetch), batch_size=settings.batch_size, sampler=sampler, collate_fn=as_is)


def _lesion_loader(
    method: Trainable,
    rows: Sequence[Sample],
    fetch: Callable[[Tensor, slice], Features],
    prepare: Preparation,
    settings: TrainingConfig,
) -> DataLoader[Batch]:
    """Batches with pasted lesions: of the training rows and, unless these are built-in images too, of built-in ones."""
    more, synthetic = synthetic_images(_synthetic(method, rows, settings), prepare.preprocessing.size)
    with torch.inference_mode():
        batches = [
            method.extract(images.to(prepare.device))["teacher"] for images in torch.split(synthetic, _READ_BATCH)
        ]
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


def _synthetic(method: AnyMethod, rows: Iterable[Sample], settings: TrainingConfig) -> int:
    """Images of each built-in task that join the training: none where the rows are built-in images themselves."""
    drawn = any(is_drawn(file) for file in {row.task: row.path for row in rows}.values())
    return settings.synthetic if method.learns_from_lesions and not drawn else 0


def _source(
    method: Trainable, rows: Sequence[Sample], prepare: Preparation, settings: TrainingConfig
) -> Callable[[Tensor, slice], Features]:
    """Teacher features of training rows by index, computed once per image as far as the cache's budgets reach."""
    disk = settings.cache_disk_gib * 2**30
    cache = FeatureCache(
        memory_bytes=settings.cache_gib * 2**30,
        folder=cache_dir() / "features" if disk else None,
        disk_bytes=disk,
        precision=settings.precision,
        device=prepare.device,
    )
    keys = [image_key(row, prepare.of(row.task)) for row in rows]

    def load(positions: Sequence[int]) -> Tensor:
        return torch.cat(list(prepare.inputs([rows[i] for i in positions])))

    cache.fill(method.teachers, keys, load)

    def fetch(index: Tensor, levels: slice) -> Features:
        flat = index.flatten().tolist()
        wanted = [keys[i] for i in flat]
        found = cache.get(method.teachers, wanted, lambda positions: load([flat[p] for p in positions]), levels=levels)
        return {
            role: [level.reshape(*index.shape, *level.shape[1:]) for level in pyramid]
            for role, pyramid in found.items()
        }

    return fetch


def _facts(method: AnyMethod, config: FitConfig, manifest: Manifest, train: Manifest) -> dict[str, Any]:
    """What a bundle says about where it comes from."""
    return {
        "method": asdict(config.method),
        **{role: teacher.facts() for role, teacher in zip(TEACHERS, method.teachers.values(), strict=False)},
        "training": {
            **asdict(config.training),
            "synthetic": _synthetic(method, train, config.training),
            "tasks": list(train.tasks),
            "images": len(train),
            "manifest": manifest.fingerprint(),
        },
    }


def _resolve(config: FitConfig, train: Manifest) -> dict[str, Intensity]:
    """Fix every training task's intensity rule: percentiles become a range on that task's training images.

    Rules of other tasks are kept as they are, for the supports of a task that is only met later.
    """
    rules = dict(config.task_intensity)
    for task in train.tasks:
        rule = config.task_intensity.get(task, config.preprocessing.intensity)
        rows = train.select(task=task)
        rules[task] = resolve_intensity(rule, (read_image(s.path, frame=s.frame) for s in rows))
    if later := sorted(set(config.task_intensity).difference(train.tasks)):
        logger.warning("task_intensity: %s is not trained on, its rule is kept for later.", ", ".join(later))
    return {task: rule for task, rule in rules.items() if rule != config.preprocessing.intensity}


def _finished(out: Path, config: FitConfig, manifest: Manifest) -> bool:
    """Say whether `out` holds this run complete; refuse to mix it with another one."""
    wanted = json.loads(json.dumps({"data": manifest.fingerprint(), **asdict(config)}))
    record = out / "training" / "run.json"
    try:
        found = with_later_settings(json.loads(record.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        found = None
    complete = (out / CONFIG).is_file()
    if found == wanted:
        return complete
    if complete or (found is not None and set(record.parent.iterdir()) != {record}):
        differ = "they are not recorded" if found is None else ", ".join(differences(found, wanted)[:3])
        raise ConfigError(f"{out}: holds a run with other settings ({differ}). Choose another --out or delete it.")
    write_whole(record, (json.dumps(wanted, indent=2) + "\n").encode())  # a run that failed at once is forgotten
    return False
