"""How much of the input range images use, as they are and made worse: what the limits of `data.contrast` rest on.

    anatomaly data phantom --out phantom && python benchmarks/intensity.py phantom/manifest.csv

Takes any number of manifests and prints one table as Markdown.  "warned" counts draws of 4 supports, of 100, that
`set_support` would warn of; "noted" counts images.
"""

import sys
from collections import defaultdict
from statistics import median

import numpy as np

from anatomaly.data.contrast import LEAST_LEVELS, LEAST_USED, measure
from anatomaly.data.manifest import load_manifest
from anatomaly.data.transforms import load
from anatomaly.types import Preprocessing

WORSE = {
    "as it is": lambda x: x,
    "12 bits in 16": lambda x: np.rint(x * 4095) / 65535,
    "14 bits in 16": lambda x: np.rint(x * 16383) / 65535,
    "a tenth as bright": lambda x: np.rint(x * 25) / 255,
    "8-bit rule on 12 bits": lambda x: np.minimum(x * 16, 1),
    "a window of a 100th": lambda x: np.clip((x - 0.5) * 100 + 0.5, 0, 1),
    "a window beside all": lambda x: np.clip(x * 10 - 10, 0, 1),
    "inverted": lambda x: 1 - x,
}


def main(manifests):
    """Print the table."""
    found = defaultdict(list)
    for source in manifests:
        for row in load_manifest(source):
            display = load(row, Preprocessing()).display
            for name, worsen in WORSE.items():
                found[row.task, name].append(measure(worsen(display).astype(np.float32)))
    draw = np.random.default_rng(0)
    print("| task | images | made worse | used: least, median | levels: least, median | noted | warned |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for (task, name), each in sorted(found.items(), key=lambda item: (list(WORSE).index(item[0][1]), item[0][0])):
        used, levels = ([float(one[number]) for one in each] for number in (0, 1))
        draws = [draw.choice(len(each), min(4, len(each)), replace=False) for _ in range(100)]
        warned = sum(
            median(used[i] for i in d) < LEAST_USED or median(levels[i] for i in d) < LEAST_LEVELS for d in draws
        )
        cells = [f"{min(used):.2f}, {median(used):.2f}", f"{min(levels):.0f}, {median(levels):.0f}"]
        print(f"| {task} | {len(each)} | {name} | {' | '.join(cells)} | {sum(e.poor for e in each)} | {warned} % |")


if __name__ == "__main__":
    main(sys.argv[1:])
