"""Models that score a row otherwise beside others: found by what they do, and scored as one row at a time."""

from contextlib import contextmanager
from types import SimpleNamespace

import pico
import pytest
import torch
from pico import BERT, DEVICE, build_model, changed, m2m, questions_of_many_shapes, scorer_on, trials
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    ViTConfig,
    ViTModel,
)

from m2m_hf import InputError
from m2m_hf.data.rows import TargetRow
from m2m_hf.data.tokens import encode
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.modeling.processing import patches
from m2m_hf.scoring import probing
from m2m_hf.scoring.forward import ALIKE, ALONE, TOGETHER, UNSHARED
from m2m_hf.scoring.packing import HEAD
from m2m_hf.scoring.probing import fitting_tokens, settle, small_pass, tokens_within

SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip


def build(family: str, positions: int = 128):
    torch.manual_seed(0)
    ids = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt_neo":
        types = [[["global", "local"], 1]]
        ids |= {"max_position_embeddings": positions, "attention_types": types, "window_size": 8}
        model = GPTNeoForCausalLM(GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, **ids))
    elif family == "rwkv":
        model = RwkvForCausalLM(RwkvConfig(context_length=128, hidden_size=32, num_hidden_layers=2, **ids))
    elif family == "llama":
        model = build_model("llama")
    elif family == "longrope":
        model = Phi3ForCausalLM(Phi3Config(**SHAPE, original_max_position_embeddings=16, rope_parameters=LONG))
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=16, head_dim=8, rope_parameters=rope))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    return model.to(DEVICE).eval()


@pytest.mark.parametrize(("family", "apart"), [("gpt_neo", UNSHARED), ("longrope", ALIKE), ("dynamic", ALIKE)])
def test_rows_are_kept_as_far_apart_as_the_model_needs(tokenizer, family, apart):
    rows = questions_of_many_shapes(tokenizer)
    scorer = scorer_on(rows, tokenizer, "choice", "logprob")
    before, stack = scorer.fingerprint, GatedStack(build(family), {})
    assert "this model scores a row otherwise beside others" in settle(stack, [{}], scorer)
    assert (scorer.apart, scorer.fingerprint != before) == (apart, True)
    again = scorer_on(rows, tokenizer, "choice", "logprob")
    assert again.recall(scorer.fingerprint)
    assert (again.apart, again.fingerprint) == (apart, scorer.fingerprint)
    expected = []
    for row in rows:
        logprobs = []
        for choice in row.choices:
            ids, start = encode(tokenizer, row.prompt, choice)
            with torch.no_grad():
                given = build(family)(input_ids=torch.tensor([ids], device=DEVICE)).logits[0].log_softmax(-1)
            logprobs.append(sum(given[i - 1, ids[i]].item() for i in range(start, len(ids))))
        expected.append(torch.tensor(logprobs).log_softmax(0)[row.answer].item())
    assert list(scorer.score(stack, [{}], 10_000)[0].values) == pytest.approx(expected, abs=2e-5)


def test_a_shared_row_that_does_not_fit_into_the_model(tokenizer):
    rows = questions_of_many_shapes(tokenizer)
    scorer = scorer_on(rows, tokenizer, "choice", "logprob")
    longest = max(len(request.ids) for question in scorer.inputs.questions for request in question.requests)
    assert max(len(question.ids) for question in scorer.inputs.questions) > longest
    said = settle(GatedStack(build("gpt_neo", longest), {}), [{}], scorer)
    assert scorer.apart == UNSHARED
    assert "(it fails: The size of tensor a " in said
    assert "): every choice is scored in a row of its own" in said


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError])
def test_an_error_while_rounding_is_measured_is_no_rounding(tokenizer, questions, monkeypatch, error):
    def broken(layer, args, output):
        raise error("of rounding")

    @contextmanager
    def failing(model, eps):
        with real(model, eps):
            handle = model.lm_head.register_forward_hook(broken)
            yield
            handle.remove()

    real = probing.changed_by
    monkeypatch.setattr(probing, "changed_by", failing)
    with pytest.raises(error, match="of rounding"):
        settle(GatedStack(build("llama"), {}), [{}], scorer_on(questions, tokenizer, "choice", "logprob"))


@pytest.mark.parametrize(("family", "apart"), [("llama", TOGETHER), ("gpt_neo", UNSHARED)])
def test_rounding_is_no_reason_to_keep_rows_apart(tokenizer, family, apart):
    for seed in range(5):
        model = build(family).to(torch.bfloat16)
        torch.manual_seed(seed)
        rows = questions_of_many_shapes(tokenizer)
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_(0, 0.5)
        scorer = scorer_on(rows, tokenizer, "choice", "logprob")
        settle(GatedStack(model, {}), [{}], scorer)
        assert scorer.apart == apart


def test_answers_of_a_model_that_reads_padding_are_those_of_one_row_at_a_time(tokenizer):
    rows = [TargetRow(row.prompt, row.choices[:1], 0) for row in questions_of_many_shapes(tokenizer)]
    stack, answers = GatedStack(build("rwkv"), {}), []
    scorer = scorer_on(rows, tokenizer, "generation", "exact_match", generation={"max_new_tokens": 8})
    scorer.metric = lambda texts, references: (0.0, 0.0, [0.0 for text in texts if answers.append(text) is None])
    for row in range(len(rows)):
        scorer.score(stack, [{}], 10_000, [row])
    expected = answers.copy()
    answers.clear()
    scorer.score(stack, [{}], 10_000)
    assert answers != expected
    answers.clear()
    assert "only rows of one length share a batch" in settle(stack, [{}], scorer)
    scorer.score(stack, [{}], 10_000)
    assert answers == expected


@pytest.mark.parametrize("kind", ["choice", "generation"])
def test_a_model_broken_on_purpose(tokenizer, kind):
    model = build_model("llama")
    handle = model.model.layers[0].register_forward_hook(lambda module, args, out: out + out.mean(0, keepdim=True))
    rows = questions_of_many_shapes(tokenizer)
    if kind == "generation":
        rows = [TargetRow(row.prompt, row.choices[:1], 0) for row in rows]
    metric = {"choice": "logprob", "generation": "exact_match"}[kind]
    scorer = scorer_on(rows, tokenizer, kind, metric)
    settle(GatedStack(model, {}), [{}], scorer)
    assert scorer.apart in (ALIKE, ALONE)
    handle.remove()
    scorer = scorer_on(rows, tokenizer, kind, metric)
    before = scorer.fingerprint
    assert settle(GatedStack(model, {}), [{}], scorer) is None
    assert (scorer.apart, scorer.fingerprint) == (TOGETHER, before)


def test_a_model_that_remembers_is_refused(tokenizer, questions):
    model, seen = build("llama"), []

    def remember(module, args, out):
        seen.append(1)
        return out * (1 + len(seen) / 10)

    model.model.layers[0].register_forward_hook(remember)
    with pytest.raises(InputError, match="otherwise after other rows"):
        settle(GatedStack(model, {}), [{}], scorer_on(questions, tokenizer, "choice", "logprob"))


def test_a_run_keeps_what_it_found(project, tokenizer, tmp_path, capsys, monkeypatch):
    build("gpt_neo").save_pretrained(tmp_path / "gpt_neo")
    tokenizer.save_pretrained(tmp_path / "gpt_neo")
    given = changed(project, "run", model_name_or_path=str(tmp_path / "gpt_neo"))
    gamma = given["candidates"].pop("gamma")
    changed(project, "run", candidates=given["candidates"])
    assert m2m("search", "--config", project / "run.yaml") == 0
    assert "target colours, validation: this model scores a row otherwise" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("m2m_hf.run.context.settle", lambda *_: pytest.fail("tried again"))
    changed(project, "run", candidates=given["candidates"] | {"gamma": gamma})
    assert m2m("search", "--config", project / "run.yaml") == 0
    assert len(trials(project / "out")) == 8


@pytest.mark.parametrize(
    ("parameters", "each", "free", "tokens"),
    [
        (106_000_000, 100_000, 80 << 30, 131_072),  # a pass of a small model is over before the next one is launched
        (1_000, 100_000, 80 << 30, 131_072),
        (973_000_000, 500_000, 80 << 30, 16_384),
        (8_000_000_000, 1_000_000, 80 << 30, 16_384),
        (106_000_000, 100_000, 8 << 30, 32_768),
        (8_000_000_000, 1_000_000, 4 << 30, 2_048),
        (106_000_000, float("inf"), 80 << 30, 1_024),
    ],
)
def test_tokens_in_a_pass_follow_from_the_models_size_and_the_free_memory(parameters, each, free, tokens):
    assert tokens_within(parameters, each, free) == tokens
    assert tokens_within(parameters, each, int(0.98 * free)) == tokens


@pytest.mark.cpu_only("it is told what a card would say")
def test_on_cuda_memory_is_measured(monkeypatch):
    assert fitting_tokens(build_model("llama")) == 1024
    taken = iter([7 << 20, 100 << 20])  # what the first pass leaves behind does not count

    def run(model) -> int:
        peak[0] = next(taken) + (9 << 20)
        return 4096

    peak = [0]
    monkeypatch.setattr(probing, "small_pass", run)
    for name, value in {
        "memory_allocated": lambda device: 9 << 20,
        "memory_reserved": lambda device: 10 << 20,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: peak[0],
        "mem_get_info": lambda device: (4 << 30, 8 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    model = SimpleNamespace(device=torch.device("cuda"), num_parameters=lambda exclude_embeddings: 106_000_000)
    assert probing.bytes_per_token(model) == (100 << 20) / 4096
    taken = iter([1, 100 << 20])
    assert fitting_tokens(model) == 65_536  # 1.6 of 4 GiB, of which half is given away


@pytest.mark.parametrize("kind", ["causal", "encoder", "image"])
def test_the_pass_that_is_measured(kind):
    build = {
        "causal": lambda: build_model("llama"),
        "encoder": lambda: BertModel(BertConfig(**BERT)),
        "image": lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, **pico.SHAPE)),
    }
    model, seen = build[kind](), []
    model.register_forward_pre_hook(
        lambda module, args, given: seen.append(next(iter(given.values()))), with_kwargs=True
    )
    if kind == "causal":
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
    tokens = small_pass(model)
    if kind == "image":
        assert tokens == 2 * patches(model.config)
        return
    assert (seen[0].shape, tokens) == ((128, 32), 4096)
    if kind == "causal":
        assert seen[1].shape[1] * HEAD == tokens  # a batch never has more logits
