"""Refusals before work begins that need the whole run: settings, targets, a run folder that another run has used.

`RememberTargets` writes the `targets.json` that a later run is compared with. Other refusals stand where what they refuse is
read: values in `config/`, rows in `data/`, a bank in `training/bank.py` and `training/imported_experts.py`, a folder in
`storage/run_folder.py`.
"""

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel
from trl import ModelConfig, SFTConfig

from m2m_hf.config.checks import BUILDERS
from m2m_hf.config.parsing import check_trl, trl_fields
from m2m_hf.config.run_config import MergeToMixConfig
from m2m_hf.config.targets import SCORERS
from m2m_hf.core.trial import Standing
from m2m_hf.data.rows import Candidate
from m2m_hf.errors import InputError, holds_secret
from m2m_hf.modeling.devices import broadcast
from m2m_hf.modeling.inspection import adapted_layers, check_model, embedded_tokens, meta_model, positions
from m2m_hf.publish.hub import fetch_expert
from m2m_hf.run.context import RunContext
from m2m_hf.scoring.external import ExternalScorer
from m2m_hf.search.callbacks import SearchCallback, SearchControl
from m2m_hf.search.model_based import FEW
from m2m_hf.storage.files import write_atomic, write_json
from m2m_hf.storage.records import find_incomplete
from m2m_hf.storage.run_folder import read_config
from m2m_hf.training.experts import expert_kind
from m2m_hf.training.fine_tune import planned_steps
from m2m_hf.training.imported_experts import AdapterImporter, check_sources
from m2m_hf.training.trackers import make_trackers
from m2m_hf.training.trainers import check_training
from m2m_hf.training.uniformity import differing

SHOWN = 8  # rows on which a Trainer is made ready


def check_values(config: MergeToMixConfig, args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuses values that no run can use, before anything is read or fetched."""
    check_trl(args, model_args)
    make_trackers(args)
    for name, value in {**trl_fields(args, model_args), **config.to_yaml()}.items():
        if holds_secret(str(value)):
            raise InputError(
                f"{name}: contains a token or password, which the run folder shows; use an environment variable"
            )


def check_settings(run: RunContext) -> None:
    """Refuses settings that this kind of run cannot use, before any data are read."""
    overrides: dict[str, Mapping[str, Any]] = {"final": run.config.final}
    overrides |= {f"candidates.{name}.training": one.training for name, one in run.config.parsed_candidates.items()}
    expert_kind(run.config.expert).check_settings(run.args, run.model_args, overrides)
    run.task.check_settings()
    run.expert()  # refuses shapes that cannot be averaged


def check_run(run: RunContext) -> None:
    """Reads and checks everything that was given, and prints it, before anything is trained or written.

    Raises:
        InputError: anything that would make the run fail or mislead later.
    """
    config, scorers = run.config, run.scorers
    least = len(run.candidates) + 2
    if config.max_trials is not None and config.max_trials < least:
        raise InputError(
            f"max_trials: expected at least {least}, for the base model, every single candidate and all together; "
            f"got {config.max_trials}"
        )
    check_search(run)
    run.task.check_labels()
    if config.final:
        args, model_args = run.final_settings
        kind = run.expert(model_args)
        check_model(model_args, args, kind.lora, run.base.plan, kind.parameters)
    show_data(run)
    for line in run.settled:
        run.terminal.say(line, "yellow")
    if run.prints_date:
        run.terminal.say(
            f"the chat template prints the date: that of the run's first start, {run.started:%Y-%m-%d}, is printed in all that "
            "is trained and scored, and by the recipe",
            "yellow",
        )
    for target, parts in scorers.items():
        for part, scorer in parts.items():
            if scorer.truncated:
                run.terminal.say(f"{target}, {part}: {scorer.truncated} {run.task.truncation}", "yellow")
    for name, candidate in run.candidates.items():
        if candidate.dropped:
            run.terminal.say(f"{name}: left out {candidate.dropped} rows whose prompt alone fills max_length", "yellow")
    for problem in same_rows(config):
        raise InputError(problem)
    for target in run.targets:
        shared = [f"{name} ({run.overlap[name, target]})" for name in run.candidates if run.overlap[name, target]]
        if shared and not config.allow_overlap:
            raise InputError(
                f"rows of target {target!r} are also in {', '.join(shared)}: a candidate that contains target questions gets an "
                "inflated score. Remove those rows, or set allow_overlap: true"
            )
    for text in run.task.special_tokens():
        run.terminal.say(text, "yellow")
    check_folder(run)
    missing, noun = run.bank.check(), run.bank.noun(1)
    for name, drift in run.bank.changed().items():
        line = f"its {noun} stands in, stale; whatever is fine-tuned is trained on the rows as they are now"
        if name in missing:
            taken = isinstance(config.bank, Mapping) and name in config.bank
            line = f"its {noun} is {'taken' if taken else 'trained'} again"
        run.terminal.say(f"{name} has changed since its {noun} was trained ({drift}): {line}", "yellow")
    if isinstance(config.bank, Mapping):
        check_sources(run.bank, config.bank, run.bank.noun())
        check_adapters(run, missing)
    bare = meta_model(run.model_args, run.args, run.base.plan)
    check_tokens(run, bare)
    check_trainings(run, bare)


def check_tokens(run: RunContext, bare: PreTrainedModel) -> None:
    """Refuses rows with tokens that the model has no embedding for; a tokenizer may know more than its rows need."""
    known = embedded_tokens(bare)
    if known == math.inf or known > max(run.task.tokenizer.get_vocab().values()):
        return
    for where, ids in run.task.texts():
        if (token := max(ids)) >= known:
            name, tokens = run.task.tokenizer.convert_ids_to_tokens(token), len(run.task.tokenizer)
            raise InputError(
                f"{where}: token {token} ({name!r}) has no embedding, since the tokenizer has {tokens:,} tokens and the model "
                f"{known:,}; use the tokenizer of this model, or save it with model.resize_token_embeddings({tokens})"
            )


def check_trainings(run: RunContext, bare: PreTrainedModel) -> None:
    """Refuses trainings that are still to be done and would fail: they are made ready, on a model without weights."""
    imported = run.config.bank if isinstance(run.config.bank, Mapping) else {}
    new = {*run.bank.check(), *run.bank.changed()}  # rows that nothing here was trained on
    to_train = [name for name in run.candidates if name in new and name not in imported]
    due = {f"candidates.{name}": (*run.candidate_settings(name), run.candidates[name]) for name in to_train}
    if (run.config.final or (imported and run.config.train_final)) and find_incomplete(run.folder.final) is not None:
        due |= {f"final, on {name} alone": (*run.final_settings, one) for name, one in run.candidates.items()}
    if imported and (run.config.objective == "trained" or run.config.to_verify):
        due |= {f"mixtures with {name}": (run.args, run.model_args, one) for name, one in run.candidates.items()}
    tried = set()
    for where, (args, model_args, candidate) in due.items():
        filled = (
            candidate.trained_rows >= args.per_device_train_batch_size * run.state.num_processes and not args.packing
        )
        shorter = args.max_length != run.args.max_length
        # Else a few rows show all that there is to see.
        every_row = args.assistant_only_loss or shorter or (args.dataloader_drop_last and not filled)
        settings = (id(args), id(model_args))  # the same for most
        if settings not in tried or every_row:
            model = meta_model(model_args, args, run.base.plan)
            rows = candidate.rows if every_row else candidate.rows.take(min(len(candidate.rows), SHOWN))
            check_training(model, rows, run.training_settings(args, model_args), where, every_row)
        tried.add(settings)
        if not run.task.limit:
            check_length(candidate, args, bare, where)


def check_length(candidate: Candidate, args: SFTConfig, model: PreTrainedModel, where: str) -> None:
    """Refuses rows that the Trainer leaves longer than the model has positions."""
    wrapped = args.packing and args.packing_strategy == "wrapped"
    longest, limit, step = candidate.tokens if wrapped else candidate.longest, positions(model), args.pad_to_multiple_of
    kept = min(longest, args.max_length or longest)
    padded = math.ceil(kept / (step or 1)) * (step or 1)
    if padded <= limit:
        return
    rotary = any("Rotary" in type(module).__name__ for module in model.modules())
    more = ", or raise max_position_embeddings in its config.json, as its positions are rotary" * rotary
    raise InputError(
        f"{where}: the model has {limit:,} positions, and rows are up to {padded:,} tokens long (the longest {longest:,}, "
        f"max_length {args.max_length}, pad_to_multiple_of {step}); set max_length: {limit // (step or 1) * (step or 1)}{more}"
    )


def show_data(run: RunContext) -> None:
    """Prints the candidates and the targets."""
    rows, titles = [], [""]
    for name, candidate in run.candidates.items():
        figures = run.task.row_figures(candidate)
        figures["steps"] = planned_steps(run.args, candidate.trained_rows, candidate.tokens)
        figures["in target"] = sum(run.overlap[name, target] for target in run.targets)
        titles = ["", *figures]
        rows.append([name, *(f"{figure:,}" for figure in figures.values())])
    run.terminal.table(f"candidates ({run.task.data.format} format)", titles, rows)
    if head := run.task.describe_head():
        run.terminal.say(head)
    for name in run.targets:
        run.terminal.say(f"target {name}: {describe_target(run, name)}")
    unread = [f"{name}: {', '.join(columns)}" for name, columns in run.task.data.unread.items()]
    if unread:
        run.terminal.say(f"columns not read: {'; '.join(unread)}")
    run.terminal.say("")


def describe_target(run: RunContext, name: str) -> str:
    """What a target is scored on, and how."""
    config, parts = run.targets[name].config, run.scorers[name]
    counts = {part: f"{scorer.examples:,} " if scorer.examples else "" for part, scorer in parts.items()}
    examples = f"{config.num_fewshot} examples ahead of each" if config.num_fewshot else ""
    if examples and config.fewshot_data is None and config.kind != "lm_eval":
        examples += ", taken out of data"
    words = [
        SCORERS[config.kind].described.format(task=config.task),
        f"{counts['validation']}validation rows" if counts["validation"] else None,
        f"{counts['test']}sealed test rows" if "test" in parts else "no test set",
        config.metric,
        examples,
        f"judged by {config.judge.model} at {config.judge.base_url}" if config.judge else None,
        f"weight {config.weight:g}" if len(run.targets) > 1 else None,
        None if config.min_delta is None else f"at most {config.min_delta:g} worse than the base model",
    ]
    return ", ".join(filter(None, words))


def check_search(run: RunContext) -> None:
    """Refuses objectives, merge methods and strategies that the targets do not allow."""
    config, scorers = run.config, run.validation_scorers
    _ = run.space  # refuses impossible constraints
    for name, scorer in scorers.items():
        if config.objective == "ensemble" and not scorer.has_ensemble:
            raise InputError(
                f"targets.{name}: objective ensemble averages the probabilities of right answers; expected scorer choice, "
                "classification, loss or preference with metric accuracy, logprob, loglikelihood"
            )
    if not run.merge_method.gated:
        if run.model_args.load_in_4bit or run.model_args.load_in_8bit:
            raise InputError(
                f"merge_method: {config.merge_method} writes merged weights into a quantised base; expected average"
            )
        for scorer in scorers.values():
            if run.expert().gated and isinstance(scorer, ExternalScorer) and scorer.exports:
                raise InputError(
                    f"merge_method: {config.merge_method} gives no adapter to hand to {scorer.name}; expected average"
                )
    if config.objective == "trained" and config.max_trials is None and not run.space.at_most(FEW):
        raise InputError(
            f"objective: trained fine-tunes a model for every mixture, and there are more than {FEW}; expected max_trials: how "
            "many mixtures to score, the base model, single candidates and all together included"
        )
    if config.strategy == "gradient" and not run.has_gradients:
        raise InputError(
            "strategy: gradient needs expert: lora, objective: merged, merge_method: average and targets whose scorer is "
            "choice, classification, loss or preference"
        )
    replaced = run.ensemble_shortcut() is not None
    if not replaced and run.choose_strategy()[0] == "bayes" and find_spec("optuna") is None:
        raise InputError("strategy bayes needs Optuna. Type: pip install 'm2m_hf[bayes]'")


def same_rows(config: MergeToMixConfig) -> Iterator[str]:
    """Candidates that read the very rows of a target, which prompts do not tell where a template words them otherwise."""
    read = [
        (f"targets.{name}.{part}", data)
        for name, one in config.parsed_targets.items()
        for part, data in one.parts.items()
        if part != "fewshot_data"
    ]
    for name, candidate in config.parsed_candidates.items() if not config.allow_overlap else ():
        ours = candidate.data
        for where, data in read:
            same = all(getattr(ours, key) == getattr(data, key) for key in ("path", "name", "data_dir", "data_files"))
            split, part = ours.split.partition("[")[::2]
            theirs, other = data.split.partition("[")[::2]
            apart = split != theirs or bool(part and other and part != other)
            apart = apart or bool(ours.where and data.where and ours.where != data.where)
            if same and not apart and ours.path not in (None, *BUILDERS):
                yield (
                    f"candidates.{name}: it contains rows of {where}, which would inflate its score: both read {split} of "
                    f"{ours.path}. Give each a part of its own, such as split: {split}[:10%] to the target and "
                    f"split: {split}[10%:] to the candidate, or set allow_overlap: true"
                )


def check_folder(run: RunContext) -> None:
    """Refuses links out of the folder, and scores that were made otherwise than they would be now.

    Experts say how they were trained (see `Bank.check`), `targets.json` what they were scored on. Only the attention stands in
    neither.
    """
    run.folder.refuse_links()
    try:
        there = read_config(run.folder.config)
    except InputError:
        there = {}  # there is none yet, or a crash cut it short; it is written again
    known, now = run.folder.known_targets(), yaml.safe_load(run.config_yaml())
    for name, parts in run.target_fingerprints().items():
        for part, fingerprint in parts.items():
            before = known.get(name, {}).get(part, fingerprint)
            if before != fingerprint:
                fields = differing(now["targets"][name], (there.get("targets") or {}).get(name) or {})
                what = "; ".join([f"its {part} rows, or what scores them: {before} there, {fingerprint} now", *fields])
                raise InputError(
                    f"targets.{name} has changed since it was scored ({what}). Restore it, or give the target another name"
                )
    attention = there.get("attn_implementation")
    if there and attention != run.model_args.attn_implementation and len(run.bank.check()) < len(run.candidates):
        raise InputError(
            f"attn_implementation: {run.folder.root} was made with another one ({attention} there, "
            f"{run.model_args.attn_implementation} now). Restore it, or choose another --output_dir"
        )


class RememberTargets(SearchCallback):
    """Writes down what the targets are, once a mixture has been scored on them."""

    def __init__(self, run: RunContext) -> None:
        self._run, self._done = run, False

    def on_standing(self, standing: Standing, best: Standing | None, control: SearchControl) -> None:
        run, path = self._run, self._run.folder.targets
        if self._done:
            return
        self._done = True
        known = run.folder.known_targets()
        if not known and path.exists():
            run.terminal.say(f"{os.path.relpath(path)} was damaged; rewritten with the current targets", "yellow")
        if run.is_main:
            now = run.target_fingerprints()
            write_json(path, known | {name: known.get(name, {}) | parts for name, parts in now.items()})


def claim_folder(run: RunContext) -> None:
    """Locks the run folder for this process, checks it once more, and writes the resolved configuration (collective)."""
    if run.is_main:
        run.folder.lock()
        check_folder(run)  # another process may have been at work since the first check
        write_atomic(run.folder.config, run.config_yaml())
        run.bank.remember_rows()
        if run.prints_date:
            write_json(run.folder.clock, {"started": run.started.isoformat()})
    run.state.wait_for_everyone()
    check_machines(run)


def check_machines(run: RunContext) -> None:
    """Refuses machines that do not see what the first one does (collective)."""
    ours = {
        "configuration": yaml.safe_load(run.config_yaml()),
        "settings": run.facts,
        "candidates": {name: one.fingerprint for name, one in run.candidates.items()},
        "targets": run.target_fingerprints(),
    }
    text = run.folder.config.read_text(encoding="utf-8") if run.is_main else ""
    text, theirs = broadcast((text, ours))
    host = socket.gethostname()
    for what, facts in ours.items():
        if differences := differing(facts, theirs[what]):
            raise InputError(f"{what}: {host} differs from the first process: {'; '.join(differences)}")
    if not has_content(run.folder.config, text):
        raise InputError(
            f"output_dir: {run.folder.root} on {host} is not the same folder as on the first machine; use a "
            "shared file system"
        )


def has_content(path: Path, content: str, patience: float = 10.0) -> bool:
    """True once a file has this content, waiting up to `patience` seconds: shared file systems take a moment to show it."""
    for _ in range(1 + round(10 * patience)):
        with contextlib.suppress(OSError, UnicodeError):
            if path.read_text(encoding="utf-8") == content:
                return True
        time.sleep(0.1)
    return False


def fetch_missing(run: RunContext, missing: Sequence[str]) -> dict[str, tuple[str, Path]]:
    """Candidate -> (where its expert is to be taken from, the folder of its files here), of those that have such a source."""
    sources, key = run.config.bank, run.bank.noun()
    assert isinstance(sources, dict)
    with run.state.local_main_process_first():
        return {name: (sources[name], fetch_expert(sources[name], key)) for name in missing if name in sources}


def check_adapters(run: RunContext, missing: Sequence[str]) -> None:
    """Refuses adapters of others that cannot be averaged with this run's; full fine-tunes are read when they are taken."""
    if run.expert().lora is None or not (others := fetch_missing(run, missing)):
        return
    importer = adapter_importer(run)
    assert importer is not None
    for name, (source, folder) in others.items():
        importer.check(name, run.bank.facts[name], folder, f"{importer.key}.{name}: {source}")


def adapter_importer(run: RunContext) -> AdapterImporter | None:
    """What imports LoRA adapters; None with another kind of expert."""
    lora, plan = run.expert().lora, run.base.plan
    if lora is None:
        return None
    layers = adapted_layers(run.model_args, run.args, lora, plan)
    base = str(run.model_args.model_name_or_path)
    return AdapterImporter(plan, run.terminal, layers, base, run.config.allow_other_bases)
