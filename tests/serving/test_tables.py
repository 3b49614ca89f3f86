"""The tables of the docs are those of the types."""

from moss_jax.serving import protocol, tables


def test_the_docs_have_the_tables_of_the_types():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.updated(page) == page, "run python -m moss_jax.serving.tables"


def test_every_event_and_every_field_is_in_a_table():
    text = tables.tables()
    for event in (*tables.members(protocol.ClientEvent), *tables.members(protocol.ServerEvent)):
        assert f"| `{event.model_fields['type'].annotation.__args__[0]}` |" in text
    assert "[`from` integer]" in text
    assert '`fate` "alike" or "dropped" or "rate" or "seen" or "still"' in text
    assert f"version {protocol.VERSION}" in tables.PAGE.read_text(encoding="utf-8")
