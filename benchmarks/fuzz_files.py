"""Damaged files by the thousand: none may end the run, raise a traceback or cost another file its answer.

    python benchmarks/fuzz_files.py [--files 10000] [--seed 0] [--block 500]

Seeds of every format and of every DICOM transfer syntax that can be written here are made by the script and damaged:
bits flipped, cut short, bytes of the header overwritten, sizes declared that are not there (with checksums that fit).
Every fifth file is a sound one and must be read as it is read alone.  Blocks run in processes of their own, so that the
death of one is counted; exit code 1 if there is one, a traceback, or a sound file that is not read.
"""

import argparse
import gzip
import io
import json
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from hashlib import sha256
from pathlib import Path

import numpy as np

from anatomaly.data import workers
from anatomaly.data.layouts import samples_of
from anatomaly.data.loading import load_batches
from anatomaly.types import Intensity, Preprocessing

_SOUND = 5  # every fifth file
_SIDES = (40, 56)  # of the seeds
_DIED = ("the decoder died", "the decoder ended", "it took more than")
_RULE = Preprocessing(size=(32, 32), intensity=Intensity("range", 0, 4096))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="Damaged files.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block", type=int, default=500, help="Files per process.")
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start is not None:
        print(json.dumps(run_block(options.seed, options.start, options.block)))
        return 0
    total, dead, began = Counter(), [], time.perf_counter()
    formats, worst = defaultdict(Counter), {"peak": 0, "workers_peak": 0, "slowest": (0.0, "")}
    for start in range(0, options.files, options.block):
        count = min(options.block, options.files - start)
        command = [sys.executable, __file__, "--seed", options.seed, "--start", start, "--block", count]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        if done.returncode:
            dead.append(f"block {start}: exit code {done.returncode}: {done.stderr.strip()[-600:]}")
            continue
        print(done.stderr, end="", file=sys.stderr)
        found = json.loads(done.stdout)
        total.update(found["total"])
        for name, counts in found["formats"].items():
            formats[name].update(counts)
        for key in worst:
            worst[key] = max(worst[key], found[key] if key != "slowest" else tuple(found[key]))
        print(f"{start + count} files, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print_tables(total, formats, worst, dead)
    return int(bool(dead or total["tracebacks"] or total["sound_lost"]))


def print_tables(total, formats, worst, dead):
    print(f"{'format':<26}{'files':>7}{'read':>7}{'refused':>9}{'worker died':>13}")
    for name, counts in sorted(formats.items()):
        print(f"{name:<26}{counts.total():>7}" + "".join(f"{counts[k]:>{w}}" for k, w in _COLUMNS.items()))
    print(f"{'total':<26}{total['damaged']:>7}" + "".join(f"{total[k]:>{w}}" for k, w in _COLUMNS.items()))
    print(f"sound files: {total['sound']}, lost or changed: {total['sound_lost']}")
    print(f"deaths of the main process: {len(dead)}, tracebacks: {total['tracebacks']}")
    print(f"peak memory: main {worst['peak'] / 2**20:.2f} GiB, a worker {worst['workers_peak'] / 2**20:.2f} GiB")
    print(f"slowest batch of 16 files: {worst['slowest'][0]:.1f} s ({worst['slowest'][1]})")
    for line in dead:
        print(line)


_COLUMNS = {"read": 7, "refused": 9, "died": 13}


def run_block(seed, start, count):
    """Write damaged files `start` to `start + count`, sound ones between them, read all, count the results."""
    seeds = list(make_seeds().items())
    total, formats, slowest = Counter(), defaultdict(Counter), (0.0, "")
    with tempfile.TemporaryDirectory() as name:
        folder, rows, origin = Path(name), [], {}
        for number in range(start, start + count):
            # each file has a generator of its own, so that it can be made again alone
            rng = random.Random(f"{seed} {number}")
            kind, content = seeds[number % len(seeds)]
            how = rng.choice(list(DAMAGES))
            path = folder / f"{number}_{kind}_{how}"
            path.write_bytes(DAMAGES[how](content, rng))
            origin[path] = kind
            rows += samples_of(path, task="t")[:2]  # two frames of a volume are enough
            if number % _SOUND == 0:
                sound = folder / f"sound_{number}_{kind}"
                sound.write_bytes(content)
                rows += samples_of(sound, task="t")[:1]
        expected = {}
        for kind, content in seeds:
            (folder / "alone").write_bytes(content)
            alone = samples_of(folder / "alone", task="t")[:1]
            expected[kind] = digest(next(load_batches(alone, _RULE, batch_size=1))[0])
        began = time.perf_counter()
        for batch in load_batches(rows, _RULE, batch_size=16):
            slowest = max(slowest, (time.perf_counter() - began, batch[0].sample.path.name))
            began = time.perf_counter()
            for loaded in batch:
                judge(loaded, origin.get(loaded.sample.path), expected, total, formats)
    workers._pool.end()  # only what has ended is measured
    usage = {who: resource.getrusage(getattr(resource, f"RUSAGE_{who}")).ru_maxrss for who in ("SELF", "CHILDREN")}
    return {
        "total": total,
        "formats": formats,
        "peak": usage["SELF"],
        "workers_peak": usage["CHILDREN"],
        "slowest": slowest,
    }


def judge(loaded, kind, expected, total, formats):
    """Count one result; `kind` is None for a sound file."""
    name = loaded.sample.path.name
    if kind is None:
        found = digest(loaded)
        total["sound"] += 1
        if found != expected[name.split("_", 2)[2]]:
            total["sound_lost"] += 1
            print(f"{name}: {found}", file=sys.stderr)
        return
    died = loaded.error is not None and any(words in loaded.error for words in _DIED)
    result = "read" if loaded.error is None else "died" if died else "refused"
    total["damaged"] += 1
    total[result] += 1
    formats[kind][result] += 1
    line = loaded.error or ""
    broken = loaded.error is not None and ("\n" in line or "Traceback" in line or name not in line)
    total["tracebacks"] += broken


def digest(loaded):
    """What a sound file is recognised by; its reason where it could not be read."""
    return loaded.error if loaded.prepared is None else sha256(loaded.prepared.display.tobytes()).hexdigest()


def flip(content, rng):
    """Flip one to eight bits anywhere."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def truncate(content, rng):
    """Cut the end off."""
    return content[: rng.randrange(len(content))]


def edit_header(content, rng):
    """Overwrite up to eight bytes near the beginning, or in the last kilobyte, where TIFF keeps its tags."""
    damaged = bytearray(content)
    length = rng.randint(1, 8)
    end = min(len(damaged), 1024)
    at = rng.randrange(end) if rng.random() < 0.8 else rng.randrange(len(damaged) - end, len(damaged))
    damaged[at : at + length] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return bytes(damaged)


def declare(content, rng):
    """Declare other sizes: wherever a side of the image is written as a number, it may be another one."""
    packed = content[:2] == b"\x1f\x8b"
    damaged = bytearray(gzip.decompress(content) if packed else content)
    forms = [(form, struct.pack(form, side)) for side in _SIDES for form in ("<H", ">H", "<I", ">I")]
    places = [(form, at) for form, old in forms for at in range(2048) if damaged[at : at + len(old)] == old]
    for form, at in rng.sample(places, min(len(places), rng.randint(1, 3))):
        size = rng.choice((0, 1, 7, 9, 1000, 16384, 32767, 65535, 2**31 - 1)) % 2 ** (8 * struct.calcsize(form))
        struct.pack_into(form, damaged, at, size)
    if damaged[:4] == b"\x89PNG":
        struct.pack_into(">I", damaged, 29, zlib.crc32(damaged[12:29]))
    return gzip.compress(bytes(damaged), 1) if packed else bytes(damaged)


def inflate(content, rng):
    """Damage what a gzip stream holds, or else as `flip`."""
    if content[:2] != b"\x1f\x8b":
        return flip(content, rng)
    return gzip.compress(rng.choice((flip, edit_header, truncate))(gzip.decompress(content), rng), 1)


DAMAGES = {"flip": flip, "truncate": truncate, "header": edit_header, "sizes": declare, "inside": inflate}


def make_seeds():
    """Small sound files, name -> content."""
    height, width = _SIDES
    ramp = np.add.outer(np.arange(height) * 29, np.arange(width) * 17)
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    deep = ((ramp + noise) * 2 % 4096).astype(np.uint16)
    grey = (deep >> 4).astype(np.uint8)
    rgb = np.stack([grey, grey[::-1], grey[:, ::-1]], -1)
    return {**_pictures(grey, rgb, deep), **_tiffs(grey, rgb, deep), **_dicoms(grey, rgb, deep), **_niftis(deep)}


def _pictures(grey, rgb, deep):
    import imagecodecs
    from PIL import Image

    def saved(picture, form, **options):
        stream = io.BytesIO()
        picture.save(stream, form, **options)
        return stream.getvalue()

    one, colour = Image.fromarray(grey), Image.fromarray(rgb)
    deep_rgb = np.stack([deep, deep[::-1], deep], -1) * 16
    return {
        **{f"png {mode}": saved(one.convert(mode), "PNG") for mode in ("1", "L", "LA")},
        **{f"png {mode}": saved(colour.convert(mode), "PNG") for mode in ("RGB", "RGBA", "P")},
        "png animated": saved(one, "PNG", save_all=True, append_images=[Image.fromarray(255 - grey)]),
        "png grey16": imagecodecs.png_encode(deep * 16),
        "png rgb16": imagecodecs.png_encode(deep_rgb),
        "png rgba16": imagecodecs.png_encode(np.concatenate([deep_rgb, deep_rgb[..., :1]], -1)),
        "jpeg grey": saved(one, "JPEG"),
        "jpeg rgb": saved(colour, "JPEG", progressive=True),
        "jpeg cmyk": saved(colour.convert("CMYK"), "JPEG"),
        "bmp": saved(colour, "BMP"),
        "gif": saved(one, "GIF", save_all=True, append_images=[Image.fromarray(255 - grey)]),
        "webp": saved(colour, "WEBP", lossless=True),
        "jpeg2000": saved(colour, "JPEG2000"),
        "jpeg2000 deep": imagecodecs.jpeg2k_encode(deep, reversible=True, bitspersample=12),
    }


def _tiffs(grey, rgb, deep):
    import tifffile

    def saved(pixels, **options):
        stream = io.BytesIO()
        big = options.pop("bigtiff", False)
        tifffile.imwrite(stream, pixels, bigtiff=big, **options)
        return stream.getvalue()

    codecs = ("lzw", "zlib", "packbits", "jpeg", "jpeg2000", "zstd", "lzma", "webp")
    pixels = {"jpeg": grey, "webp": rgb}
    return {
        "tiff": saved(deep),
        "tiff rgb": saved(rgb, photometric="rgb"),
        "tiff float": saved(deep.astype(np.float32)),
        "tiff 1 bit": saved(grey > 99),
        "tiff big": saved(deep, bigtiff=True),
        "tiff tiles": saved(deep, tile=(16, 16), compression="zlib", predictor=True),
        "tiff pages": saved(np.stack([deep, deep]), photometric="minisblack", metadata=None),
        **{f"tiff {codec}": saved(pixels.get(codec, deep), compression=codec) for codec in codecs},
    }


def _dicoms(grey, rgb, deep):
    import imagecodecs
    from pydicom import uid

    signed = deep.astype(np.int16) - 1024
    frames = np.stack([deep, deep[::-1], deep])
    native = {
        "explicit": dicom(deep, uid.ExplicitVRLittleEndian),
        "implicit": dicom(signed, uid.ImplicitVRLittleEndian, RescaleSlope=2, RescaleIntercept=-5),
        "big endian": dicom(deep, uid.ExplicitVRBigEndian),
        "deflated": dicom(deep, uid.DeflatedExplicitVRLittleEndian),
        "rgb": dicom(rgb, uid.ExplicitVRLittleEndian),
        "frames": dicom(frames, uid.ExplicitVRLittleEndian, NumberOfFrames=3),
        "rle": dicom(deep, uid.RLELossless, frames=None),
        "rle frames": dicom(frames, uid.RLELossless, frames=None, NumberOfFrames=3),
        "jpeg 2000": dicom(deep, uid.JPEG2000Lossless, frames=None),
    }
    encoded = {
        "jpeg baseline": (grey, uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode(grey)),
        "jpeg lossless": (deep, uid.JPEGLosslessSV1, imagecodecs.jpeg8_encode(deep, lossless=True, bitspersample=12)),
        "jpeg-ls": (deep, uid.JPEGLSLossless, imagecodecs.jpegls_encode(deep)),
        "jpeg 2000 lossy": (deep, uid.JPEG2000, imagecodecs.jpeg2k_encode(deep, codecformat="j2k", bitspersample=12)),
    }
    packed = {name: dicom(a, syntax, frames=[frame]) for name, (a, syntax, frame) in encoded.items()}
    return {f"dicom {name}": content for name, content in {**native, **packed}.items()}


def dicom(pixels, syntax, frames=(), **elements):
    """A DICOM file; `frames` are encoded ones, None lets pydicom encode."""
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax if frames is not None else uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = uid.SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    colour = pixels.shape[-1] == 3
    data.Rows, data.Columns = _SIDES
    data.SamplesPerPixel = 3 if colour else 1
    if colour:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    data.BitsAllocated = 8 * pixels.dtype.itemsize
    data.BitsStored = 8 if pixels.dtype.itemsize == 1 else 12 if pixels.dtype.kind == "u" else 16
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(data, name, value)
    swapped = pixels.byteswap() if syntax == uid.ExplicitVRBigEndian else pixels
    data.PixelData = encapsulate(list(frames)) if frames else swapped.tobytes()
    data["PixelData"].VR = "OB" if frames or pixels.dtype.itemsize == 1 else "OW"
    if frames is None:
        data.compress(syntax, generate_instance_uid=False)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _niftis(deep):
    import nibabel

    volume = np.stack([deep] * 9, -1).astype(np.int16)
    one = nibabel.Nifti1Image(volume, np.diag([-1.0, 1, 3, 1]))
    two = nibabel.Nifti2Image(volume.astype(np.float32), np.eye(4))
    return {
        "nifti": one.to_bytes(),
        "nifti 2 float": two.to_bytes(),
        "nifti gz": gzip.compress(one.to_bytes(), 1),
        "nifti 2 gz": gzip.compress(two.to_bytes(), 1),
    }


if __name__ == "__main__":
    raise SystemExit(main())
