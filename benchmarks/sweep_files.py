"""Try the readers on any folder of foreign files, with independent decoders beside them.

Every file is read in a process that may die, the first and the last frame as `anatomaly` reads them, and then compared
with whatever else can read it here: pydicom with its own decoders, SimpleITK, nibabel, Pillow, tifffile (each where it
is installed) and DCMTK's dcm2img or dcmj2pnm (where it is on the PATH).  The result is Markdown: docs/foreign-files.md.

    python benchmarks/sweep_files.py FOLDER... [--out TABLE.md] [--seconds 120]
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, help="file for the table; printed where not given")
    parser.add_argument("--seconds", type=float, default=120, help="longest time one file may take")
    parser.add_argument("--child", choices=("read", "compare"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve({"read": read, "compare": compare}[args.child])
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reader, comparer = Child("read", args.seconds), Child("compare", args.seconds)
        for top in args.folders:
            for path in sorted(p for p in top.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc", ".so")):
                row = reader.ask({"path": str(path), "save": f"{folder}/pixels.npz"})
                row = {"top": top.name, "name": str(path.relative_to(top)), "beside": {}, **row}
                if row["state"] == "read":
                    beside = comparer.ask({"path": str(path), "save": f"{folder}/pixels.npz", **row})
                    row["beside"] = beside.get("beside", {"others": beside["state"]})
                rows.append(row)
                print(f"{len(rows)} {row['state']} {row['name']} {row['beside']}", file=sys.stderr)
    text = "\n".join(table(rows))
    print(text) if args.out is None else args.out.write_text(text + "\n", encoding="utf-8")


class Child:
    """A process that answers one file after the other; a new one takes its place when it dies or takes too long."""

    def __init__(self, what: str, seconds: float) -> None:
        self.what, self.seconds, self.process = what, seconds, None

    def ask(self, question: dict) -> dict:
        """Its answer, or what became of it."""
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, __file__, "--child", self.what]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        timer = threading.Timer(self.seconds, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        in_time = timer.is_alive()
        timer.cancel()
        if answer:
            return json.loads(answer)
        self.process.wait()
        return {"state": "crashed", "reason": f"ended with {self.process.returncode}" if in_time else "took too long"}


def serve(function) -> None:
    for line in sys.stdin:
        print(json.dumps(function(json.loads(line))), flush=True)


# the readers


def read(question: dict) -> dict:
    from anatomaly.data.readers import count_frames, read_image, sniff_format
    from anatomaly.errors import AnatomalyError

    for library in ("imagecodecs", "nibabel", "PIL.Image", "pydicom.pixels", "tifffile"):
        importlib.import_module(library)  # so that no file is charged for it
    path = Path(question["path"])
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here on
    started, before = time.perf_counter(), memory("VmRSS")
    answer = {"format": None}
    try:
        answer["format"] = sniff_format(path)
        count = count_frames(path)
        frames = [None] if count == 1 else [0, count - 1]
        images = [read_image(path, frame=frame) for frame in frames]
        np.savez(question["save"], *[image.pixels for image in images])
        answer |= {"state": "read", "frames": frames, "spacing": images[0].spacing, "invert": images[0].invert}
    except AnatomalyError as err:
        answer |= {"state": "refused", "reason": str(err).removeprefix(f"{path}: ")}
    except BaseException as err:
        answer |= {"state": "crashed", "reason": f"{type(err).__name__}: {err}"}
    return answer | {"seconds": time.perf_counter() - started, "megabytes": max(0, memory("VmHWM") - before)}


def memory(field: str) -> float:
    """One line of /proc/self/status in MB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


# the others: each returns frames as the readers should have read them, (C, H, W) or (H, W), and the spacing or None


def with_pydicom(path: Path, frames: list) -> tuple:
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    ds = pydicom.dcmread(path, force=True)
    found = []
    for frame in frames:
        pixels = pixel_array(ds, index=frame or 0)
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, ds)
        elif pixels.ndim == 2:
            pixels = apply_modality_lut(pixels, ds)
        found.append(np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels)
    return found, ds.get("PixelSpacing") or ds.get("ImagerPixelSpacing")


def with_simpleitk(path: Path, frames: list) -> tuple:
    import SimpleITK

    image = SimpleITK.ReadImage(str(path))
    volume = path.name.endswith((".nii", ".nii.gz"))
    if volume and image.GetDimension() == 3:
        image = SimpleITK.DICOMOrient(image, "LPS")
    pixels = SimpleITK.GetArrayFromImage(image)
    colour = image.GetNumberOfComponentsPerPixel() > 1
    if pixels.ndim == (3 if colour else 2):
        pixels = pixels[None]
    found = [pixels[frame or 0] for frame in frames]
    if volume:
        found = [plane[:, ::-1] for plane in found]
    spacing = image.GetSpacing()[1::-1] if path.suffix != ".png" else None
    return [np.moveaxis(plane, -1, 0) if colour else plane for plane in found], spacing


def with_nibabel(path: Path, frames: list) -> tuple:
    import nibabel

    image = nibabel.as_closest_canonical(nibabel.load(path))
    voxels = np.atleast_3d(image.get_fdata())
    voxels = voxels.reshape(voxels.shape[:3])
    return [voxels[:, ::-1, frame or 0].T for frame in frames], image.header.get_zooms()[1::-1]


def with_pillow(path: Path, frames: list) -> tuple:
    from PIL import Image, ImageOps

    found = []
    for frame in frames:
        with Image.open(path) as picture:
            picture.seek(frame or 0)
            turned = ImageOps.exif_transpose(picture)
            deep = turned.mode.startswith(("I", "F"))
            mode = "L" if turned.mode in ("1", "L", "LA") else "RGB"
            pixels = np.asarray(turned if deep else turned.convert(mode))
            found.append(np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels)
    return found, None


def with_tifffile(path: Path, frames: list) -> tuple:
    import tifffile

    pages = [tifffile.imread(path, key=frame or 0) for frame in frames]
    return [np.moveaxis(page, -1, 0)[:3] if page.ndim == 3 and page.shape[-1] < 5 else page for page in pages], None


def with_dcmtk(path: Path, frames: list) -> tuple:
    """DCMTK stretches the range it finds, so only the course of its values can be compared."""
    from PIL import Image

    tool = shutil.which("dcm2img") or shutil.which("dcmj2pnm")
    if tool is None:
        raise ModuleNotFoundError("dcm2img")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for frame in frames:
            out = Path(folder, "frame.png")
            subprocess.run([tool, "+on2", "+F", str((frame or 0) + 1), path, out], check=True, capture_output=True)
            with Image.open(out) as picture:
                pixels = np.asarray(picture).astype(float)
            found.append(np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels)
    return found, None


BESIDE = {
    "dicom": {"pydicom": with_pydicom, "SimpleITK": with_simpleitk, "DCMTK": with_dcmtk},
    "nifti": {"nibabel": with_nibabel, "SimpleITK": with_simpleitk},
    "tiff": {"tifffile": with_tifffile, "Pillow": with_pillow},
    **{name: {"Pillow": with_pillow} for name in ("png", "jpeg", "bmp", "gif", "webp", "jpeg2000")},
}


def padding(path: Path, frame: int | None) -> np.ndarray | bool:
    """Where a DICOM file says that it shows nothing: our readers make that dark, others do not."""
    import pydicom

    ds = pydicom.dcmread(path, force=True)
    if ds.get("PixelPaddingValue") is None:
        return False
    stored = pydicom.pixels.pixel_array(ds, index=frame or 0)
    limits = [ds.PixelPaddingValue, ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue)]
    first, last = sorted(np.array(limits, np.int64).astype(stored.dtype))
    return (stored >= first) & (stored <= last)


def compare(question: dict) -> dict:
    path = Path(question["path"])
    with np.load(question["save"]) as saved:
        ours = [saved[name] for name in saved.files]
    if question["format"] == "dicom":
        ours = [np.where(padding(path, f), np.nan, a) for a, f in zip(ours, question["frames"], strict=True)]
    beside = {}
    for name, function in BESIDE[question["format"]].items():
        try:
            theirs, spacing = function(path, question["frames"])
        except ModuleNotFoundError:
            continue
        except Exception as err:
            beside[name] = f"cannot read it ({' '.join(str(err).split())[:60]})"
            continue
        inverted = question["invert"] and name in ("SimpleITK", "Pillow")
        verdicts = [verdict(a, np.asarray(b, float), name, inverted) for a, b in zip(ours, theirs, strict=True)]
        beside[name] = next((v for v in verdicts if v != "same"), "same")
        if beside[name] == "same" and spacing is not None and question["spacing"] is not None:
            close = np.allclose([float(length) for length in spacing], question["spacing"], rtol=1e-4)
            beside[name] = "same" if close else "other spacing"
    return {"state": "compared", "beside": beside}


def verdict(ours: np.ndarray, theirs: np.ndarray, name: str, inverted: bool) -> str:
    theirs = theirs if theirs.ndim == 3 else theirs[None]
    if len(ours) == 3 and len(theirs) == 1:  # grey stored as colour
        theirs = theirs.repeat(3, 0)
    if ours.shape != theirs.shape:
        return f"other shape {theirs.shape}, here {ours.shape}"
    known = np.isfinite(theirs) & np.isfinite(ours)
    ours, theirs = ours[known].astype(float), theirs[known]
    if name == "DCMTK":
        flat = ours.std() == 0 or theirs.std() == 0
        course = 1.0 if flat else abs(np.corrcoef(ours, theirs)[0, 1])
        return "same" if course > 0.999 else f"other course, correlation {course:.4f}"
    if inverted:  # bright where low: they turn the values round, our readers leave that to the display
        ours, theirs = ours - ours.min(), theirs.max() - theirs
    allowed = max(1e-5 * np.abs(theirs).max(initial=0), 1e-6)
    if theirs.max(initial=0) <= 255 < ours.max(initial=0) / 200:
        ours, allowed = ours / 257, 1.0  # 16 bits beside their 8-bit version
    apart = float(np.abs(ours - theirs).max(initial=0))
    return "same" if apart <= allowed else f"up to {apart:.4g} apart"


# the table


def table(rows: list[dict]) -> list[str]:
    decoders = sorted({name for row in rows for name in row["beside"]})
    lines = [
        "| Files from | Format | Files | Read | Refused | Crashed | Slowest | Peak memory |",
        "|---|---|" + "--:|" * 6,
    ]
    kinds = sorted({(row["top"], row.get("format") or "none we know") for row in rows})
    for top, kind in kinds:
        group = [row for row in rows if (row["top"], row.get("format") or "none we know") == (top, kind)]
        states = Counter(row["state"] for row in group)
        slowest, peak = (max(row.get(key, 0) for row in group) for key in ("seconds", "megabytes"))
        counts = " | ".join(str(states[state]) for state in ("read", "refused", "crashed"))
        lines.append(f"| {top} | {kind} | {len(group)} | {counts} | {slowest:.2f} s | {peak:.0f} MB |")
    lines += ["", "| Beside | Compared | Same | Not the same | Cannot read it itself |", "|---|--:|--:|--:|--:|"]
    for name in decoders:
        words = [row["beside"][name] for row in rows if name in row["beside"]]
        unable = sum(word.startswith("cannot") for word in words)
        same = words.count("same")
        lines.append(f"| {name} | {len(words)} | {same} | {len(words) - same - unable} | {unable} |")
    lines += ["", "Not the same:", ""]
    lines += [
        f"- `{row['name']}`: {name}: {word}"
        for row in rows
        for name, word in row["beside"].items()
        if word != "same" and not word.startswith("cannot")
    ]
    lines += ["", "Refused or crashed, by reason:", ""]
    reasons = Counter((row["state"], shorten(row["reason"])) for row in rows if "reason" in row)
    lines += [f"- {number} {state}: {reason}" for (state, reason), number in reasons.most_common()]
    return lines


def shorten(reason: str) -> str:
    """Equal reasons in equal words: without numbers in brackets and without the advice."""
    return reason.split(". ")[0][:110].rstrip(".")


if __name__ == "__main__":
    main()
