"""The crash harness: kills runs of a pico model and truncates files of finished ones. Every run must still end with the same
result, without repeating finished work.

    python tests/crash.py --kills 60 --files all

Libraries are imported once, and every run is a fork of this process.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="m2m-crash-"))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from pico import build_model, build_tokenizer, choice_rows, project_folder, write_rows

import m2m_hf.reporting.plots
import m2m_hf.storage.journal
from m2m_hf.cli.main import main
from m2m_hf.searcher import MergeToMixSearcher  # noqa: F401 - imported once for all forks
from m2m_hf.storage.journal import Journal
from m2m_hf.storage.records import find_incomplete
from m2m_hf.training.trainers import CompletionTrainer

TIMES = {"seconds", "peak_memory_bytes", "total_seconds", "costs", "place", "stored"}
APART = (".lock", ".unchanged.json", "log.txt", "report.html", "trials.jsonl", "trials.values")
WRITES = "fsync replace rename truncate rmdir unlink open".split()  # functions of module os that end a write


def build(root: Path) -> Path:
    """A project whose runs have all stages: adapters with checkpoints, search, fine-tuned mixtures, final model, report."""
    root.mkdir(parents=True)
    pico = root / "pico"
    build_model("llama").save_pretrained(pico)
    build_tokenizer().save_pretrained(pico)
    project_folder(root, pico)
    write_rows(root / "validation.jsonl", choice_rows(12))
    run = root / "run.yaml"
    run.write_text(run.read_text().replace("fine_tunes: 0", "fine_tunes: 1") + "save_steps: 1\nlora_dropout: 0.1\n")
    return run


def fork(work: Callable[[], int], log: Path) -> int:
    """Does some work in a fork, whose exit code is the work's; the process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        m2m_hf.reporting.plots.PICTURES.clear()  # drawing takes longer than all else
        m2m_hf.storage.journal.INLINE = 5  # so that values stand beside the journal too
        count_steps(log.with_name("steps.txt"))
        code = work()
    except KeyboardInterrupt:  # before the command could say so
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def count_steps(path: Path) -> None:
    """Writes a line for every training step."""
    real = CompletionTrainer.training_step

    def step(self, *arguments, **options):
        with open(path, "a") as file:
            file.write(f"{self.args.output_dir} {self.state.global_step}\n")
        return real(self, *arguments, **options)

    CompletionTrainer.training_step = step


def finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def select(run: Path, out: Path) -> int:
    return main(["select", "--config", str(run), "--output_dir", str(out)])


def watch_writes(before: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
    """Calls functions before and after each write of this process."""

    def watched(real: Callable) -> Callable:
        def call(*arguments, **options):
            if real.__name__ == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*arguments, **options)
            before()
            result = real(*arguments, **options)
            after()
            return result

        return call

    for name in WRITES:
        setattr(os, name, watched(getattr(os, name)))


def die_at(write: int, after: bool) -> None:
    """Kills this process at its write of this number, before or after it."""
    left = write

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)

    def check() -> None:
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    watch_writes(count, check)


def timeless(value):
    """Removes times, and places that depend on what else was written."""
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if key not in TIMES and key != "training.json"}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def content(out: Path) -> dict[str, object]:
    """Everything in a run folder that interruptions must not change."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        # Probabilities of the ensemble are computed again only if scores are missing from the journal.
        if path.is_dir() or path.parent.name == "ensemble" or path.name in APART:
            continue
        text = path.read_bytes().replace(str(out).encode(), b"OUT")
        found[name] = timeless(json.loads(text)) if path.suffix == ".json" else text
    trials = Journal(out / "trials.jsonl").trials.values()
    found["trials"] = [timeless(trial.to_json()) for trial in trials]
    found["report"] = (out / "report.html").exists()
    return found


def done(out: Path) -> dict[str, tuple[int, int]]:
    """Finished folder -> its identity on the disk."""
    folders = [*out.glob("adapters/[!.]*"), *out.glob("trained/[!.]*"), out / "final"]
    return {
        str(folder): (folder.stat().st_ino, (folder / "training.json").stat().st_mtime_ns)
        for folder in folders
        if find_incomplete(folder) is None
    }


def lines(out: Path) -> list[str]:
    path = out / "trials.jsonl"
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line)["key"] for line in whole]


def check(out: Path, reference: dict[str, object], what: str) -> None:
    found = content(out)
    wrong = [name for name in sorted({*found, *reference}) if found.get(name) != reference.get(name)]
    assert not wrong, f"{what}: not as if nothing had happened: {wrong}, in {out}"


def kill_runs(
    run: Path, root: Path, reference: dict[str, object], kills: int, length: float, writes: int
) -> dict[str, int]:
    """Kills runs until the number of kills is reached; starts each again until it succeeds."""
    draw = random.Random(0)
    counts = {"kills": 0, "runs": 0, "starts": 0}
    while counts["kills"] < kills:
        out = root / f"killed{counts['runs']}"
        counts["runs"] += 1
        finished: dict[str, tuple[int, int]] = {}
        died = 0
        (root / "steps.txt").write_text("")
        while True:
            counts["starts"] += 1
            known = lines(out)
            kind = draw.choice(("moment", "write"))
            number, after = draw.randint(1, writes), draw.random() < 0.5
            pause = draw.uniform(0, length)
            how = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            last = counts["kills"] >= kills

            def work(
                kind: str = kind, number: int = number, after: bool = after, out: Path = out, last: bool = last
            ) -> int:
                if kind == "write" and not last:
                    die_at(number, after)
                return select(run, out)

            process = fork(work, root / "log.txt")
            if kind == "moment" and not last:
                time.sleep(pause)
                os.kill(process, how)
            code = finish(process)
            now = done(out)
            for folder, identity in finished.items():
                assert now.get(folder) == identity, f"{folder} was finished and is done again"
            finished = now
            after_lines = lines(out)
            assert after_lines[: len(known)] == known, "journal lines were lost"
            assert len(after_lines) == len(set(after_lines)), "a trial was measured twice"
            if code == 0:
                break
            died += 1
            counts["kills"] += 1
            assert code in (-signal.SIGKILL, 130, 143, -signal.SIGTERM, -signal.SIGINT), (
                f"exit code {code}, see {root}/log.txt"
            )
        check(out, reference, f"run {counts['runs']}")
        steps = (root / "steps.txt").read_text().splitlines()
        # The step in flight, and the last one of a training, after which there is no checkpoint.
        assert len(steps) - len(set(steps)) <= 2 * died, (
            f"{len(steps) - len(set(steps))} steps again after {died} kills"
        )
        shutil.rmtree(out)
    return counts


def cut_files(run: Path, root: Path, whole: Path, reference: dict[str, object], most: int | None) -> int:
    """Truncates every file of a finished run, one at a time, and starts again."""
    draw = random.Random(1)
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file() and path.name != ".lock"]
    chosen = names if most is None else draw.sample(names, min(most, len(names)))
    out = whole.with_name("whole.kept")
    whole.rename(out)
    for name in chosen:
        shutil.copytree(out, whole)
        path = whole / name
        size = path.stat().st_size
        left = draw.choice((0, size // 2, size - 1, draw.randrange(max(1, size))))
        os.truncate(path, max(0, left))
        code = finish(fork(lambda: select(run, whole), root / "log.txt"))
        assert code == 0, f"{name} cut to {left} of {size} bytes: exit code {code}, see {root}/log.txt"
        check(whole, reference, f"{name} cut to {left} of {size} bytes")
        shutil.rmtree(whole)
    return len(chosen)


def run_all(kills: int, files: int | None) -> str:
    """Runs everything; the result in words."""
    start = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="m2m-crash-"))
    run = root / "project" / "run.yaml"
    assert finish(fork(lambda: bool(not build(run.parent)), root / "log.txt")) == 0
    counter = root / "writes"

    def counted() -> int:
        made: list[None] = []
        watch_writes(lambda: made.append(None))
        code = select(run, root / "whole")
        counter.write_text(str(len(made)))
        return code

    begun = time.monotonic()
    assert finish(fork(counted, root / "log.txt")) == 0, f"see {root}/log.txt"
    length = time.monotonic() - begun
    writes = int(counter.read_text())
    reference = content(root / "whole")
    counts = kill_runs(run, root, reference, kills, length, writes) if kills else {"kills": 0, "runs": 0, "starts": 0}
    cut = cut_files(run, root, root / "whole", reference, files)
    shutil.rmtree(root)
    return (
        f"{counts['kills']} kills in {counts['runs']} runs ({counts['starts']} starts), {cut} files cut short, in "
        f"{time.monotonic() - start:.0f} s: all ended as the run that nothing happened to ({length:.1f} s, {writes} writes)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--files", default="all", help="how many files to truncate, or all")
    given = parser.parse_args()
    print(run_all(given.kills, None if given.files == "all" else int(given.files)))
