"""Where prompt and completion part, on twelve kinds of tokenizers: as TRL trains, and alike wherever a space stands."""

import pytest
from datasets import Dataset
from pico import TEMPLATE, TEXT, USE_CPU, build_model, build_tokenizer, m2m, project_folder, scorer_on, write_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from m2m_hf import InputError
from m2m_hf.data.rows import TargetRow
from m2m_hf.data.tokens import MARK, appended, before_answer, encode, encode_choices, special_in
from m2m_hf.merging.gated_stack import GatedStack

SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<s>", "<unk>"]
BYTES = pre_tokenizers.ByteLevel.alphabet()
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


def make(model, trainer, pre=None, post=None, decoder=None, normalizer=None, **more) -> PreTrainedTokenizerFast:
    core = Tokenizer(model)
    core.pre_tokenizer, core.decoder = pre, decoder or decoders.ByteLevel()
    if normalizer:
        core.normalizer = normalizer
    core.train_from_iterator([TEXT] * 3, trainer)
    if post:
        ids = [(token, core.token_to_id(token)) for token in ("<s>", "<|end|>")]
        core.post_processor = processors.TemplateProcessing(single=post, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", unk_token="<unk>", **more
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def bpe(prefix: bool = False, pre=None, **more) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(vocab_size=316, special_tokens=SPECIAL, initial_alphabet=BYTES, show_progress=False)
    return make(models.BPE(), trainer, pre or pre_tokenizers.ByteLevel(add_prefix_space=prefix), **more)


def metaspace(kind, scheme: str, **more) -> PreTrainedTokenizerFast:
    options = {"vocab_size": 100, "special_tokens": SPECIAL, "show_progress": False}
    if kind is models.Unigram:
        model, trainer = models.Unigram(), trainers.UnigramTrainer(**options, unk_token="<unk>")
    else:
        model, trainer = models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**options)
    pre = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return make(model, trainer, pre, decoder=decoders.Metaspace(prepend_scheme=scheme), **more)


def wordpiece(**more) -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=100, special_tokens=SPECIAL, show_progress=False)
    pre, low = pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(lowercase=True)
    return make(models.WordPiece(unk_token="<unk>"), trainer, pre, decoder=decoders.WordPiece(), normalizer=low, **more)


KINDS = {
    "bpe": bpe,
    "bpe, prefix space": lambda: bpe(prefix=True),
    "bpe, digits": lambda: bpe(pre=DIGITS),
    "bpe, bos": lambda: bpe(post="<s> $A", bos_token="<s>"),
    "bpe, eos": lambda: bpe(post="$A <|end|>"),
    "bpe, bos and eos": lambda: bpe(post="<s> $A <|end|>", bos_token="<s>"),
    "bpe, left": lambda: bpe(padding_side="left", truncation_side="left"),
    "unigram, metaspace": lambda: metaspace(models.Unigram, "always"),
    "bpe, metaspace, first": lambda: metaspace(models.BPE, "first", post="<s> $A", bos_token="<s>"),
    "bpe, metaspace, eos": lambda: metaspace(models.BPE, "never", post="$A <|end|>"),
    "wordpiece": wordpiece,
    "wordpiece, both ends": lambda: wordpiece(post="<s> $A <|end|>", bos_token="<s>"),
}
ROWS = [{"prompt": "what is hot? ", "completion": "red"}, {"prompt": "answer:", "completion": " 17"}]


@pytest.fixture(params=KINDS)
def any_tokenizer(request):
    return KINDS[request.param]()


def test_a_completion_is_read_as_trl_trains_it(any_tokenizer, tmp_path):
    ends = [any_tokenizer.eos_token_id] * (1 + appended(any_tokenizer))
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=USE_CPU, bf16=False, report_to="none")
    model = build_model("llama")
    trainer = SFTTrainer(model, args, train_dataset=Dataset.from_list(ROWS), processing_class=any_tokenizer)
    for row, theirs in zip(ROWS, trainer.train_dataset, strict=True):
        ids, start = encode(any_tokenizer, row["prompt"], row["completion"])
        assert theirs["input_ids"] == ids + ends
        assert theirs["labels"] == [-100] * start + (ids + ends)[start:]


def test_choices_score_alike_wherever_the_space_stands(any_tokenizer):
    rows = {True: [], False: []}
    for number, words in enumerate((("red", "17", "4"), ("cold", "no 3"), ("two", "zebra", "9"))):
        for spaced, of_kind in rows.items():
            prompt, choices = ("is it hot? ", words) if spaced else ("is it hot?", [f" {word}" for word in words])
            of_kind.append(TargetRow(prompt, tuple(choices), number % 2))
    model = build_model("llama")
    scores = {}
    for spaced, of_kind in rows.items():
        scorer = scorer_on(of_kind, any_tokenizer, "choice", "logprob")
        scores[spaced] = scorer.score(GatedStack(model, {}), [{}], 1000)[0].values
    assert scores[True] == pytest.approx(scores[False], abs=1e-5)


def test_all_choices_start_at_the_first_boundary_and_after_one_context(any_tokenizer):
    rows, start, _ = encode_choices(any_tokenizer, "is it hot? ", ["red", "17", "zebra"])
    assert len({tuple(ids[:start]) for ids in rows}) == 1
    assert start == min(encode(any_tokenizer, "is it hot? ", text)[1] for text in ("red", "17", "zebra"))


def test_an_answer_goes_on_from_what_training_shows_before_it(any_tokenizer):
    for prompt, text in (("hot?", " red"), ("hot? ", "red"), ("hot?\n\n", "red"), ("hot?\n  ", "red"), ("", "red")):
        ids = before_answer(any_tokenizer, prompt, "row")
        whole, _ = encode(any_tokenizer, prompt, text)
        assert ids == whole[: len(ids)]
        assert any_tokenizer.eos_token_id not in ids[1:]


THOUGHT = TEMPLATE.replace("{% generation %}", "{% generation %}<think>\n\n</think>\n\n")
OPENED = TEMPLATE.replace(
    "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|><think>\n"
)


@pytest.mark.parametrize("template", [TEMPLATE, THOUGHT, OPENED], ids=["plain", "empty thought", "opened thought"])
def test_an_answer_of_a_conversation_too(tokenizer, template):
    kind = build_tokenizer()
    kind.chat_template = template
    prompt = [{"role": "user", "content": "hot?"}]
    ids = before_answer(kind, prompt, "row")
    whole, _ = encode(kind, prompt, [{"role": "assistant", "content": "red"}])
    assert kind.decode(whole).removeprefix(kind.decode(ids)) == "red<|end|>"
    assert "hot" in kind.decode(before_answer(kind, [{"role": "user", "content": f"{MARK} is hot?"}], "row"))


def test_choices_that_the_tokenizer_reads_alike_are_refused():
    tokenizer = wordpiece()
    scorer_on([TargetRow("hot?", ("one", "red", "Red"), 0)], tokenizer, "choice", "accuracy")
    with pytest.raises(InputError, match=r"row 1 of the target: .* reads the right answer and another choice alike"):
        scorer_on([TargetRow("hot?", ("one", "red", "Red"), 1)], tokenizer, "choice", "accuracy")


def test_special_tokens_in_writing_are_found(tokenizer):
    kind = bpe(post="<s> $A", bos_token="<s>", extra_special_tokens=["<|user|>"])
    rows = [{"prompt": "<s>red"}, {"prompt": [{"content": "a <|user|>"}]}, {"prompt": "<think> [user]"}]
    assert special_in(kind, rows)[0] == 2
    assert special_in(kind, [TargetRow("red", ("a<|end|>", "b"), 0)]) == (1, "<|end|>")


def test_special_tokens_in_writing_are_said(tmp_path, pico, capsys):
    project_folder(tmp_path, pico)
    rows = [{"prompt": f"<|end|>red {n}?", "completion": " one"} for n in range(6)]
    write_rows(tmp_path / "alpha.jsonl", rows)
    assert m2m("select", "--config", tmp_path / "run.yaml", "--dry_run") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "alpha: 6 rows hold special tokens in writing, such as '<|end|>', which are read as these tokens" in shown
    assert "beta: " not in shown


def test_a_row_that_is_read_otherwise_has_another_fingerprint(tokenizer):
    even, uneven = TargetRow("hot? ", ("red", "blue"), 0), TargetRow("hot? ", ("red", "17"), 0)
    scorer = scorer_on([even], tokenizer, "choice", "logprob")
    assert not scorer.inputs.reading
    assert scorer_on([uneven], bpe(pre=DIGITS), "choice", "logprob").inputs.reading
    loss = [TargetRow("hot?", (" red",), 0)]
    kinds = [scorer_on(loss, KINDS[kind](), "loss", "loglikelihood").fingerprint for kind in ("bpe", "bpe, eos")]
    assert kinds[0] != kinds[1]
