"""`m2m`: the command line. Libraries are imported inside the functions, so that `--help` answers at once.

Exit codes: 0 done, 2 bad input (one message, no traceback), 130 interrupted, 143 terminated, 1 anything else; of `m2m status`, 1
where something is damaged.
"""

import argparse
import os
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from m2m_hf import __version__
from m2m_hf.cli.launch import FLAGS, find, relaunched, shown_recipes
from m2m_hf.config.run_config import field_help
from m2m_hf.console import LibraryLog, Terminal
from m2m_hf.errors import InputError, StoppedError, printable, redact

PATIENCE = 5.0  # seconds in which a launcher ends the other processes, once one has ended


if TYPE_CHECKING:
    from m2m_hf.searcher import MergeToMixSearcher

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


def open_searcher(config: Path, overrides: Sequence[str], log: LibraryLog) -> "MergeToMixSearcher":
    """The searcher of a configuration; imports everything heavy."""
    from m2m_hf.config.parsing import parse
    from m2m_hf.searcher import MergeToMixSearcher

    log.silence_libraries()
    return MergeToMixSearcher(*parse(config, overrides))


def run(command: argparse.Namespace, overrides: Sequence[str], log: LibraryLog, arguments: Sequence[str]) -> None:
    """Carries out one command."""
    if command.command == "recipe":
        run_recipe(command.name, [*command.arguments, *overrides])
        return
    if getattr(command, "accelerate_config", None):
        replace_process(relaunched(arguments))
    if command.command in ("report", "status", "push", "export", "compare", "init"):
        if overrides:
            raise InputError(f"not understood: {' '.join(overrides)}; see m2m {command.command} --help")
        if command.command == "status":
            show_status(command.out)
        elif command.command == "init":
            write_configuration(command)
        elif command.command == "compare":
            show_comparison(command.out, command.other)
        elif command.command == "export":
            from m2m_hf.publish.export import export
            from m2m_hf.storage.journal import RunFolder

            log.silence_libraries()
            folder, lost = export(RunFolder(command.out), command.to, command.folder)
            if lost:
                Terminal().say(f"without a counterpart there: {', '.join(lost)}", "yellow")
            Terminal().say(f"exported: {os.path.relpath(folder)}")
        elif command.command == "push":
            from m2m_hf.publish.hub import push
            from m2m_hf.storage.journal import RunFolder

            log.silence_libraries()
            push(RunFolder(command.out), command.repo_id, Terminal(), command.private, command.dry_run)
        else:
            from m2m_hf.reporting.page import write_report

            Terminal().say(f"report: {os.path.relpath(write_report(command.out))}")
        return
    if command.command == "sft":
        from m2m_hf.storage.journal import read_config

        config = command.out / "config.yaml"
        if not config.exists():
            raise InputError(
                f"{command.out} is no run folder: it has no config.yaml; expected the output_dir of m2m select"
            )
        read_config(config)
        overrides = [*overrides, "--output_dir", str(command.out)]
    else:
        config = command.config
    searcher = open_searcher(config, overrides, log)
    searcher.check()
    if getattr(command, "dry_run", False):
        searcher.show_plan()
        return
    if command.command in ("select", "sft"):
        searcher.check_hub()
    searcher.prepare()
    if searcher.state.is_main_process:
        log.open(searcher.run.log)
    if command.command == "adapters":
        searcher.train_adapters()
        failed, word = searcher.failed, "experts" if searcher.config.expert == "full" else "adapters"
        searcher.terminal.say(
            f"{len(searcher.candidates) - len(failed)} {word} are complete: {os.path.relpath(searcher.run.adapters)}"
            + (f"; the training of {', '.join(failed)} failed" if failed else "")
        )
    elif command.command == "search":
        searcher.write_outcome()
        searcher.show()
    elif command.command == "fidelity":
        searcher.fidelity()
        searcher.write_outcome()
        searcher.show_fidelity()
    elif command.command == "sft":
        searcher.train_final()
        searcher.show()
        if searcher.args.push_to_hub:
            searcher.push_to_hub()
    else:
        searcher.select()


def run_recipe(name: str | None, arguments: Sequence[str]) -> None:
    """Carries out `m2m recipe`."""
    if name is None:
        for line in ("recipes; m2m recipe NAME runs a script, and prints a configuration:", *shown_recipes()):
            Terminal().say(line)
        return
    path = find("recipes", name, ".py", ".sh", ".yaml")
    if path.suffix == ".py":
        replace_process([sys.executable, str(path), *arguments])
    # Their paths are seen from the folder of recipes in a checkout; what is printed is for the one where it is put.
    print(path.read_text(encoding="utf-8").replace("../.demo", ".demo"), end="")


def replace_process(command: Sequence[str]) -> NoReturn:
    """Becomes another command, so that signals and the exit code are its own."""
    sys.stdout.flush()
    os.execv(command[0], list(command))


def show_status(out: Path) -> None:
    """Prints the status of a run folder.

    Raises:
        Damaged: something in it is not whole.
    """
    from m2m_hf.reporting.status import status
    from m2m_hf.storage.journal import RunFolder

    found = status(RunFolder(out))
    for line in found.lines:
        Terminal().say(line)
    if found.damage:
        raise DamagedError


def write_configuration(command: argparse.Namespace) -> None:
    """Carries out `m2m init`."""
    from m2m_hf.config.draft import Draft, all_named, init, named, read_other

    def question(text: str, default: str) -> str:
        try:
            return input(f"{text} [{default}]: ").strip() or default
        except EOFError:
            raise InputError("no answer, and nothing was written") from None

    draft = read_other(command.origin) if command.origin else Draft()
    draft.model = command.model or draft.model
    draft.candidates |= all_named(command.data)
    draft.target = named(command.target) if command.target else None
    draft.scorer = command.scorer
    asked = question if sys.stdin.isatty() else None
    init(draft, command.output, asked, command.origin.parent if command.origin else Path.cwd())
    Terminal().say(f"written: {command.output}; go on with: m2m select --config {command.output}")


def show_comparison(one: Path, other: Path) -> None:
    """Prints two runs side by side."""
    from m2m_hf.reporting.compare import MOST, compare
    from m2m_hf.reporting.record import Record
    from m2m_hf.storage.journal import RunFolder

    terminal = Terminal()
    names = [path.absolute().name for path in (one, other)]
    if names[0] == names[1]:
        names = [os.path.relpath(path) for path in (one, other)]
    found = compare(*(Record.read(RunFolder(path)) for path in (one, other)))
    if found.differences:
        shown = [[short(cell) for cell in row] for row in found.differences[:MOST]]
        terminal.table("asked differently", ["", *names], shown)
        if len(found.differences) > MOST:
            terminal.say(f"and {len(found.differences) - MOST} more fields: see both config.yaml")
        terminal.say("")
    terminal.table("what came of it", ["", *names], found.outcome)
    terminal.say("")
    for line in found.remarks:
        terminal.say(line)


def short(text: str, most: int = 48) -> str:
    """`text`, of which the middle is left out where it is long."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"


class DamagedError(Exception):
    """Said already; the exit code alone is left to give."""


def safe() -> str:
    """What an end before the end leaves, and how to go on."""
    from m2m_hf.storage.journal import RunFolder

    folder = RunFolder.held
    kept = "what is finished is safe"
    if folder is not None:
        adapters = len(list(folder.adapters.glob("[!.]*/training.json")))
        trials = len(folder.trials.read_bytes().splitlines()) if folder.trials.exists() else 0
        kept = f"{adapters} adapters and {trials:,} scored trials are safe in {os.path.relpath(folder.root)}"
    return f"{kept}; the same command goes on from there"


def full(error: BaseException) -> bool:
    """Whether the disk is, of which this error tells."""
    from m2m_hf.storage.journal import disk_is_full

    return disk_is_full(error)


class Terminated(BaseException):
    """SIGTERM: a scheduler ends the job, or the launcher does because another process of it died."""


def terminate(signum: int, frame: object) -> NoReturn:
    raise Terminated


def tells_of_a_lost_process(error: Exception) -> bool:
    """Whether this is how gloo or NCCL say that another process is gone."""
    name = type(error).__name__
    return name in ("DistBackendError", "DistNetworkError", "DistStoreError") or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `m2m` and returns its exit code."""
    parser = make_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    command, overrides = parser.parse_known_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log = LibraryLog()
    try:
        return report_errors(lambda: run(command, overrides, log, arguments))
    finally:
        log.close()


def alone() -> bool:
    """Whether this process alone has met an error: where all have, the first one says so, and the launcher ends the others."""
    try:
        time.sleep(PATIENCE)
    except Terminated:
        return False
    return True


def report_errors(work: Callable[[], None]) -> int:
    """Does some work, tells of whatever ends it, and returns the exit code for that."""
    rank, processes = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))  # set by the launcher
    first = rank == "0"  # one process speaks, unless it may be the one that died
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        work()
    except InputError as error:
        if full(error):
            print(f"m2m: the disk is full: {safe()} once there is room", file=sys.stderr)
            return 1
        if first or alone():
            who = "" if first else f"process {rank} of {processes}: "
            print(printable(f"m2m: {who}{error}"), file=sys.stderr)
        return 2
    except StoppedError as error:
        print(printable(f"m2m: {error}\n{safe()}"), file=sys.stderr)
        return 1
    except DamagedError:
        return 1
    except KeyboardInterrupt:
        Terminal(quiet=not first).say(f"\ninterrupted: {safe()}", "yellow")
        return 130
    except Terminated:
        if processes == 1:
            print(f"m2m: terminated: {safe()}", file=sys.stderr)
        else:
            print(
                f"m2m: process {rank} of {processes} was told to stop; where nobody asked for it, another process has died, "
                f"and says why above: {safe()}",
                file=sys.stderr,
            )
        return 128 + signal.SIGTERM
    except Exception as error:
        if processes > 1 and tells_of_a_lost_process(error):
            print(
                f"m2m: process {rank} of {processes} lost another process, which died or is out of reach "
                f"({str(error).splitlines()[0]}): {safe()}",
                file=sys.stderr,
            )
        elif full(error):
            print(f"m2m: the disk is full: {safe()} once there is room", file=sys.stderr)
        else:
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
