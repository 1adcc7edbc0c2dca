"""Files that have kept their size and times: their digests are remembered, and need not be computed again."""

import os
from contextlib import suppress
from pathlib import Path

from m2m_hf.storage.files import digest_of, read_json_or_empty, write_json

NAME = ".digests.json"


def stamp(path: str | Path) -> list[int]:
    """Size, modification time and change time: all the same, the content is too. Links are followed."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


class Digests:
    """Digests of the files of a run folder, computed only for files that have changed since `save`; with `full` for all."""

    def __init__(self, root: Path, full: bool = False) -> None:
        self.root = root
        self._known = {} if full else read_json_or_empty(root / NAME)
        self._seen: dict[str, list[int | str]] = {}

    def of(self, path: Path) -> str:
        """The digest of a file, see `digest_of`."""
        name = Path(os.path.relpath(path, self.root)).as_posix()
        known, now = self._known.get(name), stamp(path)
        if not (isinstance(known, list) and len(known) == 4 and known[:3] == now and isinstance(known[3], str)):
            known = [*now, digest_of(path)]
        self._seen[name] = known
        return str(known[3])

    def save(self) -> None:
        """Remembers every digest that was asked for; a folder that cannot be written to stays as it is."""
        with suppress(OSError):
            write_json(self.root / NAME, self._seen)
