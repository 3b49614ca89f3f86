"""Streams as files: they show the stream, and can be watched and trained on."""

import dataclasses
import itertools
import json
import runpy
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from moss_jax.config import ConversationConfig, FrameSampling
from moss_jax.data.conversations import ConversationBatches
from moss_jax.data.rows import read_rows
from moss_jax.text import chat
from moss_jax.text.labels import IGNORED
from moss_jax.video import probe, sample_file
from moss_jax.worlds.tabletop import TabletopStream, evaluation_stream
from moss_jax.worlds.tabletop.dialogue import Dialogue, converse
from moss_jax.worlds.tabletop.language import WAIT
from moss_jax.worlds.tabletop.requests import Request
from moss_jax.worlds.tabletop.write import FPS, MAX_NOISE, ground_truth, to_row, write_video

SECONDS, SIZE = 8, 96
SPEEDS = (3, 8, 32)


def calm(stream: TabletopStream) -> TabletopStream:
    """The same stream with a perfect camera."""
    return dataclasses.replace(
        stream, look=dataclasses.replace(stream.look, noise=0.0, shake=0.0, flicker=0.0)
    )


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return np.abs(a.astype(float) - b).mean()


@pytest.fixture(scope="module")
def stream() -> TabletopStream:
    """A stream with three events."""
    drawn = (evaluation_stream(0, index, SECONDS) for index in itertools.count())
    return next(s for s in drawn if len(s.world.events) == 3)


@pytest.fixture(scope="module")
def video(stream, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "calm.mp4"
    write_video(calm(stream), path, size=SIZE)
    return path


@pytest.fixture(scope="module")
def dialogues(tokenizer) -> list[tuple[TabletopStream, Dialogue]]:
    found = []
    for index in range(45):
        stream = evaluation_stream(1, index, SECONDS)
        rng = np.random.default_rng(index)
        speed = SPEEDS[index % len(SPEEDS)]
        found.append(
            (stream, converse(stream.world, stream.requests, tokenizer, tokens_per_second=speed, rng=rng))
        )
    return found


# ------------------------------------------------------------------------------------ the video


def test_a_video_is_as_long_as_its_stream(video):
    info = probe(video)
    assert (info.width, info.height, info.fps) == (SIZE, SIZE, FPS)
    assert info.duration == pytest.approx(SECONDS, abs=0.01)
    with av.open(str(video)) as container:
        assert container.streams.video[0].start_time == 0


def test_frames_of_whole_seconds_are_those_of_the_stream(video, stream):
    watched = [frame.rgb for frame in sample_file(video, FrameSampling(fps=1.0))]
    frames = calm(stream).frames(SIZE)
    assert len(watched) == len(frames) == SECONDS
    assert max(map(distance, watched, frames)) < 3
    # Closer than a change that is not shown yet would leave them.
    for event in stream.world.events:
        k = event.frame
        changed = np.abs(frames[k].astype(float) - frames[k - 1]).mean(axis=-1) > 20
        assert distance(watched[k][changed], frames[k][changed]) < 12
        assert distance(watched[k][changed], frames[k - 1][changed]) > 20


def test_changes_move_between_whole_seconds(video, stream):
    watched = [frame.rgb for frame in sample_file(video, FrameSampling(fps=FPS))]
    assert len(watched) == FPS * SECONDS
    events = {event.frame for event in stream.world.events}

    def differ(a, b):
        return (np.abs(a.astype(float) - b).mean(axis=-1) > 20).sum() > 20

    for second in range(1, SECONDS):
        before, after = watched[FPS * (second - 1)], watched[FPS * second]
        half_way = watched[FPS * second - FPS // 2]
        assert differ(before, half_way) == differ(half_way, after) == (second in events)
        # It is over shortly before the second.
        assert not differ(watched[FPS * second - 1], after)


def test_writing_is_deterministic(tmp_path):
    stream = evaluation_stream(4, 4, 3)
    written = set()
    for _ in range(6):
        write_video(stream, tmp_path / "again.mp4", size=64)
        written.add((tmp_path / "again.mp4").read_bytes())
    assert len(written) == 1


def test_the_index_of_a_video_is_at_its_beginning(video):
    content = video.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_noise_is_limited_in_files(stream, tmp_path):
    sizes = []
    for noise in (MAX_NOISE, 8.0):
        noisy = dataclasses.replace(stream, look=dataclasses.replace(stream.look, noise=noise))
        write_video(noisy, tmp_path / "noisy.mp4", size=SIZE)
        sizes.append((tmp_path / "noisy.mp4").read_bytes())
    assert sizes[0] == sizes[1]


# -------------------------------------------------------------------------------------- the row


@pytest.fixture(scope="module")
def rows(dialogues, video, tokenizer):
    """The dialogues written as rows, as the reader of conversations reads them."""
    file = video.parent / "rows.json"
    file.write_text(json.dumps([to_row(d, tokenizer, video.name) for _, d in dialogues]))
    config = ConversationConfig(files=(str(file),), media_root=str(video.parent))
    rows, report = read_rows(config, FrameSampling(), tokenizer)
    assert report.dropped == {}
    return rows


def test_a_row_has_the_tokens_of_the_dialogue(rows, dialogues, tokenizer):
    """Followed by the end of the last turn, which a stream leaves open."""
    for row, (_, dialogue) in zip(rows, dialogues, strict=True):
        assert row.realtime
        assert row.tokens.tolist() == [*dialogue.tokens, tokenizer.special.eot]
        assert row.is_target.tolist() == [*(label != IGNORED for label in dialogue.labels), False]
        (medium,) = row.media
        assert medium.times == tuple(range(SECONDS))


def test_messages_have_the_words_of_the_dialogue(dialogues, tokenizer):
    for stream, dialogue in dialogues:
        messages = to_row(dialogue, tokenizer, "0.mp4")["messages"]
        roles = [message["role"] for message in messages]
        assert roles == ["system", "user", "assistant"] + ["user", "assistant"] * len(stream.requests)
        assert messages[0]["content"] == chat.SYSTEM_PROMPT
        asked = [message["content"] for message in messages if message["role"] == "user"]
        assert asked == ["", *(request.text for request in stream.requests)]
        replies = [message["content"] for message in messages if message["role"] == "assistant"]
        assert sum(reply.count("<|video|>") for reply in replies) == SECONDS

        # Each utterance in the reply to its request, in order, whole or cut.
        for number, reply in enumerate(replies, start=-1):
            meant = [u for u in dialogue.utterances if u.request == number]
            said = reply.replace("<|video|>", "").replace(WAIT, "<|silence|>").split("<|silence|>")
            said = [text[0].upper() + text[1:] for text in said if text]
            assert len(said) in (len(meant), len(meant) - 1)  # a prompt may have cut the words of WAIT
            for text, utterance in zip(said, meant, strict=False):
                whole = {utterance.sentence.text(variant) for variant in range(2)}
                words = text.split(" -")[0]
                assert any(wording.startswith(words) for wording in whole)


def test_a_row_names_its_video_and_times(dialogues, tokenizer):
    _, dialogue = dialogues[0]
    row = to_row(dialogue, tokenizer, "clips/7.mp4")
    marker, *rest = row["videos"]
    info = json.loads(marker.removeprefix("[RealTime QA][INFO]"))
    assert info == {
        "video_path": "clips/7.mp4",
        "time_info": [f"00:0{second}" for second in range(SECONDS)],
    }
    assert rest == ["[RealTime QA][PLACEHOLDER]"] * (SECONDS - 1)
    assert row["images"] == []


def test_a_row_of_more_than_a_minute(tokenizer):
    stream = evaluation_stream(0, 0, 62)
    dialogue = converse(
        stream.world, (), tokenizer, tokens_per_second=8, rng=np.random.default_rng(0), system=None
    )
    row = to_row(dialogue, tokenizer, "0.mp4")
    assert json.loads(row["videos"][0].removeprefix("[RealTime QA][INFO]"))["time_info"][-2:] == [
        "01:00",
        "01:01",
    ]


def test_any_text_of_the_user_survives(stream, tokenizer):
    """Including characters of several tokens, and markers typed by the user."""
    text = "Où est l'étoile ⭐? <|silence|>"
    dialogue = converse(
        stream.world,
        [Request(0.5, text, "watch")],
        tokenizer,
        tokens_per_second=8,
        rng=np.random.default_rng(0),
        system=None,
    )
    messages = to_row(dialogue, tokenizer, "0.mp4")["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[2]["content"] == text


def test_a_written_stream_can_be_trained_on(stream, video, tokenizer, tmp_path):
    rng = np.random.default_rng(0)
    dialogue = converse(stream.world, stream.requests, tokenizer, tokens_per_second=8, rng=rng)
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([to_row(dialogue, tokenizer, video.name)]))
    config = ConversationConfig(
        files=(str(file),),
        media_root=str(video.parent),
        swap_probability=0.0,
        frame_buckets=(SECONDS,),
    )
    source = ConversationBatches(config, FrameSampling(), tokenizer, image_size=SIZE, batch_size=1, seed=0)
    loaded = source[0]
    assert loaded.dropped == ()
    assert loaded.batch.frame_positions[0].tolist() == dialogue.frame_positions
    assert max(map(distance, loaded.batch.frames[0], calm(stream).frames(SIZE))) < 3


# ------------------------------------------------------------------------------------ the truth


def test_the_truth_is_complete(dialogues):
    for stream, dialogue in dialogues:
        written = ground_truth(stream, dialogue)
        read = json.loads(json.dumps(written))
        assert read == written
        assert read["seconds"] == SECONDS
        assert tuple(read["facts"]) == stream.world.truth
        events = [(e["frame"], e["change"], e["kind"], e["value"]) for e in read["events"]]
        assert events == [(e.frame, e.change, e.kind, e.value) for e in stream.world.events]
        for request, told in zip(stream.requests, read["requests"], strict=True):
            assert told["time"] == request.time
            assert told["text"] == request.text
            assert (told["kind"], told["subject"]) == (request.kind, request.subject)
            assert (told["awaited"] is not None) == request.kind.startswith("alert")
            if request.awaited:
                assert told["awaited"] == request.awaited.facts
        for utterance, told in zip(dialogue.utterances, read["utterances"], strict=True):
            assert told["time"] == pytest.approx(utterance.time, abs=1e-3)
            assert (told["frame"], told["due"]) == (utterance.frame, utterance.due)
            assert (told["request"], told["cut"]) == (utterance.request, utterance.cut)
            assert told["facts"] == utterance.sentence.facts
            assert told["text"] == utterance.sentence.text()


# ---------------------------------------------------------------------------------- the command


def run(monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tabletop", *map(str, args)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("moss_jax.worlds.tabletop", run_name="__main__")
    if exit.value.code:
        raise exit.value


def test_the_command_writes_streams(monkeypatch, tmp_path, capsys, tokenizer):
    out = tmp_path / "new" / "folder"
    given = ("--seed", 4, "--first", 3, "--streams", 2, "--seconds", 3, "--size", 64)
    run(monkeypatch, "--out", out, *given)
    assert {path.name for path in out.iterdir()} == {"3.mp4", "4.mp4", "3.json", "4.json", "rows.json"}
    told = capsys.readouterr().out
    assert told == "".join(
        f"{out / name}: {(out / name).stat().st_size} bytes\n" for name in ("3.mp4", "4.mp4")
    )

    for index in (3, 4):
        stream = evaluation_stream(4, index, 3)
        written = json.loads((out / f"{index}.json").read_text())
        assert tuple(written["facts"]) == stream.world.truth
        assert [request["text"] for request in written["requests"]] == [r.text for r in stream.requests]
        assert probe(out / f"{index}.mp4").duration == pytest.approx(3, abs=0.01)

    config = ConversationConfig(files=(str(out / "rows.json"),), media_root=str(out))
    rows, report = read_rows(config, FrameSampling(), tokenizer)
    assert report.dropped == {}
    assert [Path(row.media[0].path).name for row in rows] == ["3.mp4", "4.mp4"]

    # A second run writes the same.
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    run(monkeypatch, "--out", out, *given)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == contents


def test_the_speed_of_speech_can_be_chosen(monkeypatch, tmp_path):
    said = []
    for speed in (3, 32):
        run(monkeypatch, "--out", tmp_path, "--seconds", 6, "--size", 32, "--tokens-per-second", speed)
        said.append(json.loads((tmp_path / "rows.json").read_text())[0]["messages"])
    assert said[0] != said[1]


@pytest.mark.parametrize("size", [97, 30, 0, -2])
def test_invalid_sizes_are_refused(monkeypatch, tmp_path, capsys, size):
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, "--out", tmp_path / "out", f"--size={size}")
    assert refused.value.code == 2
    assert f"--size must be an even number of at least 32, not {size}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
