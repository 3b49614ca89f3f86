"""The Realtime endpoint over a real connection."""

import json
import struct

import numpy as np
import pytest
from servers import Client, png, wait_for
from websockets.exceptions import ConnectionClosed

GREY = np.full((24, 32, 3), 128, np.uint8)
BRIGHT = np.full((24, 32, 3), 200, np.uint8)


def texts(events: list[dict]) -> str:
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


def test_a_question_about_a_frame(served):
    with Client(served.realtime) as client:
        created = client.receive()
        assert created["type"] == "session.created"
        assert created["session"]["output_modalities"] == ["text"]
        client.show(GREY)
        client.ask("Is there a cat?")
        done = client.until("response.done")
        types = [event["type"] for event in client.events]
        assert [t for t in types if t.startswith("response.")] == [
            "response.created",
            "response.output_item.added",
            "response.content_part.added",
            *["response.output_text.delta"] * types.count("response.output_text.delta"),
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.done",
        ]
        assert done["response"]["status"] == "completed"
        (item,) = done["response"]["output"]
        assert item["content"] == [{"type": "output_text", "text": "A cat. It sleeps."}]
        assert texts(client.events) == "A cat. It sleeps."
        # The extension was not negotiated, so nothing of it is seen.
        assert not any("moss" in json.dumps(event) for event in client.events[1:])
        # Frame, question and answer have been accepted, and are done.
        added = [e["item"]["id"] for e in client.events if e["type"] == "conversation.item.added"]
        finished = [e["item"]["id"] for e in client.events if e["type"] == "conversation.item.done"]
        assert sorted(added) == sorted(finished)
        assert len(added) == 3
        client.send("conversation.item.retrieve", item_id=item["id"])
        assert client.until("conversation.item.retrieved")["item"]["content"] == item["content"]


def test_the_model_speaks_unasked_and_is_silent(served):
    with Client(served.realtime) as client:
        session = client.negotiate()
        assert session["moss"]["version"] == 1
        assert session["moss"]["clock"] == "realtime"
        client.show(GREY, moss={"time": 0.5})
        fate = client.until("conversation.item.done")["moss"]["frame"]
        assert (fate["index"], fate["time"], fate["fate"]) == (0, 0.5, "seen")
        assert client.until("moss.silence")
        client.show(BRIGHT)
        assert client.until("response.created")["moss"]["asked"] is False
        assert client.until("response.done")["response"]["status"] == "completed"
        assert texts(client.events) == "Something has come."
        counters = client.until("moss.counters")
        assert counters["counters"]["frames"] == 2


def test_binary_frames_after_negotiation(served):
    with Client(served.realtime) as client:
        client.receive()
        client.socket.send(struct.pack(">d", 0.0) + png(GREY))
        assert client.receive()["error"]["code"] == "binary_not_negotiated"
        client.negotiate(frames="binary")
        client.socket.send(struct.pack(">d", 0.25) + png(GREY))
        added = client.until("conversation.item.added")
        assert added["moss"]["frame"] == {"index": 0, "time": 0.25, "queued": 1}
        client.socket.send(struct.pack(">d", float("nan")) + png(GREY))
        assert client.until("conversation.item.added")["moss"]["frame"]["index"] == 1
        for message, code in (
            (b"short", "invalid_frame"),
            (struct.pack(">d", -1.0) + png(GREY), "invalid_frame"),
            (struct.pack(">d", 1.0) + b"no image at all", "invalid_image"),
        ):
            client.socket.send(message)
            assert client.until("error")["error"]["code"] == code


def test_a_prompt_cuts_the_answer(served):
    with Client(served.realtime) as client:
        client.ask("Tell me a story.")
        client.until("response.output_text.delta")
        client.send("response.create", event_id="mine")
        error = client.until("error")["error"]
        assert (error["code"], error["event_id"]) == ("conversation_already_has_active_response", "mine")
        client.ask("Is there a cat?", response={"metadata": {"number": "2"}})
        cut = client.until("response.done")["response"]
        assert cut["status"] == "cancelled"
        assert cut["status_details"]["reason"] == "turn_detected"
        assert client.until("response.created")["response"]["metadata"] == {"number": "2"}
        assert (
            client.until("response.done")["response"]["output"][0]["content"][0]["text"]
            == "A cat. It sleeps."
        )


def test_a_response_is_cancelled(served):
    with Client(served.realtime) as client:
        client.send("response.cancel")
        assert client.until("error")["error"]["code"] == "response_cancel_not_active"
        client.ask("Tell me a story.")
        client.until("response.output_text.delta")
        client.send("response.cancel")
        details = client.until("response.done")["response"]["status_details"]
        assert details == {"type": "cancelled", "reason": "client_cancelled"}
        client.ask("Is there a cat?")
        assert client.until("response.done")["response"]["status"] == "completed"


def test_a_correction_says_what_it_takes_back(served):
    with Client(served.realtime) as client:
        client.negotiate()
        client.ask("What colour is it?")
        client.until("response.done")
        deltas = [e for e in client.events if e["type"] == "response.output_text.delta"]
        (correction,) = [e for e in deltas if "takes_back" in e["moss"]]
        said = texts(client.events)
        assert said == "It is grey. The cat is red - wait, the cat is black."
        start = correction["moss"]["from"]
        before = texts(client.events[: client.events.index(correction)])
        assert before[start:] == "The cat is red"
        assert correction["delta"] == " - wait, "


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        ("no json", "invalid_json", None),
        ("[]", "invalid_event", None),
        ("{}", "invalid_event", None),
        ('{"type": "make.coffee"}', "unknown_event", None),
        (r'{"type": "make.tea", "event_id": "\ud83d"}', "invalid_json", None),
        ('{"type": "conversation.item.create"}', "invalid_event", "item"),
        ('{"type": "input_audio_buffer.append", "audio": ""}', "unsupported", "type"),
        ('{"type": "conversation.item.delete", "item_id": "x"}', "unsupported", "type"),
        ('{"type": "conversation.item.retrieve", "item_id": "x"}', "item_not_found", "item_id"),
        ('{"type": "response.create"}', "nothing_to_answer", None),
        (
            '{"type": "session.update", "session": {"type": "realtime", "moss": {"version": 2}}}',
            "invalid_event",
            "session.moss.version",
        ),
        (
            '{"type": "session.update", "session": {"moss": {"version": 1, "sampling": {"top_p": -1}}}}',
            "invalid_setting",
            "session",
        ),
        (
            '{"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": '
            '[{"type": "input_image", "image_url": "https://example.org/cat.png"}]}}',
            "invalid_image",
            "item.content[0].image_url",
        ),
        (
            '{"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": '
            '[{"type": "input_audio", "audio": ""}]}}',
            "unsupported",
            "item.content[0]",
        ),
        ('{"type": "moss.save"}', "cannot_save", None),
    ],
)
def test_bad_input_is_told_and_the_session_goes_on(served, message, code, param):
    with Client(served.realtime) as client:
        client.receive()
        client.socket.send(message)
        error = client.receive()["error"]
        assert (error["code"], error.get("param")) == (code, param)
        client.ask("Is there a cat?")
        assert client.until("response.done")["response"]["status"] == "completed"


def test_settings_are_fixed_once_the_stream_is_open(served):
    with Client(served.realtime) as client:
        client.send("session.update", session={"type": "realtime", "instructions": "You watch birds."})
        assert client.until("session.updated")["session"]["instructions"] == "You watch birds."
        system = {
            "type": "message",
            "role": "system",
            "content": [{"type": "input_text", "text": "Be brief."}],
        }
        client.send("conversation.item.create", item=system)
        client.until("conversation.item.done")
        client.send("session.update", session={"type": "realtime", "max_output_tokens": 5})
        session = client.until("session.updated")["session"]
        assert session["instructions"] == "You watch birds.\nBe brief."
        assert session["max_output_tokens"] == 5
        client.ask("Is there a cat?")
        done = client.until("response.done")["response"]
        assert done["status_details"] == {"type": "incomplete", "reason": "max_output_tokens"}
        client.send("session.update", session={"type": "realtime", "instructions": "You watch fish."})
        error = client.until("error")["error"]
        assert (error["code"], error["param"]) == ("stream_is_open", "session.instructions")
        # What is in force may be said again.
        client.send("session.update", session={"type": "realtime", "instructions": "You watch birds."})
        client.until("session.updated")


def test_connections_beyond_the_slots_are_refused(served):
    clients = [Client(served.realtime) for _ in range(8)]
    for client in clients:
        client.__enter__()
        client.receive()
    with Client(served.realtime) as late:
        assert late.receive()["error"]["code"] == "no_free_stream"
        with pytest.raises(ConnectionClosed) as closed:
            late.receive()
        assert closed.value.rcvd.code == 1013
    clients[0].__exit__(None, None, None)
    wait_for(lambda: served.hub.free_slots == 1)
    with Client(served.realtime) as client:
        assert client.receive()["type"] == "session.created"
    for client in clients[1:]:
        client.__exit__(None, None, None)
    wait_for(lambda: served.hub.free_slots == 8 and not served.hub.sessions)
    wait_for(lambda: served.hub.counters.connections == 0)


def test_a_lost_connection_is_resumed(served):
    with Client(served.realtime) as first:
        session = first.negotiate()
        first.show(GREY)
        first.ask("Tell me a story.")
        first.until("response.output_text.delta")
        last = first.events[-1]["event_id"]
        first.lose()
    identity = f"session={session['id']}&token={session['moss']['token']}"
    with Client(f"{served.realtime}?session={session['id']}&token=wrong") as thief:
        assert thief.receive()["error"]["code"] == "session_not_found"
    with Client(f"{served.realtime}?{identity}&after={last}") as second:
        created = second.receive()
        assert created["session"]["id"] == session["id"]
        assert created["session"]["moss"]["resumed"]["missed"] == 0
        done = second.until("response.done")
        # Nothing is missing and nothing comes twice.
        assert texts(first.events + second.events) == done["response"]["output"][0]["content"][0]["text"]
        numbers = [int(e["event_id"].split("_")[1]) for e in first.events + second.events[1:]]
        assert numbers == sorted(set(numbers))
        second.send("moss.finish")
        end = second.until("moss.end")
        assert end["reason"] == "finished"
        assert end["counters"]["frames"] == 1
        with pytest.raises(ConnectionClosed) as closed:
            second.receive()
        assert closed.value.rcvd.code == 1000
    wait_for(lambda: not served.hub.sessions)


def test_a_second_connection_takes_over(served):
    with Client(served.realtime) as first, Client(served.realtime) as second:
        session = first.negotiate()
        first.show(GREY)
        first.until("conversation.item.done")
        second.receive()
        assert served.hub.free_slots == 6
        resume = {"resume": session["id"], "token": session["moss"]["token"], "after": "event_1"}
        second.send("session.update", session={"type": "realtime", "moss": {"version": 1, **resume}})
        assert second.until("session.created")["session"]["id"] == session["id"]
        with pytest.raises(ConnectionClosed) as closed:
            first.until("never")
        assert closed.value.rcvd.code == 4001
        wait_for(lambda: served.hub.free_slots == 7)
        second.ask("Is there a cat?")
        second.until("response.done")


def test_the_end_of_the_server_is_told(served):
    with Client(served.realtime) as plain, Client(served.realtime) as extended:
        extended.negotiate()
        plain.receive()
        served.server.should_exit = True
        assert extended.until("moss.end")["reason"] == "shutdown"
        assert plain.until("error")["error"]["code"] == "server_shutdown"
        with pytest.raises(ConnectionClosed) as closed:
            plain.receive()
        assert closed.value.rcvd.code == 1012
