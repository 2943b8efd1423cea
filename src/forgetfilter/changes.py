"""What differs between what was noted of a run or a result and what is asked for now, in words."""

import json
from collections.abc import Mapping
from typing import Any

from forgetfilter.config import ForgetFilterConfig

SETTINGS = {"settings": ForgetFilterConfig.identity, "decision": ForgetFilterConfig.decision}
"""Part of a manifest, or of what a result was made of, that holds settings -> what takes it from a config."""
PLACES = {"settings": ".model_name_or_path", "model": ".name"}
"""Part of a manifest -> where M0 is, by name. It may have moved: it is told by its weights, which are hashed."""


def differences(part: str, old: Any, new: Any) -> list[str]:
    """What differs in a part of a run's manifest from what is asked for, in words."""
    found = changes(old, new, defaults_of(part))
    return [f"{key} {words}" for key, words in found.items() if key != PLACES.get(part)]


def defaults_of(part: str) -> dict[str, Any] | None:
    """Setting -> default; None for a part without settings.

    A setting that did not exist when the part was written counts as left at its default.
    """
    return flat(as_json(SETTINGS[part](ForgetFilterConfig()))) if part in SETTINGS else None


def changes(old: Any, new: Any, defaults: Mapping[str, Any] | None) -> dict[str, str]:
    """What differs between noted and new values: key -> "(was ..., is ...)".

    Args:
        old: What was noted.
        new: What is asked for.
        defaults: For settings: the values of those that `old` lacks; settings that only `old` has are then ignored.
    """
    before, now = {**(defaults or {}), **flat(old)}, flat(new)
    keys = now if defaults is not None else {**before, **now}
    return {key: f"(was {before.get(key)!r}, is {now.get(key)!r})" for key in keys if before.get(key) != now.get(key)}


def as_json(value: Any) -> Any:
    """A value as a JSON file gives it back."""
    return json.loads(json.dumps(value))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}")
    return found
