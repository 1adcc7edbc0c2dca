"""The run folder: its paths, its lock, its configuration."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import yaml
from filelock import FileLock, Timeout

from m2m_hf.errors import InputError

END = "...\n"  # of a whole YAML document


def read_config(path: Path) -> dict[str, Any]:
    """`OUT/config.yaml`.

    Raises:
        InputError: it is not whole.
    """
    try:
        text = path.read_text(encoding="utf-8")
        given = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); m2m select --config writes it again") from error
    if not text.endswith(END) or not isinstance(given, dict):
        raise InputError(f"{path} was cut short; m2m select --config writes it again")
    return given


class RunFolder:
    """The paths of one run; the layout is a contract that tools and people read (ARCHITECTURE.md).

    `held` is the one that this process has claimed last.
    """

    held: ClassVar["RunFolder | None"] = None

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.config = self.root / "config.yaml"
        self.adapters = self.root / "adapters"
        self.head = self.root / "head.safetensors"
        self.targets = self.root / "targets.json"
        self.trials = self.root / "trials.jsonl"
        self.mixture = self.root / "mixture"
        self.recipe = self.root / "recipe.yaml"
        self.final = self.root / "final"
        self.trained = self.root / "trained"
        self.fidelity = self.root / "fidelity.json"
        self.summary = self.root / "summary.json"
        self.report = self.root / "report.html"
        self.pictures = self.root / "pictures"
        self.log = self.root / "log.txt"
        self._lock = FileLock(self.root / ".lock", is_singleton=True)  # one for all users in this process

    @property
    def rows(self) -> Path:
        """The rows of the chosen mixture: `train.jsonl`, or `train.parquet` of images."""
        images = self.mixture / "train.parquet"
        return images if images.exists() else self.mixture / "train.jsonl"

    def refuse_links(self) -> None:
        """Refuses links that lead out of the folder: one of somebody else's could have us write or read anywhere.

        Raises:
            InputError: naming one.
        """
        root = self.root.resolve()
        for place, folders, files in os.walk(root):
            for path in (Path(place) / name for name in (*folders, *files)):
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    raise InputError(
                        f"{path} is a link to {path.resolve()}; a run folder holds its own files. Move what it points to there, "
                        "or link the whole folder"
                    )

    def lock(self) -> None:
        """Claims the folder for this process until it ends, however it ends.

        Raises:
            InputError: another process is at work in it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            RunFolder.held = self
        except Timeout:
            raise InputError(
                f"another process is at work in {self.root}; wait for it to end, or choose another --output_dir"
            ) from None
        except OSError as error:
            raise InputError(f"output_dir: {self.root} cannot be written to ({error})") from error


def disk_is_full(error: BaseException | None, folder: Path | None = None) -> bool:
    """Whether that is what an error comes from, whichever library it has passed through.

    Args:
        folder: what was written to beside the run folder.
    """
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error) or "quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    folders = [folder, RunFolder.held and RunFolder.held.root]
    try:
        return any(shutil.disk_usage(path).free < 1 << 16 for path in folders if path)
    except OSError:
        return False
