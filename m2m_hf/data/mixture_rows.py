"""A mixture as rows."""

import json
import random
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.table import embed_table_storage

from m2m_hf.core.mixture import Mixture, row_counts
from m2m_hf.data.rows import Candidate
from m2m_hf.storage.files import digest_of, staging_path, sync, write_atomic, write_json


def mixture_dataset(counts: Mapping[str, int], candidates: Mapping[str, Candidate], seed: int) -> Dataset:
    """Name -> count rows of each candidate, shuffled. Rows are drawn with `seed`; none is twice before all are once."""
    draw = random.Random(seed)
    parts = []
    for name, count in sorted(counts.items()):
        whole = candidates[name].rows
        times, more = divmod(count, len(whole))
        numbers = [*range(len(whole))] * times + draw.sample(range(len(whole)), more)
        parts.append(whole.select(numbers))
    order = list(range(sum(map(len, parts))))
    draw.shuffle(order)
    return concatenate_datasets(parts).select(order)


def write_mixture(folder: Path, mixture: Mixture, candidates: Mapping[str, Candidate], seed: int) -> Path:
    """Writes the mixture's rows, shuffled with `seed`, as `train.jsonl` or `train.parquet` with its `manifest.json`.

    With equal weights it is the union of the candidates. Otherwise rows are drawn from each in proportion to its weight, without
    replacement, as many as the candidates allow. The same mixture and seed give the same bytes. Of images, and where
    `load_dataset("json")` would read other rows, such as dates for texts, the file is parquet.
    """
    counts = row_counts(mixture, {name: len(candidates[name].rows) for name in mixture.names})
    rows = mixture_dataset(counts, candidates, seed)
    train, other = folder / "train.jsonl", folder / "train.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [] if "image" in rows.column_names else [json.dumps(row, ensure_ascii=False) for row in rows]
    if lines:
        write_atomic(train, "".join(line + "\n" for line in lines))
    if not lines or not reads_as(train, lines):
        train, other = other, train
        partial = staging_path(train)
        # Embeds the images themselves; of image files, rows hold only their paths on this machine.
        whole = rows.flatten_indices().with_format("arrow").map(embed_table_storage, batched=True, batch_size=256)
        whole.with_format(None).to_parquet(partial)
        partial.rename(train)
    other.unlink(missing_ok=True)
    sync(folder)
    sources = {
        name: {
            "weight": weight,
            "rows": counts[name],
            "rows_of_the_candidate": len(candidates[name].rows),
            "tokens": candidates[name].tokens * counts[name] // len(candidates[name].rows),
            "fingerprint": candidates[name].fingerprint,
            "source": candidates[name].config.to_json(),
        }
        for name, weight in mixture.items
    }
    found = {"rows": len(rows), "seed": seed, "file": train.name, "sha256_16": digest_of(train), "sources": sources}
    write_json(folder / "manifest.json", found)
    return train


def reads_as(path: Path, lines: Sequence[str]) -> bool:
    """True if `load_dataset("json")`, by which TRL reads a recipe's rows, gives the rows of these lines of JSON."""
    with TemporaryDirectory(dir=path.parent, prefix=".") as cache:
        try:
            rows = load_dataset("json", data_files=escape(str(path)), split="train", cache_dir=cache)
            return len(rows) == len(lines) and all(
                json.dumps(row, ensure_ascii=False) == line for row, line in zip(rows, lines, strict=True)
            )
        except Exception:  # of several libraries, some at the first row
            return False
