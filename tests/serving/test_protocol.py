"""The types of the protocol: what clients send is parsed or refused, whatever it is."""

import json
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jax.serving import protocol, tables
from moss_jax.serving.protocol import ProtocolError
from moss_jax.serving.session import encoded, event_number

TYPES = [event.model_fields["type"].annotation.__args__[0] for event in tables.members(protocol.ClientEvent)]
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = st.sampled_from(["event_id", "item", "session", "moss", "response", "item_id", "response_id"])


def code(function, message) -> str | None:
    """The code of the error that a message gives; None if it is taken."""
    try:
        function(message)
    except ProtocolError as error:
        return error.code if len(error.message) <= 500 else "a long message"
    return None


@given(st.text() | st.binary() | JSON.map(json.dumps))
def test_no_message_breaks_the_parser(message):
    assert code(protocol.parse, message) in ("invalid_json", "invalid_event", "unknown_event")


@given(st.sampled_from(TYPES), st.dictionaries(FIELDS, JSON))
def test_no_field_breaks_the_parser(name, fields):
    assert code(protocol.parse, json.dumps({**fields, "type": name})) in (None, "invalid_event")


@given(st.binary(max_size=32))
def test_no_binary_message_breaks_the_parser(message):
    assert code(protocol.frame_time, message) in (None, "invalid_frame")


def test_binary_frames():
    assert protocol.frame_time(struct.pack(">d", 1.5) + b"image") == (1.5, b"image")
    assert protocol.frame_time(struct.pack(">d", math.nan) + b"image") == (None, b"image")
    for wrong in (b"", b"12345678", struct.pack(">d", -1.0) + b"image", struct.pack(">d", math.inf) + b"x"):
        assert code(protocol.frame_time, wrong) == "invalid_frame"


def test_fields_of_others_are_ignored_but_not_in_the_extension():
    session = {"type": "realtime", "audio": {}, "tools": [], "instructions": "Be brief."}
    event = protocol.parse(json.dumps({"type": "session.update", "session": session}))
    assert isinstance(event, protocol.SessionUpdate)
    assert event.session.instructions == "Be brief."
    session["moss"] = {"version": 1, "sampling": {"temprature": 1}}
    with pytest.raises(ProtocolError) as told:
        protocol.parse(json.dumps({"type": "session.update", "session": session}))
    assert told.value.param == "session.moss.sampling.temprature"


def test_events_of_the_server_are_parsed_by_clients():
    delta = protocol.MossDelta(time=1.0, takes_back=True, start=3)
    event = protocol.TextDelta(response_id="resp_1", item_id="item_1", delta="x", moss=delta)
    text = encoded(event, 7)
    assert json.loads(text)["moss"] == {"time": 1.0, "takes_back": True, "from": 3}
    assert protocol.parse_server_event(text) == event.model_copy(update={"event_id": "event_7"})
    assert event_number("event_7") == 7
    # One of a later version of the extension is left out.
    assert protocol.parse_server_event('{"type": "moss.dreams", "event_id": "event_8"}') is None
    with pytest.raises(ProtocolError):
        event_number("event_x")
