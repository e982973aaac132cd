"""A support bank as one safetensors file: tensors, and in its metadata what they were made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.backbones.weights import state_digest
from anatomaly.config import check_preprocessing
from anatomaly.data.origin import read_origins
from anatomaly.data.volume_grid import AXES
from anatomaly.detector.bundle import DAMAGED, FORMAT, check_format, digest_of, read_preprocessing, write_tensors
from anatomaly.detector.facts import map_range
from anatomaly.errors import ConfigError, NotReadyError, check
from anatomaly.files import parse_json, require_file
from anatomaly.types import SupportBank

if TYPE_CHECKING:
    from torch import Tensor


def save_bank(bank: SupportBank, file: Path) -> None:
    """Write a support bank to one safetensors file.

    Raises:
        OutputError: The file cannot be written.
    """
    facts = {
        "format": FORMAT,
        "task": bank.task,
        "names": bank.names,
        "sha256": bank.sha256,
        "preprocessing": asdict(bank.preprocessing),
        "model_hash": bank.model_hash,
        "map_range": bank.map_range,
        "precision": bank.precision,
        "normal_scores": bank.normal_scores,
        "patients": bank.patients,
        "attention_shares": bank.attention_shares,
        "origins": [each._asdict() for each in bank.origins],
        **({"places": bank.places, "near": bank.near} if bank.places else {}),
    }
    facts["digest"] = _bank_digest(facts, bank.tensors)
    write_tensors(file, bank.tensors, {"bank": json.dumps(facts)})


def load_bank(file: Path) -> SupportBank:
    """Read a support bank; whether its tensors fit a model is for `Detector.accept` to say.

    Raises:
        NotReadyError: The file is not a support bank, one of a newer format, damaged or changed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        require_file(file)
        with safe_open(file, framework="pt") as stream:
            facts = parse_json((stream.metadata() or {})["bank"])
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (not a dict)
        check_format(facts["format"], str(file), "bank")
        bank = SupportBank(
            tensors=tensors,
            task=facts["task"],
            names=tuple(facts["names"]),
            sha256=tuple(facts["sha256"]),
            preprocessing=read_preprocessing(facts["preprocessing"]),
            model_hash=facts["model_hash"],
            map_range=map_range(facts["map_range"], "map_range"),
            precision=facts.get("precision"),
            normal_scores=tuple(facts.get("normal_scores", ())),
            patients=tuple(facts.get("patients", ())),
            attention_shares=tuple(facts.get("attention_shares", ())),
            origins=read_origins(facts.get("origins", ())),
            places=tuple((axis, position) for axis, position in facts.get("places", ())),
            near=facts.get("near"),
        )
        _check_bank(bank)
        digest = facts.pop("digest", None)  # banks of before have none
        sound = digest is None or digest == _bank_digest(facts, tensors)
        check("digest", str(digest)[:16], sound, "that of the bank's content")
    except ConfigError as err:
        raise NotReadyError(f"{file}: is damaged or was changed ({err}) Make the bank again.") from err
    except (*DAMAGED, SafetensorError, RuntimeError) as err:
        raise NotReadyError(f"{file}: not a support bank. Make one with `anatomaly predict --save_bank FILE`.") from err
    return bank


def _bank_digest(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return digest_of({**facts, "tensors": state_digest(tensors)})


def _check_bank(bank: SupportBank) -> None:
    """Hold what a bank says of itself to what `save_bank` writes.

    Raises:
        ConfigError: A value is of another type or out of range, or the numbers of images differ.
    """
    for name in ("task", "model_hash"):
        value = getattr(bank, name)
        check(name, repr(value), isinstance(value, str) and value.isprintable(), "text of one line")
    for name in ("names", "sha256"):
        texts = all(isinstance(each, str) for each in getattr(bank, name))
        check(name, "other values", texts, "a text for every support image")
    check("precision", bank.precision, bank.precision in ("fp32", "bf16", None), "fp32 or bf16")
    check_preprocessing(bank.preprocessing)
    rule = bank.preprocessing.intensity.rule
    check("preprocessing.intensity.rule", rule, rule != "percentile", "a fixed rule")
    check("names", f"{bank.shots} images", bank.shots >= 1, "at least 1")
    check("sha256", f"{len(bank.sha256)} digests", len(bank.sha256) == bank.shots, f"{bank.shots}, one for each name")
    for name, kind in (("normal_scores", float), ("attention_shares", float), ("patients", int)):
        values = getattr(bank, name)
        finite = all(type(each) is kind and math.isfinite(each) for each in values)
        check(name, f"{len(values)} values", finite and len(values) in (0, bank.shots), f"{bank.shots} numbers")
    check("origins", f"{len(bank.origins)} images", len(bank.origins) in (0, bank.shots), f"{bank.shots}, or none")
    placed = [axis in AXES and type(position) in (int, float) and 0 <= position <= 1 for axis, position in bank.places]
    check("places", f"{len(placed)} values", all(placed) and len(placed) in (0, bank.shots), "an axis and a position")
    near = bank.near is None or (type(bank.near) is float and 0 < bank.near <= 1 and bool(placed))
    check("near", repr(bank.near), near, "a share between 0 and 1")
    counts = {len(tensor) if tensor.ndim else 0 for tensor in bank.tensors.values()}
    held = " and ".join(map(str, sorted(counts))) or "no"
    check("tensors", f"{held} images", counts == {bank.shots}, f"{bank.shots}, one for each name")
