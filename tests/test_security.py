"""Names, paths, rows and files are data: nothing in them is run, nothing escapes the run folder, and no secret is told.

Every test of a guard here has been seen to fail with the guard taken out.
"""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pico import build_adapter, candidate_rows, changed, choice_rows, language_searcher, m2m, write_rows
from safetensors.torch import load_file
from transformers import TrainerCallback

from m2m_hf.config.parsing import parse
from m2m_hf.console import Terminal
from m2m_hf.data.loading import fill
from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import Adapter
from m2m_hf.modeling.loading import load_base
from m2m_hf.storage.records import COMPLETE, describe_files
from m2m_hf.training.fine_tune import train_expert


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def explosive(mark: Path) -> str:
    """Code that writes a file where it is run."""
    return f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"


@pytest.fixture
def mark(tmp_path):
    """The file that hostile input would create."""
    path = tmp_path / "exploded"
    yield path
    assert not path.exists()


def refused(project: Path, capsys, **values) -> str:
    """What is said of the project's configuration with other values."""
    changed(project, "run", **values)
    assert m2m("select", "--config", project / "run.yaml") == 2
    return capsys.readouterr().err


ROWS = {"path": "json", "data_files": "alpha.jsonl"}
TARGET = {"data": {"path": "json", "data_files": "validation.jsonl"}, "scorer": "choice"}


@pytest.mark.parametrize(
    "name", ["../outside", "/tmp/outside", "..", ".hidden", "a/b", "a\\b", "a\0b", "x" * 65, "", "-rf"]
)
def test_no_name_escapes_the_run_folder(project, capsys, name):
    assert "is not allowed" in refused(project, capsys, targets={name: TARGET})
    assert "is not allowed" in refused(project, capsys, targets={"colours": TARGET}, candidates={name: ROWS})
    assert not (project / "out").exists()


@pytest.fixture
def model(project, tmp_path) -> Path:
    """A copy of the project's model, which it uses."""
    given = yaml.safe_load((project / "run.yaml").read_text())
    shutil.copytree(given["model_name_or_path"], tmp_path / "model")
    changed(project, "run", model_name_or_path=str(tmp_path / "model"))
    return tmp_path / "model"


def test_no_name_in_a_foreign_run_folder_leads_out_of_it(finished, capsys):
    out = finished / "out"
    outside = finished / "outside"
    shutil.copytree(out / "adapters" / "alpha", outside)
    summary = json.loads((out / "summary.json").read_text())
    summary["candidates"].append("../../outside")
    (out / "summary.json").write_text(json.dumps(summary))
    assert m2m("report", out) == 2
    assert "is not allowed" in capsys.readouterr().err
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["candidates"]["../../outside"] = config["candidates"]["alpha"]
    (out / "config.yaml").write_text(yaml.safe_dump(config, explicit_end=True))
    assert m2m("status", out) == 2
    assert "is not allowed" in capsys.readouterr().err


PLACES = (".report.html.partial", "log.txt", "trials.jsonl", "trials.values", "adapters/alpha/README.md", "pictures")


@pytest.mark.parametrize(("place", "to"), [*((place, None) for place in PLACES), ("loop", "loop")])
def test_no_link_in_a_foreign_run_folder_is_followed_out_of_it(finished, capsys, place, to):
    """Nor one that leads nowhere: where links in /proc that belong to others lead cannot be found out."""
    out, outside = finished / "out", finished / "outside"
    outside.write_text("mine")
    if (out / place).is_dir():
        shutil.rmtree(out / place)
    (out / place).unlink(missing_ok=True)
    (out / place).symlink_to(to or outside)
    for command in (("report", out), ("status", out), ("sft", out), ("search", "--config", finished / "run.yaml")):
        assert m2m(*command) == 2
        assert f"is a link to {to or outside}" in capsys.readouterr().err
    assert outside.read_text() == "mine"


def test_a_run_folder_may_be_a_link_itself_and_link_to_itself(project):
    (project / "elsewhere").mkdir()
    (project / "out").symlink_to(project / "elsewhere")
    (project / "elsewhere" / "latest").symlink_to("adapters")
    assert m2m("search", "--config", project / "run.yaml") == 0


def test_the_name_that_an_old_final_model_gives_itself_leads_nowhere(finished):
    path = finished / "out" / "final" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "x/../../../outside"}))
    assert m2m("select", "--config", finished / "run.yaml") == 0
    assert not (finished / "outside").exists()
    assert not (finished.parent / "outside").exists()


@pytest.mark.parametrize("harmless", [True, False])
def test_nothing_is_unpickled_from_a_model_or_an_adapter(project, model, tmp_path, capsys, harmless, mark):
    """Not even what would do no harm: files of that kind are not looked at."""

    def pickled(folder: Path, name: str) -> None:
        tensors = load_file(folder / f"{name}.safetensors")
        (folder / f"{name}.safetensors").unlink()
        for file in (f"{name}.bin", f"pytorch_{name}.bin"):
            torch.save(tensors if harmless else Bomb(mark), folder / file)

    pickled(model, "model")
    assert "safetensors" in refused(project, capsys)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(*parse(project / "run.yaml")[:0:-1])
    adapter = build_adapter("llama", tmp_path / "adapter", 1)
    pickled(adapter, "adapter_model")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        Adapter.load(adapter)


@pytest.mark.parametrize(
    "source",
    [{"path": "pandas", "data_files": "data.pkl"}, {"path": "mydata"}, {"path": "mydata/mydata.py"}],
)
def test_data_are_neither_unpickled_nor_loaded_by_a_script_of_their_own(project, mark, capsys, source):
    (project / "data.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    (project / "mydata").mkdir()
    (project / "mydata" / "mydata.py").write_text(explosive(mark))
    assert "candidates.beta" in refused(project, capsys, candidates={"alpha": ROWS, "beta": source})


def test_nothing_is_unpickled_from_a_checkpoint(project, tmp_path, mark):
    one = language_searcher(project, "--max_steps", "4", "--save_steps", "2")

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    def train(*callbacks):
        rows = one.run.candidates["alpha"].rows
        return train_expert(one.run.base.model, rows, one.run.training_settings(), tmp_path / "run", callbacks)

    with pytest.raises(KeyboardInterrupt):
        train(Stop())
    checkpoint = tmp_path / "run.checkpoints" / "checkpoint-2"
    known = json.loads((checkpoint / COMPLETE).read_text())
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        kept = (checkpoint / name).read_bytes()
        torch.save(Bomb(mark), checkpoint / name)
        (checkpoint / COMPLETE).unlink()
        (checkpoint / COMPLETE).write_text(json.dumps(known | {"files": describe_files(checkpoint)}))
        with pytest.raises(InputError, match="contains pickled objects"):
            train()
        (checkpoint / name).write_bytes(kept)


def test_yaml_is_safely_loaded(project, mark, capsys):
    path, out, bomb = project / "run.yaml", project / "out", f"!!python/object/apply:os.system ['touch {mark}']\n"
    path.write_text(path.read_text() + f"final: {bomb}")
    assert m2m("select", "--config", path) == 2
    assert "expected YAML" in capsys.readouterr().err
    out.mkdir()
    (out / "config.yaml").write_text(f"x: {bomb}...\n")
    for command in ("status", "sft"):
        assert m2m(command, out) == 2


def test_templates_are_filled_and_not_run():
    row = {"prompt": "{prompt.__class__} {0}", "completion": "x"}
    assert fill("a {prompt} b {{c}}", row, "here") == "a {prompt.__class__} {0} b {c}"
    for field in ("prompt.__class__", "prompt[0]", "prompt!r", "prompt:>99999999999", "", "0", "nothing"):
        with pytest.raises(InputError, match="cannot be filled"):
            fill(f"{{{field}}}", row, "here")


def test_a_chat_template_cannot_reach_out(project, capsys):
    template = project / "chat.jinja"
    template.write_text(
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch x') }}"
    )
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 12
    write_rows(project / "beta.jsonl", rows)
    assert "chat template refuses these messages" in refused(project, capsys, chat_template_path=str(template))
    assert not Path("x").exists()


def test_a_metric_is_run_only_when_asked_for(project, capsys, mark):
    metric = project / "mine" / "mine.py"
    metric.parent.mkdir()
    metric.write_text(explosive(mark))
    target = TARGET | {"metric": str(metric.parent)}
    assert "allow_metric_code" in refused(project, capsys, targets={"colours": target})


@pytest.mark.parametrize("kind", ["evil", "llama"])
def test_remote_code_stays_off(project, model, capsys, kind, mark):
    (model / "evil.py").write_text(explosive(mark) + "class Evil: pass\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    for file in ("config.json", "tokenizer_config.json"):
        given = json.loads((model / file).read_text()) | {"auto_map": dict.fromkeys(names, "evil.Evil")}
        if kind == "evil":
            given |= {"model_type": "evil", "architectures": ["Evil"], "tokenizer_class": "Evil"}
        (model / file).write_text(json.dumps(given))
    assert m2m("search", "--config", project / "run.yaml") == (2 if kind == "evil" else 0)
    capsys.readouterr()
    said = refused(project, capsys, trust_remote_code=True)
    assert "trust_remote_code: models that bring their own code are never loaded" in said


def test_a_command_sees_no_shell(project, mark):
    (project / "score.py").write_text("import json, sys; json.dump({'score': len(sys.argv)}, open(sys.argv[1], 'w'))")
    command = [sys.executable, str(project / "score.py"), "{output}"]
    command += [f"; touch {mark}", f"$(touch {mark})", f"`touch {mark}`"]
    changed(project, "run", targets={"mine": {"scorer": "command", "command": command}}, train_final=False)
    assert m2m("search", "--config", project / "run.yaml") == 0
    assert json.loads((project / "out" / "summary.json").read_text())["best"]["score"] == 5


SECRET = "hf_" + "abcdEFGH1234" * 3


NOISY = """
import logging, os, sys
from m2m_hf.cli.main import main
from m2m_hf.searcher import MergeToMixSearcher
real = MergeToMixSearcher.check
def noisy(self):
    log = logging.getLogger('huggingface_hub')
    log.warning('using %s and %s', os.environ['HF_TOKEN'], os.environ['WANDB_API_KEY'])
    self.run.terminal.say('token ' + os.environ['HF_TOKEN'])
    real(self)
MergeToMixSearcher.check = noisy
code = main(sys.argv[1:])
def broken(self): raise RuntimeError('with ' + os.environ['HF_TOKEN'])
MergeToMixSearcher.check = broken
main(['search', *sys.argv[2:]])
sys.exit(code)
"""
SCORER = """
import os, sys
size = os.path.getsize(sys.argv[1] + '/adapter_model.safetensors')
if size > 5000: sys.exit('bad token ' + os.environ['HF_TOKEN'])
print(0.5)
"""


def test_tokens_reach_no_file_and_no_message(project, forks):
    """In a process of its own, in which a library logs the token, a scorer raises with it and the table is printed."""
    (project / "score.py").write_text(SCORER)
    command = [sys.executable, str(project / "score.py"), "{adapter}"]
    changed(project, "run", targets={"mine": {"scorer": "command", "command": command}})
    secrets = {"HF_TOKEN": SECRET, "WANDB_API_KEY": "k" * 40}
    done = forks.run("-c", NOISY, "select", "--config", project / "run.yaml", **secrets)
    assert done.returncode == 0, done.stderr
    assert "bad token ***" in done.stdout
    assert "with ***" in done.stderr
    assert "using *** and ***" in (project / "out" / "log.txt").read_text()
    for secret in secrets.values():
        assert secret not in done.stdout + done.stderr
        for file in (project / "out").rglob("*"):
            assert file.is_dir() or secret.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"hub_token": SECRET}, "hub_token: do not put tokens in files"),
        ({"token": SECRET}, "unknown key 'token'"),
        *(
            ({"candidates": {"a": {"path": "json", "data_files": f"https://{place}"}}}, "do not put credentials")
            for place in (
                "me:pass@host/x.jsonl",
                f"host/x.jsonl?t={SECRET}",
                "host/x.jsonl?v=1&X-Amz-Signature=me:pass",
                "host/x.jsonl?sig=me:pass",
                "host/x.jsonl?access_token=me:pass",
                "host/x.jsonl?ApiKey=me:pass",
            )
        ),
        ({"learning_rate": SECRET}, "***"),
        ({"run_name": SECRET}, "run_name: contains a token or password"),
        (
            {"targets": {"t": {"scorer": "command", "command": ["python", "x", SECRET]}}},
            "targets: contains a token or password",
        ),
        ({SECRET: 1}, "unknown key '***'"),
    ],
)
def test_tokens_in_a_configuration_are_refused_and_not_repeated(project, capsys, edit, words):
    said = refused(project, capsys, **edit)
    assert words in said
    assert SECRET not in said
    assert "me:pass" not in said
    assert not (project / "out").exists()


ODD = (
    "{{ 7 * 7 }}", "<script>alert(1)</script>", "$(touch x)", "../../etc/passwd", "\u202eevil", "%s {0}", "__import__('os')",
)  # fmt: skip


def test_rows_are_data(project):
    """Rows that look like code, markup or paths train and are scored as text."""
    for name, rows in (("beta", candidate_rows("beta")), ("validation", choice_rows())):
        odd = [row | {"prompt": f"{ODD[n % len(ODD)]} {row['prompt']}"} for n, row in enumerate(rows)]
        write_rows(project / f"{name}.jsonl", odd)
    assert m2m("select", "--config", project / "run.yaml") == 0
    assert not Path("x").exists()


def test_nothing_steers_the_terminal(capsys):
    Terminal().say("a\x1b[31m\x07b\tc\u202ed")
    Terminal().table("x\x1b[2J", ["", "y"], [["\x1b]0;title\x07", "1"]])
    shown = capsys.readouterr().out
    assert "\\x1b[31m\\x07b" in shown
    assert "\\u202ed" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


@pytest.mark.parametrize(
    "task",
    ['"include": evil.yaml', "doc_to_text: !%66unction evil.f", "doc_to_text: '{{ cycler.__init__.__globals__ }}'"],
)
def test_a_harness_task_of_ones_own_is_run_only_when_asked_for(project, mark, capsys, task):
    (project / "evil.py").write_text(explosive(mark) + "def f(doc): return ''\n")
    path, target = project / "task.yaml", {"scorer": "lm_eval", "task": "task.yaml"}
    path.write_text(f"task: mine\n{task}\n")
    assert "allow_metric_code: true if you trust it" in refused(project, capsys, targets={"mine": target})
    for name in ("task.txt", "task"):  # the harness would take them too
        path = path.rename(project / name)
        assert "the harness has no task" in refused(project, capsys, targets={"mine": target | {"task": str(path)}})
