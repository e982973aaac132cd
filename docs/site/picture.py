"""Draw docs/example.png, the picture of the README: `python docs/site/picture.py`.

Eight normal fundus photographs of the phantom, nothing trained, and every test image of that folder, sorted by score.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from anatomaly import fit, load_manifest, predict_to_folder
from anatomaly.synthetic.phantom import write_benchmark

SIDE, LINE = 132, 22


def main() -> None:
    """Write the picture beside the pages."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = write_benchmark(
            folder / "scans", train=8, test_normal=2, test_anomalous=6, size=256, seed=3, tasks=("fundus",)
        )
        scans = load_manifest(table)
        detector = fit(scans, folder / "model")
        detector.set_support([row for row in scans if row.split == "train"], task="fundus")
        rows = [row for row in scans if row.split == "test"]
        summary = predict_to_folder(detector, rows, folder / "result", batch_size=8, task="fundus")
        found = sorted(summary.predictions, key=lambda prediction: prediction.score)
        sheet = Image.new("RGB", (SIDE * len(found), 2 * (SIDE + LINE)), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
        for column, prediction in enumerate(found):
            path = prediction.sample.path
            overlay = folder / "result" / "overlays" / Path(path).name
            kind = Path(path).parent.name.replace("_", " ")
            for line, (file, text) in enumerate(((path, kind), (overlay, f"score {prediction.score:.2f}"))):
                top = line * (SIDE + LINE)
                with Image.open(file) as picture:
                    sheet.paste(picture.convert("RGB").resize((SIDE, SIDE)), (column * SIDE, top))
                draw.text(((column + 0.5) * SIDE, top + SIDE + LINE / 2), text, "black", font, anchor="mm")
        out = Path(__file__).parents[1] / "example.png"
        palette = sheet.quantize(256, Image.Quantize.FASTOCTREE)
        sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(out, optimize=True)
        print(out, f"{out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
