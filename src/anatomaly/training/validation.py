"""What training may look at between epochs: its rows as tensors, and held-out normals with pasted lesions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from anatomaly.errors import ConfigError
from anatomaly.evaluation.metrics import image_metrics
from anatomaly.evaluation.protocols import draw_supports
from anatomaly.scoring import compare_tensor
from anatomaly.synthetic.lesions import paste_lesion

if TYPE_CHECKING:
    from anatomaly.config import FitConfig
    from anatomaly.data.manifest import Manifest
    from anatomaly.training.loaders import Preparation
    from anatomaly.types import Features, Method

VALIDATION_IMAGES = 32  # normals per task; as many again carry a pasted lesion


class Validation:
    """Held-out normals with and without pasted lesions, per training task; no image of another task is ever read.

    Args:
        method: Its teacher's features are computed once, here.
        train: Where the supports come from.
        held_out: Normals that are not trained on.
        prepare: From rows to tensors.
        config: All settings.
    """

    def __init__(
        self, method: Method, train: Manifest, held_out: Manifest, prepare: Preparation, config: FitConfig
    ) -> None:
        self.method = method
        self.config = config
        self.queries: dict[str, Features] = {}
        self.supports: dict[str, Features] = {}
        shots, seed = config.training.shots, config.training.seed
        for task in held_out.tasks:
            rows = held_out.select(task=task).samples[:VALIDATION_IMAGES]
            normal = torch.cat(list(prepare.inputs(rows)))
            rng = np.random.default_rng(seed)
            pasted = [torch.from_numpy(paste_lesion(image.cpu().numpy(), rng=rng)[0]) for image in normal]
            self.queries[task] = method.extract(torch.cat([normal, torch.stack(pasted).to(normal.device)]))
            self.supports[task] = {}
            if method.needs_support:
                support = draw_supports(train, task=task, shots=shots, draws=1, seed=seed)[0]
                self.supports[task] = method.extract_support(torch.cat(list(prepare.inputs(support))))

    def __call__(self) -> dict[str, float]:
        """Judge the method as it is, in eval mode.

        Returns:
            Image AUROC of pasted lesions per task, their mean "val_auroc", and "val_images", the number of normals that
            they rest on (as many again with a lesion): of one image it can only be 0, 0.5 or 1.
        """
        figures: dict[str, float] = {}
        images = 0
        for task, query in self.queries.items():
            with torch.inference_mode():
                scores = compare_tensor(
                    self.method,
                    self.method.encode(query),
                    self.method.embed_support(self.supports[task]),
                    size=self.config.preprocessing.size,
                    scoring=self.config.scoring,
                ).scores
            if not scores.isfinite().all():
                raise ConfigError(
                    f"training: the scores of task {task!r} are not finite any more, the training diverged. "
                    "Lower --training.learning_rate and choose another --out."
                )
            labels = np.arange(len(scores)) >= len(scores) // 2
            figures[f"val_auroc/{task}"] = image_metrics(scores.cpu().double().numpy(), labels)["auroc"]
            images += len(scores) // 2
        return {"val_auroc": float(np.mean(list(figures.values()))), **figures, "val_images": images}
