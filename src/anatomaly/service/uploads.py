"""Files of a request: in a private folder, under names made here, for as long as they are read."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from anatomaly.service.limits import Limits, RefusedError

if TYPE_CHECKING:
    from starlette.datastructures import FormData
    from starlette.requests import Request

_LONGEST_NAME = 120
_FIELD_BYTES = 2**12


class Upload(NamedTuple):
    """One file as the client sent it: what it is called in the answer, and its content."""

    name: str
    content: BinaryIO


class Stored(NamedTuple):
    """One file on disk: what it is called in the answer, and where it lies."""

    name: str
    path: Path


@asynccontextmanager
async def read_form(request: Request, limits: Limits) -> AsyncIterator[FormData]:
    """Read a multipart body, and keep its files until this ends; how large it may be is checked where it arrives.

    Raises:
        RefusedError: It is no multipart body, is damaged, or has too many files.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RefusedError(415, "request: expected multipart/form-data with files. With curl: -F images=@FILE")
    try:
        form = await request.form(max_files=limits.files, max_fields=8, max_part_size=_FIELD_BYTES)
    except HTTPException as err:
        if "Too many files" in err.detail:
            raise RefusedError(
                413, f"request: more than {limits.files} files. Send fewer at a time, or raise --max_files."
            ) from err
        raise RefusedError(400, f"request: {err.detail}") from err
    except ClientDisconnect as err:
        raise RefusedError(499, "the client went away.") from err
    try:
        yield form
    finally:
        await form.close()


def files_of(form: FormData, field: str) -> list[Upload]:
    """The files of one field, in order.

    Raises:
        RefusedError: A value of this field is no file.
    """
    found = []
    for value in form.getlist(field):
        if not isinstance(value, UploadFile):
            raise RefusedError(422, f"{field}: got text, expected files. With curl: -F {field}=@FILE")
        found.append(Upload(display_name(value.filename or ""), value.file))
    return found


def text_of(form: FormData, field: str, default: str) -> str:
    """The text of one field.

    Raises:
        RefusedError: It is a file, or holds what cannot be printed.
    """
    value = form.get(field, default)
    if not isinstance(value, str) or not value.isprintable():
        raise RefusedError(422, f"{field}: expected one line of text.")
    return value.strip() or default


def display_name(filename: str) -> str:
    r"""What a client's file is called in answers: the last part of its name, printable, of bounded length.

    Example:
        >>> display_name("../../etc/pass\nwd"), display_name("C:\\scans\\a.png"), display_name("")
        ('passwd', 'a.png', 'file')
    """
    last = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(letter for letter in last if letter.isprintable())[:_LONGEST_NAME] or "file"


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder that only this user may enter; gone, with all that is in it, when this ends."""
    with tempfile.TemporaryDirectory(prefix="anatomaly-") as folder:
        yield Path(folder)


def new_file(folder: Path) -> Path:
    """A path nobody can guess, and that occurs in no other text."""
    return folder / f"upload-{secrets.token_hex(8)}"


@contextmanager
def stored(uploads: Sequence[Upload]) -> Iterator[list[Stored]]:
    """The files on disk, one by one under a name made here, until this ends."""
    with private_folder() as folder:
        files = []
        for upload in uploads:
            path = new_file(folder)
            with path.open("xb") as file:
                shutil.copyfileobj(upload.content, file)
            files.append(Stored(upload.name, path))
        yield files


def with_names(message: str, files: Sequence[Stored]) -> str:
    """A message about stored files, in one line and in the client's own names."""
    for name, path in files:
        if path.name in message:
            message = message.replace(str(path), name).replace(path.name, name)
    return " ".join(message.split())
