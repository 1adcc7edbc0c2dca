"""Chat templates that print the date: the run's first day is theirs, for every command and for TRL."""

import json
import shutil
import time
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import pytest
import trl
import yaml
from jinja2 import TemplateError
from pico import TEMPLATE, build_model, build_tokenizer, candidate_rows, changed, m2m, trials, write_rows
from trl import SFTConfig

from m2m_hf.modeling.dates import is_pinned, pin_date, pinned

MOMENT = datetime(2024, 2, 29, 8, 5, 9)
SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
LLAMA = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n        {%- set date_string = "26 Jul 2024" %}\n'
    '    {%- endif %}\n{%- endif %}\n{{- "Today Date: " + date_string + "\\n\\n" }}'
)
DATED = {
    "literal": "<|system|>Today is {{ strftime_now('%d %b %Y') }}<|end|>",
    "llama": LLAMA,
    "begins with a line": "\n\n  {{ strftime_now('%Y年%-m月%d日 %H:%M:%S 100%%') }}\n",
    "in a macro": '{% macro head() %}\n{{ strftime_now("%A") }}, it\'s "{{ strftime_now(\'%B\') }}"{% endmacro %}{{ head() }}',
    "in a variable": "{% set form = '%Y-%m-%d' %}{{ (strftime_now(form) ~ strftime_now('%j'))|upper }}",
}
UNDATED = {
    "none": "",
    "a comment": "{# strftime_now('%Y') #}",
    "in text": "strftime_now('%Y') {{ 'strftime_now' }}",
    "llama 3.1": "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}",
    "no Jinja": "{{ strftime_now('",
}


def rendered(template: str) -> str:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue"}]
    return tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize("name", [*DATED, *(path.stem for path in SHIPPED if "strftime_now(" in path.read_text())])
def test_a_pinned_template_prints_what_it_would_have_printed_then(name, monkeypatch):
    shipped = {path.stem: path.read_text() for path in SHIPPED}
    template = shipped.get(name) or DATED[name] + TEMPLATE
    after = pinned(template, MOMENT)
    assert after != template
    assert is_pinned(after)
    assert pinned(after, datetime.now()) == after  # as from another run's folder
    today, text = rendered(template), rendered(after)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Mock(now=lambda: MOMENT))
    assert text == rendered(template) != today


@pytest.mark.parametrize("name", UNDATED)
def test_a_template_without_a_date_stays(name):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = UNDATED[name] + TEMPLATE
    assert not pin_date(tokenizer, SFTConfig(use_cpu=True, bf16=False), MOMENT)
    assert tokenizer.chat_template == UNDATED[name] + TEMPLATE


def test_a_format_that_no_literal_holds_is_refused_when_it_is_asked_for():
    with pytest.raises(TemplateError, match="knows the formats"):
        rendered(pinned("{{ strftime_now('%' ~ 'd') }}" + TEMPLATE, MOMENT))


@pytest.mark.parametrize("assistant_only", [False, True])
def test_templates_that_trl_knows_by_their_text_are_marked_first(assistant_only):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = next(path for path in SHIPPED if path.stem == "gptoss").read_text()
    args = SFTConfig(use_cpu=True, bf16=False, assistant_only_loss=assistant_only)
    assert pin_date(tokenizer, args, MOMENT)
    assert ("{% generation %}" in tokenizer.chat_template.replace("-", "")) == assistant_only


@pytest.fixture
def on(monkeypatch):
    """Sets the clock by setting the time zone: it is never the same day at both ends of the Pacific."""

    def move(zone: str) -> None:
        monkeypatch.setenv("TZ", f"Pacific/{zone}")
        time.tzset()

    yield move
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def dated(project, tmp_path):
    """`run.yaml` with conversations, and a model whose template prints the date."""
    model, tokenizer = build_model("llama"), build_tokenizer()
    tokenizer.chat_template = DATED["literal"] + TEMPLATE
    model.save_pretrained(tmp_path / "dated")
    tokenizer.save_pretrained(tmp_path / "dated")
    for name in ("alpha", "beta"):
        pairs = [((row["prompt"], "user"), (row["completion"], "assistant")) for row in candidate_rows(name)]
        rows = [{"messages": [{"role": role, "content": text} for text, role in pair]} for pair in pairs]
        write_rows(project / f"{name}.jsonl", rows)
    candidates = {name: {"path": "json", "data_files": f"{name}.jsonl"} for name in ("alpha", "beta")}
    changed(project, "run", model_name_or_path=str(tmp_path / "dated"), candidates=candidates)
    return project


def test_the_first_day_is_the_day_of_the_run(dated, tmp_path, capsys, on):
    run, out = dated / "run.yaml", dated / "out"
    whole = yaml.safe_load(run.read_text())
    changed(dated, "run", candidates={"alpha": whole["candidates"]["alpha"]})
    on("Pago_Pago")
    first = datetime.now()
    assert m2m("search", "--config", run) == 0
    changed(dated, "run", **whole)
    on("Kiritimati")
    assert m2m("select", "--config", run) == 0
    assert (
        f"the chat template prints the date: that of the run's first start, {first:%Y-%m-%d},"
        in capsys.readouterr().out
    )
    # Another run that goes by the first one's clock from its start is the same run.
    (tmp_path / "again").mkdir()
    shutil.copyfile(out / "clock.json", tmp_path / "again" / "clock.json")
    assert m2m("select", "--config", run, "--output_dir", tmp_path / "again") == 0
    keys = {one["key"]: one["score"] for one in trials(tmp_path / "again")}
    assert keys.items() <= {one["key"]: one["score"] for one in trials(out)}.items()
    for file in ("adapters/alpha", "adapters/beta", "final"):
        weights = f"{file}/adapter_model.safetensors"
        assert (out / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    # One that starts today has other adapters, under another fingerprint.
    assert m2m("adapters", "--config", run, "--output_dir", tmp_path / "today") == 0
    facts = [json.loads((folder / "adapters/alpha/training.json").read_text()) for folder in (out, tmp_path / "today")]
    assert facts[0]["uniform"]["chat_template"] != facts[1]["uniform"]["chat_template"]


@pytest.mark.cpu_only("compares bytes or last digits with a forked process, which stays on the CPU")
def test_trl_trains_on_the_rows_of_the_first_day(dated, on, forks):
    on("Pago_Pago")
    assert m2m("select", "--config", dated / "run.yaml") == 0
    recipe = dated / "out" / "recipe.yaml"
    ours = json.loads((dated / "out" / "final" / "training.json").read_text())["loss"]
    code = (
        "import sys; from trl import SFTTrainer; from trl.scripts.sft import make_parser, main\n"
        "train = SFTTrainer.train\n"
        "def spy(self, *a, **k):\n"
        "    out = train(self, *a, **k); print('LOSS', repr(out.training_loss)); return out\n"
        "SFTTrainer.train = spy\n"
        "main(*make_parser().parse_args_and_config(fail_with_unknown_args=True))\n"
    )
    on("Kiritimati")
    done = forks.run("-c", code, "--config", recipe, "--output_dir", dated / "trl")
    assert done.returncode == 0, done.stderr
    theirs = float(next(line for line in done.stdout.splitlines() if line.startswith("LOSS")).split()[1])
    assert round(theirs, 6) == ours
    assert m2m("export", dated / "out", "--to", "trl") == 0
    exported = dated / "out" / "export" / "trl"
    assert yaml.safe_load((exported / "recipe.yaml").read_text())["chat_template_path"] == "chat_template.jinja"
    assert (exported / "chat_template.jinja").read_bytes() == (dated / "out" / "chat_template.jinja").read_bytes()


def test_a_dry_run_says_the_date_and_keeps_none(dated, capsys):
    assert m2m("select", "--config", dated / "run.yaml", "--dry_run") == 0
    assert f"first start, {datetime.now():%Y-%m-%d}" in capsys.readouterr().out
    assert not (dated / "out").exists()
