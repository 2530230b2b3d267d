"""Renders a tokenizer's chat template like transformers, without importing it."""

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from speed_async.config.model_facts import read_json

TEMPLATE_FILE = "chat_template.jinja"
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""Tags for training masks; they render no text."""


def find_template(folder: Path) -> str | None:
    """Return the template's text, or None. Raises ModelError for an unreadable file."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    found = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(found, list):  # several templates with names
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found else None


class ChatTemplate:
    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        """Raises jinja2.TemplateError if the text is not a valid template."""
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._template = environment.from_string(_GENERATION.sub("", text))
        self._special_tokens = dict(special_tokens)

    def render(self, prompt: str) -> str:
        """Render one user message and the generation prompt. The template may raise."""
        return self._template.render(
            messages=[{"role": "user", "content": prompt}],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self._special_tokens,
        )


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
