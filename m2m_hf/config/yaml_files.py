"""YAML files, read and written."""

import enum
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from m2m_hf.errors import InputError


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but it refuses a key that stands twice in one mapping, and numbers that it reads as others."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = self.construct_object(key), key.start_mark.line + 1
            if name in first:
                raise InputError(
                    f"line {line}: {key.value!r} is there twice, first in line {first[name]}, and only one of them would be "
                    "read; rename or delete one"
                )
            first[name] = line
        return node

    def construct_yaml_number(self, node: yaml.ScalarNode) -> int | float:
        value: int | float = getattr(self, f"construct_yaml_{node.tag.rpartition(':')[2]}")(node)
        if ":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value):  # 1:30 is 90, and 010 is 8
            line = node.start_mark.line + 1
            raise InputError(
                f"line {line}: YAML reads {node.value} as {value}; quote it, or write the number that is meant"
            )
        return value


for kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_yaml_number)


def load_yaml(text: str) -> Any:
    """What a YAML text holds."""
    return yaml.load(text, Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """Loads the mapping in a YAML file, safely."""
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except InputError as error:
        raise InputError(f"--config {path}, {error}") from None
    except FileNotFoundError:
        raise InputError(f"--config {path}: there is no such file") from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise InputError(f"--config {path}: expected YAML, got {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected keys and values, got {type(content).__name__}")
    return content


def dump_yaml(values: Mapping[str, Any], comment: str = "") -> str:
    """`values` as YAML in their given order, below `comment`."""
    above = "".join(f"# {line}\n".replace(" \n", "\n") for line in (comment.split("\n") if comment else ()))
    return above + yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)


def plain(value: Any) -> Any:
    """`value` with enums, tuples and sets replaced by what YAML can hold."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def changed_fields(config: Any, default: Any) -> dict[str, Any]:
    """The fields of `default` in which `config` differs from it, as far as YAML can hold them."""
    values = {item.name: plain(getattr(config, item.name)) for item in fields(default) if item.init}
    return {name: value for name, value in values.items() if value != plain(getattr(default, name)) and is_plain(value)}


def is_plain(value: Any) -> bool:
    """True if YAML gives the value back unchanged."""
    try:
        return bool(yaml.safe_load(yaml.safe_dump(value)) == value)
    except yaml.YAMLError:
        return False
