"""A Jinja line makes a text of a row's columns.

The line is data, like the recipe that it stands in: it runs in Jinja's sandbox, which shuts Python's attributes off.
What makes much of a few characters is shut off as well: range and the other globals, powers and products of texts,
whatever pads a text to a width, and what stands between all characters. So is chance: every rank reads the same. Loops
in loops over large columns, and replacements by them, can still take long.
"""

from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, Undefined, meta, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.filters import do_replace, do_tojson
from jinja2.sandbox import ImmutableSandboxedEnvironment

from launcher.data.read.rows import NOT_MAPPED, RawRow, RowFault, missing_column, shown_value, too_large
from launcher.data.read.tables import one_line
from launcher.errors import RecipeError

UNFIT_FILTERS = ("center", "format", "indent", "wordwrap", "slice", "batch", "pprint", "xmlattr", "urlize", "random")
PADDING_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate", "to_bytes")
TEMPLATE_REMEDY = "Correct the template of the source, or set data.bad_rows=skip to drop such rows and count them."


class RowTemplate:
    """The line, or that of a prompt and that of its completion. `columns`: those that they use.

    Raises RecipeError where a line is no valid Jinja, or uses no column.
    """

    def __init__(self, template: str, completion: str | None, max_bytes: int) -> None:
        self.format = "text" if completion is None else "prompt_completion"
        parts = {"text": template} if completion is None else {"prompt": template, "completion": completion}
        self._max_bytes, environment = max_bytes, _Sandbox()
        self._lines: dict[str, Template] = {}
        used = dict[str, set[str]]()
        for column, line in parts.items():
            name = "completion" if column == "completion" else "template"
            try:
                used[name] = meta.find_undeclared_variables(environment.parse(line))
                self._lines[column] = environment.from_string(line)
            except (TemplateError, RecursionError) as error:
                raise RecipeError(f"{name} of a source must be valid Jinja; got {shown_value(line)}: {error}") from None
            if not used[name]:
                remedy = 'write columns in double braces, like "Q: {{ question }}"'
                raise RecipeError(f"{name} of a source must use its columns; {shown_value(line)} has none; {remedy}")
        self.columns = frozenset[str]().union(*used.values())

    def render(self, raw: RawRow) -> RawRow:
        """The row with the texts in place of the columns that they are made of. Raises RowFault where it cannot be."""
        texts = {column: self._text(line, raw) for column, line in self._lines.items()}
        rest = {key: value for key, value in raw.fields.items() if key not in self.columns}
        return raw._replace(fields={**{k + NOT_MAPPED if k in texts else k: v for k, v in rest.items()}, **texts})

    def _text(self, line: Template, raw: RawRow) -> str:
        parts, size = list[str](), 0
        try:
            for part in line.generate({key: raw.fields[key] for key in self.columns & raw.fields.keys()}):
                parts.append(part)
                size += len(part)
                if size > self._max_bytes:
                    raise too_large(raw.where, "a template that gives more", self._max_bytes)
        except RowFault:
            raise
        except Exception as error:  # whatever an expression can raise
            rule = "the template of a source makes a text of each of its rows."
            lacking = sorted(self.columns - raw.fields.keys())
            if lacking and not isinstance(error, SecurityError):
                raise missing_column(raw.where, rule, lacking[0], raw.fields) from None
            found = one_line(error) or type(error).__name__
            raise RowFault("template", where=raw.where, rule=rule, found=found, remedy=TEMPLATE_REMEDY) from None
        return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_printed)
        self.globals.clear()
        for name in UNFIT_FILTERS:
            del self.filters[name]
        self.filters |= {"tojson": _tojson, "replace": _replace}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in PADDING_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Jinja's replacement of str.format pads too; without one, is_safe_attribute refuses the method."""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if getattr(obj, "__name__", "") == "replace" and args:
            _refuse_empty(args[0])
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise SecurityError(f"{operator} is not for templates of rows")
        return super().call_binop(context, operator, left, right)


@pass_eval_context
def _tojson(context: Any, value: Any) -> Any:
    """Jinja's, without an indent: it pads."""
    return do_tojson(context, value)


@pass_eval_context
def _replace(context: Any, text: Any, old: Any, new: Any, count: int | None = None) -> str:
    _refuse_empty(old)
    return do_replace(context, text, old, new, count)


def _refuse_empty(old: Any) -> None:
    if str(old) == "":
        raise SecurityError("replace needs characters to replace; got an empty text")


def _printed(value: Any) -> Any:
    """The value of {{ … }}, if it is one that makes a text."""
    if isinstance(value, Undefined):
        return value  # raises what it is when it becomes text
    if value is None or isinstance(value, list | tuple | dict | bytes) or callable(value):
        kind = "null" if value is None else shown_value(value)
        raise ValueError(f"{{{{ … }}}} gives {kind}, no text; filters like default, join and tojson make one of it")
    return value
