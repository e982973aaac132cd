"""The controls of a report and what the keys do; the script page.js makes them work, and without it they are hidden."""

from __future__ import annotations

#: Above the list of cases.
FIND = (
    '<form id="find" class="controls" hidden aria-label="Find cases">'
    '<label>File name contains <input type="search" id="part"></label>'
    '<label>Label <select id="label"><option value="">any</option><option>anomalous</option><option>normal</option>'
    "<option>no label</option></select></label>"
    '<label>Sort by <select id="sort"><option value="score">score</option><option value="name">name</option>'
    '<option value="p">p-value</option></select></label><output id="found"></output></form>'
)
#: Above the picture; `bar` is the colour scale.
LOOK = (
    '<form id="look" class="controls" hidden aria-label="Picture">'
    '<span class="group"><button type="button" id="previous" aria-label="Previous case">&#9664;</button>'
    '<button type="button" id="next" aria-label="Next case">&#9654;</button></span>'
    '<span class="group"><label><input type="checkbox" id="overlay" checked> Overlay</label>'
    '<input type="range" id="strength" min="0" max="100" step="5" value="75" aria-label="Strength of the overlay">'
    '<output id="percent" for="strength">75%</output></span>'
    '<label><input type="checkbox" id="contours" checked> Contours</label>'
    '<button type="button" id="zoom" aria-pressed="false">Zoom</button>'
    '<button type="button" id="help">Keys: ?</button>{bar}'
    "<span>White line: the highest 5% of this image; dashed: above the scale</span>"
    '<output id="told" class="unseen"></output></form>'
)
_KEYS = (
    ("&rarr; or J", "next case"),
    ("&larr; or K", "previous case"),
    ("&uarr; &darr; Home End", "move in the list, when it has the focus"),
    ("O", "overlay on or off"),
    ("+ and &minus;", "stronger or weaker overlay"),
    ("C", "contours on or off"),
    ("Z", "zoom on the highest spot, and back"),
    ("S", "next sort order"),
    ("/", "to the search field"),
    ("?", "show or hide this"),
)
#: A dialog.
KEYS = (
    '<dialog id="keys" aria-labelledby="keys-title"><h2 id="keys-title">Keys</h2><table><tbody>'
    + "".join(f"<tr><th scope=row><kbd>{key}</kbd></th><td>{does}</td></tr>" for key, does in _KEYS)
    + "</tbody></table><p>A click on the picture zooms in there; a second one back. When zoomed, the picture takes the "
    'arrow keys once it has the focus.</p><p><label><input type="checkbox" id="letters" checked> Single keys work '
    '(switch off if they disturb)</label></p><button type="button" id="close">Close</button></dialog>'
)
