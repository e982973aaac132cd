"""Lightning's view of a method, and its loop: loss, optimiser, checkpoints, the best weights so far."""

from __future__ import annotations

import io
import json
import logging
import signal
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy

from anatomaly.detector.bundle import read_tensors, write_tensors
from anatomaly.files import output_error, write_whole
from anatomaly.methods import METHODS
from anatomaly.training.episodes import Batch
from anatomaly.training.loaders import Preparation, training_loader
from anatomaly.training.parts import ALONE, Ranks
from anatomaly.training.shared_norm import share_norms
from anatomaly.training.validation import Validation

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torch import Tensor

    from anatomaly.config import FitConfig
    from anatomaly.data.manifest import Manifest
    from anatomaly.types import Method

logger = logging.getLogger(__name__)

_BEST = "best.safetensors"
#: Validation images below which no AUROC is told: of one image it is 0 or 1.
_FEWEST = 5


class StudentTraining(lightning.LightningModule):
    """Lightning's view of a method: loss, optimiser, and the best weights so far by validation.

    Args:
        method: Its trainable part is optimised.
        validate: Returns the validation figures of the method as it is; "val_auroc" decides, "val_images" is said.
        folder: Where the best weights and `progress.jsonl` go.
        config: All settings.
        ranks: Which of how many processes this is; the first one validates and writes.
    """

    def __init__(
        self,
        method: Method,
        validate: Callable[[], dict[str, float]],
        folder: Path,
        config: FitConfig,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.method = method
        self.validate = validate
        self.folder = folder
        self.config = config.training
        self.ranks = ranks
        self.norms = share_norms(self.method) if ranks.size > 1 else []
        self.best: dict[str, float] = {"val_auroc": -1.0, "best_epoch": -1.0}
        self._started = time.perf_counter()
        self._losses: list[dict[str, Tensor]] = []
        self._shares: list[float] = []

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
        if self.ranks.rank == 0 and file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            write_whole(file, "".join(lines[: self.current_epoch]).encode())

    def training_step(self, batch: Batch) -> Tensor:
        """Loss of B episodes, whose teacher features come with the batch, times what they count in the whole batch.

        The mean over the processes and steps, which DDP and Lightning take, is then the loss of the whole batch.
        """
        for norm in self.norms:
            norm.alone = batch.alone
        losses = self.method.training_loss(batch.query, batch.support)
        self._losses.append({name: batch.share * loss.detach() for name, loss in losses.items()})
        self._shares.append(batch.share)
        return losses["total"] * (batch.share * self.ranks.size * self.config.accumulate)

    def on_train_epoch_end(self) -> None:
        """Append the epoch's figures to `progress.jsonl`; every few epochs validate and keep the best weights."""
        mean, validated = self._mean_losses(), {}
        if (self.current_epoch + 1) % self.config.validate_every == 0 or self.current_epoch + 1 == self.config.epochs:
            self.method.eval()
            validated = self.trainer.strategy.broadcast(self.validate())
            self.method.train()
        if self.ranks.rank == 0:
            self._note(mean, validated)

    def _mean_losses(self) -> dict[str, float]:
        """The mean over all batches of the epoch, of all processes together."""
        sums = torch.stack([torch.stack([step[name] for step in self._losses]).sum() for name in self._losses[0]])
        batches = torch.tensor(self._shares, device=sums.device).sum()  # a batch's shares add up to 1
        whole = self.trainer.strategy.reduce(torch.cat([sums, batches[None]]), reduce_op="sum")
        means = dict(zip(self._losses[0], (whole[:-1] / whole[-1]).tolist(), strict=True))
        self._losses.clear()
        self._shares.clear()
        return means

    def _note(self, mean: dict[str, float], validated: dict[str, float]) -> None:
        """Write down an epoch's figures, and its weights where they are the best so far."""
        epoch = self.current_epoch
        figures: dict[str, float] = {"epoch": epoch, **mean, **validated}
        if validated:
            if self.config.keep_checkpoints:
                write_tensors(self.folder / f"epoch_{epoch}.safetensors", self.method.state_dict())
            if figures["val_auroc"] > self.best["val_auroc"]:
                self.best = {"val_auroc": figures["val_auroc"], "best_epoch": epoch}
                write_tensors(self.folder / _BEST, self.method.state_dict())
            images = figures["val_images"]
            auroc = f"validation AUROC {figures['val_auroc']:.4f}"
            told = f"{auroc} from {images} normal images and as many with a pasted lesion"
            if images < _FEWEST:
                told = f"validation on {images} normal image{'s' * (images > 1)}, too few for a figure"
            logger.info("epoch %d: loss %.4f, %s", epoch, mean["total"], told)
        figures["seconds"] = time.perf_counter() - self._started
        self._started = time.perf_counter()
        try:
            with (self.folder / "progress.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(figures) + "\n")
        except OSError as err:
            raise output_error(self.folder / "progress.jsonl", err) from err

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store which epoch was best so far."""
        checkpoint["best"] = self.best  # the first process alone writes it

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


class Steps(Callback):
    """Tells `on_progress` how many of how many steps are trained."""

    def __init__(self, on_progress: Callable[[int, int, str], None]) -> None:
        self.on_progress = on_progress

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Also tell what an earlier run had trained."""
        self._tell(trainer)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """One step more."""
        self._tell(trainer)

    def _tell(self, trainer: lightning.Trainer) -> None:
        self.on_progress(trainer.global_step, int(trainer.estimated_stepping_batches), "steps")


def load_best(method: Method, folder: Path) -> None:
    """Give a method the best weights of the training in `folder`."""
    method.load_state_dict(read_tensors(folder / _BEST))


class _Started(LightningEnvironment):
    """Tells Lightning that all processes run, on one machine, and which one this is."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.set_world_size(ranks.size)
        self.set_global_rank(ranks.rank)

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self.global_rank()


def _together(ranks: Ranks) -> DDPStrategy:
    """Lightning's DDP in a group of processes that exists."""
    # Settings may leave parts of a method unused; statistics of shared norms are the same everywhere.
    return DDPStrategy(cluster_environment=_Started(ranks), find_unused_parameters=True, broadcast_buffers=False)


def train_student(
    method: Method,
    train: Manifest,
    held_out: Manifest,
    prepare: Preparation,
    folder: Path,
    config: FitConfig,
    on_progress: Callable[[int, int, str], None],
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Run Lightning's loop, load the best weights into the method and return the best epoch and its figure.

    With `ranks` this is one process of a group that exists already; the first one's figure is the valid one.
    """
    settings, strategy = config.training, "auto" if ranks is None else _together(ranks)
    ranks = ranks or ALONE
    rows = sorted(train.samples, key=lambda sample: sample.task)  # read task by task; sorting is stable
    record = METHODS[config.method.name]
    loader = training_loader(method, rows, prepare, settings, on_progress, record=record, ranks=ranks)
    validate = Validation(method, train, held_out, prepare, config) if ranks.rank == 0 else dict
    module = StudentTraining(method, validate, folder, config, ranks)
    callbacks = [ModelCheckpoint(folder, filename="last", enable_version_counter=False), Steps(on_progress)]
    last = folder / "last.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = lightning.Trainer(
            max_epochs=settings.epochs,
            accelerator="gpu" if prepare.device == "cuda" else "cpu",
            devices=ranks.size,
            strategy=strategy,
            accumulate_grad_batches=settings.accumulate,
            precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
            gradient_clip_val=settings.gradient_clip or None,
            callbacks=callbacks,
            plugins=WholeCheckpoints(),
            logger=False,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, loader, ckpt_path=last if last.is_file() else None, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C, which it ignores from then on
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
    load_best(method, folder)
    return {**module.best, "best_epoch": int(module.best["best_epoch"])}
