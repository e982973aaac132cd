"""The frame of a report's page: its head with style and security policy, the banners, and the script of its filter."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from anatomaly.tables import escaped

_WARNING = "<b>Not for clinical use.</b> Research only: do not use for diagnosis or treatment decisions."
#: A form that the script makes work; hidden without it.
FILTER = (
    '<form id="filter" hidden><label>File name contains <input type="search" id="part"></label> '
    '<label>Label <select id="label"><option value="">any</option><option>anomalous</option><option>normal</option>'
    '<option>no label</option></select></label> <output id="found"></output></form>'
)
_SCRIPT = """
const form = document.getElementById('filter'), cases = [...document.querySelectorAll('article')];
const part = document.getElementById('part'), label = document.getElementById('label');
function choose() {
  const wanted = part.value.toLowerCase();
  for (const c of cases)
    c.hidden = !(c.dataset.name.toLowerCase().includes(wanted) && (!label.value || c.dataset.label === label.value));
  document.getElementById('found').textContent = cases.filter(c => !c.hidden).length + ' shown';
}
form.hidden = cases.length < 2;
form.addEventListener('input', choose);
form.addEventListener('submit', event => event.preventDefault());
"""
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{hash}'">
<title>{title}</title><style>{style}</style></head><body>{body}<script>{script}</script></body></html>
"""


def framed(body: str, *, title: str) -> str:
    """The whole page: "not for clinical use" above and below what it says.

    Args:
        body: What the page says, as HTML that loads nothing.
        title: Plain text.
    """
    style = files("anatomaly.results").joinpath("page.css").read_text(encoding="utf-8")
    body = f'<p class="banner" role="note">{_WARNING}</p>{body}<footer class="banner">{_WARNING}</footer>'
    return _PAGE.format(title=escaped(title), style=style, script=_SCRIPT, hash=_SCRIPT_HASH, body=body)
