"""Tables of docs/serving.md, generated from the types; `python -m moss_jax.serving.tables` writes them."""

import argparse
import inspect
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic

from moss_jax.serving import protocol

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
BEGIN, END = "<!-- tables: python -m moss_jax.serving.tables -->", "<!-- end of the tables -->"


def tables() -> str:
    """All tables, as Markdown."""
    parts = [
        "### What clients send",
        event_table(members(protocol.ClientEvent)),
        "### What the server sends",
        event_table(members(protocol.ServerEvent)),
        "### Objects",
        object_table(objects()),
    ]
    return "\n\n".join(parts)


def updated(page: str) -> str:
    """Replaces the tables of a page."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def members(union: Any) -> list[type[pydantic.BaseModel]]:
    """The types of an annotated union."""
    return list(get_args(get_args(union)[0]))


def event_table(events: Iterable[type[pydantic.BaseModel]]) -> str:
    """Table with a row per event: its type, its fields and its meaning."""
    rows = ["| Event | Fields | Meaning |", "|---|---|---|"]
    for event in events:
        (name,) = get_args(event.model_fields["type"].annotation)
        rows.append(f"| `{name}` | {fields(event)} | {meaning(event)} |")
    return "\n".join(rows)


def object_table(kinds: Iterable[type[pydantic.BaseModel]]) -> str:
    """Table with a row per object: its name in the code, its fields and its meaning."""
    rows = ["| Object | Fields | Meaning |", "|---|---|---|"]
    rows += [f"| {kind.__name__} | {fields(kind)} | {meaning(kind)} |" for kind in kinds]
    return "\n".join(rows)


def fields(kind: type[pydantic.BaseModel]) -> str:
    """Fields with their types; optional ones in brackets."""
    described = []
    for name, field in kind.model_fields.items():
        if issubclass(kind, protocol.Event | protocol.Request) and name in ("type", "event_id"):
            continue
        text = f"`{field.alias or name}` {describe(field.annotation)}"
        described.append(text if field.is_required() else f"[{text}]")
    return ", ".join(described)


def describe(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return describe(arguments[0])
    if origin is typing.Literal:
        # Sorted, since `typing` caches unions of literals whatever their order is.
        return " or ".join(sorted(f'"{x}"' if isinstance(x, str) else str(x) for x in arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(x) for x in arguments if x is not type(None))
    if origin is tuple:
        return f"list of {describe(arguments[0])}"
    if origin is dict:
        return "object"
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def meaning(kind: type[pydantic.BaseModel]) -> str:
    """The docstring, followed by the descriptions of its attributes."""
    text = inspect.getdoc(kind) or ""
    summary, _, attributes = text.partition("Attributes:")
    lines = [" ".join(line.split()) for line in attributes.splitlines() if line.strip()]
    return " ".join([" ".join(summary.split()), *lines]).replace("|", "\\|")


def objects() -> Iterator[type[protocol.Message]]:
    """The types of the events' fields, in the order of the code."""
    bases = (protocol.Message, protocol.Strict)
    for kind in filter(inspect.isclass, vars(protocol).values()):
        is_event = issubclass(kind, protocol.Event | protocol.Request)
        if issubclass(kind, protocol.Message) and kind not in bases and not is_event:
            yield kind


def main() -> None:
    """Updates the tables of the page."""
    description = "Write the tables of the protocol's types into docs/serving.md."
    argparse.ArgumentParser(description=description).parse_args()
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
