"""Files that ship with the package, by name: accelerate's configurations and the recipes."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from m2m_hf.console import Terminal
from m2m_hf.errors import InputError
from m2m_hf.storage.run_folder import RunFolder

FLAGS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")  # accelerate's own
HIDDEN = ("__pycache__", "support")  # folders without recipes
RECIPES = (".py", ".sh", ".yaml")


def shipped(folder: str) -> Path:
    """`recipes` or `accelerate_configs`: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return package / folder if (package / folder).is_dir() else package.parent / folder


def names(folder: str, *endings: str) -> dict[str, Path]:
    """Name -> shipped file, in a folder and its subfolders; those of `make demo` are called `demo/data`."""
    root = shipped(folder)
    files = [path for path in sorted(root.rglob("*")) if path.suffix in endings and not {*HIDDEN} & {*path.parts}]
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


def find(folder: str, name: str, *endings: str) -> Path:
    """The file of this name or path."""
    if (path := Path(name)).suffix and path.exists():
        return path
    known = names(folder, *endings)
    if name.removesuffix(path.suffix) not in known:
        raise InputError(f"{name}: expected one of {', '.join(known)}, or a file, in {folder}")
    return known[name.removesuffix(path.suffix)]


class LaunchParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def relaunched(arguments: Sequence[str]) -> list[str]:
    """The `accelerate launch` command that runs an `m2m` command in several processes.

    Args:
        arguments: of `m2m`, including `--accelerate_config`. Without `--num_processes`, a shipped configuration starts one
            process for each GPU of every machine, or as many as it says.
    """
    parser = LaunchParser(add_help=False, allow_abbrev=False)
    for name in ("accelerate_config", *FLAGS):
        parser.add_argument(f"--{name}", type=int if name == "num_machines" else str)
    given, ours = parser.parse_known_args(list(arguments))
    config = find("accelerate_configs", given.accelerate_config, ".yaml")
    machines = given.num_machines or 1
    if config.parent == shipped("accelerate_configs"):  # a user's file is complete by itself
        given.num_processes = given.num_processes or gpus_here(config) * machines
        if machines == 1:
            given.main_process_port = given.main_process_port or "0"  # any free port
    flags = [word for name in FLAGS if (value := getattr(given, name)) for word in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launcher, *flags, "--module", "m2m_hf.cli.main", *ours]


def gpus_here(config: Path) -> int:
    """The number of GPUs; 0 if the configuration itself says how many processes to start."""
    if config.stem.startswith(("cpu", "single")):
        return 0
    import torch

    return torch.cuda.device_count()


def recipe(command: argparse.Namespace) -> None:
    """Runs a recipe that is a script, prints one that is a configuration, or lists all with their first lines.

    With `--relocate` it mends the recipe of a run folder that was moved.
    """
    if command.relocate is not None:
        relocate(RunFolder(command.relocate))
        return
    if command.name is None:
        Terminal().say("recipes; m2m recipe NAME runs a script, and prints a configuration:")
        for name, path in names("recipes", *RECIPES).items():
            first = next(line for line in path.read_text(encoding="utf-8").split("\n") if not line.startswith("#!"))
            Terminal().say(f"  {name:24} {first.strip(chr(34)).lstrip('# ').rstrip(':')}")
        return
    path = find("recipes", command.name, *RECIPES)
    if path.suffix == ".py":
        replace_process([sys.executable, str(path), *command.arguments, *command.flags])
    # In a checkout its paths start from the folder of recipes; printed, they start from the working directory.
    print(path.read_text(encoding="utf-8").replace("../.demo", ".demo"), end="")


def relocate(run: RunFolder) -> None:
    from m2m_hf.publish.relocation import relocate_recipe

    missing = relocate_recipe(run)
    if missing:
        Terminal().say(f"not on this machine: {'; '.join(missing)}; put them there, or change {run.recipe}", "yellow")
    Terminal().say(f"written: {os.path.relpath(run.recipe)}")


def replace_process(command: Sequence[str]) -> NoReturn:
    """Becomes another command, so that signals and the exit code are the command's own."""
    sys.stdout.flush()
    os.execv(command[0], list(command))
