"""The parser of `m2m`, and its help."""

import argparse
import textwrap
from pathlib import Path

from m2m_hf import __version__
from m2m_hf.cli.launch import FLAGS
from m2m_hf.config.run_config import field_help

DESCRIPTION = """\
Which of my datasets belong in the fine-tuning mixture? Trains one expert per candidate dataset (a LoRA adapter, or a
fine-tune of all parameters) of a language model, or of a classifier of texts or images, scores the exact
average of every subset on your target's validation set, and fine-tunes once on the best subset (Merge to Mix).

  m2m init                       write a configuration, from four questions or another trainer's
  m2m select   --config x.yaml   everything: adapters, search, recipe, final fine-tune
  m2m adapters --config x.yaml   only train the adapters that are missing
  m2m search   --config x.yaml   adapters and search, without the final fine-tune
  m2m fidelity --config x.yaml   fine-tune a sample of mixtures for real: can the scores be trusted here?
  m2m sft OUT                    the final fine-tune of the run in OUT, scored on the sealed test set
  m2m push OUT --repo_id ORG/NAME   adapters, final model and the chosen mixture on the Hub, with cards
  m2m compare OUT1 OUT2          two runs side by side
  m2m export OUT --to TRAINER    the chosen mixture for trl, axolotl, llamafactory, or as jsonl
  m2m report OUT                 make OUT/report.html again, from the files in OUT alone
  m2m status OUT                 what is done, left and spent, and whether every file in OUT is whole
  m2m recipe [NAME]              what else ships: the demo, benchmarks and studies

Every command goes on from where the run folder stands. On all GPUs of a machine, or on several machines (docs/multi_gpu.md):
  m2m select --config x.yaml --accelerate_config multi_gpu
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/select.py --config x.yaml
"""


SCORERS = """\
targets: each has a scorer and what that needs:
  choice          data: rows of prompt, choices, answer (an index, or the text); metric: accuracy or logprob; normalize: none,
                  tokens or bytes
  classification  data: rows of prompt, label; labels: {label: word}, or those in the data; metric and normalize as above. With
                  task: sequence_classification rows of text, label, with image_classification of image, label (path: imagefolder,
                  data_dir: ..., or parquet files); metric: accuracy, macro_f1 or logprob
  loss            data: rows of prompt, completion, or of messages; the score is the log-likelihood per token
  generation      data: the same; generation: {max_new_tokens: 64, stop_strings: [...]}; metric: exact_match, numeric_match,
                  token_f1
  command         command: [python, score.py, "{adapter}", "{output}"], which writes {"score": 0.5} to {output};
                  timeout: 3600 (seconds); with expert: full "{model}" in place of "{adapter}"
  lm_eval         task: a name, or a YAML of your own (with allow_metric_code); num_fewshot, limit; pip install 'm2m_hf[lm_eval]'
The sealed test is test_data, test_command or test_task. A metric may also be the path or Hub id of an evaluate module, which
runs its code, so only with allow_metric_code: true. Several targets have a weight each, and min_delta: by how much at most a
mixture may be worse on it than the base model. In Python a scorer may also be a function (model, tokenizer, rows) that gives
a number, or one for every row.
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

Any field can also be given as --field value. Beside those above, every field of TRL's SFTConfig and ModelConfig is one, with
TRL's defaults except: learning_rate 2e-4 (with expert: full 2e-5); use_cpu, dtype and bf16 as the hardware suggests;
output_dir runs/<name of the YAML>.
"""


def fields_text() -> str:
    """Our own fields, for `--help`."""
    lines = ["fields:"]
    for name, default, text in field_help():
        if name != "folder":
            shown = f"  {name:23} {text}" + (f" [{default}]" if default not in ("{}", "None") else "")
            lines.append(textwrap.fill(shown, 120, subsequent_indent=" " * 26))
    return "\n".join(lines) + "\n\n" + SCORERS + "\n" + EXAMPLE


def make_parser() -> argparse.ArgumentParser:
    """The parser of commands; what follows `--config` is TRL's parser's."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("m2m", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"m2m_hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in (
        ("select", "adapters, search, recipe, final fine-tune"),
        ("adapters", "train the adapters that are missing"),
        ("search", "adapters and search, without the final fine-tune"),
        ("fidelity", "search; then fine-tune mixtures for real, and tell how well their scores were predicted"),
    ):
        command = commands.add_parser(
            name, help=text, description=text, epilog=fields_text(), formatter_class=raw, allow_abbrev=False
        )
        command.add_argument("--config", required=True, type=Path, help="the YAML")
        add_launch_flags(command)
        if name == "select":
            command.add_argument(
                "--dry_run", action="store_true", help="tell what would be done and what it would cost, and end"
            )
    text = "write a configuration that runs: from four answers, from flags, or from another trainer's configuration"
    command = commands.add_parser("init", help=text, description=text, allow_abbrev=False)
    command.add_argument("--output", type=Path, default=Path("m2m.yaml"), help="where to write (default: m2m.yaml)")
    command.add_argument(
        "--from", dest="origin", type=Path, metavar="FILE", help="a YAML of TRL, axolotl or LLaMA-Factory"
    )
    command.add_argument("--model", default="", help="the base model: a Hub id or a folder")
    command.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH", help="candidates: files, folders or Hub ids"
    )
    command.add_argument("--target", metavar="NAME=PATH", help="rows of the task that you care about, for validation")
    command.add_argument(
        "--scorer", default="", help="choice, classification, loss or generation (default: as the rows suggest)"
    )
    for name, text in (
        ("sft", "the final fine-tune of a searched run, scored on the sealed test set"),
        ("report", "make report.html of a searched run again, from its files alone"),
        ("status", "what of a run is done, left and spent; checks every adapter and every line of the journal"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("out", type=Path, metavar="OUT", help="the run folder")
        if name == "sft":
            add_launch_flags(command)
    text = "put adapters, final model and the chosen mixture of a searched run on the Hub, each with a card"
    command = commands.add_parser("push", help=text, description=text, allow_abbrev=False)
    command.add_argument("out", type=Path, metavar="OUT", help="the run folder")
    command.add_argument("--repo_id", required=True, metavar="ORG/NAME", help="of the model and of the dataset")
    command.add_argument("--private", action="store_true", default=None, help="make the repositories private")
    command.add_argument("--dry_run", action="store_true", help="only tell what would go")
    text = "two finished runs side by side: what was asked differently, and what came of it"
    command = commands.add_parser("compare", help=text, description=text, allow_abbrev=False)
    command.add_argument("out", type=Path, metavar="OUT1", help="a run folder")
    command.add_argument("other", type=Path, metavar="OUT2", help="another one")
    text = "the chosen mixture and its settings as another trainer reads them"
    command = commands.add_parser("export", help=text, description=text, allow_abbrev=False)
    command.add_argument("out", type=Path, metavar="OUT", help="the run folder")
    command.add_argument("--to", required=True, help="trl, axolotl, llamafactory, or jsonl (the rows alone)")
    command.add_argument("--folder", type=Path, help="where to write (default: OUT/export/<trainer>)")
    text = "run a recipe that ships with the package, show one that is a configuration, or list them all"
    command = commands.add_parser("recipe", help=text, description=text, allow_abbrev=False)
    command.add_argument(
        "name", nargs="?", metavar="NAME", help="such as gpu_check or demo/data; --help behind it tells more"
    )
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="for the recipe")
    return parser


def add_launch_flags(command: argparse.ArgumentParser) -> None:
    """What has a command carried out by several processes."""
    command.add_argument(
        "--accelerate_config",
        metavar="NAME",
        help="start it under accelerate launch, with this configuration: cpu_2proc, single_gpu, multi_gpu, fsdp2, zero3 or a "
        f"file. Then also: {', '.join(f'--{name}' for name in FLAGS)}",
    )
