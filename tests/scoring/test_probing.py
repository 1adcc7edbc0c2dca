"""Models that score a row otherwise beside others: found by what they do, and scored as one row at a time."""

import pytest
import torch
from pico import build_model, questions_of_many_shapes, scorer_on
from transformers import GPTNeoConfig, GPTNeoForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from m2m_hf import InputError
from m2m_hf.data.rows import TargetRow
from m2m_hf.data.tokens import encode
from m2m_hf.merging.gated_stack import GatedStack
from m2m_hf.scoring.forward import ALIKE, ALONE, TOGETHER, UNSHARED
from m2m_hf.scoring.probing import settle

SHAPE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 16,
}  # fmt: skip


def build(family: str):
    torch.manual_seed(0)
    if family == "gpt_neo":
        types = [[["global", "local"], 1]]
        ids = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
        shape = GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=types, window_size=8, **ids)
        model = GPTNeoForCausalLM(shape)
    elif family == "longrope":
        model = Phi3ForCausalLM(Phi3Config(**SHAPE, original_max_position_embeddings=16, rope_parameters=LONG))
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=16, head_dim=8, rope_parameters=rope))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.2)
    return model.eval()


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
                given = build(family)(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            logprobs.append(sum(given[i - 1, ids[i]].item() for i in range(start, len(ids))))
        expected.append(torch.tensor(logprobs).log_softmax(0)[row.answer].item())
    assert list(scorer.score(stack, [{}], 10_000)[0].values) == pytest.approx(expected, abs=2e-5)


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
    model, seen = build_model("llama"), []

    def remember(module, args, out):
        seen.append(1)
        return out * (1 + len(seen) / 10)

    model.model.layers[0].register_forward_hook(remember)
    with pytest.raises(InputError, match="otherwise after other rows"):
        settle(GatedStack(model, {}), [{}], scorer_on(questions, tokenizer, "choice", "logprob"))
