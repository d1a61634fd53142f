import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zebra.data import Document, PackedTokens, byte_tokenizer, pack, read_documents
from zebra.data.corpus import is_held_out


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def reloaded(tokenizer, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_tokens_are_the_bytes_of_the_text_and_decode_to_it(reloaded, text):
    ids = reloaded(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode())
    assert reloaded.decode(ids) == text


@pytest.mark.parametrize(
    "text",
    [
        "<|bos|> x <|eos|>",
        " .  , n't 's",
        "\r\n\t\x00\x7f",
        "caf\u00e9 \u65e5\u672c \U0001f993",
        "",
    ],
)
def test_awkward_text_round_trips(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == [tokenizer.bos_token_id, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_reloaded_tokenizer_keeps_its_special_tokens(tokenizer, reloaded):
    for t in (tokenizer, reloaded):
        assert (len(t), t.bos_token_id, t.eos_token_id, t.pad_token_id) == (259, 256, 257, 258)


def test_standard_library_splits_share_no_file_and_leave_tests_out():
    train = [d.name for d in read_documents(["stdlib"])]
    held_out = [d.name for d in read_documents(["stdlib:heldout"])]
    assert set(train).isdisjoint(held_out)
    assert all(is_held_out(n) for n in held_out) and not any(is_held_out(n) for n in train)
    assert {"argparse.py", "json/decoder.py"} & {*train, *held_out}
    assert not any({"test", "tests", "site-packages"} & set(n.split("/")) for n in train)
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.10


def test_standard_library_documents_come_in_the_same_order_every_time():
    assert list(read_documents(["stdlib:heldout"])) == list(read_documents(["stdlib:heldout"]))


def test_folders_jsonl_and_text_files_are_read_in_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": ""}\n')
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    assert [d.text for d in read_documents([tmp_path])] == ["one", "two", "second"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"txt": 1}\n', 'x.jsonl:1 must be a JSON object with "text"'),
        ("x.jsonl", b'{"text": "a"}\n{"te', "x.jsonl:2 must be"),
        ("x.jsonl", b'{"text": 3}\n', 'x.jsonl:1 "text" must be a string, got int'),
        ("x.txt", b"\xff\xfe\xfd", "must be UTF-8 text"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_documents([tmp_path / name]))


def test_missing_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got .*nothing"):
        list(read_documents([tmp_path / "nothing"]))
    with pytest.raises(ValueError, match="must hold text files"):
        list(read_documents([tmp_path]))


def test_pack_puts_every_document_between_bos_and_eos(tokenizer):
    tokens = pack([Document("a", "hi"), Document("b", "\u00e9")], tokenizer)
    assert tokens.tolist() == [256, 104, 105, 257, 256, 0xC3, 0xA9, 257]


def test_bytes_are_packed_as_the_tokenizer_would_encode_them(reloaded):
    documents = [d for d in read_documents(["stdlib:heldout"]) if len(d.text) < 5000]
    encoded = reloaded([d.text for d in documents], add_special_tokens=False)["input_ids"]
    expected = [token for ids in encoded for token in [256, *ids, 257]]
    assert pack(documents, reloaded).tolist() == expected


def test_an_epoch_takes_every_block_once_and_the_next_is_in_another_order():
    stream = PackedTokens(np.arange(107, dtype=np.int32), 10, seed=3)
    first, second = (stream.take(10) for _ in range(2))
    assert sorted(first.flatten().tolist()) == list(range(100))
    assert sorted(second.flatten().tolist()) == list(range(100))
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9))
def test_position_alone_resumes_a_stream(position, count):
    tokens = np.arange(70, dtype=np.int32)
    whole = PackedTokens(tokens, 10, seed=1)
    if position:
        whole.take(position)
    resumed = PackedTokens(tokens, 10, seed=1)
    resumed.position = position
    assert torch.equal(whole.take(count), resumed.take(count))


def test_seeds_order_blocks_differently():
    tokens = np.arange(1000, dtype=np.int32)
    first, second = (PackedTokens(tokens, 10, seed).take(100) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_corpus_shorter_than_a_block_is_refused():
    with pytest.raises(ValueError, match="a block takes 10 tokens, got a corpus of 9"):
        PackedTokens(np.arange(9, dtype=np.int32), 10, seed=0)


def test_jsonl_accepts_any_unicode(tmp_path):
    text = "caf\u00e9 \u2028 \U0001f993"
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}) + "\n")
    assert [d.text for d in read_documents([tmp_path / "x.jsonl"])] == [text]
