"""Experts that others have trained: taken into a bank as far as their files tell that they may be averaged."""

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from m2m_hf.console import Terminal
from m2m_hf.errors import InputError
from m2m_hf.merging.adapter import ADAPTER_FILES, Adapter
from m2m_hf.merging.full_experts import DELTA_FILE, floats, save_delta
from m2m_hf.modeling.devices import broadcast
from m2m_hf.modeling.heads import SUFFIX, HeadPlan
from m2m_hf.modeling.inspection import is_trained
from m2m_hf.modeling.lora import lora_facts
from m2m_hf.storage.files import file_fingerprint, fingerprint, read_json_or_empty, staging_path
from m2m_hf.training.bank import MAX_LOST, Bank, differing
from m2m_hf.training.fine_tune import publish

HEADS_APART = (
    "heads that were trained for one candidate each belong to labels of their own, and their average to none. Expected experts "
    "whose head is the base model's, or that have none"
)
MAX_MOVED = 0.5  # of the norm of the base's weights: fine-tuning moves them by a few percent
NAMING = (  # how the layers of an adapter were chosen
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
)  # fmt: skip


def refuse_head(changed: Sequence[str], plan: HeadPlan | None, where: str) -> None:
    """Refuses an expert that has changed the head.

    Args:
        changed: names of the modules or weights that it changes.

    Raises:
        InputError: with the reason.
    """
    kept = plan.untrained if plan is not None and plan.own is not None else None
    if head := [name for name in changed if kept and re.fullmatch(kept, name)]:
        raise InputError(f"{where} has trained {', '.join(head[:3])}: {HEADS_APART}")


def check_sources(bank: Bank, given: Mapping[str, str], key: str) -> None:
    """Refuses a configuration that takes an expert from elsewhere than the one that is there came from.

    Args:
        given: candidate -> where its expert is to be taken from.
        key: `adapters` or `experts`.

    Raises:
        InputError: another source, or files there that have changed since.
    """
    for name, source in given.items():
        there: str | None = None
        if PartialState().is_main_process and (record := read_json_or_empty(bank.folder / name / "training.json")):
            files = sorted(Path(source).expanduser().glob("*.safetensors"))
            if record.get("source") != source:
                there = f"came from {record['source']}" if record.get("source") else "was trained here"
            elif files and record.get("source_files") not in (None, file_fingerprint(files)):
                there = "is not what is there now: its files have changed since it was taken"
        if there := broadcast(there):
            raise InputError(
                f"{key}.{name}: {source} is to be taken, and the one in {bank.folder / name} {there}. Restore the source, or "
                f"delete {bank.folder / name} to have it taken anew"
            )


def import_adapters(
    bank: Bank,
    others: Mapping[str, tuple[str, Path]],
    plan: HeadPlan | None,
    adapted: Mapping[str, tuple[int, int]],
    terminal: Terminal,
) -> None:
    """Takes adapters that were not trained by this package into a bank, as far as their files tell that they may be averaged.

    What they do not tell, such as the learning rate, is taken on trust: recorded as `unknown` in `training.json`, and
    said in every result.

    Args:
        others: candidate -> (what was given, the folder of the adapter).
        plan: of the head of a classification run.
        adapted: the layers that this run's adapters are on, see `models.adapted_layers`.

    Raises:
        InputError: one that is no LoRA adapter that can be averaged, or of another shape than this run's.
    """
    for name, (source, folder) in others.items():
        adapter = Adapter.load(folder)
        where = f"adapters.{name}: {source}"
        # How its layers were named says less than which they are; the task is often left out.
        aside = {f"lora_config.{one}" for one in ("task_type", *NAMING)}
        shape = {fact: value for fact, value in lora_facts(adapter.config).items() if fact not in aside}
        refuse_head([*adapter.parts()], plan, where)
        layers = {layer: (a.shape[1], b.shape[0]) for layer, (a, b, _) in adapter.parts().items()}
        if others_there := sorted(layer for layer in {*layers, *adapted} if layers.get(layer) != adapted.get(layer)):
            first = others_there[0]
            raise InputError(
                f"{where} adapts other layers than this run does, or those of another base model: {first} "
                f"{'of (in, out) ' + str(layers[first]) if first in layers else 'not at all'}, expected "
                f"{adapted.get(first, 'nothing there')}; {len(others_there)} such layers. See lora_target_modules"
            )
        ours = {fact: value for fact, value in bank.facts[name].items() if fact in shape}
        if differences := differing(ours, shape):
            raise InputError(
                f"{where} has another shape than this run asks for: {'; '.join(differences)}. The final "
                "model is trained with this run's: give the shape of the adapters in the configuration"
            )
        base = adapter.config.base_model_name_or_path
        if base:
            terminal.say(f"  {name}: says that it was trained on {base}", "dim")
        if PartialState().is_main_process:
            partial = staging_path(bank.folder / name)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for file in ADAPTER_FILES:
                shutil.copyfile(folder / file, partial / file)
        PartialState().wait_for_everyone()
        weights = file_fingerprint([folder / file for file in ADAPTER_FILES])
        unknown = [fact for fact in bank.facts[name] if fact not in shape]
        publish_imported(bank, name, source, folder, weights, unknown, {})
    if others:
        terminal.say(
            f"took {len(others)} adapters that others have trained: {', '.join(others)}. Their files tell rank, scaling and "
            "layers; base weights, data, learning rate, epochs, batch size, seed and versions are taken on trust",
            "yellow",
        )


def import_models(
    bank: Bank,
    others: Mapping[str, tuple[str, Path]],
    base: PreTrainedModel,
    load: Callable[[Path], PreTrainedModel],
    plan: HeadPlan | None,
    terminal: Terminal,
) -> None:
    """The same of finished fine-tunes of all parameters: what each has changed of the base becomes an expert.

    Args:
        others: candidate -> (what was given, the folder of the model).
        base: the run's base model.
        load: loads a model as the base was loaded.

    Raises:
        InputError: a model of another architecture, with a head of its own, or that is no fine-tune of the base.
    """
    kept_out = plan.untrained if plan is not None and plan.own is None else None  # a pooler, which nothing reads
    before = {key: one.detach() for key, one in floats(base).items() if not (kept_out and re.fullmatch(kept_out, key))}
    learned = {key for key, _ in base.named_parameters()}
    for name, (source, folder) in others.items():
        where = f"experts.{name}: {source}"
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = load(folder)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, InputError) as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{where} cannot be loaded as the base model is ({why[:300]})") from error
        architecture = next(iter(config.architectures or ()), "")
        if plan is not None and plan.own is None and architecture.endswith(SUFFIX[plan.task]):
            raise InputError(f"{where} is a {architecture}, whose classifier was trained with it: {HEADS_APART}")
        after = {
            key: one.detach() for key, one in floats(model).items() if not (kept_out and re.fullmatch(kept_out, key))
        }
        if [(key, one.shape) for key, one in before.items()] != [(key, one.shape) for key, one in after.items()]:
            others_too = sorted({key for key in {*before, *after} if key not in before or key not in after}) or [
                "shapes"
            ]
            raise InputError(f"{where} has other weights than the base model: {', '.join(others_too[:3])}")
        changed = [key for key, one in before.items() if not torch.equal(one, after[key])]
        refuse_head(changed, plan, where)
        pattern = bank.facts[name]["trained_parameters"]
        if frozen := [key for key in changed if key in learned and not is_trained(key, plan, pattern)]:
            raise InputError(
                f"{where} has changed {', '.join(frozen[:3])} and {len(frozen)} weights in all that trained_parameters "
                f"{pattern!r} leaves as they are in this run's own experts; give the pattern that theirs were trained by"
            )
        size = math.sqrt(sum(float(one.double().square().sum()) for one in before.values()))
        moved = math.sqrt(sum(float((after[key].double() - before[key].double()).square().sum()) for key in changed))
        if not changed or not moved < MAX_MOVED * size:
            raise InputError(
                f"{where} is {moved / size:.0%} of the base's weights away from them: "
                + ("it is the base itself" if not changed else "expected a fine-tune of the base model")
            )
        terminal.say(
            f"  {name}: {len(changed)} of {len(before)} weights changed, by {moved / size:.2%} of the base's", "dim"
        )
        kept: dict[str, Any] = {}
        dtype = bank.facts[name]["delta_dtype"]
        if PartialState().is_main_process:
            partial = staging_path(bank.folder / name)
            shutil.rmtree(partial, ignore_errors=True)
            try:
                kept = save_delta(partial, before, after, getattr(torch, dtype)) | {"dtype": dtype}
            except InputError as error:  # the other processes must hear of it
                kept = {"reason": str(error)}
        del after, model
        kept = broadcast(kept)
        if "reason" in kept:
            raise InputError(f"{where}: {kept['reason']}")
        if not kept["parameters"]:
            raise InputError(f"{where}: delta_dtype {dtype} keeps nothing of what it has learned; expected float32")
        if kept["lost"] > MAX_LOST:
            terminal.say(f"  {name}: delta_dtype {dtype} has lost {kept['lost']:.1%} of what it has learned", "yellow")
        made = staging_path(bank.folder / name) / DELTA_FILE
        weights = broadcast(file_fingerprint([made]) if PartialState().is_main_process else None)
        known = ("base_model", "dtype", "data_format")
        unknown = [fact for fact in bank.facts[name] if fact not in known]
        publish_imported(bank, name, source, folder, weights, unknown, {"kept": kept})
    if others:
        terminal.say(
            f"took {len(others)} fine-tunes that others have made: {', '.join(others)}. Their weights tell architecture and "
            "distance from the base; data, learning rate, epochs, batch size, seed and versions are taken on trust",
            "yellow",
        )


def publish_imported(
    bank: Bank, name: str, source: str, folder: Path, weights: str, unknown: Sequence[str], more: Mapping[str, Any]
) -> None:
    """Puts an expert of others into its place.

    Args:
        source, folder: what was given, and where that is.
        weights: recognises its files.
        unknown: what these do not tell.
    """
    data = bank.candidates[name].fingerprint
    publish(
        bank.folder / name,
        {
            "candidate": name,
            "fingerprint": fingerprint([bank.facts[name], data, weights]),
            "data": data,
            "rows": len(bank.candidates[name].rows),
            "data_tokens": bank.candidates[name].tokens,
            "steps": 0,
            "seconds": 0.0,
            "source": source,
            "source_files": file_fingerprint(sorted(folder.glob("*.safetensors"))),
            "unknown": list(unknown),
            **more,
            "uniform": bank.facts[name],
        },
    )
