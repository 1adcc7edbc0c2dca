"""A finished run on the Hub: experts and final model in a model repository, the chosen mixture in a dataset repository.

`org/name` holds the final adapter, or the final model, at its root and every candidate's expert in `adapters/<candidate>/`, so
that `PeftModel.from_pretrained(model, "org/name", subfolder="adapters/<candidate>")` loads an adapter; the dataset of the same id
holds the rows of the chosen mixture where their licences allow it, and always its manifest and recipe. A head that is made of
labels' names is in both. Nothing that names a place on this machine is published.
"""

from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfUriError, LocalTokenNotFoundError

from m2m_hf.console import Terminal
from m2m_hf.core.mixture import Mixture
from m2m_hf.errors import InputError, first_line
from m2m_hf.publish.repositories import FAILURES, OWN, Repository, check_name, plan
from m2m_hf.storage.files import read_json_or_empty
from m2m_hf.storage.records import files_of
from m2m_hf.storage.run_folder import RunFolder

UNREADABLE = (HfUriError, JSONDecodeError, KeyError)  # what the client raises where an answer is not what it expects


def push(
    run: RunFolder, repo_id: str, terminal: Terminal, private: bool | None = None, dry_run: bool = False
) -> list[str]:
    """Puts a finished run on the Hub, and returns the addresses of dataset and model, both called `repo_id`.

    What is there already is not sent again, so that the same command goes on. New repositories are `private` as the account has
    it, if that is None.
    """
    addresses = []
    for one in plan(run, repo_id):
        sizes = {
            path: content.stat().st_size if isinstance(content, Path) else len(content)
            for path, content in one.files.items()
        }
        terminal.say(f"{one.kind} {repo_id}: {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB")
        if dry_run:
            for path, size in sizes.items():
                terminal.say(f"  {path}  {size:,} bytes")
        for note in one.notes:
            terminal.say(f"  {note}", "yellow")
        if not dry_run:
            chosen = Mixture.of(read_json_or_empty(run.summary)["best"]["mixture"])
            addresses.append(send(one, repo_id, private, f"Merge to Mix: {str(chosen)[:60]}"))
            terminal.say(f"  {addresses[-1]}")
    if dry_run:
        terminal.say("nothing was sent")
    return addresses


def send(repository: Repository, repo_id: str, private: bool | None, message: str) -> str:
    """Makes the repository where there is none, and puts everything there in one commit. Returns its address."""
    api, kind = HfApi(), repository.kind
    try:
        api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
        there = set(api.list_repo_files(repo_id, repo_type=kind))
        gone = sorted(put_before(repo_id, kind, there) - set(repository.files))
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise InputError(
                f"{kind} {repo_id} is there already and public; make it private on the Hub, or leave --private"
            )
        new = [CommitOperationAdd(path, content) for path, content in repository.files.items()]
        old = [CommitOperationDelete(path) for path in gone]
        done = api.create_commit(repo_id, [*new, *old], commit_message=message, repo_type=kind)
    except (*FAILURES, *UNREADABLE) as error:
        raise refused(error, repo_id) from error
    return str(done.repo_url)


def put_before(repo_id: str, kind: str, there: set[str]) -> set[str]:
    """What of these files an earlier push has put there: those of the final model are named by its `training.json`."""
    named = {}
    if "training.json" in there:
        named = files_of(read_json_or_empty(Path(hf_hub_download(repo_id, "training.json", repo_type=kind))))
    return {path for path in there if path.startswith(OWN) or path in named}


def check_login(repo_id: str) -> None:
    """Refuses before anything is trained what could not be pushed in the end."""
    check_name(repo_id)
    try:
        HfApi().whoami()
    except FAILURES as error:
        raise refused(error, repo_id) from error


def refused(error: Exception, repo_id: str) -> InputError:
    """What to say where the Hub does not do what was asked."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = first_line(error)
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return InputError(
            f"the Hub does not let you write to {repo_id} ({text}): type hf auth login, or set HF_TOKEN to a token that may write"
        )
    return InputError(
        f"{repo_id}: the Hub cannot be used ({text}); what was sent is kept, and the same command continues"
    )


def fetched(source: str, inside: str, patterns: list[str], but: list[str], key: str, what: str) -> Path:
    """A folder, or what a model repository `org/name` or `org/name@revision` has of these files, `but` not of those."""
    local = Path(source).expanduser()
    if local.is_dir():
        return local
    path, _, revision = source.partition("@")
    repo_id = path.removesuffix(f"/{inside}") if inside else path
    try:
        found = snapshot_download(repo_id, revision=revision or None, allow_patterns=patterns, ignore_patterns=but)
        return Path(found) / inside
    except FAILURES as error:
        raise InputError(
            f"{key}: {source!r} is neither a folder nor {what} that the Hub shows ({first_line(error)})"
        ) from error


def fetch_expert(source: str, key: str) -> Path:
    """The folder of one adapter, or fine-tuned model: a folder, or `org/name`, with a folder in it and `@revision` behind it."""
    inside = "/".join(source.partition("@")[0].split("/")[2:])
    below = f"{inside}/" if inside else ""
    files, what = (["adapter_*"], "an adapter") if key == "adapters" else (["*.json", "*.safetensors"], "a model")
    found = fetched(source, inside, [below + one for one in files], [f"{below}*/*"], key, what)
    if key == "experts" and not (found / "config.json").is_file():
        raise InputError(
            f"experts: {source} has no config.json; expected a fine-tuned model. To use all experts of a "
            "pushed run, set experts: org/name"
        )
    return found


def fetch_bank(source: str, key: str) -> Path:
    """The folder with the experts of a published bank: `org/name`, `org/name@revision`, or a folder."""
    root = fetched(source, "", ["adapters/*"], [], key, "a model repository")
    folder = root / "adapters" if (root / "adapters").is_dir() else root
    if not any(folder.glob("*/training.json")):
        raise InputError(f"{key}: {source} holds no {key} with a training.json; expected what m2m push has put there")
    return folder
