"""Write a page: one HTML file. A content security policy blocks all but its own script and style."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from forgetfilter.files import write_text


def asset(name: str) -> str:
    """Text of a file beside this one."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def escaped(value: Mapping[str, Any]) -> str:
    """JSON that is safe in a script element: "<" could end the element, U+2028 and U+2029 a line of old JavaScript."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def write_page(path: Path, title: str, body: str, data: Mapping[str, Any] | None = None, script: str = "") -> Path:
    """Write a page; see `page_text`. Returns the file."""
    write_text(path, page_text(title, body, data, script))
    return path


def page_text(
    title: str, body: str, data: Mapping[str, Any] | None = None, script: str = "", *, connects: bool = False
) -> str:
    """The text of a page.

    Args:
        title: Its title, as text.
        body: Its markup; nothing from outside may be in it unescaped.
        data: What the script reads, JSON; safe whatever its strings hold.
        script: Its script; that of all pages comes before it.
        connects: Whether the script may ask the server that the page came from.
    """
    style, script = asset("page.css"), asset("shared.js") + script if script else ""
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; base-uri 'none'"
    policy += "; form-action 'none'" + ("; connect-src 'self'" if connects else "")
    parts = {"policy": policy, "title": html.escape(title), "style": style, "body": body, "data": escaped(data or {})}
    return Template(asset("page.html")).substitute(parts, script=script)
