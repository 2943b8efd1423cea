"""What differs between what was noted of a run or a result and what is asked for now, in words."""

import json
from collections.abc import Mapping
from typing import Any

from forgetfilter.config import ForgetFilterConfig


def default_settings() -> dict[str, Any]:
    """Setting -> default. A setting that did not exist when a manifest was written counts as left at its default."""
    return flat(json.loads(json.dumps(ForgetFilterConfig().identity())))


def default_decision() -> dict[str, Any]:
    """Decision setting -> default."""
    return flat(json.loads(json.dumps(ForgetFilterConfig().decision())))


DEFAULTS = {"settings": default_settings, "decision": default_decision}
"""Part of a manifest, or of what a result was made of -> what counts where it lacks a setting."""
PLACES = {"settings": ".model_name_or_path", "model": ".name"}
"""Part of a manifest -> where M0 is, by name. It may have moved: it is told by its weights, which are hashed."""


def differences(part: str, old: Any, new: Any) -> list[str]:
    """What differs in a part of a run's manifest from what is asked for, in words."""
    found = changes(old, new, DEFAULTS[part]() if part in DEFAULTS else None)
    return [f"{key} {words}" for key, words in found.items() if key != PLACES.get(part)]


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


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by dots."""
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}.{key}")
    return found
