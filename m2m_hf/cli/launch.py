"""What ships beside the package, by name: accelerate's configurations to launch with, and the recipes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from m2m_hf.errors import InputError

FLAGS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")  # accelerate's own


def shipped(folder: str) -> Path:
    """Where `recipes` or `accelerate_configs` are: in the package, as a wheel puts them, or beside it in a checkout."""
    here = Path(__file__).parents[1]
    return here / folder if (here / folder).is_dir() else here.parent / folder


def names(folder: str, *endings: str) -> dict[str, Path]:
    """Name -> file of what is shipped in a folder and the folders in it; those of `make demo` are called `demo/data`."""
    root = shipped(folder)
    files = [path for path in sorted(root.rglob("*")) if path.suffix in endings and "__pycache__" not in path.parts]
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in files}


def find(folder: str, name: str, *endings: str) -> Path:
    """The file that a name or a path means.

    Raises:
        InputError: there is none.
    """
    if (given := Path(name)).suffix and given.exists():
        return given
    known = names(folder, *endings)
    if name.removesuffix(given.suffix) not in known:
        raise InputError(f"{name}: expected one of {', '.join(known)}, or a file, in {folder}")
    return known[name.removesuffix(given.suffix)]


def relaunched(arguments: Sequence[str]) -> list[str]:
    """The command of `accelerate launch` that carries out an `m2m` command in several processes.

    Args:
        arguments: of `m2m`, with `--accelerate_config` among them. It and `FLAGS` are accelerate's; the others stay. Where the
            number of processes is not given, it is that of the GPUs here, on every machine, or else what the configuration says.

    Raises:
        InputError: no such configuration, or a flag without its value.
    """
    ours, theirs, left = [], {}, list(arguments)
    while left:
        word, *left = left
        name, given, value = word.partition("=")
        if name.removeprefix("--") not in ("accelerate_config", *FLAGS) or not name.startswith("--"):
            ours.append(word)
            continue
        if not given:
            if not left:
                raise InputError(f"{name}: expected a value behind it")
            value, *left = left
        theirs[name[2:]] = value
    config = find("accelerate_configs", theirs.pop("accelerate_config"), ".yaml")
    machines = int(theirs.get("num_machines", "1")) if theirs.get("num_machines", "1").isdigit() else 1
    if config.parent == shipped("accelerate_configs"):  # a file of one's own says all itself
        if "num_processes" not in theirs and (gpus := gpus_here(config)):
            theirs["num_processes"] = str(gpus * machines)
        if machines == 1:
            theirs.setdefault("main_process_port", "0")  # any that is free
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [
        *command,
        *(word for key, value in theirs.items() for word in (f"--{key}", value)),
        "--module",
        "m2m_hf.cli.main",
        *ours,
    ]


def gpus_here(config: Path) -> int:
    """How many processes to start on this machine; 0 where the configuration is to say it."""
    import torch

    if config.stem.startswith(("cpu", "single")):
        return 0
    return torch.cuda.device_count()


def shown_recipes() -> list[str]:
    """Name and first line of every recipe."""
    lines = []
    for name, path in names("recipes", ".py", ".sh", ".yaml").items():
        first = next(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#!"))
        lines.append(f"  {name:24} {first.strip(chr(34)).lstrip('# ')}")
    return lines
