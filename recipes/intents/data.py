"""The rows of recipes/intents.yaml: requests with their intents, from three public collections.

One candidate for each of four domains of CLINC150 (Larson et al., 1909.02027; CC BY 3.0), one of SNIPS (Coucke et al.,
1805.10190; CC0), and one of BANKING77 (Casanueva et al., 2003.04807; CC BY 4.0) whose labels are shuffled on purpose. The
target is BANKING77: validation and test have no row in common with each other or with any candidate.
"""

import argparse
import csv
import io
import json
import random
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SOURCE = "https://raw.githubusercontent.com"
CLINC = "clinc/oos-eval/master/data/"
SNIPS = "sonos/nlu-benchmark/master/2017-06-custom-intent-engines/"
BANKING = "PolyAI-LDN/task-specific-datasets/master/banking_data/"
DOMAINS = ("banking", "credit_cards", "home", "travel")
SKILLS = (
    "AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook", "SearchCreativeWork", "SearchScreeningEvent",
)  # fmt: skip
ROWS = 900  # of every candidate
TARGET = {"validation": 600, "test": 1000}
SEED = 42

Rows = list[dict[str, str]]


def fetch(source: str, path: str) -> str:
    """The text of a file.

    Raises:
        SystemExit: it cannot be had.
    """
    try:
        with urllib.request.urlopen(f"{source}/{path}", timeout=60) as answer:
            content: bytes = answer.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise SystemExit(
            f"could not download {source}/{path} ({error}); this needs a connection, or --source: a mirror, or "
            "file:///folder with the three repositories in it"
        ) from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:  # as some files of SNIPS are
        return content.decode("latin-1")


def words(name: str) -> str:
    """A label in words: `Refund_not_showing_up`, `PlayMusic`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", name).strip(" ?").lower()


def clinc(source: str) -> dict[str, Rows]:
    """The training rows of every domain that is a candidate."""
    domains: dict[str, list[str]] = json.loads(fetch(source, CLINC + "domains.json"))
    rows: list[list[str]] = json.loads(fetch(source, CLINC + "data_full.json"))["train"]
    return {
        f"clinc_{domain}": [{"text": text, "label": words(one)} for text, one in rows if one in domains[domain]]
        for domain in DOMAINS
    }


def snips(source: str) -> Rows:
    """Its requests come in pieces."""
    found = []
    for skill in SKILLS:
        given: list[dict[str, Any]] = json.loads(fetch(source, f"{SNIPS}{skill}/train_{skill}.json"))[skill]
        found += [
            {"text": "".join(piece["text"] for piece in one["data"]).strip(), "label": words(skill)} for one in given
        ]
    return found


def banking(source: str, part: str) -> Rows:
    """A part of BANKING77."""
    rows = csv.DictReader(io.StringIO(fetch(source, f"{BANKING}{part}.csv")))
    return [{"text": row["text"].strip(), "label": words(row["category"])} for row in rows]


def draw(rows: Rows, count: int, taken: set[str]) -> Rows:
    """So many rows, none of which asks what was asked before."""
    shuffled = random.Random(SEED).sample(rows, len(rows))
    found: Rows = []
    for row in shuffled:
        key = " ".join(row["text"].split()).casefold()
        if len(found) < count and key and key not in taken:
            taken.add(key)
            found.append(row)
    return found


def main(folder: Path, source: str) -> None:
    """Downloads and writes, unless it is all there.

    Raises:
        SystemExit: no connection, or files of another form.
    """
    names = [f"clinc_{domain}" for domain in DOMAINS] + ["snips", "banking77_wrong"]
    names += [f"target_banking77_{part}" for part in TARGET]
    if all((folder / f"{name}.jsonl").exists() for name in names):
        print(f"data: {folder} (cached)")
        return
    print(f"data: downloading CLINC150, SNIPS and BANKING77 from {source} (about 5 MB)", flush=True)
    taken: set[str] = set()
    try:
        # Targets draw first, so that no candidate holds one of their rows.
        train, test = banking(source, "train"), banking(source, "test")
        made = {"target_banking77_test": draw(test, TARGET["test"], taken)}
        made["target_banking77_validation"] = draw(train, TARGET["validation"], taken)
        made["banking77_wrong"] = draw(train, ROWS, taken)
        labels = [row["label"] for row in made["banking77_wrong"]]
        random.Random(SEED).shuffle(labels)
        made["banking77_wrong"] = [
            row | {"label": label} for row, label in zip(made["banking77_wrong"], labels, strict=True)
        ]
        made |= {name: draw(rows, ROWS, taken) for name, rows in clinc(source).items()}
        made["snips"] = draw(snips(source), ROWS, taken)
    except (KeyError, ValueError, TypeError) as error:
        raise SystemExit(f"what {source} holds has another form than it had ({error!r}): not used") from error
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in made.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"data: {path}: {len(rows)} rows, {len({row['label'] for row in rows})} labels")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Puts the rows of recipes/intents.yaml into a folder.")
    parser.add_argument("folder", type=Path, help="where to, for example .demo/intents")
    parser.add_argument("--source", default=SOURCE, help="where the three repositories are (default: %(default)s)")
    given = parser.parse_args()
    main(given.folder, given.source.rstrip("/"))
