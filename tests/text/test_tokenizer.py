"""The tokenizer: ids, plain and marked text, files, and errors."""

import json
import pickle
import random
import re
import string
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jax.config import moss_tiny
from moss_jax.shipped import shipped
from moss_jax.text import Tokenizer, TokenizerError, train_tokenizer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
TINY = Tokenizer.moss_tiny()
TINY_FILE = shipped("moss-tiny") / "tokenizer.json"
MARKERS = list(TINY.special.by_text())
# Every text that is a control token of moss_tiny, and reserved names of Llama 3.
CONTROL_TEXTS = [*MARKERS, "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_3|>"]


def tiny_json() -> dict:
    return json.loads(TINY_FILE.read_bytes())


def as_bytes(data: dict) -> bytes:
    return json.dumps(data).encode()


def llama3_json(names: dict[int, str]) -> dict:
    """A tokenizer.json of Llama 3's shape: 128000 ordinary tokens, then 256 special ones and `<|image|>`."""
    rng = random.Random(0)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ordinary = dict.fromkeys(alphabet)
    while len(ordinary) < 128_000:
        ordinary["".join(rng.choices(string.ascii_letters + string.punctuation + "Ġ", k=5))] = None
    special = {128_000 + n: f"<|reserved_special_token_{n}|>" for n in range(256)}
    special |= {128_000: "<|begin_of_text|>", 128_006: "<|start_header_id|>", 128_007: "<|end_header_id|>"}
    special |= {128_009: "<|eot_id|>", 128_256: "<|image|>"} | names
    data = tiny_json()
    data["model"] |= {"vocab": {token: i for i, token in enumerate(ordinary)}, "merges": []}
    added = data["added_tokens"][0]
    data["added_tokens"] = [added | {"id": i, "content": text} for i, text in special.items()]
    return data


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    return Tokenizer(as_bytes(llama3_json({})))


def rows() -> list[list[str]]:
    file = DATA / "realtime_rows.json"
    if not file.is_file():
        pytest.skip("the sample rows are not here")
    return [[m["content"] for m in row["messages"]] for row in json.loads(file.read_text(encoding="utf-8"))]


# ---------------------------------------------------------------------------------- moss_tiny's ids


def test_tiny_vocabulary_fills_the_preset():
    decoder = moss_tiny().decoder
    assert TINY.vocab_size == TINY.special.image == decoder.vocab_size == decoder.image_token_id == 1024
    assert min(TINY.control_ids) == 1015
    assert max(TINY.control_ids) == 1024
    assert len(TINY.control_ids) == 10
    assert all(TINY.token_bytes(i) for i in range(1015))
    assert all(TINY.token_bytes(i) == b"" for i in range(1015, 1025))


def test_tiny_has_every_byte_and_no_duplicates():
    ordinary = [TINY.token_bytes(i) for i in range(1015)]
    assert {bytes([b]) for b in range(256)} <= set(ordinary)
    assert len(set(ordinary)) == len(ordinary)


def test_training_again_writes_the_same_file(tmp_path, monkeypatch):
    out = tmp_path / "trained.json"
    monkeypatch.setattr("sys.argv", ["train_tokenizer", "--out", str(out)])
    train_tokenizer.main()
    assert out.read_bytes() == TINY_FILE.read_bytes()


def test_tiny_knows_the_words_of_its_world():
    for text in ("user", "assistant", "system", "\n\n", " card", " number", " the", "Wait", " left", " blue"):
        assert len(TINY.encode(text)) == 1
    text = "Wait, now the blue card moves to the left of the red circle."
    assert len(TINY.encode(text)) <= len(text.split()) + 2


# ------------------------------------------------------------------------------------ plain text


@settings(deadline=None)
@given(st.text())
def test_plain_text_round_trips(text):
    assert TINY.decode(TINY.encode(text)) == text


@settings(deadline=None)
@given(st.lists(st.sampled_from(CONTROL_TEXTS) | st.text(max_size=3)).map("".join))
def test_plain_text_never_becomes_a_control_token(text):
    ids = TINY.encode(text)
    assert not TINY.control_ids & set(ids)
    assert TINY.decode(ids) == text


def test_added_tokens_that_are_not_special_are_not_encoded_either():
    data = tiny_json()
    for token in data["added_tokens"]:
        token["special"] = False
    tokenizer = Tokenizer(as_bytes(data))
    assert not tokenizer.control_ids & set(tokenizer.encode("".join(CONTROL_TEXTS)))


def test_pickling_keeps_plain_text_plain():
    text = "".join(CONTROL_TEXTS)
    assert pickle.loads(pickle.dumps(TINY)).encode(text) == TINY.encode(text)


def test_truncation_and_post_processor_of_the_file_are_ignored():
    data = tiny_json()
    data["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    bos = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [1015], "tokens": ["<|begin_of_text|>"]}
        },
    }
    text = "What number is on the card?"
    assert Tokenizer(as_bytes(data)).encode(text) == TINY.encode(text)


def test_lone_surrogate_is_refused():
    with pytest.raises(TokenizerError, match=r"character 2 is the lone surrogate U\+D83D"):
        TINY.encode("ok\ud83d")


# ----------------------------------------------------------------------------------- marked text


@settings(deadline=None)
@given(st.lists(st.sampled_from(MARKERS) | st.text(max_size=5)))
def test_marked_text_is_the_reference_encoding(pieces):
    reference = tokenizers.Tokenizer.from_file(str(TINY_FILE))
    text = "".join(pieces)
    assert TINY.encode_marked(text) == reference.encode(text, add_special_tokens=False).ids


def test_other_control_tokens_are_not_marked():
    assert TINY.encode_marked("<|end_of_text|>") == TINY.encode("<|end_of_text|>")


def test_only_the_markers_asked_for_become_control_tokens():
    text = "<|silence|>a<|video|><|eot_id|>"
    ids = TINY.encode_marked(text, ["<|video|>"])
    assert ids == [*TINY.encode("<|silence|>a"), TINY.special.video, *TINY.encode("<|eot_id|>")]
    assert TINY.encode_marked(text, []) == TINY.encode(text)


def test_real_rows_keep_frames_silences_and_text():
    frames = []
    text_of = {i: text for text, i in TINY.special.by_text().items()}
    for contents in rows():
        text = "".join(contents)
        ids = TINY.encode_marked(text)
        frames.append(ids.count(TINY.special.video))
        assert ids.count(TINY.special.silence) == text.count("<|silence|>")
        assert TINY.decode(ids) == text.replace("<|silence|>", "").replace("<|video|>", "")
        assert [text_of[i] for i in ids if i in text_of] == re.findall(r"<\|\w+\|>", text)
    assert frames == [155, 98, 30]


# -------------------------------------------------------------------------------------- decoding


def test_decode_leaves_control_tokens_out():
    special = TINY.special
    ids = [special.begin_of_text, *TINY.encode(" a"), special.silence, special.image, *TINY.encode(" card")]
    assert TINY.decode(ids) == " a card"
    assert TINY.decode(np.array(ids, np.int32)) == " a card"


@settings(deadline=None)
@given(st.lists(st.integers(0, 1023)))
def test_decode_is_the_reference_decoding(ids):
    reference = tokenizers.Tokenizer.from_file(str(TINY_FILE))
    assert TINY.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("token_id", [-100, 1025])
def test_unknown_id_is_refused(token_id):
    with pytest.raises(TokenizerError, match=f"token id {token_id} is not in .* from 0 to 1024"):
        TINY.decode([token_id])


# ----------------------------------------------------------------------------- repetition penalty


def test_penalty_exempt():
    exempt = TINY.penalty_exempt()
    assert exempt.shape == (1024,)
    assert exempt.dtype == bool
    assert exempt[sorted(TINY.control_ids - {TINY.special.image})].all()
    for text in (".", ",", " ", "\n\n", "|", "!"):
        assert exempt[TINY.encode(text)].all(), text
    for text in (" card", "the", "7", "a"):
        assert not exempt[TINY.encode(text)].any(), text
    # Pieces of a character may be anything.
    assert not exempt[TINY.encode("é")].any()


def test_penalty_exempt_of_a_large_vocabulary(llama3):
    exempt = llama3.penalty_exempt()
    assert exempt.shape == (128_256,)
    assert exempt[128_000:].all()
    assert not exempt[:128_000].all()


# ---------------------------------------------------------------------------------------- Llama 3


def test_llama3_has_some_special_tokens_under_reserved_names(llama3):
    special = llama3.special
    assert (special.silence, special.ellipsis, special.video) == (128_011, 128_012, 128_255)
    assert llama3.vocab_size == special.image == 128_256
    assert len(llama3.control_ids) == 257
    assert llama3.encode_marked("<|silence|><|video|>") == [128_011, 128_255]


def test_llama3_names_take_precedence_over_ids():
    special = Tokenizer(as_bytes(llama3_json({128_013: "<|silence|>"}))).special
    assert (special.silence, special.ellipsis) == (128_013, 128_012)


# ------------------------------------------------------------------------------------------ files


def test_load_and_save_keep_the_file(tmp_path):
    saved = TINY.save(tmp_path / "checkpoint")
    assert saved == tmp_path / "checkpoint" / "tokenizer.json"
    assert saved.read_bytes() == TINY_FILE.read_bytes()
    for path in (saved, saved.parent, str(saved.parent)):
        assert Tokenizer.load(path).special == TINY.special


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def test_missing_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(TokenizerError) as error:
            Tokenizer.load(path)
        file = tmp_path / "tokenizer.json"
        expected = f"no tokenizer at {file}; give a tokenizer.json or a checkpoint folder that holds one"
        assert one_sentence(error) == expected


def test_a_folder_where_a_file_is_meant_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    for path in (tmp_path, TINY_FILE / "x"):
        with pytest.raises(
            TokenizerError, match=r"cannot be read \(.*\); it must be a tokenizer\.json"
        ) as error:
            Tokenizer.load(path)
        one_sentence(error)


def test_a_file_without_permission_is_refused(unprivileged):
    locked = unprivileged / "tokenizer.json"
    locked.write_bytes(TINY.content)
    locked.chmod(0)
    with pytest.raises(TokenizerError, match=r"cannot be read .*Permission denied"):
        Tokenizer.load(locked)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"added_tokens": []}',
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_corrupt_file_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(tmp_path)
    assert one_sentence(error).startswith(f"{tmp_path / 'tokenizer.json'} cannot be read as a tokenizer.json")


def test_truncated_file_is_refused():
    with pytest.raises(TokenizerError) as error:
        Tokenizer(TINY_FILE.read_bytes()[:20_000])
    one_sentence(error)


def test_other_kinds_of_tokenizer_are_refused():
    without_decoder = as_bytes(tiny_json() | {"decoder": None})
    with pytest.raises(TokenizerError) as error:
        Tokenizer(without_decoder)
    assert one_sentence(error) == "tokenizer.json must be a byte-level BPE tokenizer, as Llama 3's is"
    not_bytes = tiny_json()
    not_bytes["model"]["vocab"]["語"] = 2000
    with pytest.raises(TokenizerError, match="'語' in its vocabulary stands for no byte"):
        Tokenizer(as_bytes(not_bytes))


def test_one_error_names_all_missing_special_tokens():
    data = tiny_json()
    missing = ["<|video|>", "<|silence|>", "<|...|>"]
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in missing]
    with pytest.raises(TokenizerError) as error:
        Tokenizer(as_bytes(data), "my/tokenizer.json")
    assert one_sentence(error) == "my/tokenizer.json lacks the special tokens " + ", ".join(missing)


def test_special_tokens_beyond_the_vocabulary_are_refused():
    with pytest.raises(TokenizerError, match=r"than the 128256 of .* to <\|silence\|>$") as error:
        Tokenizer(as_bytes(llama3_json({128_257: "<|silence|>"})))
    one_sentence(error)
