"""The frame of a report's page: its head with style, script and security policy, and the banners."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from anatomaly.tables import escaped

_WARNING = "<b>Not for clinical use.</b> Research only: do not use for diagnosis or treatment decisions."
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hash}'">
<title>{title}</title><style>{style}</style><script>{script}</script></head>
<body>{body}</body></html>
"""


def framed(body: str, *, title: str) -> str:
    """The whole page: "not for clinical use" above and below what it says.

    Args:
        body: What the page says, as HTML that loads nothing.
        title: Plain text.
    """
    style, script = (files("anatomaly.results").joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    body = f'<p class="banner" role="note">{_WARNING}</p>{body}<footer class="banner">{_WARNING}</footer>'
    return _PAGE.format(title=escaped(title), style=style, script=script, hash=digest, body=body)
