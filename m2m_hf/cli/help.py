"""The parser of `m2m`, and its help."""

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

from m2m_hf import __version__
from m2m_hf.cli import commands
from m2m_hf.cli.init import SCORED, init
from m2m_hf.cli.launch import FLAGS, recipe
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.config.targets import SCORERS

DESCRIPTION = """\
Which datasets belong in the fine-tuning mixture? Trains one expert per candidate dataset (a LoRA adapter, or a fine-tune
of all parameters) of a language model or a classifier of texts or images, scores the exact average of every subset on
your target's validation set, and fine-tunes once on the best subset (Merge to Mix).

{commands}

Every command continues from the state of the run folder. On all GPUs of a machine, or on several machines (docs/multi_gpu.md):
  m2m select --config x.yaml --accelerate_config multi_gpu
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/select.py --config x.yaml
"""


BENCHMARKS = """\
In a configuration the name stands for rows, prompt, scorer and metric; what stands beside it goes over them, rows key by key:

  targets:
    gsm8k: {benchmark: gsm8k}
    arc:
      benchmark: arc_easy
      data: {max_examples: 1000}                       # the other keys of data stay
    math:
      benchmark: gsm8k
      data: {path: json, data_files: mine.jsonl}       # rows of yours with the columns of the benchmark

m2m targets gsm8k prints what a name stands for, which is a start for a target of your own. See docs/targets.md.
"""


TARGETS = """\
The sealed test is test_data, test_command or test_task. A metric may also be the path or Hub id of an evaluate module; its
code runs, so this needs allow_metric_code: true. Each of several targets has a weight, and min_delta: how far a mixture may
fall below the base model on it. In Python a scorer may also be a function (model, tokenizer, rows) that returns a number, or
one for every row.
"""


EXAMPLE = """\
a configuration that runs:
  model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
  lora_r: 8
  learning_rate: 5.0e-4
  max_steps: 40
  output_dir: runs/science
  candidates:
    openbookqa: {path: json, data_files: data/openbookqa.jsonl}
    gsm8k: {path: openai/gsm8k, name: main, columns: {question: prompt, answer: completion}, max_examples: 5000}
  targets:
    arc_easy:
      data: {path: json, data_files: data/arc_validation.jsonl}
      test_data: {path: json, data_files: data/arc_test.jsonl}
      scorer: choice

Fields are those above and those of TRL's SFTConfig and ModelConfig. All but those marked YAML only can also be given as
--field value. TRL's defaults hold except: learning_rate 2e-4 (with expert: full 2e-5); use_cpu, dtype and bf16 as the
hardware suggests; output_dir runs/<name of the YAML>.
"""


def targets_text() -> str:
    """The scorers and their options, for `--help`."""
    lines = ["targets: each has a benchmark: (m2m targets lists them), or a scorer, and its options:"]
    for name, kind in SCORERS.items():
        if kind.help:
            lines.append(textwrap.fill(f"  {name:15} {kind.help}", 120, subsequent_indent=" " * 18))
    return "\n".join(lines) + "\n" + TARGETS


def fields_text() -> str:
    """The fields of a configuration, for `--help`."""
    lines = ["fields:"]
    for item in fields(MergeToMixConfig):
        if item.name != "folder":
            default = f" [{item.default}]" if item.default not in (None, MISSING) else ""
            shown = f"  {item.name:23} {item.metadata['help']}{default}"
            lines.append(textwrap.fill(shown, 120, subsequent_indent=" " * 26))
    return "\n".join(lines) + "\n\n" + targets_text() + "\n" + EXAMPLE


def boolean(text: str) -> bool:
    """A flag's value, in the words that transformers' HfArgumentParser takes."""
    words = {"true": True, "t": True, "yes": True, "y": True, "1": True}
    words |= {"false": False, "f": False, "no": False, "n": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return words[text.lower()]


def shared(*names: str, **options: Any) -> argparse.ArgumentParser:
    """An argument that several commands take."""
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument(*names, **options)
    return parent


FLAG: dict[str, Any] = {"nargs": "?", "const": True, "default": False, "type": boolean, "metavar": "true|false"}
CONFIGURED = ("select", "adapters", "search", "fidelity")  # take the YAML as their first word, too
CONFIG = shared(
    "--config",
    required=True,
    type=Path,
    metavar="X.YAML",
    help="the YAML, also as the command's first word; most of its fields may be given as --field value, which wins",
)
OUT = shared("out", type=Path, metavar="OUT", help="the run folder")
LAUNCH = shared(
    "--accelerate_config",
    metavar="NAME",
    help="start it under accelerate launch, with this configuration: cpu_2proc, single_gpu, multi_gpu, fsdp2, zero3 or a "
    f"file. Then also: {', '.join(f'--{name}' for name in FLAGS)}",
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of commands; TRL's parser reads what follows `--config`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("m2m", formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"m2m_hf {__version__}")
    parsers = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, help="m2m COMMAND --help says more"
    )
    lines = []

    def add(
        usage: str, text: str, run: Callable[[argparse.Namespace], None], *parents: argparse.ArgumentParser
    ) -> Callable[..., argparse.Action]:
        """Adds a command, and returns what adds an argument of its own to it."""
        lines.append(f"  m2m {usage:27} {text}")
        epilog = fields_text() if CONFIG in parents else None
        name = usage.split()[0]
        command = parsers.add_parser(
            name, parents=parents, description=text, epilog=epilog, formatter_class=raw, allow_abbrev=False
        )
        command.set_defaults(run=run, takes_flags=LAUNCH in parents or run is recipe)
        return command.add_argument

    argument = add("init", "write a configuration, from four questions, flags or another trainer's file", init)
    argument(
        "--output", type=Path, default=Path("m2m.yaml"), metavar="FILE", help="the file to write (default: m2m.yaml)"
    )
    argument(
        "--from", dest="origin", type=Path, metavar="FILE", help="take over a YAML of TRL, axolotl or LLaMA-Factory"
    )
    argument("--model", default="", help="the base model: a Hub id or a folder")
    argument("--data", nargs="+", default=[], metavar="NAME=PATH", help="candidates: files, folders or Hub ids")
    argument("--target", metavar="NAME=PATH", help="validation rows of the task that you care about")
    argument("--benchmark", default="", metavar="NAME", help="in place of --target: one that m2m targets lists")
    argument("--scorer", default="", help=f"one of {', '.join(SCORED)} (default: as the rows suggest)")
    argument("--reward_model", default="", help="which rates answers, of scorer reward: a Hub id or a folder")
    argument("--judge", nargs=2, metavar=("URL", "MODEL"), help="the server and its model, of scorer judge")

    text = "everything: adapters, search, recipe, final fine-tune"
    argument = add("select   --config x.yaml", text, partial(commands.work, commands.select), CONFIG, LAUNCH)
    argument("--dry_run", help="show what would be done and its cost, and end", **FLAG)

    text = "train only the missing adapters"
    add("adapters --config x.yaml", text, partial(commands.work, commands.adapters), CONFIG, LAUNCH)
    text = "adapters and search, without the final fine-tune"
    add("search   --config x.yaml", text, partial(commands.work, commands.search), CONFIG, LAUNCH)
    text = "search, then fine-tune a sample of mixtures for real: can the scores be trusted here?"
    add("fidelity --config x.yaml", text, partial(commands.work, commands.fidelity), CONFIG, LAUNCH)
    text = "the final fine-tune of the run in OUT, scored on the sealed test set"
    add("sft OUT", text, partial(commands.work, commands.sft), OUT, LAUNCH)

    text = "upload adapters, final model and the chosen mixture to the Hub, each with a card"
    argument = add("push OUT --repo_id ORG/NAME", text, commands.push_to_hub, OUT)
    argument("--repo_id", required=True, metavar="ORG/NAME", help="of the model and of the dataset")
    argument("--private", action="store_true", default=None, help="make the repositories private")
    argument("--dry_run", help="only show what would be uploaded", **FLAG)

    text = "two finished runs side by side: their settings and their results"
    argument = add("compare OUT1 OUT2", text, commands.show_comparison)
    argument("out", type=Path, metavar="OUT1", help="a run folder")
    argument("other", type=Path, metavar="OUT2", help="another one")

    text = "the chosen mixture and its settings for trl, axolotl or llamafactory, or its rows as jsonl"
    argument = add("export OUT --to TRAINER", text, commands.export_mixture, OUT)
    argument("--to", required=True, metavar="TRAINER", help="trl, axolotl, llamafactory, or jsonl (the rows alone)")
    argument("--folder", type=Path, help="where to write (default: OUT/export/<trainer>)")

    add("report OUT", "rebuild OUT/report.html from the files in OUT", commands.make_report, OUT)

    text = "the benchmarks that a target may name, or what one of them stands for"
    argument = add("targets [NAME]", text, commands.show_targets)
    argument("name", nargs="?", metavar="NAME", help="print the YAML of this one")
    parsers.choices["targets"].epilog = BENCHMARKS

    text = "what is done, left and spent; checks every adapter and every line of the journal"
    argument = add("status OUT", text, commands.show_status, OUT)
    argument("--full", action="store_true", help="read every file again, also those unchanged since the last time")

    text = "list the shipped recipes (demo, benchmarks, studies), or run a script, or print a configuration"
    argument = add("recipe [NAME]", text, recipe)
    argument("name", nargs="?", metavar="NAME", help="such as gpu_check or demo/data; NAME --help says more")
    argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="for the recipe")
    argument(
        "--relocate", type=Path, metavar="OUT", help="write the paths in OUT/recipe.yaml anew, after OUT was moved"
    )

    parser.description = DESCRIPTION.format(commands="\n".join(lines))
    return parser
