"""What the service answers, as it stands in /openapi.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, Field

Picture = Literal["image", "map", "overlay"]
NOTICE = "Research only. Not a medical device."


class Error(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="One line: what is wrong with which item, and what to do.")


class Normal(BaseModel):
    """One normal image of a session."""

    name: str
    score: float | None = Field(description="Its score, judged by the other normals; null where it is the only one.")
    picture: str | None = Field(default=None, description="PNG in base64, at most 256 pixels a side, where asked for.")


class SessionFacts(BaseModel):
    """A set of normal images that queries are compared with."""

    id: str
    task: str
    shots: int = Field(description="Number of normal images, slices of volumes counted.")
    normals: list[Normal]
    intensity: str = Field(description="The rule that all images of this session are read with.")
    p_values: str | None = Field(description="Where p-values come from, or why there are none.")
    notice: str = NOTICE


class Result(BaseModel):
    """The verdict on one image, or the reason there is none."""

    name: str = Field(description="As the client called its file; of a PACS, the instance's UID.")
    frame: int | None = Field(default=None, description="0-based frame or slice of a file of several.")
    score: float | None = Field(default=None, description="Raw; higher is more anomalous.")
    p_value: float | None = Field(default=None, description="Conformal, low is anomalous; where a calibration fits.")
    support_weights: list[float] | None = Field(default=None, description="How much each normal counted, summing to 1.")
    size: tuple[int, int] | None = Field(default=None, description="Height and width of the file's own pixels.")
    spacing: tuple[float, float] | None = Field(default=None, description="mm per pixel, row and column.")
    pictures: Mapping[str, str] | None = Field(default=None, description="PNG in base64, by name, where asked for.")
    seconds: float = 0.0
    note: str | None = None
    error: str | None = None


class Answer(BaseModel):
    """Verdicts in the order of the files, and the yardstick to read them with."""

    results: list[Result]
    judged: int
    failed: int
    normal_scores: list[float] = Field(description="Of each normal image, judged by the others.")
    p_values: str | None = Field(description="Where p-values come from, or why there are none.")
    pushed: int | None = Field(default=None, description="Results the PACS took, where asked for.")
    error: str | None = Field(
        default=None, description="One line, where no image could be judged or nothing was pushed."
    )
    notice: str = NOTICE


class Pull(BaseModel):
    """What to judge of the PACS this service was started with."""

    study: str = Field(description="StudyInstanceUID.")
    series: str | None = Field(default=None, description="SeriesInstanceUID; without: all series of the study.")
    instance: str | None = Field(default=None, description="SOPInstanceUID; without: all instances of the series.")
    push: bool = Field(default=False, description="Send an overlay of every result back, as a new series of the study.")


class About(BaseModel):
    """The model and the limits of this service."""

    method: str
    teachers: list[str]
    size: tuple[int, int] = Field(description="Height and width of the model's input.")
    needs_normals: bool
    limits: dict[str, int | float]
    dicomweb: bool
    version: str
    notice: str = NOTICE
