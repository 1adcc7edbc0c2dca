"""Data for classification: labels and label spaces, texts, images, and messages about bad rows."""

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from pico import COLOURS, RGB, changed, intent_rows, m2m, picture, searcher, write_rows
from PIL import Image as Pixels

from m2m_hf import InputError, MergeToMixConfig, MergeToMixSearcher
from m2m_hf.config.candidates import CandidateConfig, DataConfig
from m2m_hf.config.parsing import parse
from m2m_hf.console import Terminal
from m2m_hf.data.classification import ClassificationReader, Length
from m2m_hf.data.mixture_rows import mixture_dataset
from m2m_hf.data.rows import image_digest
from m2m_hf.training.trainers import Collate


def test_with_a_label_space_every_row_is_a_choice_among_all_labels(intents, capsys):
    space = sorted({*COLOURS, "hello_there", "good_bye", "cold", "hot"})
    one = searcher(intents, labels={label: label.replace("_", " ") for label in space})
    one.train_adapters()
    assert one.run.task.head.labels == tuple(space)
    assert one.run.task.head.closed
    assert one.run.targets["intents"].rows[0].choices == tuple(space)
    with pytest.raises(
        InputError, match=r"candidates.colours, row 3.label: 'blue': expected one of the 2 labels of this run"
    ):
        searcher(intents, labels=["red", "green"]).check()
    # Mapped onto it, they are in it.
    given = changed(intents, labels=["red", "blue"])
    mapped = given["candidates"]["greetings"] | {"labels": {"hello_there": "red", "good_bye": "blue"}}
    target = given["targets"]["intents"]
    target["labels"] = {"red": "red", "cold": "blue", "hot": "red", "hello_there": "red"}
    changed(intents, candidates={"greetings": mapped}, targets={"intents": target})
    one = searcher(intents, "--output_dir", str(intents / "mapped"))
    assert set(one.run.candidates["greetings"].rows["label"]) == {"red", "blue"}
    assert {row.choices for row in one.run.targets["intents"].rows} == {("blue", "red")}


def test_label_columns_of_other_kinds(intents):
    rows = [{"text": row["text"], "label": i % 2} for i, row in enumerate(intent_rows(["red", "green"], 6))]
    of_classes = Features({"text": Value("string"), "label": ClassLabel(names=["red", "green"])})
    write_rows(intents / "n.jsonl", rows)
    numbers = {"path": "json", "data_files": str(intents / "n.jsonl"), "labels": {"0": "red", "1": "green"}}
    candidates = {"classes": Dataset.from_list(rows, features=of_classes), "numbers": numbers}
    ours, args, model_args = parse(intents / "intents.yaml")
    config = MergeToMixConfig(task=ours.task, candidates=candidates, targets=ours.to_yaml()["targets"])
    one = MergeToMixSearcher(config, args, model_args, Terminal(quiet=True))
    assert one.run.candidates["classes"].rows["label"] == one.run.candidates["numbers"].rows["label"]


def test_a_test_is_a_choice_among_the_labels_of_the_validation_set(intents):
    write_rows(intents / "test_intents.jsonl", intent_rows(["red", "cold"], 6, 200))
    one = searcher(intents)
    assert {row.choices for row in one.run.targets["intents"].test_rows} == {("cold", "hello_there", "hot", "red")}
    write_rows(intents / "test_intents.jsonl", intent_rows(["red", "warm"], 6, 200))
    with pytest.raises(InputError, match=r"test_data, row 2.label: expected one of cold.*got 'warm'"):
        searcher(intents).check()


def test_a_map_of_labels_is_that_of_the_whole_candidate(intents):
    rows = [
        row | {"shop": "s1" if row["label"] == "blau" or number > 8 else "s0"}
        for number, row in enumerate(intent_rows(["rot", "blau", "neu"], 12))
    ]
    write_rows(intents / "colours.jsonl", [*rows, rows[2] | {"label": None, "shop": "s2"}])
    mapped = {"path": "json", "data_files": "colours.jsonl", "labels": {"rot": "red", "blau": "blue"}}
    parts = mapped | {"where": {"shop": "s0"}}
    few = mapped | {"max_examples": 5, "where": {"shop": "s1"}}
    changed(intents, candidates={"parts": parts, "few": few})
    assert set(searcher(intents).run.candidates["parts"].rows["label"]) == {"red", "neu"}
    changed(intents, candidates={"parts": parts, "few": few | {"labels": {"rouge": "red"}}})
    words = r"candidates.few.labels: no row is labelled rouge; its labels are blau, neu, rot"
    with pytest.raises(InputError, match=words):
        searcher(intents).check()


def test_rows_drawn_from_a_candidate_keep_its_labels(intents):
    one = searcher(intents)
    settings = one.run.training_settings()
    rows = mixture_dataset({"greetings": 1, "colours": 2}, one.run.candidates, 0)
    collate = Collate(settings.processing, settings.head, settings.among, settings.limit)
    allowed = collate(list(rows))["allowed"]
    assert sorted(allowed.sum(1).tolist()) == [2, 3, 3]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a"}], "column 'label' missing; it has text"),
        ([{"body": "a", "label": "b"}], "columns: {body: text}"),
        ([{"text": "a", "label": None}, {"text": "b", "label": "x"}], "row 1.label: expected a label, got None"),
        ([{"text": " ", "label": "x"}], "row 1.text: expected text"),
        ([{"text": "a", "label": 0.5}], "names or whole numbers"),
        (intent_rows(["one"], 6), "all its rows are labelled 'one'"),
        ([{"text": "RED  108 big small", "label": "x"}, {"text": "other", "label": "y"}], "are also in colours (1)"),
    ],
)
def test_bad_candidate_rows_are_refused(intents, refused, rows, words):
    write_rows(intents / "colours.jsonl", rows)
    assert words in refused(intents / "intents.yaml")


def test_labels_of_a_target_that_the_run_does_not_have_are_refused_before_the_training(own, refused):
    target = changed(own)["targets"]["intents"]
    changed(own, targets={"intents": target | {"labels": ["green", "blue", "purple"]}})
    words = "targets.intents.labels: purple: expected one of the 3 labels of this run: red, green, blue"
    assert words in refused(own / "intents.yaml")


def test_labels_the_classifier_does_not_have_are_refused_or_mapped(pictures_of, vit, refused):
    folder = pictures_of(vit, "all-linear")
    path = folder / "images.yaml"
    rows = list(load_dataset("parquet", data_files=str(folder / "validation.parquet"), split="train"))
    for row in rows:
        row["label"] = {"red": "rouge"}.get(row["label"], row["label"])
    kinds = Features({"image": Image(), "label": Value("string")})
    Dataset.from_list(rows, features=kinds).to_parquet(folder / "all.parquet")
    words = "expected one of the 3 labels of this run: red, green, blue. Map it, with labels: {rouge: red"
    assert words in refused(path, "--allow_overlap", "true")
    candidates = changed(folder, "images")["candidates"]
    candidates["all"]["labels"] = {"rouge": "red"}
    changed(folder, "images", candidates=candidates)
    assert "are also in all (7)" in refused(path)  # the same pixels, in another file
    assert m2m("adapters", "--config", path, "--allow_overlap", "true") == 0


@pytest.fixture
def image_folder(pictures_of, vit):
    """Images by label -> a run on them as its candidate `all`, in folders called by the labels."""

    def make(files: dict[str, list]) -> Path:
        folder = pictures_of(vit, "all-linear")
        for label, images in files.items():
            (folder / "files" / label).mkdir(parents=True)
            for number, image in enumerate(images):
                image.save(folder / "files" / label / f"{number}.png")
        candidates = changed(folder, "images")["candidates"]
        changed(folder, "images", candidates=candidates | {"all": {"path": "imagefolder", "data_dir": "files"}})
        return folder

    return make


def test_a_folder_of_images_is_read(image_folder):
    folder = image_folder({label: [picture(colour, n) for n in range(3)] for label, colour in RGB.items()})
    one = searcher(folder, name="images")
    assert sorted(one.run.candidates["all"].rows["label"]) == sorted([*RGB] * 3)
    one.train_adapters()


@pytest.mark.parametrize(
    ("ending", "labels", "read"),
    [
        ("csv", ["7", "10"], True),
        ("csv", ["a", "2024-01-01"], True),
        ("csv", ["007", "10"], False),
        ("csv", ["NA", "a"], False),
        ("jsonl", ["007", "NA"], True),
        ("jsonl", ["2024-01-01", "2024-01-02"], False),
    ],
)
@pytest.mark.filterwarnings("ignore:.*metadata.csv:pytest.PytestUnraisableExceptionWarning")  # datasets leaves it open
def test_labels_beside_images_are_read_as_they_stand_or_refused(tmp_path, ending, labels, read):
    rows = [{"file_name": f"{n}.png", "label": label} for n, label in enumerate(labels)]
    for row in rows:
        Pixels.new("RGB", (4, 4)).save(tmp_path / row["file_name"])
    if ending == "csv":
        lines = ["file_name,label", *(",".join(row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    (tmp_path / f"metadata.{ending}").write_text("".join(f"{line}\n" for line in lines))
    reader = ClassificationReader("image_classification", None, Length(4), 0, "RGB")
    config = CandidateConfig(DataConfig(path="imagefolder", data_dir=str(tmp_path)))
    if read:
        assert reader.candidate("a", config).rows["label"][:] == labels
    else:
        with pytest.raises(
            InputError, match=rf"candidates\.a: .*metadata\.{ending}, column 'label': `datasets` reads "
        ):
            reader.candidate("a", config)


def test_pixels_that_are_no_colours_are_refused(image_folder, refused):
    folder = image_folder({label: [Pixels.new("I;16", (8, 8), 40_000)] for label in ("red", "blue")})
    words = "candidates.all, row 1.image: cannot be read (pixels of mode I;16"
    assert words in refused(folder / "images.yaml")


def test_a_column_that_holds_no_images_is_refused(pictures_of, vit, refused):
    folder = pictures_of(vit, "all-linear")
    Dataset.from_list([{"image": "here.png", "label": "red"}]).to_parquet(folder / "all.parquet")
    assert "candidates.all.image: expected images" in refused(folder / "images.yaml")


def test_palettes_are_told_apart_by_their_colours():
    pictures = []
    for colour in ((255, 0, 0), (0, 0, 255)):
        one = Pixels.new("P", (4, 4))
        one.putpalette([*colour] * 256)
        pictures.append(one)
    assert image_digest(pictures[0]) != image_digest(pictures[1])
    assert image_digest(pictures[0]) == image_digest(Pixels.new("RGB", (4, 4), (255, 0, 0)))
