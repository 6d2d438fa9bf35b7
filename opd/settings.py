"""Strict settings: pydantic sections, YAML files, messages that name the key. Imports no torch."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line, exit code 2."""


class RunFailed(RuntimeError):
    """A server, the learner or a worker ended badly: the message names it, the cause and the log; exit code 1."""


def first_line(e: Exception) -> str:
    """What a library's error says first, which is mostly what matters."""
    return str(e).strip().partition("\n")[0] or type(e).__name__


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written as 1e-4, which YAML 1.1 takes for a string; no key twice in a mapping."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Refuses what PyYAML passes over: of a key that is there twice, it takes the last."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                value = self.construct_object(key)
                if value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} twice", key.start_mark)
                seen.add(value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Section(BaseModel):
    """A section of a recipe: unknown keys, wrong types and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True, allow_inf_nan=False)

    def changed(self, values: dict[str, Any]) -> Self:
        """A copy with other values, by dotted key such as `rollout.sleep`; what was validated stays as it is."""
        out = self
        for key, value in values.items():
            name, _, rest = key.partition(".")
            out = out.model_copy(update={name: getattr(out, name).changed({rest: value}) if rest else value})
        return out


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises UserError that names it."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as e:
        raise UserError(f"{path}: expected a YAML file: {e.strerror or e}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    return raw


S = TypeVar("S", bound=Section)


def validated(section: type[S], raw: dict[str, Any], source: str | Path) -> S:
    """`raw` as a `section`. Raises UserError that names the source and every key at fault."""
    try:
        return section.model_validate(raw)
    except ValidationError as e:
        raise UserError(f"{source}: " + "; ".join(_explain(err, section) for err in e.errors())) from e


def override(raw: dict[str, Any], item: str) -> None:
    """Set `section.key=value` in what a YAML file held. Raises UserError that quotes it."""
    key, eq, value = item.partition("=")
    if not eq or not all(key.split(".")):
        raise UserError(f"override {item!r}: expected key.path=value, such as optim.lr=1e-4")
    *parents, last = key.split(".")
    node = raw
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"override {item!r}: {name} is a value, not a section")
    try:
        node[last] = yaml.load(value, _Loader) if value else None
    except yaml.YAMLError as e:
        raise UserError(f"override {item!r}: the value is not valid YAML") from e


def _explain(error: Any, section: type[Section]) -> str:
    where = ".".join(str(p) for p in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}{_suggest(error['loc'], section)}"
    if error["type"] == "missing":
        return f"{where} is required"
    message = error["msg"].removeprefix("Value error, ")
    if error["loc"]:
        return f"{where}: {message}, found {json.dumps(error['input'], default=str)[:80]}"
    return message


def _suggest(loc: tuple[Any, ...], section: type[Section]) -> str:
    model: Any = section
    for name in loc[:-1]:
        model = model.model_fields[name].annotation if name in getattr(model, "model_fields", {}) else None
        model = next((m for m in get_args(model) if hasattr(m, "model_fields")), model)  # of `Section | None`
    names = [f.alias or n for n, f in getattr(model, "model_fields", {}).items()]
    close = difflib.get_close_matches(str(loc[-1]), names, n=1)
    return f" (did you mean {close[0]}?)" if close else f" (known here: {', '.join(names)})"
