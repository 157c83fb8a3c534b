"""A source's own columns become those of a format, as the user says beside its path.

a row of the source                                -> what formats.py is given
{question, answer, id}                                columns: {prompt: question, completion: answer}
                                                   -> {prompt, completion, id}
{dialogue: [{speaker, words}]}                        columns: {messages: dialogue, role: speaker, content: words}
                                                   -> {messages: [{role, content}]}
{question, answer, id}                                template: "Q: {{ question }} A: {{ answer }}"
                                                   -> {text, id}

Nothing behind this module knows the source's names.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from launcher.credentials import masked
from launcher.data.read.formats import MESSAGE_COLUMNS, MESSAGE_KEYS, OPTIONAL_COLUMNS, OUR_COLUMNS, Fields
from launcher.data.read.rows import NOT_MAPPED, Feed, RawRow, RowFault, missing_column, near_name, shown_value
from launcher.errors import DataError, RecipeError
from launcher.recipe.data_section import Source

if TYPE_CHECKING:
    from launcher.data.read.row_template import RowTemplate

COLUMNS_RULE = "columns of a source names ours, each with its name there, such as {prompt: question}"
NO_ROW_HAS_IT = "Correct the source's entry, or take this name out of it."


def reshape_of(source: Source, max_bytes: int) -> Callable[[Sequence[Feed]], list[Feed]]:
    """What gives all feeds of this source the columns of a format. A row has at most `max_bytes` afterwards too.

    Raises RecipeError: columns names one that nothing reads, or a template is no Jinja or uses no column.
    """
    given, template = source.columns or {}, None
    if source.template is not None:
        from launcher.data.read.row_template import RowTemplate  # loads Jinja

        template = RowTemplate(source.template, source.completion, max_bytes)
    elif not given:
        return list
    columns = template.columns if template else OUR_COLUMNS
    known = columns if template else columns | MESSAGE_KEYS
    if unknown := sorted(given.keys() - known):
        which, rule = (
            ("it uses", "beside a template, columns names what it uses") if template else ("ours are", COLUMNS_RULE)
        )
        raise RecipeError(
            f"{masked(source.path)}: {rule}; got {shown_value(unknown[0])} for {shown_value(given[unknown[0]])}; "
            f"{near_name(unknown[0], known)}{which} {', '.join(sorted(known))}"
        )
    names = _Names(
        {ours: theirs for ours, theirs in given.items() if ours in columns},
        {ours: theirs for ours, theirs in given.items() if ours not in columns},
        columns if template else OPTIONAL_COLUMNS,
    )
    format = template.format if template else source.format

    def reshape(feeds: Sequence[Feed]) -> list[Feed]:
        search = _Search(masked(source.path), {feed.name for feed in feeds}, {**names.columns, **names.keys})
        rows = partial(_reshaped, names=names, search=search, template=template)
        return [replace(feed, source=repr(source), format=format, raw_rows=partial(rows, feed)) for feed in feeds]

    return reshape


@dataclass
class _Search:
    """For the user's names, over all feeds of a source: a file may lack what another has."""

    source: str
    unread: set[str]  # feeds that were not read to their end yet
    unseen: dict[str, str]  # the user's names, by ours, that no row had yet
    last: Fields = field(default_factory=Fields)  # of the last row


@dataclass(frozen=True)
class _Names:
    """The user's names, by ours."""

    columns: dict[str, str]
    keys: dict[str, str]  # of messages
    optional: frozenset[str]  # columns that a row may lack

    def renamed(self, raw: RawRow, unseen: dict[str, str]) -> RawRow:
        """The row under our names; those that it has are taken out of `unseen`. RowFault where it lacks a column."""
        for ours, theirs in self.columns.items():
            if theirs not in raw.fields and ours not in self.optional:
                raise missing_column(raw.where, _rule(ours, theirs), theirs, raw.fields)
        fields = _moved(raw.fields, self.columns, unseen)
        for column in MESSAGE_COLUMNS & fields.keys() if self.keys else ():
            if isinstance(items := fields[column], list):
                fields[column] = [_moved(i, self.keys, unseen) if isinstance(i, dict) else i for i in items]
        return raw._replace(fields=fields)


def _reshaped(
    feed: Feed, *, names: _Names, search: _Search, template: "RowTemplate | None"
) -> Iterator[RawRow | RowFault]:
    """Raises DataError at the end of the last feed where no row has one of the names: it may be misspelt."""
    for raw in feed.raw_rows():
        try:
            if isinstance(raw, RawRow):
                search.last = raw.fields
                raw = names.renamed(raw, search.unseen)
                raw = template.render(raw) if template else raw
        except RowFault as fault:
            raw = fault
        yield raw
    search.unread.discard(feed.name)
    fields = search.last
    for ours, theirs in search.unseen.items() if fields and not search.unread else ():
        in_lists = (item for value in fields.values() if isinstance(value, list) for item in value)
        of_message = next((item for item in in_lists if isinstance(item, dict)), fields)
        there = of_message if ours in names.keys else fields
        where = f"{search.source}, in all rows"
        raise DataError(str(missing_column(where, _rule(ours, theirs), theirs, there, NO_ROW_HAS_IT)))


def _rule(ours: str, theirs: str) -> str:
    return f"{shown_value(ours)} is called {shown_value(theirs)} here, by columns of the source."


def _moved(fields: Fields, names: dict[str, str], unseen: dict[str, str]) -> Fields:
    """The fields, some under our names and those taken out of `unseen`. One that has such a name already gives way."""
    found = {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}
    for ours in found:
        unseen.pop(ours, None)
    taken = {names[ours] for ours in found}
    rest = {key: value for key, value in fields.items() if key not in taken}
    return {**{key + NOT_MAPPED if key in names else key: value for key, value in rest.items()}, **found}
