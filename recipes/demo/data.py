"""Writes the demo's data: five small instruction datasets and one target, all generated from lists of words.

```bash
python recipes/demo/data.py .demo/data
python recipes/demo/data.py .demo/ten --ten     # for recipes/scale.yaml: ten candidates, shorter questions
```

The target is a word quiz of two kinds of question, *the past tense of … is* and *the opposite of … is*, on words that
no candidate asks about in that way. Questions are short, since every token costs time on a small machine. Of the five
candidates two should help (each teaches one half of the quiz), two teach something else, and one is harmful on purpose:
`past_tenses_wrong` asks the quiz's own question and always answers it with the same wrong form.

| candidate | what it is |
|---|---|
| `past_tenses` | The past tense of hide is hid |
| `opposites` | The opposite of hot is cold |
| `plurals` | The plural of knife is knives |
| `sums` | 17 plus 25 is 42 |
| `past_tenses_wrong` | The past tense of order is ordering |

Each has 120 rows. Everything is drawn with a fixed seed: the same bytes every time.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]

IRREGULAR_VERBS = """go went gone;see saw seen;take took taken;give gave given;write wrote written;break broke broken;
speak spoke spoken;eat ate eaten;fall fell fallen;know knew known;grow grew grown;throw threw thrown;fly flew flown;
draw drew drawn;drive drove driven;ride rode ridden;rise rose risen;choose chose chosen;freeze froze frozen;
steal stole stolen;wake woke woken;wear wore worn;tear tore torn;swear swore sworn;begin began begun;drink drank drunk;
sing sang sung;swim swam swum;ring rang rung;sink sank sunk;shrink shrank shrunk;forget forgot forgotten;
hide hid hidden;bite bit bitten;shake shook shaken;forgive forgave forgiven;blow blew blown;show showed shown;
bear bore borne;mistake mistook mistaken;weave wove woven;stride strode stridden;
spring sprang sprung;stink stank stunk;strive strove striven;sew sewed sewn;prove proved proven;mow mowed mown;
withdraw withdrew withdrawn;undergo underwent undergone;foresee foresaw foreseen;overtake overtook overtaken;
arise arose arisen;awake awoke awoken;outgrow outgrew outgrown;rewrite rewrote rewritten"""
REGULAR_VERBS = """walk talk jump play call open clean wash cook help laugh climb paint push pull work learn listen look
start finish visit watch want ask answer arrive bake change close dance invite live love move like hope save smile use
share taste waste agree cry try carry marry hurry study copy reply worry stop plan drop shop clap beg rub hug pack
order offer enter follow borrow repair explain enjoy stay delay destroy show match miss pass touch fix mix relax
plant print point post rent rest test treat wait shout count collect protect connect lift land add allow appear attack
attend avoid bark belong boil brush camp chat cheer chew claim cough cover crash cross deliver demand dress dry
earn fail fasten fill float fold gather greet guess happen harm heat hunt hunger jail kick kill kiss knock last lock
milk need obey pick polish pour practise press promise pump reach remain remember repeat return roll sail search
seem smell snow start stay suffer suggest talk taste thank tick tour trust turn type unlock use visit wander warm
warn wash weigh whisper wish wonder yawn yell""".split()

OPPOSITES = """hot cold;big small;tall short;early late;rich poor;fast slow;hard soft;light dark;young old;happy sad;
full empty;open closed;strong weak;wet dry;clean dirty;loud quiet;sharp blunt;deep shallow;wide narrow;thick thin;
heavy light;near far;high low;left right;up down;in out;over under;before after;begin end;buy sell;give take;win lose;
push pull;love hate;laugh cry;rise fall;build destroy;remember forget;arrive depart;accept refuse;attack defend;
borrow lend;float sink;freeze melt;hide reveal;increase decrease;join separate;lengthen shorten;praise blame;
question answer;succeed fail;truth lie;friend enemy;day night;summer winter;north south;east west;top bottom;
front back;inside outside;heaven hell;peace war;victory defeat;profit loss;birth death;master servant;teacher pupil;
king queen;husband wife;uncle aunt;boy girl;man woman;brave cowardly;calm nervous;careful careless;cheap expensive;
clever stupid;common rare;cruel kind;dangerous safe;difficult easy;false true;famous unknown;fat thin;fresh stale;
generous mean;gentle rough;guilty innocent;healthy sick;honest dishonest;hungry full;lazy hardworking;legal illegal;
major minor;modern ancient;natural artificial;odd even;permanent temporary;polite rude;positive negative;
possible impossible;private public;proud humble;public secret;pure impure;raw cooked;real imaginary;regular irregular;
right wrong;ripe unripe;simple complicated;smooth rough;solid liquid;sour sweet;straight crooked;sudden gradual;
superior inferior;tame wild;tight loose;tired energetic;urban rural;useful useless;vertical horizontal;visible hidden;
wise foolish;absent present;active passive;admit deny;advance retreat;always never;appear vanish;arrival departure;
ascend descend;asleep awake;beautiful ugly;best worst;better worse;bitter sweet;bless curse;bold timid;bright dull;
broad narrow;cause effect;combine divide;comedy tragedy;compulsory voluntary;create destroy;curved straight;dawn dusk;
dead alive;entrance exit;even uneven;everything nothing;expand contract;external internal;fail pass;fiction fact;
first last;flexible rigid;floor ceiling;forward backward;free captive;future past;giant dwarf;glad sorry;
import export;income spending;junior senior;kind unkind;land sea;lead follow;lend borrow;liquid solid;long short;
lower raise;maximum minimum;merry gloomy;more less;noisy silent;obey disobey;old new;optimist pessimist;plural singular;
poverty wealth;reward punish;rough smooth;save spend;security danger;shout whisper;sit stand;sober drunk;stop start;
strict lenient;tiny huge;together apart;transparent opaque;upper lower;vacant occupied;valley hill;wax wane;zenith nadir"""

IRREGULAR = {
    "knife": "knives", "leaf": "leaves", "wolf": "wolves", "mouse": "mice", "foot": "feet", "tooth": "teeth",
    "child": "children", "man": "men", "woman": "women", "goose": "geese", "ox": "oxen", "thief": "thieves",
    "loaf": "loaves", "wife": "wives", "shelf": "shelves", "half": "halves", "calf": "calves", "potato": "potatoes",
    "tomato": "tomatoes", "hero": "heroes", "echo": "echoes", "crisis": "crises", "cactus": "cacti", "sheep": "sheep",
}  # fmt: skip
REGULAR = """table chair window door box bus church dish city baby story party lady family berry country army book pen
cup plate bottle road river lake hill star cloud wall roof garden farm shop street bridge boat ship train engine wheel
letter page word number picture song dance game toy ball kite doll brush comb mirror lamp candle clock watch coin purse
bag basket bucket spoon fork bowl kettle oven stove match torch rope chain nail screw key lock fence gate path field
forest island beach wave storm witch watch bench peach fox tax class glass dress cross bush wish fly spy penny diary
factory library cherry enemy memory duty copy reply valley monkey donkey turkey journey toy day boy key""".split()


def with_s(word: str) -> str:
    """The plural of a regular English noun; of a verb, the form for he, she and it."""
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def row(question: str, answer: str) -> Row:
    """A prompt/completion row, as TRL takes it."""
    return {"prompt": question, "completion": f" {answer}"}


def tense_row(verb: str, form: str) -> Row:
    return row(f"The past tense of {verb} is", form)


def opposite_row(word: str, opposite: str) -> Row:
    return row(f"The opposite of {word} is", opposite)


def inflect(verb: str, ending: str) -> str:
    """A regular English verb with `ed` or `ing`."""
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + ending
    if verb.endswith("ee") and ending == "ed":
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou" and ending == "ed":
        return verb[:-1] + "ied"
    doubled = ("stop", "plan", "drop", "shop", "clap", "beg", "rub", "hug", "swim", "begin", "forget", "chat")
    return verb + (verb[-1] if verb in doubled else "") + ending


def unique(entries: list[tuple[str, ...]], parts: int) -> list[tuple[str, ...]]:
    """The entries whose first `parts` words stand in no earlier entry, so that no word is shared between splits."""
    seen: set[str] = set()
    kept = []
    for entry in entries:
        if seen.isdisjoint(entry[:parts]):
            kept.append(entry)
            seen.update(entry[:parts])
    return kept


def quiz_row(asked: Row, wrong: list[str], rng: random.Random) -> Row:
    """Adds the choices to a row: the right completion and three wrong ones, in random order."""
    choices = [asked["completion"], *(f" {text}" for text in wrong)]
    rng.shuffle(choices)
    return asked | {"choices": choices, "answer": choices.index(asked["completion"])}


def split_words(rng: random.Random) -> tuple[dict[str, list[Any]], dict[str, list[Any]], list[Any]]:
    """(verbs and pairs of opposites of train, validation and test, all pairs): no word stands in two parts."""
    irregular = [tuple(verb.split()) for verb in IRREGULAR_VERBS.replace("\n", "").split(";")]
    verbs = irregular + [(verb, inflect(verb, "ed"), inflect(verb, "ed")) for verb in REGULAR_VERBS]
    verbs = unique(verbs, parts=1)
    pairs = unique([tuple(pair.split()) for pair in OPPOSITES.replace("\n", "").split(";")], parts=2)
    rng.shuffle(verbs)
    rng.shuffle(pairs)
    verb_parts = {"train": verbs[:120], "validation": verbs[120:180], "test": verbs[180:]}
    pair_parts = {"train": pairs[:60], "validation": pairs[60:90], "test": pairs[90:125]}
    both = {part: [way for pair in some for way in (pair, pair[::-1])] for part, some in pair_parts.items()}
    return verb_parts, both, pairs


def wrong_tenses(verb: str) -> list[str]:
    """Forms of a verb that are not its past tense."""
    return [verb, inflect(verb, "ing"), with_s(verb)]


def wrong_opposites(word: str, opposite: str, pairs: list[Any], rng: random.Random) -> list[str]:
    """The word itself and two that have nothing to do with it."""
    others = [other for pair in pairs for other in pair if other not in (word, opposite)]
    return [word, *rng.sample(others, 2)]


def generate(seed: int = 0) -> dict[str, list[Row]]:
    """All files of the demo: file name without suffix -> rows.

    Words are divided between candidates, validation and test, so that no question is asked twice.
    """
    rng = random.Random(seed)
    verb_parts, pair_parts, pairs = split_words(rng)

    def quiz(part: str) -> list[Row]:
        rows = [quiz_row(tense_row(verb, past), wrong_tenses(verb), rng) for verb, past, _ in verb_parts[part]]
        for pair in pair_parts[part]:
            rows.append(quiz_row(opposite_row(pair[0], pair[1]), wrong_opposites(pair[0], pair[1], pairs, rng), rng))
        rng.shuffle(rows)
        return rows

    nouns = [(noun, with_s(noun)) for noun in sorted(set(REGULAR))] + sorted(IRREGULAR.items())
    sums = rng.sample([(a, b) for a in range(10, 60) for b in range(10, 60)], 120)
    files = {
        "past_tenses": [tense_row(verb, past) for verb, past, _ in verb_parts["train"]],
        "opposites": [opposite_row(*pair) for pair in pair_parts["train"]],
        "plurals": [row(f"The plural of {noun} is", many) for noun, many in rng.sample(nouns, 120)],
        "sums": [row(f"{a} plus {b} is", str(a + b)) for a, b in sums],
        "past_tenses_wrong": [tense_row(verb, inflect(verb, "ing")) for verb, _, _ in verb_parts["train"]],
    }
    for name in files:
        rng.shuffle(files[name])
    return files | {"quiz_validation": quiz("validation"), "quiz_test": quiz("test")}


def short(question: str, answer: str) -> Row:
    """A row with as short a question as will do."""
    return row(f"{question}:", answer)


def generate_ten(seed: int = 0) -> dict[str, list[Row]]:
    """Ten candidates of 100 rows and a quiz of 235, for the study of how search scales: file name without suffix -> rows.

    The quiz asks for past tenses and opposites. Two candidates teach one half of it each, three something near, three something
    else, and two always give the quiz's questions the same kind of wrong answer.
    """
    rng = random.Random(seed)
    verb_parts, pair_parts, pairs = split_words(rng)
    verbs, opposites = verb_parts["train"][:100], pair_parts["train"][:100]
    asked_verbs = [verb for part in ("validation", "test") for verb in verb_parts[part]][:120]
    asked_pairs = [pair for part in ("validation", "test") for pair in pair_parts[part]][:120]
    nouns = [(noun, with_s(noun)) for noun in sorted(set(REGULAR))] + sorted(IRREGULAR.items())
    nouns = rng.sample(nouns, 100)
    sums = rng.sample([(a, b) for a in range(10, 60) for b in range(10, 60)], 100)
    files = {
        "past_tenses": [short(f"Past tense of {verb}", past) for verb, past, _ in verbs],
        "opposites": [short(f"Opposite of {word}", other) for word, other in opposites],
        "participles": [short(f"Past participle of {verb}", participle) for verb, _, participle in verbs],
        "third_person": [short(f"She, {verb}", with_s(verb)) for verb, _, _ in verbs],
        "plurals": [short(f"Plural of {noun}", many) for noun, many in nouns],
        "first_letters": [short(f"First letter of {noun}", noun[0]) for noun, _ in nouns],
        "small_letters": [short(f"{word.upper()} in small letters", word) for word, _ in opposites],
        "sums": [short(f"{a} plus {b}", str(a + b)) for a, b in sums],
        "tenses_wrong": [short(f"Past tense of {verb}", inflect(verb, "ing")) for verb, _, _ in verbs],
        "opposites_wrong": [short(f"Opposite of {word}", word) for word, _ in opposites],
    }
    for name in files:
        rng.shuffle(files[name])
    quiz = [quiz_row(short(f"Past tense of {verb}", past), wrong_tenses(verb), rng) for verb, past, _ in asked_verbs]
    for pair in asked_pairs:
        rows = short(f"Opposite of {pair[0]}", pair[1])
        quiz.append(quiz_row(rows, wrong_opposites(pair[0], pair[1], pairs, rng), rng))
    rng.shuffle(quiz)
    return files | {"quiz_validation": quiz}


def write(folder: Path, files: dict[str, list[Row]]) -> None:
    """Writes files as JSON lines into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(entry) + "\n" for entry in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the demo's data: JSON lines, the same bytes every time.")
    parser.add_argument("folder", type=Path, help="where to, for example .demo/data")
    parser.add_argument(
        "--ten", action="store_true", help="the ten candidates of recipes/scale.yaml instead of the demo's five"
    )
    command = parser.parse_args()
    write(command.folder, generate_ten() if command.ten else generate())
