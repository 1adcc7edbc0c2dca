"""Instructions that code can verify, as an `evaluate` module that works offline.

A reference is JSON: a list of `{"id": ..., <arguments>}`, or the two columns of IFEval as `{"instruction_id_list": [...],
"kwargs": [...]}`. An example is 1 if its answer follows all of them, as it stands: the strict accuracy by prompt of Zhou et al.,
Instruction-Following Evaluation for Large Language Models, 2023. Ids, arguments and what they ask for are theirs. Where code may
read an answer otherwise: keywords are no patterns, a bullet has a space behind its mark, and see `count_sentences`.
"""

import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate

Arguments = Mapping[str, Any]
RELATIONS = ("at least", "less than")
PUNCTUATION = string.punctuation + "“”‘’…"
END = re.compile(r"[.!?…]+[\"'”’»)\]*_]*(?=\s|$)")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e|[A-HJ-Z])$")
HIGHLIGHT = re.compile(r"\*\*\S[^\n*]*\*\*|\*[^\s*][^\n*]*\*")
FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL | re.IGNORECASE)
DECISIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def count_sentences(text: str) -> int:
    """Sentences end in . ! ? or … before white space, but not behind an initial or one of a few abbreviations."""
    count = start = 0
    for end in END.finditer(text):
        if end[0] == "." and ABBREVIATION.search(text[max(start, end.start() - 6) : end.start()]):
            continue
        count += re.search(r"\w", text[start : end.end()]) is not None
        start = end.end()
    return count + (re.search(r"\w", text[start:]) is not None)


def parts(text: str, separator: str) -> list[str]:
    """What stands between separators, stripped; nothing before the first one and behind the last one is no part."""
    found = [part.strip() for part in text.split(separator)]
    return found[not found[0] : len(found) - (len(found) > 1 and not found[-1])]


def nth_paragraph(text: str, ask: Arguments) -> bool:
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    if len(paragraphs) != ask["num_paragraphs"] or not 0 < ask["nth_paragraph"] <= len(paragraphs):
        return False
    first = paragraphs[int(ask["nth_paragraph"]) - 1].split()[0].strip(PUNCTUATION)
    return first.casefold() == str(ask["first_word"]).strip(PUNCTUATION).casefold()


def is_json(text: str) -> bool:
    fenced = FENCED.fullmatch(text.strip())
    try:
        json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return True


def has_postscript(text: str, ask: Arguments) -> bool:
    marker = r"\.\s?".join(map(re.escape, ask["postscript_marker"].strip(". ").split(".")))
    return re.search(rf"(?<![\w.]){marker}\b", text, re.IGNORECASE) is not None


def two_answers(text: str, ask: Arguments) -> bool:
    found = parts(text, "******")
    return len(found) == 2 and "" not in found and found[0] != found[1]


def paragraphs(text: str, ask: Arguments) -> bool:
    found = parts(text, "***")
    return "" not in found and len(found) == ask["num_paragraphs"]


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def held(text: str, word: str) -> int:
    """How often a text holds another, in any letter case."""
    return text.casefold().count(word.casefold())


def whole(text: str, word: str) -> bool:
    """True if a text has this word, not only within another."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def counted(
    count: Callable[[str, Arguments], int], number: str, relation: str = ""
) -> Callable[[str, Arguments], bool]:
    """A check that compares a count with a number: as the relation says, by default at least that many."""

    def check(text: str, ask: Arguments) -> bool:
        wanted: float = ask[number]
        return count(text, ask) < wanted if ask.get(relation) == "less than" else count(text, ask) >= wanted

    return check


# id: (whether an answer follows it, its arguments)
CHECKS: dict[str, tuple[Callable[[str, Arguments], bool], tuple[str, ...]]] = {
    "keywords:existence": (lambda text, ask: all(held(text, word) for word in ask["keywords"]), ("keywords",)),
    "keywords:forbidden_words": (
        lambda text, ask: not any(whole(text, word) for word in ask["forbidden_words"]),
        ("forbidden_words",),
    ),
    "keywords:frequency": (
        counted(lambda text, ask: held(text, ask["keyword"]), "frequency", "relation"),
        ("keyword", "frequency", "relation"),
    ),
    "keywords:letter_frequency": (
        counted(lambda text, ask: held(text, ask["letter"]), "let_frequency", "let_relation"),
        ("letter", "let_frequency", "let_relation"),
    ),
    "length_constraints:number_words": (
        counted(lambda text, ask: len(words(text)), "num_words", "relation"),
        ("num_words", "relation"),
    ),
    "length_constraints:number_sentences": (
        counted(lambda text, ask: count_sentences(text), "num_sentences", "relation"),
        ("num_sentences", "relation"),
    ),
    "length_constraints:number_paragraphs": (paragraphs, ("num_paragraphs",)),
    "length_constraints:nth_paragraph_first_word": (nth_paragraph, ("num_paragraphs", "nth_paragraph", "first_word")),
    "detectable_content:number_placeholders": (
        counted(lambda text, ask: len(re.findall(r"\[[^\[\]\n]+\]", text)), "num_placeholders"),
        ("num_placeholders",),
    ),
    "detectable_content:postscript": (has_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": (
        lambda text, ask: len(re.findall(r"^\s*[*-]\s+\S", text, re.MULTILINE)) == ask["num_bullets"],
        ("num_bullets",),
    ),
    "detectable_format:constrained_response": (lambda text, ask: any(said in text for said in DECISIONS), ()),
    "detectable_format:number_highlighted_sections": (
        counted(lambda text, ask: len(HIGHLIGHT.findall(text)), "num_highlights"),
        ("num_highlights",),
    ),
    "detectable_format:multiple_sections": (
        counted(lambda text, ask: len(re.findall(rf"{re.escape(ask['section_spliter'])}\s*\d+", text)), "num_sections"),
        ("section_spliter", "num_sections"),
    ),
    "detectable_format:json_format": (lambda text, ask: is_json(text), ()),
    "detectable_format:title": (lambda text, ask: re.search(r"<<[^\n<>]*\w[^\n<>]*>>", text) is not None, ()),
    "combination:two_responses": (two_answers, ()),
    "combination:repeat_prompt": (
        lambda text, ask: text.strip().casefold().startswith(ask["prompt_to_repeat"].strip().casefold()),
        ("prompt_to_repeat",),
    ),
    "startend:end_checker": (
        lambda text, ask: text.strip().strip('"').casefold().endswith(ask["end_phrase"].strip().casefold()),
        ("end_phrase",),
    ),
    "startend:quotation": (lambda text, ask: re.fullmatch(r'\s*".*"\s*', text, re.DOTALL) is not None, ()),
    "change_case:capital_word_frequency": (
        counted(
            lambda text, ask: sum(word.isupper() for word in re.findall(r"[^\W\d_][\w'’-]*", text)),
            "capital_frequency",
            "capital_relation",
        ),
        ("capital_frequency", "capital_relation"),
    ),
    "change_case:english_capital": (lambda text, ask: text.isupper(), ()),
    "change_case:english_lowercase": (lambda text, ask: text.islower(), ()),
    "punctuation:no_comma": (lambda text, ask: "," not in text, ()),
}
TEXTS = ("keyword", "letter", "first_word", "postscript_marker", "section_spliter", "prompt_to_repeat", "end_phrase")


def wrong_argument(name: str, value: Any) -> str:
    """What an argument should have been; nothing if it is right."""
    if name.endswith("relation"):
        return "" if value in RELATIONS else f"one of {', '.join(RELATIONS)}"
    if name in ("keywords", "forbidden_words"):
        right = isinstance(value, list) and value and all(isinstance(word, str) and word for word in value)
        return "" if right else "a list of words"
    if name in TEXTS:
        return "" if isinstance(value, str) and value.strip() else "a text"
    return "" if type(value) in (int, float) and value == int(value) >= 0 else "a whole number"


def instructions_of(reference: str) -> list[dict[str, Any]]:
    """The instructions of a reference; a ValueError says what is wrong with it, or that code cannot verify one of them."""
    try:
        value = json.loads(reference)
    except ValueError:
        value = None
    if isinstance(value, dict) and isinstance(ids := value.get("instruction_id_list"), list):
        given = value.get("kwargs")
        if isinstance(given, list) and len(given) == len(ids):
            value = [{**(ask or {}), "id": name} for name, ask in zip(ids, given, strict=True)]
    if not isinstance(value, list) or not value or not all(isinstance(ask, dict) and "id" in ask for ask in value):
        raise ValueError(
            'expected JSON, such as [{"id": "punctuation:no_comma"}], or {"instruction_id_list": [...], "kwargs": [...]} with as '
            f"many of both, got {reference!r:.200}"
        )
    for ask in value:
        if ask["id"] not in CHECKS:
            hint = "leave such rows out: where: {instruction_id_list: {without: ...}}; code can verify"
            raise ValueError(f"instruction {ask['id']!r} is none that code can verify; {hint} {', '.join(CHECKS)}")
        for name in CHECKS[ask["id"]][1]:
            if expected := wrong_argument(name, ask.get(name)):
                raise ValueError(f"instruction {ask['id']}, {name}: expected {expected}, got {ask.get(name)!r}")
    return value


def follows(answer: str, reference: str) -> float:
    """1 if an answer follows all instructions; an empty one follows none."""
    asked = instructions_of(reference)
    return float(bool(answer.strip()) and all(CHECKS[ask["id"]][0](answer, ask) for ask in asked))


class Instructions(evaluate.Metric):
    """The share of answers that follow all their instructions."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="",
            inputs_description="predictions: answers; references: their instructions as JSON.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def check(self, reference: str) -> None:
        """Refuses a reference that cannot be read, with a ValueError."""
        instructions_of(reference)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        values = list(map(follows, predictions, references))
        return {"instructions": sum(values) / len(values), "per_example": values}
