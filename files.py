"""Files that strangers wrote, read into numpy arrays, and how they are fetched. It needs no torch.

What a file declares is compared with the bytes that are there before memory is taken, nothing in it is run, and no name
in it becomes a path. A reader raises its documented errors on whatever bytes (test_iae.py mutates them by thousands);
data.py makes an `InputError` of them, which names the file and says what to do.
"""

import contextlib
import hashlib
import http.client
import io
import math
import os
import re
import struct
import subprocess
import sys
import tarfile
import threading
import time
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")  # told by the content: no other decoder of Pillow is asked
MOST_PIXELS, MOST_SIDE = 25_000_000, 10_000  # a larger picture counts as broken
LARGE = threading.Lock()  # held for a picture of many pixels: one at a time, since it may need 300 MB
MOST_BYTES = 2**28  # of a picture file or a list: a larger one counts as broken
MOST_BROKEN = 0.01  # a larger share of broken pictures stops the run
DEFLATE_RATIO = 1032  # zlib cannot expand more: what declares more bytes than that is not what it says
SILENT_SECONDS = 10  # a mirror that sends nothing for so long is given up
DOWNLOAD_SECONDS = 600  # one file, however slowly it drips, and a second for every SLOWEST bytes of it
SLOWEST = 100_000
DOWNLOAD_ERRORS = (OSError, ValueError, KeyError, http.client.HTTPException, tarfile.TarError, EOFError, zlib.error,
                   subprocess.SubprocessError)
# What damaged bytes make zipfile and Pillow raise, beside the ValueErrors of this file.
ZIP_ERRORS = (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, struct.error, OverflowError,
              NotImplementedError)  # of a zip "version" to come
PICTURE_ERRORS = (*ZIP_ERRORS, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)


class InputError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do."""


def brief(error: BaseException | str) -> str:
    """A message or name on one line of at most 150 printable characters: a stranger may have written it."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(text.split())[:150] or type(error).__name__


def read_mat(path: Path, most: dict[str, int]) -> dict[str, np.ndarray]:
    """The variables of a MATLAB v5 file that `most` names, of at most so many bytes each: uint8 or float64 arrays.

    MATLAB's first index runs fastest, so its A x B x C is shape (C, B, A) here. Numeric arrays of the little-endian
    form are read, compressed or not; the file must hold no other variables before these. Raises OSError, ValueError
    or zlib.error. https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
    """
    found = {}
    with open(path, "rb") as file:
        total, start = os.fstat(file.fileno()).st_size, 128
        head = file.read(start)
        if head[:10] != b"MATLAB 5.0" or head[124:] != b"\0\1IM":
            raise ValueError("not a little-endian MATLAB v5 file")
        while len(found) < len(most):
            file.seek(start)
            kind, length = struct.unpack("<II", exactly(file, 8))
            start += 8 + length
            if start > total:
                raise ValueError("truncated")
            stream = file
            if kind == 15:  # miCOMPRESSED holds another element
                stream = Inflated(file, length)
                kind = struct.unpack("<II", exactly(stream, 8))[0]
            if kind != 14:  # miMATRIX
                raise ValueError(f"an element of type {kind} in place of an array")
            flags, dims = element(stream, 6, 8), element(stream, 5, 16)  # miUINT32, miINT32
            name = element(stream, 1, 64).decode("latin1")  # miINT8
            if name not in most or name in found:
                raise ValueError(f"an unexpected variable {name!r}")
            if len(flags) != 8 or flags[0] not in (6, 9) or flags[1] & 8 or len(dims) % 4:  # double, uint8; complex
                raise ValueError(f"{name} is not a plain array of double or uint8")
            kind, size, inline = tag(stream)
            dtype = {2: np.dtype(np.uint8), 9: np.dtype("<f8")}.get(kind)  # a double may be stored as uint8
            shape = struct.unpack(f"<{len(dims) // 4}I", dims)[::-1]
            if dtype is None or size != math.prod(shape) * dtype.itemsize or size > most[name]:
                raise ValueError(f"{name} declares {size} bytes of type {kind} for shape {shape[::-1]}")
            flat = read_array(io.BytesIO(inline) if inline else stream, size, length)
            if stream is not file and (len(stream.read(8)) > 7 or not stream.pump.eof):  # padding at most; the checksum
                raise ValueError(f"{name} has no proper end")
            found[name] = flat.view(dtype).reshape(shape)
    return found


def tag(stream: BinaryIO) -> tuple[int, int, bytes]:
    """(type, bytes, data) of the next MAT element; the data of a small one lie in the tag itself, else b""."""
    raw = exactly(stream, 8)
    kind, size = struct.unpack("<II", raw)
    if kind >> 16 == 0:
        return kind, size, b""
    if kind >> 16 > 4:
        raise ValueError(f"a small element of {kind >> 16} bytes")
    return kind & 0xFFFF, kind >> 16, raw[4 : 4 + (kind >> 16)]


def element(stream: BinaryIO, kind: int, most: int) -> bytes:
    """The data of the next MAT element, which must be of this type and of at most `most` bytes."""
    found, size, data = tag(stream)
    if found != kind or size > most:
        raise ValueError(f"an element of type {found} and {size} bytes in an array's head")
    return data or exactly(stream, size + -size % 8)[:size]  # padded to 8 bytes


def exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise ValueError("truncated")
    return data


class Inflated:
    """read(n) gives the next n bytes of the zlib stream in the next `length` bytes of a file, and never holds more."""

    def __init__(self, file: BinaryIO, length: int):
        self.file, self.left, self.rest, self.pump = file, length, b"", zlib.decompressobj()

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size and not self.pump.eof:
            if not self.rest:
                self.rest = self.file.read(min(self.left, 2**16))
                self.left -= len(self.rest)
            piece = self.pump.decompress(self.rest, size - len(data))
            if not piece and not self.rest:
                break
            data, self.rest = data + piece, self.pump.unconsumed_tail
        return bytes(data)


def read_npy(archive: zipfile.ZipFile, name: str) -> np.ndarray | None:
    """The array `name` of an open `.npz`, numbers only; None where it is not there. Raises ZIP_ERRORS.

    https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html: magic, version, header length, header.
    """
    info = archive.NameToInfo.get(f"{name}.npy")
    if info is None:
        return None
    with open_member(archive, info) as file:
        start = file.read(8)
        if start[:6] != b"\x93NUMPY" or start[6:7] not in (b"\1", b"\2", b"\3"):
            raise ValueError(f"{name} is not an array")
        length, = struct.unpack("<H", file.read(2)) if start[6] == 1 else struct.unpack("<I", file.read(4))
        if length > 10_000:
            raise ValueError(f"{name} has a header of {length} bytes")
        header = file.read(length).decode("latin1")
        match = re.fullmatch(r"\{'descr': '([<>|]?)(\w+)', 'fortran_order': (True|False), 'shape': "
                             r"\(((?:\d{1,18}, ?)*(?:\d{1,18})?)\), *\}\s*", header)
        if match is None or re.fullmatch("[biufc](1|2|4|8|16)", match[2]) is None:
            raise ValueError(f"{name} does not hold numbers; objects are never loaded")
        try:
            dtype = np.dtype(match[1] + match[2])
        except TypeError:  # such as b16
            raise ValueError(f"{name} has no type {match[2]!r}") from None
        shape = tuple(int(number) for number in match[4].replace(",", " ").split())
        size = math.prod(shape) * dtype.itemsize
        if len(shape) > 8 or info.file_size != size + len(start) + (2 if start[6] == 1 else 4) + length:
            raise ValueError(f"{name} has not the {size} bytes that its shape {shape} needs")
        flat = read_array(file, size, info.compress_size).view(dtype)
        if file.read(1):  # at the end, zipfile checks the CRC as well
            raise ValueError(f"{name} is too long")
    return flat.reshape(shape[::-1]).T if match[3] == "True" else flat.reshape(shape)


def open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> BinaryIO:
    """A member of a zip, to be read in pieces. ValueError where it is encrypted or of a rare compression."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 0x61:
        raise ValueError(f"{info.filename} is encrypted, a patch, or neither stored nor deflated")
    return archive.open(info)


def read_array(file: BinaryIO, size: int, packed: int) -> np.ndarray:
    """uint8 (size,): the next `size` bytes of `file`, made of at most `packed` compressed ones. ValueError if fewer."""
    if size > DEFLATE_RATIO * packed:
        raise ValueError(f"truncated ({packed} bytes cannot hold {size})")
    flat, done = np.empty(size, np.uint8), 0
    while piece := file.read(min(2**20, size - done)):
        flat[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
        done += len(piece)
    if done < size:
        raise ValueError(f"truncated ({done} of {size} bytes)")
    return flat


def central_square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box (left, upper, right, lower) of the largest central square of a picture of `size` = (width, height)."""
    width, height = size
    side = min(size)
    return (width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2


def read_picture(file, crop: Callable, shape: tuple[int, int], wanted: tuple[int, int] | None) -> np.ndarray:
    """uint8 (3, *shape): the part `crop(size)` of a picture, resized to `shape` = (height, width) by an anti-aliased
    bicubic filter. Raises PICTURE_ERRORS, also where the picture is too large, or not of size `wanted`.

    A JPEG much larger than needed is decoded at 1/2, 1/4 or 1/8 (Pillow's draft mode: fewer DCT coefficients), to no
    less than 1.5 times `shape`, and the box of the crop is divided likewise, fractions of a pixel included: the cut is
    the same, in a third less time.
    """
    with Image.open(file, formats=PICTURE_FORMATS) as picture:
        size = width, height = picture.size
        if wanted is not None and size != wanted:
            raise ValueError(f"{width}x{height} pixels, not {wanted[0]}x{wanted[1]}")
        if width * height > MOST_PIXELS or max(size) > MOST_SIDE:
            raise ValueError(f"{width}x{height} pixels are too many")
        box = crop(size)
        share = max(1.5 * shape[1] / (box[2] - box[0]), 1.5 * shape[0] / (box[3] - box[1]))
        if picture.format == "JPEG" and share < 1:
            picture.draft(picture.mode, (max(1, int(width * share)), max(1, int(height * share))))
            scale = round(max(size) / max(picture.size))
            box = tuple(min(edge / scale, limit) for edge, limit in zip(box, picture.size * 2))
        with LARGE if picture.width * picture.height > 4_000_000 else contextlib.nullcontext():
            if picture.mode.startswith("I"):  # 16 bits
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            transparent = "A" in picture.getbands() or "transparency" in picture.info
            mode = "RGBA" if transparent else "RGB"
            picture = picture if picture.mode == mode else picture.convert(mode)
            if picture.size != shape[::-1] or box != (0, 0, *picture.size):
                picture = picture.resize(shape[::-1], Image.Resampling.BICUBIC, box=box)
        if transparent:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        return np.asarray(picture).transpose(2, 0, 1)


def read_pictures(label: str, names: Sequence[str], read: Callable[[int], np.ndarray],
                  shape: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """(uint8 (N, 3, *shape), rows): `read(row)` for every name, by threads (Pillow decodes outside Python's lock).

    Broken pictures are left out of x and `rows`: one line names the first and counts them. InputError where more than
    MOST_BROKEN of all are broken. Little beside x is held in memory.
    """
    x, broken, start = np.empty((len(names), 3, *shape), np.uint8), {}, time.monotonic()

    def block(first: int) -> None:
        for row in range(first, min(first + 64, len(names))):
            try:
                x[row] = read(row)
            except PICTURE_ERRORS as error:
                broken[row] = brief(error)

    # Twice the cores: a thread that waits for a file or for Python's lock leaves its core to another.
    with quiet_pillow(), ThreadPoolExecutor(min(32, 2 * (os.cpu_count() or 1))) as pool:
        jobs = [pool.submit(block, first) for first in range(0, len(names), 64)]
        try:
            shown = start
            for count, job in enumerate(as_completed(jobs), 1):
                job.result()
                now, done = time.monotonic(), min(64 * count, len(names))
                if now - shown > 5:
                    speed, shown = done / (now - start), now
                    print(f"{label}: {done} of {len(names)} pictures, {speed:.0f} a second, "
                          f"{(len(names) - done) / speed:.0f} s left", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    rows = [row for row in range(len(names)) if row not in broken]
    if broken:
        first = min(broken)
        counted = (f"{len(broken)} of {len(names)} pictures cannot be read, the first {brief(names[first])} "
                   f"({broken[first]})")
        if len(broken) > MOST_BROKEN * len(names):
            raise InputError(f"{label}: {counted}; remove or mend them (up to {MOST_BROKEN:.0%} would be skipped)")
        print(f"warning: {label}: skipped: {counted}", file=sys.stderr)
        for to, row in enumerate(rows):  # in place: a second array would double the memory
            x[to] = x[row]
    return x[: len(rows)], rows


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's doubts about odd metadata are not printed, and a decompression bomb is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def find(data_dir: Path, folder: str, name: str, test: Callable = os.path.isfile) -> Path | None:
    """data_dir/name or data_dir/folder/name, whichever is there."""
    return next((path for path in (data_dir / name, data_dir / folder / name) if test(path)), None)


def is_official(path: Path, size: int, md5: str) -> bool:
    """Whether a file has the official size and md5."""
    if path.stat().st_size != size:
        return False
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest() == md5


def fetch(label: str, name: str, addresses: Sequence[str], size: int, md5: str, folder: Path, by_hand: str) -> Path:
    """Fetches an official file from the first address that gives it whole, into `folder`. InputError if none does."""
    path, reasons = folder / name, []
    part = path.with_name(f"{name}.{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({brief(error)}); choose another data folder") from None
    for address in addresses:
        try:
            with open(part, "wb") as file:
                download(address, file, size, label, name)
            if not is_official(part, size, md5):
                raise ValueError(f"not the official file ({part.stat().st_size} of {size} bytes, or another md5)")
            os.replace(part, path)
            return path
        except DOWNLOAD_ERRORS as error:
            reasons.append(f"{urlsplit(address).netloc}: {brief(error)}")
            print(f"{label}: no luck with {reasons[-1]}", file=sys.stderr)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
    raise InputError(f"{name} is not in {folder.parent} or {folder}, and no source gave it ({'; '.join(reasons)}): get "
                     f"it by hand from {by_hand} and put it in {folder}")


def download(url: str, file: BinaryIO, limit: int, label: str, name: str) -> None:
    """Writes the bytes at `url`, `limit` at most, to `file`, with progress on stderr. Raises DOWNLOAD_ERRORS."""
    parts, terminal = urlsplit(url), sys.stderr.isatty()
    print(f"{label}: fetching {name} from {parts.netloc}", file=sys.stderr, flush=True)
    done, start, shown = 0, time.monotonic(), 0.0
    try:
        with urllib.request.urlopen(url, timeout=SILENT_SECONDS) as response:
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            # read1 returns what has arrived: the clock is looked at even where the bytes drip.
            while chunk := response.read1(2**16):
                file.write(chunk)
                done += len(chunk)
                now = time.monotonic()
                if done > limit:
                    raise ValueError(f"{name} is too long")
                if now - start > DOWNLOAD_SECONDS + limit / SLOWEST:
                    raise ValueError(f"{name} takes too long")
                if terminal and now - shown > 0.1:
                    of = f" of {total / 1e6:.1f}" if total else ""
                    speed = done / (now - start + 1e-9)
                    left = f", {(total - done) / speed:.0f} s left" if total and total > 1e7 else ""
                    print(f"\r{label}: {done / 1e6:.1f}{of} MB{left}   ", end="", file=sys.stderr, flush=True)
                    shown = now
            if total is not None and done < total:
                raise ValueError(f"{name} ended after {done} of {total} bytes")
    finally:
        if shown:
            print(file=sys.stderr)
    print(f"{label}: {name}: {done / 1e6:.1f} MB in {time.monotonic() - start:.1f} s", file=sys.stderr)


def save(path: Path, *pieces):
    """Writes a file whole or not at all, through a temporary file beside it. Raises InputError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                for piece in pieces:
                    file.write(piece)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({brief(error)}); choose another data folder") from None
