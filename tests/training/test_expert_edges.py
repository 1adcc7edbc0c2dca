"""Experts and their averages where something is odd: normalisation that counts, sources that change, folders, outliers."""

import errno
import json
import os
import shutil
import sys

import pytest
import torch
import yaml
from pico import RGB, build_adapter, build_model, build_tokenizer, changed, intent_rows, m2m, searcher, write_rows
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    LevitConfig,
    LevitForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
    XLNetConfig,
    XLNetModel,
)

from m2m_hf import MergeToMixSearcher
from m2m_hf.config.parsing import parse
from m2m_hf.console import Terminal
from m2m_hf.core.mixture import Mixture, gray_code_order
from m2m_hf.errors import InputError
from m2m_hf.merging import full_experts as deltas
from m2m_hf.merging.dense_stack import DenseStack
from m2m_hf.merging.full_experts import DELTA_FILE, Delta, Sums, floats, save_delta, scratch_folder
from m2m_hf.merging.methods import MergeMethod
from m2m_hf.modeling.inspection import positions
from m2m_hf.storage.records import is_inside

FULL = ("--expert", "full", "--learning_rate", "1e-3")
BATCHES = ("--per_device_train_batch_size", "3")  # of 9 rows, as a batch of one has no variance
LABELS = {
    "id2label": dict(enumerate(RGB)),
    "label2id": {name: number for number, name in enumerate(RGB)},
}


@pytest.fixture
def resnet(tmp_path):
    """A pico ResNet, whose normalisation keeps running statistics and counts batches."""
    torch.manual_seed(0)
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**shape, **LABELS)).save_pretrained(tmp_path / "resnet")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet"


@pytest.fixture
def levit(tmp_path):
    """A pico LeViT: linear layers with such normalisation behind them."""
    torch.manual_seed(0)
    shape = {"image_size": 16, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1]}
    more = {"key_dim": [4, 4, 4], "attention_ratio": [2, 2, 2], "mlp_ratio": [2, 2, 2]}
    LevitForImageClassification(LevitConfig(**shape, **more, **LABELS)).save_pretrained(tmp_path / "levit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "levit")
    return tmp_path / "levit"


def images(folder, *flags: str) -> MergeToMixSearcher:
    flags = (*BATCHES, *flags)
    return MergeToMixSearcher(*parse(folder / "images.yaml", flags), Terminal(quiet=True))


def buffers(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def test_running_statistics_are_averaged_whatever_the_method(pictures_of, resnet):
    one = images(pictures_of(resnet, "all-linear"), *FULL)
    one.train_adapters()
    experts, before = one.bank.load(), buffers(one.base)
    assert any("running_var" in name for name in experts["warm"].shapes)
    for method in (
        MergeMethod("task_arithmetic", scaling=3.0), MergeMethod("dare", density=0.2), MergeMethod("ties", density=0.2),
        MergeMethod("svd", rank=1), MergeMethod(),
    ):  # fmt: skip
        stack = DenseStack(one.base, experts, method, one.run.root)
        for weights in ({"warm": 0.5, "cold": 0.5}, {"warm": 0.25, "cold": 0.75}, {"warm": 1.0}):
            stack.set(method.gates(weights))
            now = buffers(one.base)
            for name in (name for name in before if "running" in name):
                expected = before[name] + sum(share * experts[part].delta(name) for part, share in weights.items())
                assert torch.allclose(now[name], expected, atol=1e-6), (method, weights, name)
        stack.detach()
        assert all(torch.equal(tensor, before[name]) for name, tensor in one.base.named_buffers())


def test_trimming_counts_no_statistics(pictures_of, resnet):
    one = images(pictures_of(resnet, "all-linear"), *FULL)
    one.train_adapters()
    expert = one.bank.load()["warm"]
    stack = DenseStack(one.base, {"warm": expert}, MergeMethod("ties", density=0.1), one.run.root)
    learned = torch.cat([expert.delta(name).abs().flatten() for name in expert.shapes if "running" not in name])
    kept = max(1, round(0.1 * len(learned)))
    assert stack._threshold("warm", torch.device("cpu")) == float(learned.sort(descending=True).values[kept - 1])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_a_training_counts_is_taken_back(pictures_of, levit, kind):
    one = images(pictures_of(levit, "all-linear"), *(FULL if kind == "full" else ()))
    before = buffers(one.base)
    assert {tensor.dtype for tensor in before.values()} >= {torch.int64, torch.float32}
    one.train_adapters()
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.base.named_buffers())


def test_statistics_alone_are_nothing_learned(pictures_of, resnet, capsys):
    folder = pictures_of(resnet, "all-linear")
    flags = (*BATCHES, "--expert", "full", "--learning_rate", "0")
    assert m2m("adapters", "--config", folder / "images.yaml", *flags) == 2
    assert "it learned nothing" in capsys.readouterr().err


def test_a_search_that_goes_on_in_one_process_keeps_what_it_has_put_aside(intents):
    """Every step claims the run folder anew, and clears it of what killed processes have left."""
    one = searcher(intents, *FULL)
    before = {name: tensor.clone() for name, tensor in floats(one.base).items()}
    one.search()
    mixtures = [Mixture.subset(["noise"]), Mixture.subset(["colours", "noise"])]
    for method in (MergeMethod("ties"), MergeMethod()):
        assert len(one.surrogate(mixtures, method=method)) == 2
    one.search()
    one._detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in floats(one.base).items())
    for method in (MergeMethod("linear"), MergeMethod("svd")):
        with pytest.raises(InputError, match=f"merge method {method.name}.*full experts have no factors"):
            one.surrogate(mixtures, method=method)


def test_a_search_goes_from_neighbour_to_neighbour(intents):
    write_rows(intents / "more.jsonl", intent_rows(["one", "two"], 12, 500))
    given = changed(intents)
    changed(intents, candidates=given["candidates"] | {"more": {"path": "json", "data_files": "more.jsonl"}})
    searcher(intents, *FULL).search()
    lines = [json.loads(line) for line in (intents / "out" / "trials.jsonl").read_text().splitlines()]
    proposed = [Mixture.subset(line["names"]) for line in lines if 1 < len(line["names"]) < 4]
    assert len(proposed) == 10
    assert proposed == gray_code_order(proposed)


def moved(tmp_path, name: str, before: dict, change: dict) -> Delta:
    save_delta(tmp_path / name, before, {key: before[key] + change[key] for key in before}, torch.float32)
    return Delta(tmp_path / name)


def test_an_outlier_leaves_the_others_what_they_are(tmp_path):
    draw = torch.Generator().manual_seed(0)
    before = {"w": torch.zeros(64, 32), "v": torch.zeros(8)}
    changes = {
        name: {key: 1e-3 * torch.randn(one.shape, generator=draw) for key, one in before.items()} for name in "abo"
    }
    changes["o"]["w"][3, 4] = 1e6
    experts = {name: moved(tmp_path, name, before, change) for name, change in changes.items()}
    sums = Sums(experts, {name: one.shape for name, one in before.items()}, tmp_path)
    found = {}

    def keep(name, part, total):
        found[name] = total.clone()

    for members in ("a", "abo", "ob", "ab"):
        sums.to(members, keep)
        for name in before:
            exact = sum(changes[one][name].double() for one in members)
            assert (found[name].double() - exact).abs().max() <= 2**-23 * exact.abs().max(), (members, name)
    assert list(sums._units) == ["v"]
    sums.close()


def test_sums_are_rounded_and_not_cut_off(tmp_path):
    before = {"w": torch.zeros(4096)}
    draw = torch.Generator().manual_seed(0)
    changes = {
        name: {"w": torch.rand(4096, generator=draw).pow(8)} for name in "abcdefgh"
    }  # mostly small beside the largest
    experts = {name: moved(tmp_path, name, before, change) for name, change in changes.items()}
    sums = Sums(experts, {"w": torch.Size([4096])}, tmp_path)
    exact = sum(change["w"].double() for change in changes.values())
    sums.to("abcdefgh", lambda name, part, total: None)
    raw = torch.from_file(str(sums._place / "0"), shared=True, size=4096, dtype=torch.int32)
    # The mean error of eight truncations would be four units.
    assert abs(float((raw.double() * sums._units["w"] - exact).mean())) < 0.2 * sums._units["w"]
    sums.close()


@pytest.mark.parametrize("place", [(0, 0), (7, 3)])
def test_what_is_not_finite_is_found_in_every_block(tmp_path, monkeypatch, place):
    monkeypatch.setattr(deltas, "BLOCK", 8)
    spoiled = torch.full((8, 4), 1e-3)
    spoiled[place] = torch.nan
    for name, tensor in (("a", torch.full((8, 4), 1e-3)), ("b", spoiled)):
        (tmp_path / name).mkdir()
        save_file({"w": tensor}, tmp_path / name / DELTA_FILE)
    experts = {name: Delta(tmp_path / name) for name in "ab"}
    with pytest.raises(InputError, match=r"b/delta.safetensors: not all numbers of w are finite"):
        Sums(experts, {"w": torch.Size([8, 4])}, tmp_path)


def test_a_full_disk_is_met_before_the_sums_are_written(tmp_path, monkeypatch):
    before = {"w": torch.zeros(64)}
    experts = {name: moved(tmp_path, name, before, {"w": torch.ones(64)}) for name in "ab"}
    asked = []

    def full(file, start, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Sums(experts, {"w": torch.Size([64])}, tmp_path)
    assert asked == [256]


def test_what_is_aside_goes_when_the_process_ends(tmp_path, monkeypatch):
    last = []
    monkeypatch.setattr("atexit.register", last.append)
    place, _ = scratch_folder(tmp_path)
    assert place.is_dir()
    last[0]()
    assert not place.exists()


def test_a_change_that_a_dtype_cannot_hold_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"delta_dtype: torch.float16 cannot hold what was learned of w"):
        save_delta(tmp_path, {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 1e6])}, torch.float16)


def test_a_weight_of_another_shape_is_another_base(tmp_path):
    model = build_model("llama")
    before = floats(model)
    (tmp_path / "a").mkdir()
    name = next(name for name in before if before[name].ndim == 2)
    save_file({name: torch.ones(3, 3)}, tmp_path / "a" / DELTA_FILE)
    with pytest.raises(
        InputError, match=r"of shape \(3, 3\), which LlamaForCausalLM does not have: another base model"
    ):
        DenseStack(model, {"a": Delta(tmp_path / "a")}, MergeMethod(), tmp_path)


def test_trimming_and_dropping_are_of_each_expert_by_itself(tmp_path):
    """One changes two weights, the other one of them."""
    model = build_model("llama")
    before = floats(model)
    first, second = [name for name in before if "q_proj" in name][:2]
    draw = torch.Generator().manual_seed(0)
    change = {name: torch.randn(before[name].shape, generator=draw) for name in (first, second)}
    for expert, names in (("a", (first,)), ("b", (first, second))):
        (tmp_path / expert).mkdir()
        save_file({name: change[name].contiguous() for name in names}, tmp_path / expert / DELTA_FILE)
    experts = {name: Delta(tmp_path / name) for name in "ab"}
    stack = DenseStack(model, experts, MergeMethod("ties", density=0.5), tmp_path)
    for expert, names in (("a", (first,)), ("b", (first, second))):
        entries = torch.cat([change[name].abs().flatten() for name in names]).sort(descending=True).values
        assert stack._threshold(expert, torch.device("cpu")) == float(entries[len(entries) // 2 - 1])
    stack.detach()
    stack = DenseStack(model, experts, MergeMethod("dare", density=0.5), tmp_path)
    masks = []
    for weights, name in (({"a": 1.0}, first), ({"b": 1.0}, first), ({"b": 1.0}, second)):
        start = before[name].detach().clone()
        stack.set(weights)
        masks.append((before[name].detach() - start).abs() > 1e-6)
        stack.set({})
    stack.detach()
    assert not torch.equal(masks[0], masks[1])  # every expert loses others
    assert not torch.equal(masks[1], masks[2])  # and in every layer


def test_a_tokenizer_with_a_folder_of_its_own_is_kept_whole(project, pico, tmp_path):
    shutil.copytree(pico, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(pico)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ messages }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    changed(project, "run", model_name_or_path=str(tmp_path / "model"), save_steps=1)
    assert m2m("select", "--config", project / "run.yaml", *FULL) == 0
    inside = "additional_chat_templates/tool_use.jinja"
    final = json.loads((project / "out" / "final" / "training.json").read_text())
    assert final["files"][inside]["bytes"] == (project / "out" / "final" / inside).stat().st_size
    assert m2m("status", project / "out") == 0
    (project / "out" / "final" / inside).write_text("{{ other }}")
    assert m2m("status", project / "out") != 0


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/x", "../x", "a/../../x", "a//b", "./a", "a\\b", "C:x", "a/"])
def test_only_files_inside_are_described(name):
    assert not is_inside(name)
    assert is_inside("a/b.json")


def shape_of(path) -> dict:
    given = yaml.safe_load(path.read_text())
    return {
        "r": given["lora_r"],
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": given["lora_target_modules"],
    }


def test_adapters_of_another_base_are_refused_before_anything_is_trained(project, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    size = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 320,
    }
    config = LoraConfig(**shape_of(project / "run.yaml"), task_type="CAUSAL_LM")
    get_peft_model(LlamaForCausalLM(LlamaConfig(**size)), config).save_pretrained(tmp_path / "theirs")
    changed(project, "run", adapters={"alpha": str(tmp_path / "theirs")})
    assert m2m("adapters", "--config", project / "run.yaml") == 2
    told = capsys.readouterr()
    assert "adapts other layers than this run does, or those of another base model" in told.err
    assert not list((project / "out").glob("adapters/*"))


def test_adapters_on_the_same_layers_are_taken_however_these_were_named(project, tmp_path, capsys):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = shape_of(project / "run.yaml") | {"target_modules": names}
    build_adapter("llama", tmp_path / "theirs", 0, **shape)
    changed(
        project, "run", adapters={"alpha": str(tmp_path / "theirs")}, lora_target_modules="all-linear", lora_alpha=16
    )
    changed(project, "run", lora_dropout=0.05)
    assert m2m("adapters", "--config", project / "run.yaml") == 0, capsys.readouterr().err
    assert "took 1 adapters that others have trained: alpha" in capsys.readouterr().out


@pytest.mark.parametrize("expert", ["lora", "full"])
def test_a_source_that_changes_is_not_overlooked(project, pico, tmp_path, capsys, expert):
    def theirs(name: str, seed: int) -> None:
        if expert == "lora":
            build_adapter("llama", tmp_path / name, seed, **shape_of(project / "run.yaml"))
            return
        model = build_model("llama")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        model.save_pretrained(tmp_path / name)

    key = "adapters" if expert == "lora" else "experts"
    theirs("one", 1)
    theirs("two", 2)
    changed(project, "run", expert=expert, lora_alpha=16, lora_dropout=0.05, **{key: {"alpha": str(tmp_path / "one")}})
    path = project / "run.yaml"
    assert m2m("adapters", "--config", path) == 0, capsys.readouterr().err
    assert m2m("adapters", "--config", path) == 0
    capsys.readouterr()
    changed(project, "run", **{key: {"alpha": str(tmp_path / "two")}})
    assert m2m("adapters", "--config", path) == 2
    assert f"{key}.alpha: {tmp_path / 'two'} is to be taken, and the one in" in (told := capsys.readouterr().err)
    assert f"came from {tmp_path / 'one'}" in told
    changed(project, "run", **{key: {"alpha": str(tmp_path / "one"), "beta": str(tmp_path / "two")}})
    assert m2m("adapters", "--config", path) == 2
    assert "was trained here" in capsys.readouterr().err
    changed(project, "run", **{key: {"alpha": str(tmp_path / "one")}})
    shutil.rmtree(tmp_path / "one")
    theirs("one", 3)
    assert m2m("adapters", "--config", path) == 2
    assert "its files have changed since it was taken" in capsys.readouterr().err
    shutil.rmtree(project / "out" / "adapters" / "alpha")
    assert m2m("adapters", "--config", path) == 0
    assert m2m("adapters", "--config", path, "--learning_rate", "3e-3") == 2
    assert "was taken from" in capsys.readouterr().err


def of_other(intents, encoder, tmp_path, change) -> None:
    """A fine-tune of somebody else's as the expert of noise."""
    model = AutoModel.from_pretrained(encoder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(tmp_path / "theirs")
    changed(intents, expert="full", learning_rate=1e-3, experts={"noise": str(tmp_path / "theirs")})


def test_a_fine_tune_of_more_than_is_trained_here_is_refused(intents, encoder, tmp_path, capsys):
    of_other(intents, encoder, tmp_path, lambda model: [one.mul_(1.01) for one in model.encoder.layer.parameters()])
    changed(intents, trained_parameters=r"layer\.1\.")
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert "weights in all that trained_parameters" in capsys.readouterr().err
    changed(intents, trained_parameters=r"layer\.[01]\.")
    assert m2m("adapters", "--config", intents / "intents.yaml") == 0


def test_a_fine_tune_that_a_dtype_erases_is_refused_and_what_is_lost_is_said(intents, encoder, tmp_path, capsys):
    of_other(intents, encoder, tmp_path, lambda model: model.encoder.layer[0].output.dense.weight.add_(1e-9))
    assert m2m("adapters", "--config", intents / "intents.yaml", "--delta_dtype", "float16") == 2
    assert "keeps nothing of what it has learned" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "theirs")
    of_other(intents, encoder, tmp_path, lambda model: model.encoder.layer[0].output.dense.weight.mul_(1 + 2e-5))
    assert m2m("adapters", "--config", intents / "intents.yaml", "--delta_dtype", "float16") == 0
    assert "noise: delta_dtype float16 has lost" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["config", "type", "weights"])
def test_a_fine_tune_that_cannot_be_loaded_is_named(intents, encoder, tmp_path, capsys, spoil):
    of_other(intents, encoder, tmp_path, lambda model: model.encoder.layer[0].output.dense.weight.mul_(1.01))
    theirs = tmp_path / "theirs"
    if spoil == "config":
        (theirs / "config.json").write_text("{")
    elif spoil == "type":
        told = json.loads((theirs / "config.json").read_text())
        (theirs / "config.json").write_text(json.dumps(told | {"model_type": "nobody"}))
    else:
        (theirs / "model.safetensors").write_bytes((theirs / "model.safetensors").read_bytes()[:-1000])
    assert m2m("adapters", "--config", intents / "intents.yaml") == 2
    assert f"experts.noise: {theirs} cannot be loaded as the base model is" in capsys.readouterr().err


def test_a_command_scores_what_any_method_has_merged(intents, tmp_path):
    script = tmp_path / "score.py"
    script.write_text(
        "import json, sys\nfrom safetensors.numpy import load_file\n"
        "weights = load_file(sys.argv[1] + '/model.safetensors')\n"
        "print(json.dumps({'score': float(weights['encoder.layer.0.attention.self.query.weight'].astype(float).sum())}))\n"
    )
    target = {"scorer": "command", "command": [sys.executable, str(script), "{model}"]}
    changed(intents, expert="full", learning_rate=1e-3, merge_method="ties", targets={"t": target})
    assert m2m("search", "--config", intents / "intents.yaml") == 0
    changed(intents, expert="lora", targets={"t": target | {"command": [sys.executable, str(script), "{adapter}"]}})
    assert m2m("search", "--config", intents / "intents.yaml", "--output_dir", intents / "other") == 2


@pytest.mark.parametrize("where", ["final", "candidate"])
def test_a_shape_of_adapters_is_none_of_full_experts(intents, capsys, where):
    given = changed(intents)
    if where == "final":
        changed(intents, final={"lora_r": 64})
    else:
        given["candidates"]["noise"]["training"] = {"lora_r": 64}
        changed(intents, candidates=given["candidates"], allow_mixed_training=True)
    assert m2m("adapters", "--config", intents / "intents.yaml", "--expert", "full") == 2
    assert "lora_r: belongs to expert: lora" in capsys.readouterr().err


def test_what_full_experts_depend_on_is_told_apart(intents):
    facts = searcher(intents, *FULL).facts
    assert facts != searcher(intents, *FULL, "--trained_parameters", "layer").facts
    assert facts != searcher(intents, *FULL, "--delta_dtype", "bfloat16").facts


def test_what_scores_depend_on_is_in_the_keys_of_trials(intents):
    one = searcher(intents)
    one.train_adapters()
    before = one.keys["intents"].base
    for fact in ("head", "labels", "label_template", "sides"):
        one = searcher(intents)
        one.facts[fact] = "another"
        vars(one)["bank"] = type("Bank", (), {"training": lambda self: {}})()
        assert one.keys["intents"].base != before, fact


def test_other_weights_are_another_expert(project, tmp_path):
    found = []
    for seed in (1, 2):
        build_adapter("llama", tmp_path / "theirs", seed, **shape_of(project / "run.yaml"))
        out = project / f"out-{seed}"
        changed(project, "run", adapters={"alpha": str(tmp_path / "theirs")}, lora_alpha=16, lora_dropout=0.05)
        assert m2m("adapters", "--config", project / "run.yaml", "--output_dir", out) == 0
        found.append(json.loads((out / "adapters" / "alpha" / "training.json").read_text())["fingerprint"])
    assert found[0] != found[1]


def test_a_trainer_that_cannot_be_made_leaves_nothing_on_the_base(intents, monkeypatch):
    one = searcher(intents)
    before = {name: tensor.clone() for name, tensor in one.base.state_dict().items()}

    def fails(self, head, **kwargs):
        raise ValueError("not today")

    with monkeypatch.context() as patch:
        patch.setattr("m2m_hf.training.trainers.LabelTrainer.__init__", fails)
        with pytest.raises(ValueError, match="not today"):
            one.train_adapters()
    after = one.base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    one.train_adapters()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # PEFT, of which layers it has found
def test_adapters_on_layers_that_keep_their_weight_transposed_are_taken(project, tmp_path, capsys):
    build_model("gpt2").save_pretrained(tmp_path / "gpt2")
    build_tokenizer().save_pretrained(tmp_path / "gpt2")
    build_adapter("gpt2", tmp_path / "theirs", 0, r=4, lora_alpha=32, lora_dropout=0.05)
    given = {"model_name_or_path": str(tmp_path / "gpt2"), "lora_target_modules": ["c_attn", "c_proj", "c_fc"]}
    changed(project, "run", **given, adapters={"alpha": str(tmp_path / "theirs")})
    assert m2m("search", "--config", project / "run.yaml") == 0, capsys.readouterr().err
    assert "took 1 adapters" in capsys.readouterr().out


def test_a_model_that_says_no_length_has_none():
    assert positions(XLNetModel(XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8))) == 1_000_000
