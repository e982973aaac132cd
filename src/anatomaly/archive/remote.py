"""Files that lie elsewhere (`s3://...`), through fsspec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anatomaly.errors import ManifestError, NotReadyError, ReadError

if TYPE_CHECKING:
    from collections.abc import Iterator


def is_remote(path: str) -> bool:
    """Whether a path is an address such as `s3://bucket/scan.dcm`, not a file of this machine."""
    return "://" in path


def open_remote(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it.

    Raises:
        NotReadyError: Its package is not installed.
        ManifestError: There is no such kind of address, or it cannot be reached.
    """
    try:
        import fsspec
    except ImportError as err:
        raise NotReadyError(f'{address}: needs fsspec. Install it: pip install "anatomaly[scale]"') from err
    try:
        files, path = fsspec.core.url_to_fs(address)
    except ImportError as err:
        raise NotReadyError(f"{address}: {' '.join(str(err).split()).rstrip('.')}.") from err
    except Exception as err:  # every file system has errors of its own
        raise ManifestError(f"{address}: cannot be reached ({_reason(err)}).") from err
    return files, path


def list_remote(address: str) -> list[str]:
    """The addresses of all files below an address, in no order.

    Raises:
        NotReadyError, ManifestError: As `open_remote`, or it cannot be listed.
    """
    files, path = open_remote(address)
    try:
        found = files.find(path)
    except Exception as err:
        raise ManifestError(f"{address}: cannot be listed ({_reason(err)}).") from err
    return list(_addresses(address, found))


def fetch(address: str, folder: Path, number: int) -> Path:
    """Copy a remote file into a folder.

    Args:
        address: The file.
        folder: Where to.
        number: Makes the name there its own; its suffix stays.

    Raises:
        ReadError: It cannot be had.
    """
    copy = folder / f"{number}_{address.partition('::')[0].rpartition('/')[2][-100:]}"
    try:
        files, path = open_remote(address)
        files.get_file(path, str(copy))
    except (NotReadyError, ManifestError) as err:
        raise ReadError(str(err)) from err
    except Exception as err:
        raise ReadError(f"{address}: cannot be fetched ({_reason(err)}).") from err
    return copy


def _addresses(address: str, paths: list[str]) -> Iterator[str]:
    """Paths of a file system as addresses; of `zip://x::s3://y.zip` the part behind `::` stays."""
    first, *behind = address.split("::")
    protocol = first.partition("://")[0]
    for path in paths:
        yield "::".join([path if is_remote(path) else f"{protocol}://{path}", *behind])


def _reason(err: Exception) -> str:
    return " ".join(f"{type(err).__name__}: {err}".split()).rstrip(".")[:200]
