"""anatomaly serve: the model behind HTTP, with a page."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING

from anatomaly.commands.arguments import load_detector, model_arguments
from anatomaly.commands.console import say
from anatomaly.errors import NotReadyError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

_LIMITS = {
    "upload_mib": "MiB that one request may send.",
    "files": "Files in one request.",
    "normals": "Normal images of one session.",
    "images": "Images judged in one request, slices counted.",
    "seconds": "Seconds for sending a request, for decoding a file and for judging.",
    "queue": "Requests in the queue; one more is sent away.",
    "sessions": "Sessions kept; the least recently used gives way.",
    "memory_gib": "GiB that all sessions may take.",
}


def serve_arguments(parser: ArgumentParser) -> None:
    """Options of `serve`."""
    from anatomaly.service.limits import Limits

    model_arguments(parser)
    parser.add_argument("--host", type=str, default="127.0.0.1", help="Address to listen at; others need a token.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen at; 0 takes any that is free.")
    parser.add_argument("--token", type=str | None, help="What requests must name. Better: set ANATOMALY_TOKEN.")
    parser.add_argument(
        "--dicomweb", type=str | None, help="PACS to pull from and push to, such as http://HOST/dicom-web."
    )
    for each in fields(Limits):
        parser.add_argument(
            f"--max_{each.name}", type=type(each.default), default=each.default, help=_LIMITS[each.name]
        )


def run_serve(options: Namespace) -> int:
    """Run `serve`."""
    from anatomaly.data.workers import limit_time
    from anatomaly.service.limits import Limits

    try:
        from anatomaly.service.app import make_app
        from anatomaly.service.pacs import Pacs
        from anatomaly.service.serving import is_loopback, listen, serve, token_for
    except ModuleNotFoundError as err:
        raise NotReadyError(f"serve: needs {err.name}. Try: pip install 'anatomaly[service]'") from err

    limits = Limits(**{each.name: options[f"max_{each.name}"] for each in fields(Limits)})
    given = options.token or os.environ.get("ANATOMALY_TOKEN")
    token = token_for(options.host, given)
    pacs = None if options.dicomweb is None else Pacs(options.dicomweb, os.environ.get("ANATOMALY_DICOMWEB_LOGIN"))
    limit_time(limits.seconds)
    with listen(options.host, options.port) as listening:
        detector = load_detector(options)
        app = make_app(
            detector, limits, batch_size=options.batch_size, token=token, hosts=frozenset({options.host}), pacs=pacs
        )
        name = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{name}:{listening.getsockname()[1]}/"

        def tell() -> None:
            say("Research only. Not a medical device.")
            if token is not None and not given:
                say(f"Token: {token}")
            say(f"Page: {url}{'' if token is None or given else f'#token={token}'}   Stop: Ctrl-C")
            if not is_loopback(options.host):
                say("Other machines can reach this, unencrypted. Put a proxy with TLS before it.")

        serve(app, listening, limits.seconds, tell)
    say("Stopped.")
    return 0
