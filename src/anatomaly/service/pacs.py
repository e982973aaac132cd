"""Images from a PACS and results back to it, over DICOMweb: QIDO finds, WADO pulls, STOW pushes.

Which PACS is said when the service starts, never by a client.  Errors name no patient, study or image.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import requests
from dicomweb_client import DICOMwebClient
from pydicom import dcmread
from pydicom.uid import generate_uid

from anatomaly.errors import AnatomalyError, ConfigError
from anatomaly.results.dicom_objects import Maker
from anatomaly.service.capture import secondary_capture
from anatomaly.service.limits import Limits, RefusedError
from anatomaly.service.uploads import Stored, new_file, private_folder, with_names

if TYPE_CHECKING:
    from anatomaly.service.judging import Judge, Wanted
    from anatomaly.service.records import Answer, Pull
    from anatomaly.service.sessions import Session
    from anatomaly.types import Prediction

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_SERIES, _INSTANCE, _NUMBER = "0020000E", "00080018", "00200013"
_WAIT = (5, 30)  # seconds to connect, and to wait for a part of an answer


class _Found(NamedTuple):
    """One instance of a study, in the order of its series."""

    series: str
    number: int
    instance: str


class Pacs:
    """A DICOMweb server.

    Args:
        url: Of its DICOMweb root, such as http://localhost:8042/dicom-web.
        login: "user:password", or None.

    Raises:
        ConfigError: The address is none.
    """

    def __init__(self, url: str, login: str | None = None) -> None:
        logging.getLogger("dicomweb_client").setLevel(logging.CRITICAL)  # it logs addresses that hold UIDs
        session = requests.Session()
        if login is not None:
            user, _, password = login.partition(":")
            session.auth = (user, password)
        try:
            self._client = DICOMwebClient(url, session=session, timeout=_WAIT)
        except ValueError as err:
            raise ConfigError(f"dicomweb: got {url}, expected an address such as http://HOST/dicom-web.") from err
        self._client.set_http_retry_params(retry=False)

    def pull(self, wanted: Pull, folder: Path, limits: Limits) -> list[Stored]:
        """Store the instances of a study, a series, or one of them.

        Args:
            wanted: Which ones.
            folder: Private to this request.
            limits: Of their number, bytes and time.

        Returns:
            The files, named by SOPInstanceUID.

        Raises:
            RefusedError: There is none, are too many, or the PACS does not answer as it should.
        """
        _check_uids(wanted)
        late, room, files = time.monotonic() + limits.seconds, limits.upload_mib * 2**20, []
        with _reworded():
            for series, _, instance in self._find(wanted, limits.images):
                if time.monotonic() > late:
                    raise RefusedError(504, f"dicomweb: not all came within {limits.seconds} s. Ask for one series.")
                found = self._client.retrieve_instance(
                    wanted.study, series, instance, media_types=(("application/dicom", "*"),)
                )
                path = new_file(folder)
                found.save_as(path, enforce_file_format=True)
                room -= path.stat().st_size
                if room < 0:
                    raise RefusedError(413, f"dicomweb: more than {limits.upload_mib:g} MiB. Ask for one series.")
                files.append(Stored(instance, path))
        return files

    def push(self, files: Sequence[Path]) -> tuple[int, str | None]:
        """Store DICOM files there, one by one.

        Returns:
            How many it took, and a line on the first that it did not take.
        """
        troubles = [self._push(file) for file in files]
        found = [trouble for trouble in troubles if trouble is not None]
        return len(files) - len(found), next(iter(found), None)

    def _push(self, file: Path) -> str | None:
        """Store one DICOM file; returns why it could not be."""
        try:
            with _reworded():
                answer = self._client.store_instances([dcmread(file)])
        except RefusedError as err:
            return err.line
        return "dicomweb: the PACS did not take a result." if answer.get("FailedSOPSequence") else None

    def _find(self, wanted: Pull, most: int) -> list[_Found]:
        if wanted.instance is not None and wanted.series is not None:
            return [_Found(wanted.series, 0, wanted.instance)]
        rows = self._client.search_for_instances(
            wanted.study, wanted.series, limit=most + 1, fields=["InstanceNumber", "SeriesInstanceUID"]
        )
        if not rows:
            raise RefusedError(404, "dicomweb: the PACS has no such study or series.")
        if len(rows) > most:
            raise RefusedError(413, f"dicomweb: more than {most} instances. Ask for one series, or raise --max_images.")
        found = sorted(
            _Found(str(_first(row, _SERIES, wanted.series)), int(_first(row, _NUMBER, 0)), str(_first(row, _INSTANCE)))
            for row in rows
        )
        return found


async def judge_pulled(
    pacs: Pacs,
    wanted: Pull,
    judge: Judge,
    session: Session,
    pictures: Wanted,
    run: Callable[[Callable[[], Answer]], Awaitable[Answer]],
) -> Answer:
    """Pull, judge, and push where asked for; what was judged is answered even where nothing could be pushed.

    Args:
        pacs: From where, and back to where.
        wanted: What.
        judge: The detector.
        session: The normals to compare with.
        pictures: For the answer.
        run: Has the desk's thread run a job.

    Raises:
        RefusedError: As `Pacs.pull`.
    """
    with private_folder() as folder:
        files = await asyncio.to_thread(pacs.pull, wanted, folder, judge.limits)
        captures: list[Path] = []
        troubles: list[str] = []
        maker = Maker(judge.detector.facts.name, judge.detector.model_hash, session.bank.digest)
        series = str(generate_uid())

        def capture(prediction: Prediction, file: Stored) -> None:
            try:
                captures.append(secondary_capture(prediction, session.bank, maker, series, len(captures) + 1))
            except AnatomalyError as err:
                troubles.append(with_names(str(err), [file]))

        answer = await run(lambda: judge.answer(session, files, pictures, also=capture if wanted.push else None))
        if wanted.push:
            answer.pushed, trouble = await asyncio.to_thread(pacs.push, captures)
            answer.error = answer.error or trouble or next(iter(troubles), None)
        return answer


def _check_uids(wanted: Pull) -> None:
    if wanted.instance is not None and wanted.series is None:
        raise RefusedError(422, "instance: named without its series. Add series.")
    for field in ("study", "series", "instance"):
        uid = getattr(wanted, field)
        if uid is not None and not (len(uid) <= 64 and _UID.fullmatch(uid)):
            raise RefusedError(422, f"{field}: expected a DICOM UID, digits and dots, at most 64 characters.")


def _first(row: dict[str, Any], tag: str, default: Any = None) -> Any:
    values = row.get(tag, {}).get("Value") or [default]
    if values[0] is None:
        raise RefusedError(502, "dicomweb: the PACS lists an instance without a UID.")
    return values[0]


@contextmanager
def _reworded() -> Iterator[None]:
    """What goes wrong on the way to the PACS, as one line that names nobody.

    Raises:
        RefusedError: For any error.
    """
    try:
        yield
    except RefusedError:
        raise
    except requests.HTTPError as err:
        status = err.response.status_code if err.response is not None else 0
        if status == 404:
            raise RefusedError(404, "dicomweb: the PACS has no such study, series or instance.") from err
        raise RefusedError(502, f"dicomweb: the PACS answered with status {status}.") from err
    except requests.Timeout as err:
        raise RefusedError(504, "dicomweb: the PACS does not answer in time.") from err
    except requests.RequestException as err:
        raise RefusedError(502, "dicomweb: the PACS cannot be reached. Check --dicomweb.") from err
    except Exception as err:  # whatever a parser raises
        raise RefusedError(502, f"dicomweb: the PACS sent what cannot be read ({type(err).__name__}).") from err
