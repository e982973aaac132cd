"""Teachers from timm: the CNNs of both papers, any other model with a feature pyramid, and vision transformers.

A vision transformer has one stride.  Its four levels are the outputs of four of its blocks, taken as timm's
`FeatureGetterNet` gives them: without the model's final norm, without class and register tokens, as (B, C, h, w).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anatomaly.backbones.teacher import LEVELS, Teacher, forbid_blocks
from anatomaly.backbones.weights import PATIENCE, WeightsSource, find_weights, load_strict, read_state, tensors_of
from anatomaly.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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


def timm_teacher(
    name: str, spec: TimmSpec, *, weights: str = "auto", normalise: bool = True, blocks: Sequence[int] | None = None
) -> Teacher:
    """Build a teacher from a timm model.

    Args:
        name: Name in `BACKBONES`, for messages and bundles.
        spec: Which timm model.
        weights: "auto" (see `weights.find_weights`), "random" (seeded, for tests and timing), or a file with timm's
            own names, or with those of a teacher.  What it says of positions is resampled by timm where it was trained
            on another grid.
        normalise: See `Teacher`.
        blocks: Of a model of one stride: which four blocks are its levels, ascending, from 0; None spreads them evenly.

    Raises:
        ConfigError: There are no such blocks, or the model has a pyramid.
        WeightsError: No weights can be had, or they do not fit.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random state is left alone
        body, chosen = _build(name, spec, weights, blocks)
    return Teacher(
        name,
        body,
        channels=body.feature_info.channels(),
        strides=body.feature_info.reduction(),
        mean=spec.mean or body.pretrained_cfg["mean"],
        std=spec.std or body.pretrained_cfg["std"],
        weights=weights,
        normalise=normalise,
        blocks=chosen,
        size=tuple(body.pretrained_cfg["input_size"][1:]),
    )


#: What makes a timm model take images of more sizes than one.  Models that know neither need it not, or cannot.
_ANY_SIZE: Sequence[Mapping[str, Any]] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


def create(model: str, **settings: Any) -> Any:  # a timm model, which adds feature_info and more to nn.Module
    """Build a timm model from seed 0 that takes images of any size its patches allow, where timm offers that.

    Args:
        model: timm's name.
        settings: Of `timm.create_model`.
    """
    import timm

    for way in _ANY_SIZE[:-1]:
        torch.manual_seed(0)
        try:
            return timm.create_model(model, **settings, **way)
        except TypeError:  # this model has no such setting
            continue
    torch.manual_seed(0)
    return timm.create_model(model, **settings, **_ANY_SIZE[-1])


def _features(
    name: str, spec: TimmSpec, blocks: Sequence[int] | None, *, pretrained: bool = False
) -> tuple[Any, tuple[int, ...] | None]:
    """A timm model as levels (B, C, h, w), and the blocks they come from where it has one stride."""
    body = create(spec.model, features_only=True, pretrained=pretrained)
    if getattr(body, "output_fmt", "NCHW") != "NCHW":  # Swin and others give (B, h, w, C) unless asked like this
        body = create(spec.model, features_only=True, pretrained=pretrained, feature_cls="getter")
    depth = len(body.feature_info.info)
    same = len({each["reduction"] for each in body.feature_info.info}) == 1
    if not (same and depth >= LEVELS and hasattr(getattr(body, "model", None), "forward_intermediates")):
        forbid_blocks(name, blocks)
        return body, None
    spread = ((level + 1) * depth // LEVELS - 1 for level in range(LEVELS))
    chosen = tuple(spread if blocks is None else blocks)
    if len(chosen) != LEVELS or not all(low < high for low, high in zip((-1, *chosen), (*chosen, depth), strict=True)):
        raise ConfigError(
            f"teacher.blocks: got {list(chosen)}, expected {LEVELS} ascending numbers from 0 to {depth - 1}: "
            f"{name} has {depth} blocks. Choose among these."
        )
    few = type(body)(body.model, out_indices=chosen)  # drops the blocks behind the last one
    few.pretrained_cfg = body.pretrained_cfg
    return few, chosen


def _build(name: str, spec: TimmSpec, weights: str, blocks: Sequence[int] | None) -> tuple[Any, tuple[int, ...] | None]:
    scheme, colon, _ = spec.model.partition(":")
    if colon and scheme not in _HUB:  # timm would take a folder too
        raise WeightsError(f"{name}: got {spec.model!r}, expected the name of a timm model. See timm.list_models().")
    try:
        with _hub_in_time() if colon else nullcontext():
            body, chosen = _features(name, spec, blocks)
    except ConfigError:
        raise
    except Exception as err:  # of many kinds, as each model and the hub please
        raise WeightsError(
            f"{name}: timm cannot build {spec.model!r} ({_reason(err)}). See timm.list_models()."
        ) from err
    if weights == "random":
        return body, chosen
    explicit = None if weights == "auto" else Path(weights)
    if spec.source is None and explicit is None:
        try:
            with _hub_in_time():
                return _features(name, spec, blocks, pretrained=True)
        except Exception as err:
            raise WeightsError(
                f"{name}: timm could not fetch pretrained weights ({_reason(err)}). Pass --teacher.weights FILE, or "
                "use --teacher.name efficientnet_lite0, whose weights come as a pip package."
            ) from err
    file = find_weights(name, spec.source or WeightsSource("", ""), explicit=explicit)
    state = tensors_of(read_state(file), where=str(file))
    with _hub_in_time() if colon else nullcontext():
        state = _fitted(spec, body.state_dict(), state, where=str(file))
    load_strict(body, state, where=str(file))
    return body, chosen


def _fitted(
    spec: TimmSpec, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], *, where: str
) -> dict[str, Tensor]:
    """A file's tensors under a teacher's names, those behind its last level left out; strangers keep theirs."""
    strange = any(key not in wanted and not _behind(key) for key in state)
    if not set(wanted) <= set(state) or (strange and not spec.by_order):  # else it was saved from a teacher
        state = _renamed(spec, wanted, state, where=where)
    return {key: value for key, value in state.items() if key in wanted or not _behind(key)}


def _renamed(
    spec: TimmSpec, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], *, where: str
) -> dict[str, Tensor]:
    """The tensors of a whole model's file that a teacher has, under its names, and strangers."""
    own = create(spec.model).state_dict()
    if spec.by_order:
        state = _rename_by_order(state, own, where=where)
    places = names_in_whole(wanted, own)
    needed = set(places.values())
    found = {key: value for key, value in state.items() if key in needed or key not in own}
    other = {key for key in needed & set(found) if found[key].shape != own[key].shape}
    if other and needed <= set(found) and all("pos" in key for key in other):
        found |= _resampled(spec, {**own, **{key: found[key] for key in needed}}, needed)
    back = {whole: key for key, whole in places.items()}
    return {back.get(key, key): value for key, value in found.items()}


def _resampled(spec: TimmSpec, state: dict[str, Tensor], needed: Iterable[str]) -> dict[str, Tensor]:
    """What timm makes of these tensors of a whole model, whose positions were trained on another grid."""
    try:
        whole = create(spec.model, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(state)})
    except Exception:  # it cannot resample them; what does not fit is told when they are loaded
        return {}
    fitted = whole.state_dict()
    return {key: fitted[key] for key in needed}


def names_in_whole(body: Iterable[str], whole: Iterable[str]) -> dict[str, str]:
    """The names that tensors of a feature extractor have in the whole model.

    timm's extractors write `stages_0` for `stages.0`, or put `model.` or `body.` in front of all names.

    Args:
        body: Names in the extractor.
        whole: Names in the whole model.

    Returns:
        By name in the extractor; those it does not share are missing.

    Example:
        >>> names_in_whole(["stages_0.weight", "model.norm.bias", "own"], ["stages.0.weight", "norm.bias"])
        {'stages_0.weight': 'stages.0.weight', 'model.norm.bias': 'norm.bias'}
    """
    spelled = {key.replace(".", "_"): key for key in whole}
    places = {}
    for key in body:
        for name in (key, key.removeprefix("model."), key.removeprefix("body.")):
            if name.replace(".", "_") in spelled:
                places[key] = spelled[name.replace(".", "_")]
                break
    return places


def _behind(key: str) -> bool:
    """Whether a tensor of this name stands behind the last level of any model."""
    return key.split(".")[0] in _HEAD


def _reason(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:120]


#: How timm spells a model that stands on the Hugging Face hub alone.
_HUB = ("hf-hub", "hf_hub")


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
        get_session().head(address, timeout=PATIENCE)
    except Exception as err:  # of many kinds, by version and way
        return err
    return None


#: Top-level modules that stand behind the last level, or are of pretraining only, and are dropped with `features_only`.
_HEAD = frozenset(
    {"fc", "classifier", "head", "conv_head", "bn2", "norm", "fc_norm", "head_dist", "attn_pool", "mask_token"}
)


def _rename_by_order(state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Give the n-th tensor of a file the n-th name of the model, refusing any difference in number or shape."""
    if [tuple(t.shape) for t in state.values()] != [tuple(t.shape) for t in own.values()]:
        raise WeightsError(f"{where}: {len(state)} tensors do not match the model's {len(own)} in order and shape.")
    return dict(zip(own, state.values(), strict=True))
