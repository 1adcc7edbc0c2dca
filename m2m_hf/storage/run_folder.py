"""The run folder: its paths, its lock, its configuration."""

import contextlib
import errno
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import yaml
from filelock import FileLock, Timeout

from m2m_hf.errors import InputError
from m2m_hf.storage.files import read_json_or_empty

END = "...\n"  # ends a complete YAML document


def read_config(path: Path) -> dict[str, Any]:
    """Reads `OUT/config.yaml`; refuses one that is missing, damaged or was cut short."""
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}); m2m select --config writes it again") from error
    if not text.endswith(END) or not isinstance(config, dict):
        raise InputError(f"{path} was cut short; m2m select --config writes it again")
    return config


class RunFolder:
    """The paths of one run; the layout is a contract that tools and people read (ARCHITECTURE.md).

    `held` is the folder that this process claimed last.
    """

    held: ClassVar["RunFolder | None"] = None

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.config = self.root / "config.yaml"
        self.adapters = self.root / "adapters"
        self.row_digests = (
            self.root / "row_digests"
        )  # of what experts were trained on, named by `data` of their `training.json`
        self.head = self.root / "head.safetensors"
        self.targets = self.root / "targets.json"
        self.trials = self.root / "trials.jsonl"
        self.mixture = self.root / "mixture"
        self.answers = self.root / "answers"  # of rated models, named by the scores that they got
        self.cut_off = self.root / "cut_off.json"  # target -> how many answers did not end by themselves
        self.recipe = self.root / "recipe.yaml"
        self.clock = self.root / "clock.json"
        self.chat_template = self.root / "chat_template.jinja"
        self.final = self.root / "final"
        self.trained = self.root / "trained"
        self.fidelity = self.root / "fidelity.json"
        self.summary = self.root / "summary.json"
        self.report = self.root / "report.html"
        self.pictures = self.root / "pictures"
        self.log = self.root / "log.txt"
        self.unchanged = self.root / ".unchanged.json"  # what `cli/unchanged.py` knows of a finished run
        self._lock = FileLock(self.root / ".lock", is_singleton=True)  # shared by all users in this process

    def judged(self, target: str) -> Path:
        """What a target's judge was asked and said."""
        return self.root / "judgements" / f"{target}.jsonl"

    @property
    def rows(self) -> Path:
        """The rows of the chosen mixture: `train.jsonl` or `train.parquet`."""
        table = self.mixture / "train.parquet"
        return table if table.exists() else self.mixture / "train.jsonl"

    def started(self) -> datetime:
        """When the run started, for chat templates that print the date; now, where `clock.json` does not tell."""
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(str(read_json_or_empty(self.clock).get("started")))
        return datetime.now().replace(microsecond=0)

    def known_targets(self) -> dict[str, dict[str, Any]]:
        """Target -> the fingerprints of its parts, as `targets.json` has them; without what is damaged."""
        return {name: parts for name, parts in read_json_or_empty(self.targets).items() if isinstance(parts, dict)}

    def refuse_links(self) -> None:
        """Refuses links that lead out of the folder: a stranger's folder could make us read or write anywhere."""
        root = self.root.resolve()
        for place, folders, files in os.walk(root):
            for path in (Path(place) / name for name in (*folders, *files)):
                if path.is_symlink() and not leads_into(path, root):
                    raise InputError(
                        f"{path} is a link to {path.readlink()}, outside the run folder. Move the target here, or link the whole "
                        "folder"
                    )

    def lock(self) -> None:
        """Claims the folder until this process ends. From now on it may change, so `unchanged` is deleted."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self.unchanged.unlink(missing_ok=True)
            RunFolder.held = self
        except Timeout:
            raise InputError(
                f"another process is at work in {self.root}; wait for it to end, or choose another --output_dir"
            ) from None
        except OSError as error:
            raise InputError(f"output_dir: {self.root} cannot be written to ({error})") from error


def disk_is_full(error: BaseException | None, folder: Path | None = None) -> bool:
    """True if the error, which arose in `folder` or the run folder, means that the disk is full; whichever library raised it."""
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


def leads_into(link: Path, folder: Path) -> bool:
    """Whether a link leads to something in `folder`; not if that cannot be found out."""
    try:
        return link.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # not permitted; a loop
        return False
