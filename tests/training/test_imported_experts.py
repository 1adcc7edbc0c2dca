"""Experts that others have trained: imported if their files show that they can be averaged, refused by name if not."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pico import DEVICE, build_adapter, build_model, build_tokenizer, changed, m2m, trials
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from m2m_hf import MergeToMixSearcher
from m2m_hf.merging.adapter import Adapter
from m2m_hf.merging.gated_stack import GatedStack

SHAPE = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"], "task_type": None}
FILE = "adapter_model.safetensors"


@pytest.fixture
def theirs(project, tmp_path):
    """Adapters of somebody else for two of the three candidates, and a configuration that takes them."""
    for seed, name in enumerate(("alpha", "beta")):
        build_adapter("llama", tmp_path / "theirs" / name, seed, **SHAPE)
    with (project / "run.yaml").open("a") as file:
        file.write("adapters: {alpha: theirs/alpha, beta: theirs/beta}\n")
    return tmp_path / "theirs"


def test_a_search_uses_imported_adapters(project, theirs, capsys):
    run, out = project / "run.yaml", project / "out"
    assert m2m("search", "--config", run) == 0
    printed = capsys.readouterr().out
    assert "imported 2 adapters: alpha, beta" in printed
    assert "cannot be checked" in printed
    assert "trained 1 adapter:" in printed
    assert "how the adapters of alpha, beta were trained is not known" in printed
    for name in ("alpha", "beta"):
        assert (out / "adapters" / name / FILE).read_bytes() == (theirs / name / FILE).read_bytes()
        record = json.loads((out / "adapters" / name / "training.json").read_text())
        assert "learning_rate" in record["unknown"]
        assert "lora_config.r" not in record["unknown"]
    # They score what a stack of them scores.
    (trial,) = [one for one in trials(out) if one["names"] == ["alpha", "beta"]]
    stack = GatedStack(build_model("llama"), {name: Adapter.load(theirs / name) for name in ("alpha", "beta")})
    scorer = MergeToMixSearcher.from_yaml(run).run.scorers["colours"]["validation"]
    score = scorer.score(stack, [{"alpha": 0.5, "beta": 0.5}], 500)[0]
    assert trial["score"] == score.value
    assert trial["logprobs"] == pytest.approx(list(score.logprobs), abs=1e-5)
    # The next run imports nothing.
    assert m2m("select", "--config", run) == 0
    assert "cannot be checked" not in capsys.readouterr().out
    assert m2m("status", out) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 2}, "lora_config.r (2 there, 4 now)"),
        ({"lora_alpha": 8}, "lora_config.lora_alpha (8 there, 32 now)"),
        ({"target_modules": ["q_proj"]}, "v_proj not at all, expected (32, 16); 2 such layers"),
        ({"use_dora": True}, "use_dora=True cannot be averaged"),
    ],
)
def test_adapters_of_another_shape_are_refused(project, theirs, capsys, change, words):
    shutil.rmtree(theirs / "beta")
    build_adapter("llama", theirs / "beta", 1, **SHAPE | change)
    assert m2m("search", "--config", project / "run.yaml") == 2
    assert words in capsys.readouterr().err


def test_missing_adapters_and_unknown_candidates_are_refused(project, theirs, capsys):
    shutil.rmtree(theirs / "beta")
    assert m2m("search", "--config", project / "run.yaml") == 2
    assert "is neither a folder nor an adapter that the Hub shows" in capsys.readouterr().err
    changed(project, "run", adapters={"alfa": "theirs/alpha"})
    assert m2m("search", "--config", project / "run.yaml") == 2
    assert "adapters: unknown key 'alfa'; did you mean 'alpha'?" in capsys.readouterr().err


def test_adapters_of_another_base_are_refused_before_anything_is_trained(project, theirs, capsys):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    other = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=320))
    get_peft_model(other, LoraConfig(**SHAPE)).save_pretrained(theirs / "alpha")
    assert m2m("adapters", "--config", project / "run.yaml") == 2
    assert "adapts other layers than this run does, or those of another base model" in capsys.readouterr().err
    assert not list((project / "out").glob("adapters/*"))


def names_base(folder, base: str | None) -> None:
    """Lets an adapter say what it was trained on."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))


@pytest.mark.parametrize("words", [["adapters"], ["select", "--dry_run"]])
def test_an_adapter_that_names_another_base_is_refused(project, theirs, pico, capsys, words):
    names_base(theirs / "alpha", f"org/{pico.name}")  # from another place: the same
    names_base(theirs / "beta", "org/Another-Base")
    command, *flags = words
    assert m2m(command, project / "run.yaml", *flags) == 2
    said = capsys.readouterr().err
    assert "adapters.beta" in said
    assert "org/Another-Base" in said
    assert str(pico) in said
    assert "set allow_other_bases: true" in said
    assert not list((project / "out").glob("adapters/*"))
    assert m2m(command, project / "run.yaml", *flags, "--allow_other_bases", "true") == 0
    said = capsys.readouterr().out
    assert f"beta: its adapter was trained on org/Another-Base, as it says, and this run's base model is {pico}" in said
    assert "alpha: its adapter" not in said


def test_a_dry_run_refuses_adapters_of_another_shape(project, theirs, capsys):
    shutil.rmtree(theirs / "beta")
    build_adapter("llama", theirs / "beta", 1, **SHAPE | {"r": 2})
    assert m2m("select", project / "run.yaml", "--dry_run") == 2
    assert "lora_config.r (2 there, 4 now)" in capsys.readouterr().err


def test_adapters_on_the_same_layers_may_name_them_differently(project, tmp_path, capsys):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    build_adapter("llama", tmp_path / "theirs", 0, **SHAPE | {"target_modules": names})
    changed(project, "run", adapters={"alpha": str(tmp_path / "theirs")}, lora_target_modules="all-linear")
    assert m2m("adapters", "--config", project / "run.yaml") == 0, capsys.readouterr().err
    assert "imported 1 adapter: alpha" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # of PEFT, about the layers it found
def test_adapters_on_layers_with_transposed_weights_are_imported(project, tmp_path, capsys):
    build_model("gpt2").save_pretrained(tmp_path / "gpt2")
    build_tokenizer().save_pretrained(tmp_path / "gpt2")
    build_adapter("gpt2", tmp_path / "theirs", 0, r=4, lora_alpha=32, lora_dropout=0.05)
    model = {"model_name_or_path": str(tmp_path / "gpt2"), "lora_target_modules": ["c_attn", "c_proj", "c_fc"]}
    changed(project, "run", **model, adapters={"alpha": str(tmp_path / "theirs")})
    assert m2m("search", "--config", project / "run.yaml") == 0, capsys.readouterr().err
    assert "imported 1 adapter:" in capsys.readouterr().out


def write_theirs(kind: str, folder, seed: int):
    """An adapter, or a fine-tune, of somebody else; its folder."""
    shutil.rmtree(folder, ignore_errors=True)
    if kind == "lora":
        return build_adapter("llama", folder, seed, **SHAPE)
    model, draw = build_model("llama"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw).to(DEVICE))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "key"), [("lora", "adapters"), ("full", "experts")])
def test_a_source_that_changes_is_refused(project, tmp_path, capsys, kind, key):
    one, two = write_theirs(kind, tmp_path / "one", 1), write_theirs(kind, tmp_path / "two", 2)
    record = project / "out" / "adapters" / "alpha" / "training.json"

    def refusal(*flags: str, **sources) -> str:
        """What is said where the experts come from there; nothing where they are taken."""
        changed(project, "run", expert=kind, **{key: {name: str(source) for name, source in sources.items()}})
        capsys.readouterr()
        code = m2m("adapters", "--config", project / "run.yaml", *flags)
        return capsys.readouterr().err if code else ""

    assert not refusal(alpha=one)
    assert not refusal(alpha=one)
    first = json.loads(record.read_text())["fingerprint"]
    message = refusal(alpha=two)
    assert f"{key}.alpha: {two} is to be taken, and the one in" in message
    assert f"came from {one}" in message
    assert "was trained here" in refusal(alpha=one, beta=two)
    write_theirs(kind, one, 3)
    assert "its files have changed since it was taken" in refusal(alpha=one)
    shutil.rmtree(record.parent)
    assert not refusal(alpha=one)
    assert json.loads(record.read_text())["fingerprint"] != first  # other weights are another expert
    message = refusal("--learning_rate", "3e-3", alpha=one)
    assert f"taken from {one}" in message
    assert f"or delete {record.parent} to take it again" in message


@pytest.fixture
def fine_tune(intents, encoder, tmp_path):
    """(what changes a model) -> somebody else's fine-tune of the base, as the expert of noise."""

    def write(change) -> None:
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        model = AutoModel.from_pretrained(encoder)
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path / "theirs")
        changed(intents, expert="full", learning_rate=1e-3, experts={"noise": str(tmp_path / "theirs")})

    return write


def test_a_fine_tune_of_more_parameters_than_this_run_trains_is_refused(intents, fine_tune, capsys):
    fine_tune(lambda model: [weight.mul_(1.01) for weight in model.encoder.layer.parameters()])
    changed(intents, trained_parameters=r"layer\.1\.")
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert r"weights that trained_parameters 'layer\\.1\\.' does not train" in capsys.readouterr().err
    changed(intents, trained_parameters=r"layer\.[01]\.")
    assert m2m("adapters", "--config", intents / "intents.yaml") == 0


def test_a_fine_tune_that_the_dtype_erases_is_refused_and_a_loss_is_reported(intents, fine_tune, capsys):
    fine_tune(lambda model: model.encoder.layer[0].output.dense.weight.add_(1e-9))
    assert m2m("adapters", "--config", intents / "intents.yaml", "--delta_dtype", "float16") == 2
    assert "delta_dtype: float16 keeps nothing of what was learned" in capsys.readouterr().err
    fine_tune(lambda model: model.encoder.layer[0].output.dense.weight.mul_(1 + 2e-5))
    assert m2m("adapters", "--config", intents / "intents.yaml", "--delta_dtype", "float16") == 0
    assert "noise: delta_dtype float16 has lost" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["config", "type", "weights"])
def test_a_fine_tune_that_cannot_be_loaded_is_named(intents, fine_tune, tmp_path, capsys, damage):
    fine_tune(lambda model: model.encoder.layer[0].output.dense.weight.mul_(1.01))
    theirs = tmp_path / "theirs"
    config, weights = theirs / "config.json", theirs / "model.safetensors"
    if damage == "config":
        config.write_text("{")
    elif damage == "type":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "nobody"}))
    else:
        weights.write_bytes(weights.read_bytes()[:-1000])
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert f"experts.noise: {theirs} cannot be loaded as the base model is" in capsys.readouterr().err
