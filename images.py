"""From rows of image files to batches: reading a file as it means it, augmenting, loading.

What Pillow alone would take for something else (16-bit colours, planes, signed and inverted
numbers, useless alpha, turned TIFFs) is recognised from the file's own tags, and read rightly or
refused with one sentence. The rows come from data.py.
"""

import hashlib
import os
import re
import signal
import sys
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import PIL
import torch
from PIL import Image, ImageChops, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".avif", ".tif", ".tiff",
           ".gif")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # paper, F.2.2


class DataError(ValueError):
    """Images or labels that can't be used; one sentence that names the file and what to do."""


def require(fine: object, complaint: str) -> None:
    if not fine:
        raise DataError(complaint)


def such(names: list[str], words: str) -> list[str]:
    """A note, if there is something to be noted."""
    return [f"{len(names)} {words}, such as {names[0]}"] if names else []


@dataclass(frozen=True)
class Row:
    """One image: path relative to the data folder, names of its classes, group (such as the
    patient) and part of the split; "" where there is none."""
    path: str
    labels: tuple[str, ...] = ()
    group: str = ""
    split: str = ""


@dataclass
class ImageSet:
    """`rows` and `classes` in a fixed order (no classes: no labels), `notes` for the user.
    `window` is where the intensities of images of more than 8 bits lie; None: each in its own."""
    folder: Path
    rows: list[Row]
    classes: list[str]
    multi_label: bool = False
    notes: list[str] = field(default_factory=list)
    window: tuple[float, float] | None = None

    def part(self, name: str) -> list[Row]:
        return [row for row in self.rows if row.split == name]

    def known(self, rows: list[Row]) -> list[int]:
        """Which of them have known classes; with several an image, "none of them" is known too."""
        return [i for i, row in enumerate(rows) if row.labels or self.multi_label]

    def labelled(self, rows: list[Row]) -> list[Row]:
        """Those whose classes are known."""
        return [rows[i] for i in self.known(rows)]

    def truth(self, rows: list[Row]) -> np.ndarray:
        """Multi-hot float labels `(N, K)`."""
        column = {name: k for k, name in enumerate(self.classes)}
        truth = np.zeros((len(rows), len(column)), np.float32)
        for i, row in enumerate(rows):
            truth[i, [column[name] for name in row.labels]] = 1
        return truth


# %% one file

# Tags of a TIFF, by which Pillow's reading of it is judged.
BITS, COMPRESSION, PHOTOMETRIC, SAMPLES = 258, 259, 262, 277
PLANES, COLOURS, EXTRA, KIND = 284, 320, 338, 339
KINDS = {1: "whole numbers", 2: "signed numbers", 3: "floats"}


def _header(file) -> tuple[Image.Image, dict, bool]:
    """An image opened but not decoded, its TIFF tags, and whether it has more than 8 bits."""
    image = Image.open(file)
    deep = image.mode[0] in "IF" or (image.mode != "CMYK" and ";16" in str(image.tile))
    return image, getattr(image, "tag_v2", {}), deep


def _decode(file) -> tuple[Image.Image, np.ndarray | None, bool]:
    """The upright image; where it has more than 8 bits its values `(H, W)` or `(H, W, 3)`; and
    whether low values are bright. Where Pillow takes a file for what it isn't, its tags say so."""
    image, tags, deep = _header(file)
    bits, kind, extra = tags.get(BITS, (8,))[0], tags.get(KIND, (1,))[0], tags.get(EXTRA, ())
    multiplied = 1 in extra  # the colours by their alpha
    require(tags.get(PLANES) != 2 or tags.get(SAMPLES, 1) == 1
            or bits == 8 and image.mode[:3] == "RGB" and not multiplied,
            "planes other than 8-bit RGB are misread here")
    require(image.mode != "La", "its grey times alpha is misread here")
    require("LA;16" not in str(image.tile) and not (deep and "transparency" in image.info),
            "its transparency of 16 bits is misread here")
    image, values = _load(image), None
    if tags.get(PHOTOMETRIC) == 3 and max(tags[COLOURS]) < 256:  # a palette of 8 bits, not 16
        image.putpalette(bytes(tags[COLOURS]), "RGB;L")
    if kind == 2 and image.mode == "L":  # signed bytes
        image = image.point(lambda value: value ^ 128)
    if deep and image.mode[0] in "IF":
        values = np.asarray(image, np.float32)
        if bits == 32 and kind == 1:  # which Pillow has in signed numbers
            values = values % 2.0 ** 32
    elif deep:
        low = np.asarray(_load(_header(file)[0], lower=True))[..., :3]
        values = np.asarray(image)[..., :3] * np.float32(256) + low
    if multiplied:  # so they are already as they look over black
        image = image.convert("RGB")
    return image, values, tags.get(PHOTOMETRIC) == 0


def _load(image: Image.Image, lower: bool = False) -> Image.Image:
    """Decoded and upright. Of colours of 16 bits Pillow reads the upper bytes, and the `lower`
    ones if told that bytes come in the other order."""
    other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
    for i, tile in enumerate(image.tile if image.format in ("TIFF", "PNG") else ()):
        form, *more = [tile.args] if isinstance(tile.args, str) else tile.args
        form = form.replace("RGBa", "RGBA")  # colours as they are, not divided by alpha
        if tile.codec_name == "libtiff":  # which has put bytes in order already
            form = re.sub(r"(;\d+)B", r"\1N", form)
        form = form[:-1] + other[form[-1]] if lower else form
        image.tile[i] = tile._replace(args=(form, *more) if more else form)
    image.load()
    return ImageOps.exif_transpose(image)


def _range(values: np.ndarray) -> tuple[float, float]:
    """From where to where intensities lie, a few hot pixels and fill values left out."""
    values = values[np.abs(values) < 1e30]  # nor is anything that is no number
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, (0.5, 99.5), method="nearest").tolist()
    return (low, high) if low < high else (float(values.min()), float(values.max()))


def load_image(path: str | Path, window: tuple[float, float] | None = None) -> Image.Image:
    """Any supported file as 8-bit RGB: grey, palette, alpha (over black; not where it is the same
    everywhere), CMYK; the first page of several; turned upright. More than 8 bits are scaled by
    `window`, else by the image's own range. Raises `DataError`, naming the file."""
    try:
        with open(path, "rb") as file:  # by its name, Pillow 13 scrambles some turned TIFFs
            image, values, inverted = _decode(file)
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        words = getattr(error, "strerror", None) or " ".join(str(error).split())
        words = "of no form that Pillow knows" if unknown else words
        raise DataError(f"{path} can't be read as an image ({_form(path)}{words}); mend it, save "
                        "it as 8-bit RGB or 16-bit grey, or add --skip-bad") from None
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if values is not None:
        low, high = window or _range(values)
        values = (np.nan_to_num(values, nan=low).clip(low, high) - low) / ((high - low) or 1)
        values = 1 - values if inverted else values
        image = Image.fromarray((255 * values).round().astype(np.uint8))
    image = image.convert("RGB")
    if alpha and len(set(alpha.getextrema())) > 1:
        image.paste(0, mask=ImageChops.invert(alpha))  # in place: large ones fill the memory
    return image


def _form(path: str | Path) -> str:
    """What a TIFF that can't be read holds; "" for other files."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            head += file.read(8) if 43 in head[2:4] else b""  # a BigTIFF
            tags = TiffImagePlugin.ImageFileDirectory_v2(head)
            file.seek(tags.next)
            tags.load(file)
        bits, kind = tags.get(BITS, (1,)), KINDS.get(tags.get(KIND, (1,))[0], "other numbers")
        return (f"a TIFF of {len(bits)} x {bits[0]} bits, {kind}, photometric "
                f"{tags.get(PHOTOMETRIC)}, planes {tags.get(PLANES)}, compression "
                f"{tags.get(COMPRESSION)}: ")
    except Exception:
        return ""


def _several_pages(image: Image.Image) -> bool:
    return getattr(image, "n_frames", 1) > 1 and image.format != "MPO"


def facts(path: str | Path) -> dict[str, str]:
    """What a file says of its size, mode and pages, and whether an alpha channel is of use."""
    try:
        with open(path, "rb") as file:
            image, _, deep = _header(file)
            found = {"sizes": f"{image.width} x {image.height}",
                     "modes": f"{image.mode} of 16 bits or more" if deep else image.mode}
            if _several_pages(image):
                found["pages"] = "several"
            if image.has_transparency_data:
                low, high = image.convert("RGBA").getextrema()[3]
                found["alpha"] = "the same everywhere: left out" if low == high else "used"
            return found
    except Exception:  # `load_image` says what is wrong
        return {"modes": "unreadable"}


def with_window(images: ImageSet, choice: str | tuple[float, float] = "auto") -> ImageSet:
    """The same with a window for more than 8 bits: `image` (each its own), (low, high), or
    `auto`, which is the range of a sample of the training part."""
    rows = images.part("train") or images.rows
    rows = rows[:: max(1, len(rows) // 200)]
    draw, values, several = np.random.default_rng(0), [], []
    for row in rows:
        try:
            with open(images.folder / row.path, "rb") as file:
                image, _, deep = _header(file)
                several += [row.path] * _several_pages(image)
                if deep and choice == "auto":
                    flat = _decode(file)[1].ravel()
                    values.append(flat[draw.integers(flat.size, size=10_000)])
        except Exception:  # `load_image` says what is wrong
            continue
    window = None if choice in ("auto", "image") else choice
    window = _range(np.concatenate(values)) if values else window
    notes = such(several, f"images of {len(rows)} looked at have several pages; the first is read")
    return replace(images, notes=images.notes + notes, window=window)


def good_rows(images: ImageSet) -> ImageSet:
    """Decode every image once and leave out, with a note, those that can't be read."""
    bad = {}
    for row in images.rows:
        try:
            load_image(images.folder / row.path)
        except DataError as error:
            bad[row.path] = error
    rows = [row for row in images.rows if row.path not in bad]
    require(rows, f"{images.folder} holds no image that can be read")
    notes = such(list(bad), "images that can't be read are left out")
    return replace(images, rows=rows, notes=images.notes + notes)


# %% augmenting

AUGMENTATIONS = ("cass", "blur", "solarize", "blur+solarize")


def augmentation(size: int, name: str = "cass") -> Callable[[Image.Image], torch.Tensor]:
    """PIL image -> normalised float tensor `(3, size, size)`, by the paper's list (F.2.2).

    `cass` is the paper's; `blur`, `solarize` and `blur+solarize` add BYOL's (C.3); `none` only
    resizes and normalises, for evaluation. "Jitter or perspective" and "jitter or affine" are
    read as the paper words them: one of the two, each as likely.
    """
    def one_of(other: v2.Transform) -> v2.Transform:
        jitter = v2.ColorJitter(0.2, 0.2, 0.2, hue=0.1)  # strengths: the notebook's; hue: ours
        return v2.RandomApply([v2.RandomChoice([jitter, other])], p=0.3)

    bilinear = v2.InterpolationMode.BILINEAR
    steps: list[Callable] = [v2.Resize((size, size), bilinear)]
    if name != "none":
        steps += [one_of(v2.RandomPerspective(0.2, p=1.0, interpolation=bilinear)),
                  one_of(v2.RandomAffine(10, interpolation=bilinear)),
                  v2.RandomHorizontalFlip(0.3), v2.RandomVerticalFlip(0.3)]
    if "blur" in name:
        kernel = 2 * (size // 20) + 1  # BYOL: 23 of 224 pixels
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=0.2))
    if "solarize" in name:
        steps.append(v2.RandomSolarize(128, p=0.2))
    return v2.Compose([*steps, normalised])


def normalised(image: Image.Image) -> torch.Tensor:
    """An RGB image as normalised float tensor `(3, H, W)`: to the bit what v2's ToImage, ToDtype
    and Normalize make of it, in a third of the time at 96 pixels."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
    return pixels.mul_(1 / 255).sub_(mean).div_(deviation)


# %% loading


class ImageRows(Dataset):
    """Images of `rows`, with their labels `(K,)` if `labelled`, asked for by (epoch, index): the
    augmentation of image i in epoch e is drawn from a stream seeded by (seed, e, i), so workers,
    a cache or a pause change nothing."""

    def __init__(self, images: ImageSet, rows: list[Row], transform: Callable, seed: int = 0,
                 labelled: bool = False, cache: "ImageCache | None" = None) -> None:
        self.folder, self.window = images.folder, images.window
        self.paths = [row.path for row in rows]
        self.transform, self.seed, self.cache = transform, seed, cache
        self.truth = torch.from_numpy(images.truth(rows)) if labelled else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        load = self.cache.load if self.cache else load_image
        image = load(self.folder / self.paths[index], self.window)
        stream = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0]
        with torch.random.fork_rng(devices=[]):  # the training loop's own stream stays as it was
            torch.default_generator.manual_seed(int(stream >> 1))
            image = self.transform(image)
        return image if self.truth is None else (image, self.truth[index])


class EpochBatches:
    """Batches of (epoch, index); the order of epoch e is a permutation seeded by (seed, e)."""

    def __init__(self, images: int, batch_size: int, seed: int, shuffle: bool,
                 drop_last: bool) -> None:
        self.images, self.size = images, min(batch_size, images)
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0
        stop = images - images % self.size if drop_last else images
        starts = list(range(0, stop, self.size))
        if shuffle and self.size > 1 and stop - starts[-1] == 1:
            starts.pop()  # batch norm can't train on one image: it joins the batch before
        self.bounds = list(zip(starts, [*starts[1:], stop]))

    def __len__(self) -> int:
        return len(self.bounds)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.images)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.images)
        for begin, end in self.bounds:
            yield [(self.epoch, int(i)) for i in order[begin:end]]


class EpochLoader(DataLoader):
    """A DataLoader whose order and augmentation follow from (seed, epoch) alone."""

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next, from 0."""
        self.batch_sampler.epoch = epoch

    def __iter__(self) -> Iterator:
        batches = super().__iter__()
        if not (self.batch_sampler.shuffle and sys.stdout.isatty()):
            return batches
        return iter(tqdm(batches, f"epoch {self.batch_sampler.epoch + 1}", len(self), leave=False,
                         unit=" images", unit_scale=self.batch_sampler.size))


def make_loader(dataset: Dataset, batch_size: int, *, seed: int = 0, shuffle: bool = True,
                drop_last: bool = False, workers: int = 0) -> EpochLoader:
    """Batches `(N, 3, size, size)`, with `(N, K)` labels where the dataset has them."""
    batches = EpochBatches(len(dataset), batch_size, seed, shuffle, drop_last)
    return EpochLoader(dataset, batch_sampler=batches, num_workers=workers,
                       persistent_workers=workers > 0, worker_init_fn=_quiet_worker,
                       pin_memory=torch.cuda.is_available(),
                       generator=torch.Generator())  # else it draws from the global stream


def _quiet_worker(_: int) -> None:
    """One thread a worker; Ctrl-C is for the main process, which ends the workers itself."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# %% the cache


class ImageCache:
    """Images resized to `(size, size)`, each kept in `folder` in a file of 3 bytes a pixel once it
    was asked for. Resizing is the first step of every augmentation, so what comes out of the others
    is the same to the bit. A file is named by a hash of what it was made from, so that a changed
    image gets another, and renamed when whole, whoever else writes it. Raises `DataError`."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, (size, size)
        self.resize = v2.Resize(self.size, v2.InterpolationMode.BILINEAR)
        self._write("CACHEDIR.TAG", b"Signature: 8a477f597d28d172789f06886806bc55\n")  # no backups

    def load(self, path: Path, window: tuple[float, float] | None = None) -> Image.Image:
        """What `load_image` returns, resized."""
        if not path.is_file():
            return load_image(path)  # which says what is wrong
        state = path.stat()
        made_from = (path.absolute(), self.size, window, PIL.__version__,
                     state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        name = hashlib.sha256(repr(made_from).encode()).hexdigest()[:32] + ".rgb"
        try:
            return Image.frombytes("RGB", self.size, (self.folder / name).read_bytes())
        except (FileNotFoundError, ValueError):  # not there yet, or cut off
            image = self.resize(load_image(path, window))
        self._write(name, image.tobytes())
        return image

    def _write(self, name: str, content: bytes) -> None:
        aside = self.folder / f"{name}.{uuid.uuid4().hex}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(content)
            os.replace(aside, self.folder / name)
        except OSError as error:
            if aside.is_file():
                aside.unlink()
            raise DataError(f"--cache {self.folder} can't be written: {error.strerror}") from None
