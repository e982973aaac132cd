"""From a request's files to its answer: what runs in the desk's thread, around one `Detector`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from anatomaly.config import check_intensity
from anatomaly.data.readers import count_frames
from anatomaly.data.transforms import load
from anatomaly.data.windows import parse_intensity
from anatomaly.errors import AnatomalyError, ConfigError, ReadError
from anatomaly.service.limits import Limits, RefusedError
from anatomaly.service.pictures import base64_png, painted, thumbnail_png
from anatomaly.service.records import Answer, Normal, Result
from anatomaly.service.sessions import Session
from anatomaly.service.uploads import with_names
from anatomaly.types import Intensity, Sample

if TYPE_CHECKING:
    from anatomaly.detector.detector import Detector
    from anatomaly.service.records import Picture
    from anatomaly.service.uploads import Stored
    from anatomaly.types import Prediction

_PICTURE_BYTES = 2**28  # of one answer


class Wanted(NamedTuple):
    """What belongs into an answer.

    Attributes:
        kinds: Which pictures.
        side: Pixels of their longest side at most; None for the file's own grid.
        frame: The one frame or slice to judge, from 0; None for all.
    """

    kinds: tuple[Picture, ...] = ()
    side: int | None = None
    frame: int | None = None


class Judged(NamedTuple):
    """One row of a request: where it came from, and either its prediction or why there is none."""

    file: Stored
    prediction: Prediction | None
    error: str | None = None


def intensity_of(text: str) -> Intensity | None:
    """The rule a client named, in words such as "brain" and "window:40/80", or as JSON; None for an empty text.

    Raises:
        ConfigError: It is no rule.
    """
    if not text:
        return None
    try:
        rule = Intensity(**json.loads(text)) if text.startswith("{") else parse_intensity(text)
        check_intensity(rule, "intensity")
    except (ValueError, TypeError, RecursionError) as err:
        raise ConfigError('intensity: expected JSON such as {"rule": "window", "low": 40, "high": 80}.') from err
    return rule


class Judge:
    """A detector and the limits of a request; used by one thread at a time.

    Args:
        detector: Its bank is set anew for every request.
        limits: Of a request.
        batch_size: Images per forward pass; changes no score.
    """

    def __init__(self, detector: Detector, limits: Limits, *, batch_size: int = 16) -> None:
        self.detector, self.limits, self.batch_size = detector, limits, batch_size

    def session(
        self, files: Sequence[Stored], task: str, intensity: Intensity | None, *, pictures: bool
    ) -> tuple[Session, list[Normal]]:
        """Encode normal images.

        Args:
            files: Each one or more normal images.
            task: Name of the kind of image.
            intensity: The rule for these images, or None for the model's own.
            pictures: Whether to show them in the answer.

        Returns:
            The session, and what is said of each image.

        Raises:
            RefusedError: An image cannot be read, there is none or are too many; the line is in the client's names.
        """
        named = {path.name: name for name, path in files}
        try:
            if not files and self.detector.method.needs_support:
                raise ConfigError("normals: got no files, expected at least 1. With curl: -F normals=@FILE")
            samples = [sample for file in files for sample in self._rows(file, task, self.limits.normals)]
            if len(samples) > self.limits.normals:
                raise ConfigError(
                    f"normals: got {len(samples)} images, expected at most {self.limits.normals}. "
                    "Send fewer, or raise --max_normals."
                )
            if not samples and not self.detector.method.needs_support:
                bank = self.detector.empty_bank(task, intensity=intensity)
            else:
                bank = self.detector.make_bank(samples, task=task, intensity=intensity)
            shown = [thumbnail_png(load(each, bank.preprocessing)) if pictures else None for each in samples]
        except AnatomalyError as err:
            raise RefusedError(422, with_names(str(err), files)) from err
        self.detector.bank = bank
        names = tuple(_framed(named[each.path.name], each.frame) for each in samples)
        scores = bank.normal_scores or (None,) * len(names)
        facts = [Normal(name=n, score=s, picture=p) for n, s, p in zip(names, scores, shown, strict=True)]
        return Session(bank, names, self.detector.find_calibration()[1]), facts

    def answer(
        self,
        session: Session,
        files: Sequence[Stored],
        wanted: Wanted,
        *,
        also: Callable[[Prediction, Stored], None] | None = None,
    ) -> Answer:
        """Judge files and say what came out, in their order; a file that cannot be read costs its own rows only.

        Args:
            session: What to compare with.
            files: Each one or more images.
            wanted: Pictures, and frames, for the answer.
            also: Called with every prediction that has a score.
        """
        room = _PICTURE_BYTES
        results = []
        for judged in self.judge(session, files, wanted.frame):
            if also is not None and judged.prediction is not None and judged.prediction.error is None:
                also(judged.prediction, judged.file)
            results.append(self._result(session, judged, wanted if room > 0 else Wanted(), files))
            if wanted.kinds and room <= 0 and judged.prediction is not None:
                results[-1].note = _joined(results[-1].note, "no pictures: this answer is full. Send fewer images.")
            room -= sum(map(len, (results[-1].pictures or {}).values()))
        failed = sum(result.error is not None for result in results)
        return Answer(
            results=results,
            judged=len(results) - failed,
            failed=failed,
            normal_scores=list(session.bank.normal_scores),
            p_values=session.p_values or None,
            error=None if failed < len(results) else _all_failed(results),
        )

    def judge(self, session: Session, files: Sequence[Stored], frame: int | None = None) -> Iterator[Judged]:
        """Predictions of all images in files, in order; after the time limit the rest is told that there is none."""
        late = time.monotonic() + self.limits.seconds
        rows: list[Judged | tuple[Stored, Sample]] = []
        for file in files:
            if time.monotonic() > late:
                rows.append(Judged(file, None, self._too_late(file)))
            else:
                rows += self._readable(file, session.bank.task, self.limits.images - len(rows), frame)

        def in_time() -> Iterator[Sample]:
            for row in rows:
                if isinstance(row, Judged):
                    continue
                if time.monotonic() > late:
                    return
                yield row[1]

        self.detector.bank = session.bank
        predictions = self.detector.predict(in_time(), batch_size=self.batch_size)
        for row in rows:
            if isinstance(row, Judged):
                yield row
                continue
            prediction = next(predictions, None)
            yield Judged(row[0], prediction, None if prediction is not None else self._too_late(row[0]))

    def _readable(self, file: Stored, task: str, room: int, frame: int | None) -> list[Judged | tuple[Stored, Sample]]:
        """The rows of a file, or the one that says why there is none."""
        try:
            return [(file, sample) for sample in self._rows(file, task, room, frame)]
        except AnatomalyError as err:
            return [Judged(file, None, with_names(str(err), [file]))]

    def _rows(self, file: Stored, task: str, room: int, frame: int | None = None) -> list[Sample]:
        """One row per image in a file, or that of one frame.

        Raises:
            ReadError: It cannot be read, holds more images than there is room for, or has no such frame.
        """
        count = count_frames(file.path)
        if frame is not None and frame >= count:
            raise ReadError(f"{file.name}: has no frame {frame}: it holds {count} image(s). Ask for 0..{count - 1}.")
        frames = range(count) if frame is None else range(frame, frame + 1)
        if len(frames) > room:
            raise ReadError(
                f"{file.name}: holds {count} image(s), there is room for {max(0, room)} more in this request. "
                "Send fewer at a time, or raise --max_images (--max_normals for normals)."
            )
        return [Sample(file.path, task, frame=each if count > 1 else None) for each in frames]

    def _too_late(self, file: Stored) -> str:
        return f"{file.name}: not judged within {self.limits.seconds} s. Send fewer at a time, or raise --max_seconds."

    def _result(self, session: Session, judged: Judged, wanted: Wanted, files: Sequence[Stored]) -> Result:
        file, prediction, error = judged
        if prediction is None or prediction.error is not None:
            told = error or (prediction.error if prediction is not None else None) or ""
            frame = None if prediction is None else prediction.sample.frame
            return Result(name=file.name, frame=frame, error=with_names(told, files))
        weights, image = prediction.support_weights, prediction.image
        pictures: dict[str, str] = {
            kind: base64_png(painted(prediction, session.bank, kind, wanted.side)) for kind in wanted.kinds
        }
        return Result(
            name=file.name,
            frame=prediction.sample.frame,
            score=prediction.score,
            p_value=prediction.p_value,
            support_weights=None if weights is None else weights.mean(axis=0, dtype="float64").tolist(),
            size=None if image is None else (image.shape[1], image.shape[2]),
            spacing=prediction.spacing,
            pictures=pictures or None,
            seconds=prediction.seconds,
            note=None if prediction.note is None else with_names(prediction.note, files),
        )


def _framed(name: str, frame: int | None) -> str:
    return name if frame is None else f"{name}#{frame}"


def _joined(note: str | None, more: str) -> str:
    return more if note is None else f"{note}; {more}"


def _all_failed(results: Sequence[Result]) -> str:
    """The line of an answer in which nothing could be judged."""
    if len(results) == 1:
        return results[0].error or ""
    return f"none of {len(results)} images could be judged; the first: {results[0].error}"
