"""Fixtures: pico models and tokenizers, made in code: no network, milliseconds."""

import gc
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch
from forks import Forks
from hub_server import Hub
from pico import (
    BERT,
    DEVICE,
    RGB,
    ROOT,
    SETTINGS,
    SHAPE,
    build_model,
    build_tokenizer,
    changed,
    choice_rows,
    copy_project,
    intent_rows,
    project_folder,
    write_images,
    write_intents,
    write_rows,
)
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from m2m_hf.cli.main import main
from m2m_hf.data.causal_lm import target_row
from m2m_hf.data.rows import TargetRow


@pytest.fixture(scope="session")
def classify():
    """`recipes/classify.py` as a module."""
    spec = importlib.util.spec_from_file_location("classify", ROOT / "recipes" / "classify.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", ["", *sys.path])
        spec.loader.exec_module(module)
    return module


def pytest_configure() -> None:
    if DEVICE != "cpu" and not torch.get_device_module(DEVICE).is_available():
        pytest.exit(f"M2M_TEST_DEVICE={DEVICE}: there is no such device, and models would be on the CPU", 2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is for the CPU alone where models are elsewhere."""
    marker = item.get_closest_marker("cpu_only")
    if marker and DEVICE != "cpu":
        pytest.skip(marker.args[0])


def pytest_collection_finish() -> None:
    """Every training ends with a garbage collection, which would look at all that was imported: a third of a second each."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pages are made in every run, their pictures only where a test asks for `pictures`: drawing takes longer than all else."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("m2m_hf.reporting.plots.PICTURES", {})


@pytest.fixture
def pictures():
    """Has pictures drawn."""


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def pico(tmp_path_factory) -> Path:
    """A folder with a pico Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("pico")
    build_model("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory) -> Path:
    """A random reward model with the pico tokenizer, whose rewards differ by ones."""
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=320, num_labels=1, pad_token_id=0, **shape))
    with torch.no_grad():
        model.score.weight.mul_(30)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """A folder with a pico BERT, whose pooler nothing trains, and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT, attn_implementation="sdpa")).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def refused(capsys):
    """A configuration and flags -> what is said when its adapters are to be trained."""

    def run(path: Path, *flags: str) -> str:
        assert main(["adapters", "--config", str(path), *flags]) == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def intents(tmp_path, encoder) -> Path:
    """See `write_intents`."""
    return write_intents(tmp_path, encoder)


@pytest.fixture
def copied(intents, encoder, tmp_path) -> Path:
    """The encoder in a folder of its own, which the run `intents` uses."""
    shutil.copytree(encoder, tmp_path / "model")
    changed(intents, model_name_or_path=str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.fixture
def questions() -> list[TargetRow]:
    return [target_row(row, "text", "choice", "row") for row in choice_rows(9)]


@pytest.fixture
def project(tmp_path, pico) -> Path:
    """See `project_folder`."""
    return project_folder(tmp_path, pico)


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory, pico) -> Path:
    """What `m2m select` leaves of a `project_folder` whose candidates may be published. To be copied, not to be touched."""
    folder = project_folder(tmp_path_factory.mktemp("finished"), pico)
    run = folder / "run.yaml"
    run.write_text(run.read_text().replace(".jsonl}\n", ".jsonl, license: cc-by-4.0}\n", 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2m_hf.reporting.plots.PICTURES", {})
        assert main(["select", "--config", str(run)]) == 0
    return folder


@pytest.fixture
def finished(tmp_path, finished_project) -> Path:
    """A `project` from which `m2m select` has selected: its run folder is `out`."""
    return copy_project(finished_project, tmp_path)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A Hub on loopback, the process that is told of it, and where that keeps what it has from it. See `hub` and `forks`."""
    cache = tmp_path_factory.mktemp("hub")
    with Hub() as server:
        told = {
            "CUDA_VISIBLE_DEVICES": "",  # a fork of a process that has looked for a card cannot use it
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": server.token,
            "M2M_TEST_DEVICE": "cpu",
            "PYTHONHASHSEED": "7",  # sets have their elements in another order than here
            "PYTHONPATH": str(ROOT),
        }
        with Forks(told) as process:
            yield server, process, cache


@pytest.fixture
def hub(served) -> Hub:
    """A Hub that knows nothing yet, and of which nothing is known: the server that the processes of `forks` are told of."""
    server, _, cache = served
    server.forget()
    for path in cache.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return server


@pytest.fixture
def forks(hub, served) -> Forks:
    """Python processes that need no time to import anything; they are told of the Hub of `hub` and log in there."""
    return served[1]


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(RGB)), "label2id": {name: place for place, name in enumerate(RGB)}}
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SHAPE, **names)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {
        **SHAPE,
        "vocab_size": 320,
        "max_position_embeddings": 40,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    config = CLIPConfig(
        text_config={**text, "projection_dim": 12}, projection_dim=12,
        vision_config={**SHAPE, "image_size": 8, "patch_size": 4, "projection_dim": 12},
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    tokenizer = build_tokenizer()
    ends = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ends  # where CLIP takes what a text means
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def resnet(tmp_path) -> Path:
    """A pico ResNet, whose normalisation keeps running statistics and counts batches."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(RGB)), "label2id": {name: place for place, name in enumerate(RGB)}}
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**shape, **names)).save_pretrained(tmp_path / "resnet")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


@pytest.fixture
def pictures_of(tmp_path):
    """model folder -> a run on images, `images.yaml`."""

    def make(model: Path, targets: str) -> Path:
        for number, (name, labels) in enumerate(
            {"warm": ["red", "green"], "cold": ["blue", "green"], "all": [*RGB]}.items()
        ):
            write_images(tmp_path / f"{name}.parquet", labels, 9, 100 * number)
        for number, part in enumerate(("validation", "test")):
            write_images(tmp_path / f"{part}.parquet", [*RGB], 7, 1000 * (number + 1))
        (tmp_path / "images.yaml").write_text(f"""
model_name_or_path: {model}
task: image_classification
lora_target_modules: {targets}
{SETTINGS}
output_dir: {tmp_path / "out"}
candidates:
  warm: {{path: parquet, data_files: warm.parquet}}
  cold: {{path: parquet, data_files: cold.parquet}}
  all: {{path: parquet, data_files: all.parquet}}
targets:
  colours:
    data: {{path: parquet, data_files: validation.parquet}}
    test_data: {{path: parquet, data_files: test.parquet}}
    scorer: classification
""")
        return tmp_path

    return make


@pytest.fixture
def classifier(tmp_path_factory) -> Path:
    """A pico BERT with a classifier over three colours."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    names = {"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}}
    BertForSequenceClassification(BertConfig(**BERT, **names)).save_pretrained(folder)
    return folder


@pytest.fixture
def own(intents, classifier, encoder) -> Path:
    """A run on a model with a classifier of its own."""
    AutoTokenizer.from_pretrained(encoder).save_pretrained(classifier)
    changed(intents, model_name_or_path=str(classifier))
    for name in ("greetings", "noise"):
        write_rows(intents / f"{name}.jsonl", intent_rows(["blue", "red"], 10, len(name)))
    for part, start in (("validation", 100), ("test", 200)):
        write_rows(intents / f"{part}_intents.jsonl", intent_rows(["green", "blue"], 10, start))
    return intents
