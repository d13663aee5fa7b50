"""Frozen dataclasses to plain JSON values, for ``--dry-run --json`` and ``mis inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from mis_run.dataclass import fields, is_dataclass
from mis_run.hints import Any


def plain(value: Any) -> Any:
    """``value`` with dataclasses, paths, enums, sets and tuples turned into JSON's own types."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return value
