"""Chat completions, models and files over HTTP, by OpenAI's own client."""

import base64
import contextlib
import dataclasses
import functools
import http.client
import io
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import httpx
import numpy as np
import openai
import pytest
from engines import FORGETS_NOTHING, ScriptedEngine
from hypothesis import given
from hypothesis import strategies as st
from servers import Running, data_url, png, running, wait_for

from moss_jax.config import ChatConfig, EngineConfig, FrameSampling, MemoryConfig, SchedulerConfig
from moss_jax.serving.chat import routes
from moss_jax.serving.chat.answers import Stops
from moss_jax.serving.chat.errors import ApiError
from moss_jax.serving.chat.requests import ChatRequest, parse_request
from moss_jax.serving.hub import Hub
from moss_jax.serving.media import MediaLimits, decode_clip
from moss_jax.serving.security import Gate, Tokens, protection
from moss_jax.stream import Scheduler, Text, answer_offline
from moss_jax.video import Frame, fit_frame

MODEL = "moss-test"
CONFIG = ChatConfig(queue_seconds=0.3, queue=2, max_frames=40, file_bytes=2**20, files=3)


ANSWERS = {"cat": "A cat. It sleeps.", "story": "And then, " * 400, "colour": "It is grey."}


class AnsweringEngine(ScriptedEngine):
    """Answers the questions that have a word of `ANSWERS` in them."""

    def step(self, state, rows, features=None):
        for slot, row in enumerate(rows):
            said = self.tokenizer.decode([t for t in row.tokens if t >= 0]) if row else ""
            for text in (text for word, text in ANSWERS.items() if word in said):
                self.script[slot].extend([*self.tokenizer.encode(text), self.tokenizer.special.silence])
        return super().step(state, rows, features)


class ReusingScheduler(Scheduler):
    """Empties the slots of the stand-in, which has no programs for that."""

    def _begin(self, state, stream):
        state.context[stream.slot].clear()
        self.engine.script[stream.slot].clear()
        self._used.discard(stream.slot)
        return super()._begin(state, stream)


class Chatting(Running):
    """A server of chat completions with its engine."""

    engine: AnsweringEngine

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def ask(self, *content, **options):
        """The answer to one turn of the user."""
        messages = [{"role": "user", "content": list(content) if len(content) > 1 else content[0]}]
        return self.client().chat.completions.create(model=MODEL, messages=messages, **options)

    def post(self, body: dict | bytes) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body)
        return httpx.post(f"{self.url}/v1/chat/completions", content=content, timeout=60)

    @property
    def free(self) -> int:
        return self.hub.free_slots


@contextlib.contextmanager
def chatting(tokenizer, config=CONFIG, memory=FORGETS_NOTHING, **options) -> Iterator[Chatting]:
    slots = EngineConfig(8, 4096, 256, memory)
    engine = AnsweringEngine(tokenizer, {slot: [] for slot in range(slots.slots)}, slots)
    hub = Hub(ReusingScheduler(engine, SchedulerConfig()), model=MODEL)
    with running(hub, routes=routes(hub, config), **options) as server:
        chat = Chatting(hub, server.server, server.loop, server.port)
        chat.engine = engine
        yield chat


@pytest.fixture
def chat(tokenizer) -> Iterator[Chatting]:
    with chatting(tokenizer) as server:
        yield server


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def image(value: int | str) -> dict:
    url = value if isinstance(value, str) else data_url(np.full((8, 8, 3), value, np.uint8))
    return {"type": "image_url", "image_url": {"url": url}}


def video(url: str) -> dict:
    return {"type": "video_url", "video_url": {"url": url}}


@functools.cache
def clip() -> bytes:
    """A video of 16 seconds that gets brighter."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 15 * number, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def clip_url() -> str:
    return f"data:video/mp4;base64,{base64.b64encode(clip()).decode()}"


def clip_frames(**sampling) -> list[int]:
    """What the engine tells the frames of the clip by."""
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        Path(file.name).write_bytes(clip())
        frames = decode_clip(file.name, FrameSampling(**sampling), 112, limits=MediaLimits())
    return [int(frame.rgb[0, 0, 0]) for frame in frames]


# ------------------------------------------------------------------------------------- answers


def test_a_question_is_answered(chat, tokenizer):
    answer = chat.ask("What is a cat?")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "A cat. It sleeps.")
    assert choice.finish_reason == "stop"
    usage = answer.usage
    assert usage.completion_tokens == len(tokenizer.encode("A cat. It sleeps."))
    assert usage.prompt_tokens == len(chat.engine.state.context[0]) - usage.completion_tokens - 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    wait_for(lambda: chat.free == 8)


def test_an_answer_is_streamed(chat):
    with chat.ask("What is a cat?", stream=True, stream_options={"include_usage": True}) as answer:
        chunks = list(answer)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in middle]
    assert len(pieces) > 2
    assert "".join(pieces) == "A cat. It sleeps."
    assert last.choices[0].finish_reason == "stop"
    assert [chunk.choices[0].finish_reason for chunk in middle] == [None] * len(middle)
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(middle)
    assert not any(chunk.usage for chunk in chunks[:-1])


def test_the_stream_ends_as_openais_does(chat):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "A cat?"}], "stream": True}
    answer = chat.post(body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert "usage" not in answer.text


def test_a_dialogue_is_given_as_a_whole(chat, tokenizer):
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [image(7), text("What is this?"), text("And that?"), image(9)]},
        {"role": "assistant", "content": [text("A dog.")]},
        {"role": "user", "content": "And a cat?"},
    ]
    answer = chat.client().chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content == "A cat. It sleeps."
    assert chat.engine.seen == [7, 9]
    context = chat.engine.state.context[0]
    said = tokenizer.decode(context)
    order = ["Be short.", "What is this?\nAnd that?", "A dog.", "And a cat?", "A cat. It sleeps."]
    assert sorted(order, key=said.index) == order
    first, second = [i for i, token in enumerate(context) if token == tokenizer.special.image]
    assert tokenizer.decode(context[first + 1 : second]) == "What is this?\nAnd that?"


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_and_the_limits_of_an_answer(chat, tokenizer, streamed):
    def ask(*content, **options):
        answer = chat.ask(*content, stream=streamed, **options)
        if not streamed:
            return answer.choices[0].message.content, answer.choices[0].finish_reason
        chunks = [chunk.choices[0] for chunk in answer]
        return "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason

    assert ask("A cat?", stop="sleeps") == ("A cat. It ", "stop")
    assert ask("A cat?", stop=["It sleeps!", "t. It"]) == ("A ca", "stop")
    assert ask("A cat?", stop=["sleeps. "]) == ("A cat. It sleeps.", "stop")
    limited = tokenizer.decode(tokenizer.encode("And then, " * 400)[:5])
    assert ask("A story.", max_tokens=5) == (limited, "length")
    assert ask("A story.", max_completion_tokens=5, max_tokens=50) == (limited, "length")
    wait_for(lambda: chat.free == 8)


@given(st.text("abc", max_size=40), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stops_are_found_however_the_text_is_cut(answer, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    finder, told = Stops(stops), ""
    for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True):
        told += finder.feed(answer[start:end])
        assert answer.startswith(told)
    told += finder.flush()
    ends = [i + len(stop) for stop in stops for i in range(len(answer)) if answer.startswith(stop, i)]
    # The stop that is complete first ends the answer; where several are, the text before the first of them.
    assert finder.found == bool(ends)
    if not ends:
        assert told == answer
    else:
        assert not any(stop in told for stop in stops) or not stops
        assert answer[len(told) :].startswith(tuple(stops))


# --------------------------------------------------------------------------------------- media


def test_videos_from_everywhere(tokenizer, tmp_path):
    """A data URL, an upload, a file below a folder that is allowed, and the forms that name them."""
    (tmp_path / "a b.mp4").write_bytes(clip())
    config = ChatConfig(file_roots=(str(tmp_path),), file_bytes=2**30)
    expected = clip_frames()
    with chatting(tokenizer, config) as chat:
        uploaded = chat.client().files.create(file=("clip.mp4", clip()), purpose="user_data")
        ways = [
            video(clip_url()),
            {"type": "video_url", "video_url": clip_url()},
            video(uploaded.id),
            {"type": "file", "file": {"file_id": uploaded.id}},
            {"type": "file", "file": {"file_data": clip_url(), "filename": "clip.mp4"}},
            video(f"file://{tmp_path}/a b.mp4"),
            video(f"file://localhost{tmp_path}/a%20b.mp4"),
        ]
        for way in ways:
            chat.engine.seen.clear()
            assert chat.ask(way, text("A cat?")).choices[0].message.content == "A cat. It sleeps."
            assert chat.engine.seen == expected


def test_the_frames_of_a_request_are_limited_and_shared(tokenizer):
    with chatting(tokenizer, ChatConfig(max_frames=9)) as chat:
        chat.ask(video(clip_url()), video(clip_url()), image(3), text("A cat?"))
        assert chat.engine.seen == [*clip_frames(max_frames=4) * 2, 3]
        chat.engine.seen.clear()
        chat.ask(
            video(clip_url()), text("A cat?"), extra_body={"media_io_kwargs": {"video": {"num_frames": 5}}}
        )
        assert chat.engine.seen == clip_frames(min_frames=5, max_frames=5)
        chat.engine.seen.clear()
        chat.ask(video(clip_url()), text("A cat?"), extra_body={"media_io_kwargs": {"video": {"fps": 0.2}}})
        assert chat.engine.seen == clip_frames(fps=0.2)
        with pytest.raises(openai.BadRequestError, match="at most 9 images"):
            chat.ask(*[image(1)] * 10)


def test_a_clip_is_sampled_to_what_a_bank_that_forgets_nothing_has_room_for(tokenizer):
    engine = AnsweringEngine(tokenizer, {0: []}, EngineConfig(1, 4096, 3, FORGETS_NOTHING))
    hub = Hub(Scheduler(engine, SchedulerConfig()), model=MODEL)
    with running(hub, routes=routes(hub)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": [video(clip_url()), text("A cat?")]}]
        client.chat.completions.create(model=MODEL, messages=messages)
    assert engine.seen == clip_frames(max_frames=3)


# The body that lmms-eval 0.7.3 sends with `--model openai --model_args ...,pass_video_url=True`.
LMMS_EVAL = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": "file://{path}"}},
                {"type": "text", "text": "Is there a cat?\nAnswer with yes or no."},
            ],
        }
    ],
    "model": MODEL,
    "max_tokens": 16,
    "temperature": 0,
    "media_io_kwargs": {"video": {"num_frames": 10}},
}


def test_the_request_of_lmms_eval(tokenizer, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip())
    body = json.loads(json.dumps(LMMS_EVAL).replace("{path}", str(path)))
    with chatting(tokenizer, ChatConfig(file_roots=(str(tmp_path),))) as chat:
        answer = chat.post(body).json()
        assert answer["choices"][0]["message"]["content"] == "A cat. It sleeps."
        assert answer["usage"]["prompt_tokens"] > 10
        assert chat.engine.seen == clip_frames(min_frames=10, max_frames=10)


# --------------------------------------------------------------------------------------- errors


def user(*content) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": list(content)}]}


HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hello."}]}
REFUSED = {
    "no JSON": (b"{", 400, None),
    "a list": (b"[]", 400, None),
    "no model": ({"messages": HELLO["messages"]}, 400, "model"),
    "another model": (HELLO | {"model": "gpt"}, 404, "model"),
    "no messages": (HELLO | {"messages": []}, 400, "messages"),
    "no user last": (
        HELLO | {"messages": [*HELLO["messages"], {"role": "assistant", "content": "Hi."}]},
        400,
        "messages",
    ),
    "a role": (HELLO | {"messages": [{"role": "robot", "content": ""}]}, 400, "messages.0.role"),
    "a tool": (HELLO | {"tools": [{"type": "function"}]}, 400, "tools"),
    "several answers": (HELLO | {"n": 2}, 400, "n"),
    "a hot answer": (HELLO | {"temperature": 3}, 400, "temperature"),
    "a text as number": (HELLO | {"top_p": "much"}, 400, "top_p"),
    "no tokens": (HELLO | {"max_tokens": 0}, 400, "max_tokens"),
    "an empty stop": (HELLO | {"stop": ""}, 400, "stop"),
    "a large seed": (HELLO | {"seed": 2**70}, 400, None),
    "a large top_k": (HELLO | {"top_k": 2**40}, 400, None),
    "no temperature": (b'{"model": "moss-test", "messages": [], "temperature": NaN}', 400, None),
    "depth": (b"[" * 100_000, 400, None),
    "JSON wanted": (HELLO | {"response_format": {"type": "json_object"}}, 400, "response_format"),
    "audio": (user({"type": "input_audio", "input_audio": {}}), 400, "messages.0.content.0"),
    "bad base64": (user(image("data:image/png;base64,?")), 400, "messages.0.content.0"),
    "no image": (user(text("a"), image("data:image/png;base64,YWJj")), 400, "messages.0.content.1"),
    "a remote image": (user(image("http://127.0.0.1/a.png")), 400, "messages.0.content.0"),
    "a local file": (user(image("file:///etc/passwd")), 400, "messages.0.content.0"),
    "another scheme": (user(image("ftp://example.com/a.png")), 400, "messages.0.content.0"),
    "no such file": (user(image("file-123")), 404, "file_id"),
    "too long": (user(text("word " * 5000)), 400, "messages"),
    "no Unicode": (
        b'{"model": "moss-test", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        None,
    ),
}


@pytest.fixture(scope="module")
def one_chat(tokenizer) -> Iterator[Chatting]:
    with chatting(tokenizer) as server:
        yield server


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_told_in_openais_form(one_chat, name):
    body, status, param = REFUSED[name]
    answer = one_chat.post(body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert param is None or error["param"] == param
    assert "passwd" not in error["message"]
    assert one_chat.free == 8


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["text", "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url"]), inner, max_size=4
        )
    ),
)


@given(st.dictionaries(st.sampled_from(list(ChatRequest.model_fields)), JSON), JSON)
def test_whatever_comes_is_a_request_or_an_error(fields, messages):
    body = HELLO | fields | ({"messages": messages} if messages else {})
    with contextlib.suppress(ApiError):
        parse_request(json.dumps(body).encode()).check()


@given(st.binary(max_size=40))
def test_bytes_are_an_error(body):
    with pytest.raises(ApiError):
        parse_request(body)


def test_the_body_of_a_request_is_limited(tokenizer):
    with chatting(tokenizer, ChatConfig(max_body_bytes=1000)) as chat:
        answer = chat.post(b" " * 2000)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert chat.post(HELLO).status_code == 200


def test_the_bodies_of_all_requests_together_are_limited(tokenizer):
    with chatting(tokenizer, ChatConfig(max_body_bytes=1000)) as chat, contextlib.ExitStack() as stack:
        for _ in range(4):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", chat.port)))
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
            connection.sendall(head.encode() + b" " * 950)

        def refused():
            answer = chat.post(HELLO | {"user": "x" * 500})
            return answer.status_code == 429 and "retry-after" in answer.headers

        wait_for(refused)
        stack.close()
        wait_for(lambda: chat.post(HELLO).status_code == 200)


def test_a_text_far_too_long_is_not_even_tokenized(one_chat):
    with pytest.raises(openai.BadRequestError, match="characters") as refused:
        one_chat.ask("word " * 200_000)
    assert refused.value.code == "context_length_exceeded"


def test_a_question_too_long_for_the_model_has_openais_code(one_chat):
    with pytest.raises(openai.BadRequestError) as refused:
        one_chat.ask("word " * 5000)
    assert refused.value.code == "context_length_exceeded"


# ------------------------------------------------------------------------------------- traffic


def test_a_request_waits_for_a_free_stream_and_not_for_ever(chat):
    taken = [chat.call(chat.hub.reserve) for _ in range(8)]
    with pytest.raises(openai.InternalServerError) as late:
        chat.ask("A cat?")
    assert (late.value.status_code, late.value.code) == (503, "no_free_stream")
    assert int(late.value.response.headers["retry-after"]) > 0
    answers = []
    thread = threading.Thread(target=lambda: answers.append(chat.ask("A cat?")))
    thread.start()
    time.sleep(0.05)
    chat.call(taken.pop().release)
    thread.join(60)
    assert answers[0].choices[0].message.content == "A cat. It sleeps."


def test_completions_leave_slots_to_live_streams(tokenizer):
    config = dataclasses.replace(CONFIG, max_streams=2, queue=10, queue_seconds=30.0)
    with chatting(tokenizer, config) as chat, ThreadPoolExecutor(5) as threads:
        chat.engine.before_step = lambda: time.sleep(0.002)
        asked = [threads.submit(chat.ask, "A story?", max_tokens=50) for _ in range(5)]
        taken = []
        while not all(answer.done() for answer in asked):
            taken.append(len(chat.hub.scheduler.streams))
            time.sleep(0.001)
        assert {answer.result().choices[0].finish_reason for answer in asked} == {"length"}
        assert max(taken) == 2


def test_too_many_waiting_requests_are_turned_away(chat):
    for _ in range(8):
        chat.call(chat.hub.reserve)
    # Four are prepared, two wait in line.
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(chat.post(HELLO).status_code)) for _ in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(statuses) == [429] * 4 + [503] * 6


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_goes_away_frees_its_slot(chat, streamed):
    chat.engine.before_step = lambda: time.sleep(0.005)
    connection = http.client.HTTPConnection("127.0.0.1", chat.port)
    body = HELLO | {"messages": [{"role": "user", "content": "A story."}], "stream": streamed}
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"max_tokens": 3000}))
    wait_for(lambda: chat.free == 7)
    if streamed:
        assert connection.getresponse().readline().startswith(b"data: ")
    connection.sock and connection.sock.close()
    connection.close()
    wait_for(lambda: chat.free == 8)
    assert len(chat.engine.state.context[0]) < 1500
    assert chat.ask("A cat?").choices[0].message.content == "A cat. It sleeps."


def test_a_client_that_goes_away_leaves_the_line(chat):
    taken = [chat.call(chat.hub.reserve) for _ in range(8)]
    for _ in range(3):
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{chat.url}/v1/chat/completions", json=HELLO, timeout=0.05)
    chat.call(taken.pop().release)
    assert chat.ask("A cat?").choices[0].message.content == "A cat. It sleeps."
    wait_for(lambda: chat.free == 1)


def test_answers_beside_one_another(tokenizer):
    with chatting(tokenizer, ChatConfig()) as chat:
        answers = {}

        def ask(number: int) -> None:
            question = "A cat?" if number % 2 else "What colour?"
            answers[number] = chat.ask(image(number), text(question)).choices[0].message.content

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        expected = [ANSWERS["colour"], ANSWERS["cat"]]
        assert [answers[number] for number in range(8)] == expected * 4
        assert sorted(chat.engine.seen) == list(range(8))


def test_a_server_that_ends_tells_its_clients(tokenizer):
    with chatting(tokenizer) as chat:
        chat.engine.before_step = lambda: time.sleep(0.005)
        errors = []

        def ask() -> None:
            with pytest.raises(openai.APIStatusError) as error:
                chat.ask("A story.", max_tokens=3000)
            errors.append(error.value.status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: chat.free == 7)
    thread.join(60)
    assert errors == [503]


def test_a_stream_that_fails_is_told(chat):
    def fail():
        raise RuntimeError("injected")

    chat.engine.before_step = fail
    with pytest.raises(openai.InternalServerError) as failed:
        chat.ask("A cat?")
    assert failed.value.status_code == 500
    assert "injected" not in str(failed.value)
    with pytest.raises(openai.APIError):
        list(chat.ask("A cat?", stream=True))


# ------------------------------------------------------------------------------- models, files


def test_models(one_chat):
    client = one_chat.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_files(chat):
    files = chat.client().files
    content = png(np.full((4, 4, 3), 9, np.uint8))
    first = files.create(file=("../../a b.png", content), purpose="vision")
    second = files.create(file=("b.bin", b"12345"), purpose="user_data")
    assert (first.object, first.bytes, first.filename, first.purpose) == (
        "file",
        len(content),
        "a b.png",
        "vision",
    )
    assert first.expires_at > first.created_at
    assert [file.id for file in files.list()] == [second.id, first.id]
    assert [file.id for file in files.list(order="asc", limit=1).data] == [first.id]
    assert [file.id for file in files.list(order="asc", after=first.id)] == [second.id]
    assert [file.id for file in files.list(purpose="vision")] == [first.id]
    assert files.retrieve(first.id) == first
    assert files.content(first.id).read() == content
    assert chat.ask({"type": "file", "file": {"file_id": first.id}}, text("A cat?"))
    assert chat.engine.seen == [9]
    assert files.delete(first.id).deleted
    for call in (files.retrieve, files.content, files.delete):
        with pytest.raises(openai.NotFoundError):
            call(first.id)
    with pytest.raises(openai.BadRequestError, match="purpose"):
        files.create(file=("c", b"1"), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="limit"):
        files.list(limit=0)


def test_a_file_belongs_to_the_token_that_uploaded_it(tokenizer):
    mine, other = "the-token-of-one-client", "the-token-of-another-client"
    with chatting(tokenizer, middleware=protection(Gate(tokens=Tokens([mine, other])))) as chat:
        owner, stranger = chat.client(api_key=mine), chat.client(api_key=other)
        file = owner.files.create(file=("a.png", png(np.full((4, 4, 3), 9, np.uint8))), purpose="vision")

        def ask(client: openai.OpenAI, part: dict):
            messages = [{"role": "user", "content": [part, text("A cat?")]}]
            return client.chat.completions.create(model=MODEL, messages=messages)

        references = ({"type": "file", "file": {"file_id": file.id}}, image(file.id), video(file.id))
        for call in (
            stranger.files.retrieve,
            stranger.files.content,
            stranger.files.delete,
            lambda id: stranger.files.list(after=id),
            *(functools.partial(lambda part, _: ask(stranger, part), part) for part in references),
        ):
            with pytest.raises(openai.NotFoundError) as refused:
                call(file.id)
            assert refused.value.code == "file_not_found"
        assert stranger.files.list().data == []
        assert chat.engine.seen == []
        assert [listed.id for listed in owner.files.list()] == [file.id]
        for part in references:
            ask(owner, part)
        assert chat.engine.seen == [9] * 3
        assert owner.files.delete(file.id).deleted


def test_the_store_of_files_is_bounded(chat):
    files = chat.client().files
    first = files.create(file=("a", b"1" * (2**19)), purpose="user_data")
    with pytest.raises(openai.APIStatusError) as full:
        files.create(file=("b", b"1" * (2**19 + 1)), purpose="user_data")
    assert (full.value.status_code, full.value.code) == (413, "storage_full")
    files.create(file=("b", b"1" * (2**19)), purpose="user_data")
    files.delete(first.id)
    for name in ("c", "d"):
        files.create(file=(name, b"1"), purpose="user_data")
    with pytest.raises(openai.APIStatusError, match="3 files"):
        files.create(file=("e", b"1"), purpose="user_data")


def test_files_expire(chat):
    files = chat.client().files
    expires = {"anchor": "created_at", "seconds": 1}
    file = files.create(file=("a", b"1"), purpose="user_data", extra_body={"expires_after": expires})
    assert file.expires_at - file.created_at <= 2
    wait_for(lambda: not files.list().data)


def test_an_upload_is_limited_before_it_is_stored(tokenizer):
    with chatting(tokenizer, ChatConfig(max_video_bytes=1000)) as chat:
        with pytest.raises(openai.APIStatusError) as large:
            chat.client().files.create(file=("a", b"1" * (3 * 2**20)), purpose="user_data")
        assert large.value.status_code == 413
        answer = httpx.post(
            f"{chat.url}/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}
        )
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


# ------------------------------------------------------------------------------- a real engine


@pytest.mark.slow
def test_answers_are_those_of_the_offline_answer(make_engine, tokenizer, frames):
    """Over the wire, by a model, in realtime, whatever the sampling."""
    engine = make_engine(slots=2, memory=MemoryConfig(text="window"))
    hub = Hub(Scheduler(engine, SchedulerConfig()), model=MODEL)
    size = engine.model_config.vision.image_size
    shown = [frame[:size, :size] for frame in frames[:3]]
    assert shown[0].shape[0] < size
    with running(hub, routes=routes(hub)) as server:
        chat = Chatting(hub, server.server, server.loop, server.port)
        urls = [image(data_url(rgb)) for rgb in shown]

        def ask(**options):
            return chat.ask(*urls, text("What is it?"), max_tokens=12, **options).choices[0].message.content

        warm = [ask(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
        greedy = ask()
        assert ask(temperature=0.0, top_p=0.5) == greedy
    assert warm[0] == warm[1] != warm[2]
    fitted = [Frame(fit_frame(rgb, size), 0.0) for rgb in shown]
    events = answer_offline(make_engine(), fitted, "What is it?", max_tokens=12)
    assert greedy == "".join(event.text for event in events if isinstance(event, Text))
