"""Tokenizers and image processors, as TRL and transformers load them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from m2m_hf.errors import InputError, first_line
from m2m_hf.modeling.loading import load_config
from m2m_hf.storage.files import fingerprint

PATCHES = 256  # assumed of an image where the model has none; sets how many images are scored at once


def image_mode(config: Any) -> str:
    """The mode of the images that a model takes: `L` for one channel, else `RGB`."""
    return "L" if getattr(getattr(config, "vision_config", config), "num_channels", 3) == 1 else "RGB"


def load_tokenizer(model_args: ModelConfig, args: SFTConfig, generates: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer that TRL would load for this model, with the special tokens and the chat template that it would set.

    A classifier's tokenizer, which does not generate, needs no end-of-text token. It pads on the right, whatever its files say:
    positions then begin with the text, so that its score is the same in every batch.
    """
    tokenizer: Any = load_config(model_args, transformers.AutoTokenizer)
    if generates:
        tokenizer.eos_token = args.eos_token or tokenizer.eos_token
        tokenizer.pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    else:
        tokenizer.pad_token = args.pad_token or tokenizer.pad_token
        tokenizer.padding_side = "right"
    for name in ("eos_token", "pad_token") if generates else ("pad_token",):
        if getattr(tokenizer, name) not in tokenizer.get_vocab():
            why = "" if generates else ", and a batch needs padding"
            raise InputError(
                f"{name}: {getattr(tokenizer, name)!r} is not a token of this model{why}; give one that is"
            )
    if generates and args.chat_template_path is not None:
        if not Path(args.chat_template_path).is_file():
            raise InputError(f"chat_template_path: expected a Jinja file, got {args.chat_template_path!r}")
        tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
    return tokenizer


def load_image_processor(model_args: ModelConfig) -> Any:
    """The image processor that is stored beside a model's weights."""
    try:
        return load_config(model_args, transformers.AutoImageProcessor)
    except (InputError, ImportError) as error:
        raise InputError(
            f"model_name_or_path: {model_args.model_name_or_path!r} has no image processor; expected a "
            f"preprocessor_config.json beside its weights ({first_line(error.__cause__ or error)[:200]})"
        ) from error


def patches(config: Any) -> int:
    """Into how many tokens a model cuts an image; `PATCHES` where it does not say."""
    config = getattr(config, "vision_config", config)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else PATCHES


def inputs_of(processing: Any, content: Sequence[Any], limit: int) -> Mapping[str, torch.Tensor]:
    """The model's input for texts, padded to the longest, or for images."""
    inputs: Mapping[str, torch.Tensor]
    if isinstance(content[0], str):
        inputs = processing(list(content), truncation=True, max_length=limit, padding=True, return_tensors="pt")
    else:
        inputs = processing(images=list(content), return_tensors="pt")
    return inputs


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase, chat: bool) -> dict[str, Any]:
    """Returns what identifies a tokenizer and, if it is used, its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:
        content = json.loads(backend.to_str())
        for last_call in ("truncation", "padding"):
            content.pop(last_call, None)
    return {
        "tokenizer": fingerprint([content, str(tokenizer.special_tokens_map)]),
        "chat_template": fingerprint(tokenizer.chat_template) if chat else None,
    }
