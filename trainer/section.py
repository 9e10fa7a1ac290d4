"""Sections of a recipe: what a key may hold, and which keys a stage's result depends on."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr

from strop.trainer.errors import UserError


def not_zero_in_fp32(value: float) -> float:
    if 0 < value < 1e-30:
        raise ValueError("is too close to 0 for 32-bit floats; give 1e-30 or more")
    return value


def _path(value: str) -> str:
    try:
        Path(value).expanduser()
    except RuntimeError as e:
        raise ValueError(f"there is no user {value.split('/')[0][1:]}; write the path without ~") from e
    if "\0" in value:
        raise ValueError("a path cannot hold a NUL character; correct it")
    return value


Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False), AfterValidator(not_zero_in_fp32)]
Weight = Annotated[PositiveFloat, Field(le=1e6)]
FilePath = Annotated[str, AfterValidator(_path)]  # each reader expands ~


UNKEYED = {"key": "none"}  # changing the field re-runs nothing
BY_CONTENT = {"key": "content"}  # the field names a text file, whose content counts


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False)
    _texts: dict[str, str] = PrivateAttr(default_factory=dict)

    def only(self, *names: str) -> "Part":
        """The named fields, for a stage that the rest of the section does not concern."""
        return Part(self, names)

    def key(self) -> dict:
        """What a stage's result depends on if it receives this section, as JSON values."""
        return Part(self, type(self).model_fields).key()

    def read(self, name: str) -> str | None:
        """The text of the file that field `name` names, as it was when it was first read: a run that goes on while the
        file is edited is one run. Raises UserError if it cannot be read."""
        path = getattr(self, name)
        if path is not None and name not in self._texts:
            self._texts[name] = read_text(f"{type(self).__name__.lower()}.{name}", path)
        return self._texts.get(name)


class Part:
    """Some fields of a section, read as attributes; any other name raises AttributeError."""

    def __init__(self, section: Section, names):
        self._section, self._names = section, tuple(names)

    def __getattr__(self, name: str):
        if name.startswith("_") or name not in self._names:
            raise AttributeError(f"this part of {type(self._section).__name__} has no field {name}")
        return getattr(self._section, name)

    def read(self, name: str) -> str | None:
        """As Section.read."""
        return self._section.read(name)

    def key(self) -> dict:
        """As Section.key. Raises UserError if a file that counts by its content cannot be read."""
        found = {}
        for name in self._names:
            how = (type(self._section).model_fields[name].json_schema_extra or {}).get("key")
            if how == "content":
                found[name] = self.read(name)
            elif how != "none":
                found[name] = key_of(getattr(self._section, name))
        return found


def key_of(value):
    """What a stage's result depends on if it receives `value`: a section, a part of one, or a tree of them."""
    if isinstance(value, Section | Part):
        return value.key()
    if isinstance(value, list | tuple):
        return [key_of(v) for v in value]
    if isinstance(value, dict):
        return {k: key_of(v) for k, v in value.items()}
    return value


def read_text(name: str, path: str | Path) -> str:
    """The text of a file that the recipe names under key `name`. Raises UserError if it cannot be read."""
    file = Path(path).expanduser()
    if file.exists() and not file.is_file():
        raise UserError(f"{name}={path}: is not a file; name a file of text")
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{name}={path}: not readable as text ({e})") from e
