"""The routes: each reads a request, has the desk's thread work on it, and sends what comes back."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from anatomaly._version import __version__
from anatomaly.detector.detector import Detector
from anatomaly.errors import AnatomalyError
from anatomaly.service.desk import Desk
from anatomaly.service.guard import Guard
from anatomaly.service.judging import Judge, Wanted, intensity_of
from anatomaly.service.limits import Limits, RefusedError
from anatomaly.service.metrics import Metrics
from anatomaly.service.pacs import Pacs, judge_pulled
from anatomaly.service.records import About, Answer, Error, Normal, Picture, Pull, SessionFacts
from anatomaly.service.sessions import Session, Sessions
from anatomaly.service.uploads import Upload, files_of, read_form, stored, text_of

Found = TypeVar("Found")

_PAGE = Path(__file__).parent
_RESEARCH = "Research only. Not a medical device. Every error is JSON: an object whose `error` is one line."
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": words}
    for status, words in (
        (400, "The request is damaged"),
        (401, "The token is missing or wrong"),
        (404, "No such session"),
        (410, "The session gave way to newer ones"),
        (413, "Too large, or too many"),
        (422, "Nothing in it can be judged"),
        (429, "The queue is full; Retry-After says for how long"),
    )
}
Side = Annotated[int | None, Query(ge=16, le=8192, description="Longest side of the pictures in pixels at most.")]

Frame = Annotated[int, Query(ge=0, description="Frame or slice of a file of several.")]


def _wanted(
    pictures: Annotated[list[Picture], Query(default_factory=list, description="For the answer; may be repeated.")],
    side: Side = None,
) -> Wanted:
    return Wanted(tuple(pictures), side)


Pictures = Annotated[Wanted, Depends(_wanted)]


def make_app(
    detector: Detector,
    limits: Limits,
    *,
    batch_size: int = 16,
    token: str | None = None,
    hosts: frozenset[str] = frozenset(),
    pacs: Pacs | None = None,
) -> ASGIApp:
    """The service as an ASGI application.

    Args:
        detector: What judges; the service has it alone.
        limits: What a client may ask.
        batch_size: Images per forward pass; changes no score.
        token: What requests must name; None to serve this machine only.
        hosts: Names besides "localhost", "127.0.0.1" and "::1" under which this machine may ask.
        pacs: Where images are pulled from and results pushed to, or None.
    """
    desk, sessions = Desk(limits.queue), Sessions(limits)
    metrics, judge = Metrics(desk, sessions), Judge(detector, limits, batch_size=batch_size)

    @asynccontextmanager
    async def until_closed(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.close()

    app = FastAPI(
        title="anatomaly",
        version=__version__,
        description=_RESEARCH,
        docs_url=None,  # its page takes scripts from a CDN
        redoc_url=None,
        lifespan=until_closed,
        responses=_ERRORS,
    )
    _tell_errors(app)

    async def run(request: Request, job: Callable[[], Found]) -> Found:
        return await desk.run(job, request.is_disconnected)

    def facts_of(key: str, session: Session, normals: list[Normal]) -> SessionFacts:
        rule = session.bank.preprocessing.intensity
        numbers = "" if rule.rule == "auto" else f" {rule.low:g}, {rule.high:g}"
        return SessionFacts(
            id=key,
            task=session.bank.task,
            shots=session.bank.shots,
            normals=normals,
            intensity=f"{rule.rule}{numbers}",
            p_values=session.p_values or None,
        )

    @app.post("/sessions", status_code=201, openapi_extra=_form(normals=True))
    async def create_session(request: Request, pictures: bool = False) -> SessionFacts:
        """Encode normal images of one kind; queries are compared with them."""
        with desk.place():
            async with read_form(request, limits) as form:
                files = files_of(form, "normals")
                session, normals = await run(request, partial(_open, judge, files, *_kind(form), pictures))
        return facts_of(sessions.add(session), session, normals)

    @app.get("/sessions/{key}")
    async def read_session(key: str) -> SessionFacts:
        """What a session was made of."""
        session = sessions.get(key)
        scores = session.bank.normal_scores or (None,) * len(session.names)
        normals = [Normal(name=n, score=s) for n, s in zip(session.names, scores, strict=True)]
        return facts_of(key, session, normals)

    @app.delete("/sessions/{key}", status_code=204)
    async def delete_session(key: str) -> None:
        """Forget a session and everything that came with it."""
        sessions.remove(key)

    @app.post("/sessions/{key}/queries", response_model=Answer, openapi_extra=_form(images=True))
    async def judge_images(request: Request, key: str, wanted: Pictures) -> Response:
        """Judge one image or a batch; a file that cannot be read costs its own rows only."""
        session = sessions.get(key)
        with desk.place():
            async with read_form(request, limits) as form:
                files = _some(files_of(form, "images"), "images")
                return _sent(await run(request, partial(_answer, judge, session, files, wanted)), metrics)

    @app.post(
        "/sessions/{key}/pictures/{kind}",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}},
        openapi_extra=_form(images=True),
    )
    async def picture(request: Request, key: str, kind: Picture, frame: Frame = 0, side: Side = None) -> Response:
        """The map, the overlay or the image of one file, as a PNG."""
        session, wanted = sessions.get(key), Wanted((kind,), side, frame)
        with desk.place():
            async with read_form(request, limits) as form:
                files = _some(files_of(form, "images"), "images")[:1]
                answer = await run(request, partial(_answer, judge, session, files, wanted))
        metrics.judged(answer.judged, answer.failed)
        (found,) = answer.results
        if found.pictures is None:
            raise RefusedError(422, found.error or "image: there is no picture.")
        return Response(base64.b64decode(found.pictures[kind]), media_type="image/png")

    @app.post("/batch", response_model=Answer, openapi_extra=_form(normals=True, images=True))
    async def judge_batch(request: Request, wanted: Pictures) -> Response:
        """Normals and images in one request; nothing is kept."""
        with desk.place():
            async with read_form(request, limits) as form:
                normals, images = files_of(form, "normals"), _some(files_of(form, "images"), "images")

                def both() -> Answer:
                    session, _ = _open(judge, normals, *_kind(form), False)
                    return _answer(judge, session, images, wanted)

                return _sent(await run(request, both), metrics)

    @app.post("/sessions/{key}/dicomweb", response_model=Answer)
    async def judge_pacs(request: Request, key: str, pull: Pull, wanted: Pictures) -> Response:
        """Judge instances of the PACS this service was started with, and send overlays back where asked for."""
        session = sessions.get(key)
        if pacs is None:
            raise RefusedError(404, "dicomweb: this service knows no PACS. Start it with --dicomweb URL.")
        with desk.place():
            answer = await judge_pulled(pacs, pull, judge, session, wanted, partial(run, request))
        return _sent(answer, metrics)

    @app.get("/about")
    async def about() -> About:
        """The model and the limits."""
        facts = detector.facts
        return About(
            method=facts.name,
            teachers=[each.name for each in facts.teachers],
            size=detector.preprocessing.size,
            needs_normals=detector.method.needs_support,
            limits=asdict(limits),
            dicomweb=pacs is not None,
            version=__version__,
        )

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"model": Error}})
    async def ready() -> dict[str, str]:
        """Whether a request would be taken now."""
        if desk.full:
            raise RefusedError(503, f"queue: {desk.taken} requests wait already.", retry_after=1)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Counts, times, queue and memory in the text format of Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    for path, kind in (("page.html", "text/html"), ("page.css", "text/css"), ("page.js", "text/javascript")):
        url = "/" if path == "page.html" else f"/{path}"
        app.get(url, include_in_schema=False)(partial(_file, _PAGE / path, kind))

    return Guard(app, limits, metrics, token=token, hosts=hosts | {"localhost", "127.0.0.1", "::1"})


async def _file(path: Path, kind: str) -> FileResponse:
    return FileResponse(path, media_type=f"{kind}; charset=utf-8")


def _open(judge: Judge, files: list[Upload], task: str, intensity: str, pictures: bool) -> tuple[Session, list[Normal]]:
    with stored(files) as kept:
        try:
            rule = intensity_of(intensity)
        except AnatomalyError as err:
            raise RefusedError(422, str(err)) from err
        return judge.session(kept, task, rule, pictures=pictures)


def _answer(judge: Judge, session: Session, files: list[Upload], wanted: Wanted) -> Answer:
    with stored(files) as kept:
        return judge.answer(session, kept, wanted)


def _sent(answer: Answer, metrics: Metrics) -> Response:
    """An answer as JSON; 422 where nothing in it could be judged."""
    metrics.judged(answer.judged, answer.failed)
    return Response(answer.model_dump_json(), 200 if answer.judged else 422, media_type="application/json")


def _kind(form: Any) -> tuple[str, str]:
    return text_of(form, "task", "task"), text_of(form, "intensity", "")


def _some(files: list[Upload], field: str) -> list[Upload]:
    if not files:
        raise RefusedError(422, f"{field}: got no files, expected at least 1. With curl: -F {field}=@FILE")
    return files


def _form(*, normals: bool = False, images: bool = False) -> dict[str, Any]:
    """How a multipart body looks, for /openapi.json."""
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    text = {"type": "string"}
    fields: dict[str, Any] = {}
    if images:
        fields["images"] = {**files, "description": "Images to judge."}
    if normals:
        fields["normals"] = {**files, "description": "Normal images of one kind."}
        fields["task"] = {**text, "description": "Name of the kind of image, for calibrations."}
        fields["intensity"] = {
            **text,
            "description": "Where the files need another rule: such as brain, window:40/80 or range:0..4095.",
        }
    schema = {
        "type": "object",
        "properties": fields,
        "required": [each for each in fields if fields[each]["type"] == "array"],
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _tell_errors(app: FastAPI) -> None:
    """Every error as {"error": one line}."""

    def told(status: int, line: str, retry_after: int | None = None) -> JSONResponse:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return JSONResponse({"error": " ".join(line.split())}, status, headers)

    async def refused(_: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, RefusedError)
        return told(err.status, err.line, err.retry_after)

    async def failed(_: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, HTTPException)
        return told(err.status_code, f"request: {err.detail}. See /openapi.json.")

    async def invalid(_: Request, err: Exception) -> JSONResponse:
        assert isinstance(err, RequestValidationError)
        first = err.errors()[0]
        return told(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}. See /openapi.json.")

    async def broken(_: Request, _err: Exception) -> JSONResponse:
        return told(500, "service: something broke here. Please report it.")

    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(HTTPException, failed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, broken)
