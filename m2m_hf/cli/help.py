"""The parser of `m2m`, and its help."""

import argparse
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from m2m_hf import __version__
from m2m_hf.cli.launch import FLAGS

DESCRIPTION = """\
Which datasets belong in the fine-tuning mixture? Trains one expert per candidate dataset (a LoRA adapter, or a fine-tune
of all parameters) of a language model or a classifier of texts or images, scores the exact average of every subset on
your target's validation set, and fine-tunes once on the best subset (Merge to Mix).

  m2m init                       write a configuration, from four questions or another trainer's file
  m2m select   --config x.yaml   everything: adapters, search, recipe, final fine-tune
  m2m adapters --config x.yaml   train only the missing adapters
  m2m search   --config x.yaml   adapters and search, without the final fine-tune
  m2m fidelity --config x.yaml   fine-tune a sample of mixtures for real: can the scores be trusted here?
  m2m sft OUT                    the final fine-tune of the run in OUT, scored on the sealed test set
  m2m push OUT --repo_id ORG/NAME   adapters, final model and the chosen mixture on the Hub, with cards
  m2m compare OUT1 OUT2          two runs side by side
  m2m export OUT --to TRAINER    the chosen mixture for trl, axolotl, llamafactory, or as jsonl
  m2m report OUT                 rebuild OUT/report.html from the files in OUT
  m2m status OUT                 what is done, left and spent, and whether any file in OUT is damaged
  m2m recipe [NAME]              shipped scripts and configurations: the demo, benchmarks, studies

Every command continues from the state of the run folder. On all GPUs of a machine, or on several machines (docs/multi_gpu.md):
  m2m select --config x.yaml --accelerate_config multi_gpu
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/select.py --config x.yaml
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

Every field can also be given as --field value. Fields are those above and those of TRL's SFTConfig and ModelConfig, with
TRL's defaults except: learning_rate 2e-4 (with expert: full 2e-5); use_cpu, dtype and bf16 as the hardware suggests;
output_dir runs/<name of the YAML>.
"""


def targets_text() -> str:
    """The scorers and their options, for `--help`."""
    from m2m_hf.config.targets import SCORERS

    lines = ["targets: each has a scorer, and its options:"]
    for name, kind in SCORERS.items():
        first, *others = kind.help.splitlines() or [""]
        lines += [f"  {name:<15} {first}", *(" " * 18 + line for line in others)] if first else []
    return "\n".join(lines) + "\n" + TARGETS


def fields_text() -> str:
    """The fields of a configuration, for `--help`."""
    from m2m_hf.config.run_config import MergeToMixConfig

    lines = ["fields:"]
    for item in fields(MergeToMixConfig):
        if item.name != "folder":
            default = f" [{item.default}]" if item.default not in (None, MISSING) else ""
            shown = f"  {item.name:23} {item.metadata['help']}{default}"
            lines.append(textwrap.fill(shown, 120, subsequent_indent=" " * 26))
    return "\n".join(lines) + "\n\n" + targets_text() + "\n" + EXAMPLE


class CommandParser(argparse.ArgumentParser):
    """The parser of one command; one that takes a configuration explains its fields when help is asked for."""

    def format_help(self) -> str:
        if "--config" in self._option_string_actions:
            self.epilog = fields_text()
        return super().format_help()


def argument(*names: str, **options: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What `add_argument` takes."""
    return names, options


CONFIG = argument("--config", required=True, type=Path, help="the YAML")
OUT = argument("out", type=Path, metavar="OUT", help="the run folder")
LAUNCH = argument(
    "--accelerate_config",
    metavar="NAME",
    help="start it under accelerate launch, with this configuration: cpu_2proc, single_gpu, multi_gpu, fsdp2, zero3 or a "
    f"file. Then also: {', '.join(f'--{name}' for name in FLAGS)}",
)
COMMANDS: dict[str, tuple[str, tuple[tuple[tuple[str, ...], dict[str, Any]], ...]]] = {
    "select": (
        "adapters, search, recipe, final fine-tune",
        (
            CONFIG,
            LAUNCH,
            argument("--dry_run", action="store_true", help="show what would be done and its cost, and end"),
        ),
    ),
    "adapters": ("train the missing adapters", (CONFIG, LAUNCH)),
    "search": ("adapters and search, without the final fine-tune", (CONFIG, LAUNCH)),
    "fidelity": (
        "search, then fine-tune a sample of mixtures and show how well their scores were predicted",
        (CONFIG, LAUNCH),
    ),
    "init": (
        "write a configuration that runs: from four answers, from flags, or from another trainer's configuration",
        (
            argument("--output", type=Path, default=Path("m2m.yaml"), help="the file to write (default: m2m.yaml)"),
            argument(
                "--from", dest="origin", type=Path, metavar="FILE", help="a YAML of TRL, axolotl or LLaMA-Factory"
            ),
            argument("--model", default="", help="the base model: a Hub id or a folder"),
            argument(
                "--data", nargs="+", default=[], metavar="NAME=PATH", help="candidates: files, folders or Hub ids"
            ),
            argument("--target", metavar="NAME=PATH", help="validation rows of the task that you care about"),
            argument(
                "--scorer", default="", help="choice, classification, loss or generation (default: as the rows suggest)"
            ),
        ),
    ),
    "sft": ("the final fine-tune of a searched run, scored on the sealed test set", (OUT, LAUNCH)),
    "report": ("rebuild report.html of a searched run from its files", (OUT,)),
    "status": (
        "what of a run is done, left and spent; checks every adapter and every line of the journal",
        (
            OUT,
            argument(
                "--full", action="store_true", help="read every file again, also those unchanged since the last time"
            ),
        ),
    ),
    "push": (
        "upload adapters, final model and the chosen mixture of a searched run to the Hub, each with a card",
        (
            OUT,
            argument("--repo_id", required=True, metavar="ORG/NAME", help="of the model and of the dataset"),
            argument("--private", action="store_true", default=None, help="make the repositories private"),
            argument("--dry_run", action="store_true", help="only show what would be uploaded"),
        ),
    ),
    "compare": (
        "two finished runs side by side: their settings and their results",
        (
            argument("out", type=Path, metavar="OUT1", help="a run folder"),
            argument("other", type=Path, metavar="OUT2", help="another one"),
        ),
    ),
    "export": (
        "the chosen mixture and its settings for another trainer",
        (
            OUT,
            argument("--to", required=True, help="trl, axolotl, llamafactory, or jsonl (the rows alone)"),
            argument("--folder", type=Path, help="where to write (default: OUT/export/<trainer>)"),
        ),
    ),
    "recipe": (
        "run a shipped recipe, print one that is a configuration, or list all",
        (
            argument("name", nargs="?", metavar="NAME", help="such as gpu_check or demo/data; NAME --help says more"),
            argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="for the recipe"),
        ),
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of commands; TRL's parser reads what follows `--config`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("m2m", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"m2m_hf {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)
    for name, (text, arguments) in COMMANDS.items():
        command = subparsers.add_parser(name, help=text, description=text, formatter_class=raw, allow_abbrev=False)
        for names, options in arguments:
            command.add_argument(*names, **options)
    return parser
