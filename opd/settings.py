"""What users write: text files, YAML, strict settings, messages that name file and key. Imports no torch."""

from __future__ import annotations

import difflib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar, get_args

import regex
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

T = TypeVar("T")


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line, exit code 2."""


class Fatal(UserError):
    """What no record is to blame for, such as an endpoint that is down: it ends the run or stage that met it."""


KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}  # else a device


def regular_file(path: str | Path, kind: str) -> Path:
    """The path, where it leads to a stored file: reading a device or a pipe may never end, and is no second time alike.

    `kind`: what is looked for, in messages. Raises UserError for anything else, and where there is nothing.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{path}: no such {kind}") from e
    except (OSError, ValueError) as e:  # a ValueError is a zero byte in the path
        raise UserError(f"{shown(path)}: no {kind}: {getattr(e, 'strerror', e)}") from e
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: no {kind} but {KINDS.get(stat.S_IFMT(mode), 'a device')}")
    if os.path.realpath(path).startswith(("/proc/", "/sys/")):
        raise UserError(f"{path}: no {kind} but what the system makes up when it is read")
    return Path(path)


def shipped(path: str) -> str:
    """The path, if it leads somewhere or opd carries no such file, else that of opd's own."""
    ours = Path(__file__).parent / path
    return str(ours) if not os.path.exists(path) and ours.exists() else path


def looked(path: str, last: str = "") -> str:
    """For a message on a path of a recipe that leads nowhere: where it was looked for, at last in opd perhaps."""
    away = os.path.isabs(path) or os.path.exists(path)
    return "" if away else f" in {Path.cwd()} or beside the recipe{last}"


def shown(path: object) -> str:
    """A path in a message: the beginning of one that no file system takes, as when it is a recording itself."""
    text = str(path)
    return text if len(text) < 256 and text.isprintable() else f"{ascii(text[:60])}…"


def open_text(path: str | Path, kind: str = "text file", newline: str | None = None) -> TextIO:
    """A user's text file, in UTF-8; the byte-order mark that Windows tools write is no part of it.

    Raises UserError as `regular_file` does, and for a file that cannot be opened.
    """
    try:
        return open(regular_file(path, kind), encoding="utf-8-sig", newline=newline)
    except OSError as e:
        raise UserError(f"{path}: no {kind} that can be read: {e.strerror or e}") from e


def read_text(path: str | Path, kind: str = "text file") -> str:
    """All of a user's text file. Raises UserError as `open_text` does, and UnicodeDecodeError."""
    with open_text(path, kind) as f:
        return f.read()


def text_lines(path: str | Path, kind: str = "text file") -> Iterator[tuple[str, str | ValueError]]:
    """(place, line) of a user's text file but for blank ones; a ValueError in the place of one that is no UTF-8.

    Raises UserError as `open_text` does.
    """
    with open_text(path, kind) as f:
        for number, line in enumerate(f.buffer, 1):
            try:
                text = line.decode("utf-8-sig").strip()  # a mark also where files were joined
            except UnicodeDecodeError as e:
                yield f"{path}:{number}", ValueError(f"not valid UTF-8 at byte {e.start + 1}")
                continue
            if text:
                yield f"{path}:{number}", text


UNSEEN = regex.compile(r"[\p{M}\p{Z}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}\u2800]*")  # the last: blank Braille


def plain_text(text: str) -> str:
    """What a text says: without a byte-order mark before it and white space around it.

    "" where nothing can be read: only combining marks, white space, control, format and zero-width characters.
    """
    text = text.strip().lstrip("\ufeff").strip()
    return "" if UNSEEN.fullmatch(text) else text


class RunFailed(RuntimeError):
    """A server, the learner or a worker ended badly: the message names it, the cause and the log; exit code 1."""


def first_line(e: BaseException) -> str:
    """What a library's error says first, which is mostly what matters."""
    return str(e).strip().partition("\n")[0] or type(e).__name__


MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def attempt(make: Callable[..., T], *args: Any) -> T | ValueError:
    """What `make` gives for one record; where it raises, a ValueError that says in one line why the record is bad.

    The boundary of a record: decoders, tokenizers, paths and types fail in ways of their own. What is about the run
    passes: Fatal, and a machine whose memory, disk or device is at fault.
    """
    try:
        return make(*args)
    except (Fatal, MemoryError):
        raise
    except UnicodeEncodeError:
        return ValueError("half a surrogate pair, which is no text")
    except UnicodeDecodeError as e:
        return ValueError(f"not valid {e.encoding.upper()} at byte {e.start + 1}")
    except Exception as e:
        device = type(e).__name__ in ("OutOfMemoryError", "AcceleratorError")  # torch's, which is not imported here
        if device or isinstance(e, OSError) and e.errno in MACHINE:
            raise
        told = first_line(e)
        if isinstance(e, ValueError):
            return e if told == str(e) else ValueError(told)
        return ValueError(f"{type(e).__name__}: {told[:300]}")


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

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any, info: ValidationInfo) -> Any:
        """What need not be there is not there when it is written as `""`, as `null`, or as the override `key=`."""
        default = cls.model_fields[info.field_name or ""].default
        return default if value in (None, "") and default in (None, "") else value

    def changed(self, values: dict[str, Any]) -> Self:
        """A copy with other values, by dotted key such as `rollout.sleep`; what was validated stays as it is."""
        out = self
        for key, value in values.items():
            name, _, rest = key.partition(".")
            assert name in type(out).model_fields, f"{type(out).__name__} has no {name}"
            out = out.model_copy(update={name: getattr(out, name).changed({rest: value}) if rest else value})
        return out


def read_yaml(path: str | Path, kind: str = "YAML file") -> dict[str, Any]:
    """A YAML file that holds a mapping; `kind`: what it is, in messages. Raises UserError that names it."""
    try:
        raw = yaml.load(read_text(path, kind), _Loader)
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
