"""The tokenizer against tiktoken and `tokenizers`, which read the same files here."""

import json
import random
import tempfile
from operator import length_hint
from pathlib import Path

import pytest
import tiktoken
from conftest import MERGES, ROOT, TOKENS, write_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from encoder import bytes_to_unicode, get_encoder

# As in tiktoken's own definition of "gpt2".
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
SHARED = ROOT.parent / "shared"
STRINGS = [
    *("", " ", "   a  b   ", "\n\n  \n\tdef f(x):\n        return x\r\n\r\n"),
    "I'm sure we've said it's what they'll do, 'tis 'S IT'STEAD '\u2019s ''s 're' x'\u017f",
    "naïve café, cafe\u0301, ÅNGSTRÖM, ß, ﬁ, ǅ, İ",
    "\u05d9\u05c1 Ελληνικά русский עברית العربية हिन्दी ไทย",
    "今日は、世界\uff01你好\uff0c世界。안녕하세요",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇺🇳 ☺️",
    "½ ² ⅷ 1,234.5e-6 ١٢٣ 三 10²³",
    " \x00 \x1c \x1f \x7f \x85 \xa0 \xad \u180e \u200b \u2028 \u3000 \ufeff \ufffd \uffff",
    "<|endoftext|> x = {'a': [1, 2]}; <br/> \\n http://a.b/c?d=e&f#g ## ###",
    # any character before a letter, and long words
    *("".join(f" {chr(c + i)}s\n" for i in range(0x400)) for c in (0, 0x400, 0x2000, 0x3000)),
    *("".join(random.Random(0).choices(s, k=5_000)) for s in ("a", "=", "etaoinshr", "今日は世界")),
]


@pytest.fixture(scope="module", params=["1M", "124M"])
def both(request):
    """Our encoder, and tiktoken with the same tokens."""
    name, models_dir = request.param, ROOT / "models"
    if name == "124M":
        folders = (models_dir, SHARED / "gpt2")
        models_dir = next((d for d in folders if (d / name / "encoder.json").exists()), None)
    if models_dir is None:
        pytest.skip("OpenAI's vocabulary is not here: `python gpt2.py hello` downloads it")
    ours = get_encoder(name, models_dir)
    byte = {char: byte for byte, char in bytes_to_unicode().items()}
    special = {"<|endoftext|>": len(ours.encoder) - 1}
    ranks = {bytes(map(byte.get, t)): id for t, id in ours.encoder.items() if t not in special}
    theirs = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return ours, theirs


@pytest.mark.parametrize("text", STRINGS, ids=lambda text: ascii(text[:20]))
def test_ids_are_those_of_tiktoken_and_decode_to_the_text(both, text):
    ours, theirs = both
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


# Unicode's versions differ in which code points are letters, so unassigned ones are left out.
ASSIGNED = st.characters(exclude_categories=["Cs", "Cn"])
KINDS = st.sampled_from("aZ9é中½👍'\u2019sStmdrvel.=\x85\xa0\u3000 \n\t")


@given(texts=st.lists(st.text(ASSIGNED) | st.text(KINDS) | st.just("<|endoftext|>")))
@settings(max_examples=200, deadline=None)
def test_any_text_has_the_ids_of_tiktoken_with_and_without_its_special_token(both, texts):
    (ours, theirs), text = both, "".join(texts)
    assert ours.encode(text) == ours.encode(text, set()) == theirs.encode_ordinary(text)
    ids = theirs.encode(text, allowed_special="all")
    assert ours.encode(text, allowed_special="all") == ids
    assert ours.encode(text, allowed_special={"<|endoftext|>", "no token"}) == ids


@given(data=st.data())
@settings(deadline=None)
def test_any_ids_decode_as_with_tiktoken_at_once_or_in_a_stream(both, data):
    ours, theirs = both
    ids = data.draw(st.lists(st.integers(0, len(ours.encoder) - 1)))
    assert ours.decode(ids) == "".join(ours.decode_stream(iter(ids))) == theirs.decode(ids)


def test_a_stream_yields_one_text_for_each_id_as_soon_as_it_comes(both):
    ours, theirs = both
    ids, pieces = theirs.encode_ordinary("né 👍!"), []
    source = iter(ids)
    for piece in ours.decode_stream(source):
        pieces.append(piece)
        assert length_hint(source) == max(0, len(ids) - len(pieces))
        assert "né 👍!".startswith("".join(pieces))
    assert "".join(pieces) == "né 👍!" and len(pieces) == len(ids) + 1


@pytest.mark.parametrize("id", [-1, 50257, None, "0", 0.5])
def test_an_id_outside_the_vocabulary_and_half_of_a_character_are_refused(both, id):
    with pytest.raises(ValueError, match=f"the id {id}$"):
        both[0].decode([0, id])
    with pytest.raises(ValueError, match="surrogate"):
        both[0].encode("Romeo \ud800")


# --- Two files: OpenAI's, or Hugging Face's older ones ---

VOCABULARY = {token: id for id, token in enumerate(TOKENS)}
THE = TOKENS.index("Ġthe")


def theirs(added=(), vocabulary=VOCABULARY):
    """Make a tokenizer by the library `tokenizers`, with these added tokens."""
    made = Tokenizer(models.BPE(vocabulary, MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*added])
    return made


def ours(files):
    """Write a tokenizer of that library, or JSON under these names, and read it with our code.

    An older vocabulary lies in the same folder, and a tokenizer.json comes before it.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_vocabulary(Path(folder), "vocab.json", "merges.txt")
        if isinstance(files, Tokenizer):
            files = {"tokenizer.json": json.loads(files.to_str())}
        for name, content in files.items():
            Path(folder, name).write_text(json.dumps(content), "utf-8-sig")
        return get_encoder("", folder)


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["", "byte order mark"])
def test_two_files_are_read_alike_under_either_name(names, line_end, start, tmp_path):
    write_vocabulary(tmp_path, *names)
    for name in names:
        text = start + (tmp_path / name).read_bytes().decode().replace("\n", line_end)
        (tmp_path / name).write_bytes(text.encode())
    encoder = get_encoder(tmp_path.name, tmp_path.parent)
    assert encoder.encoder == VOCABULARY and [*encoder.bpe_ranks] == MERGES


def test_beside_two_files_added_tokens_and_those_that_look_special_are_found():
    vocabulary = VOCABULARY | {"<s>": 300, "[PAD]": 301}
    encoder = ours({"vocab.json": vocabulary, "added_tokens.json": {"user:": 302, "": 303}})
    library = theirs(["<|endoftext|>", "<s>", "[PAD]", "user:"])
    text = "the user: naïve é, <s>the[PAD]<|endoftext|>user:<pad>"
    assert encoder.encode(text, allowed_special="all") == library.encode(text).ids
    assert encoder.encode(text) == theirs().encode(text).ids
    assert (encoder.bos, encoder.eos) == ([299], {299})  # <|endoftext|>
    assert encoder.decode([302, THE, 303, 300]) == "user: the<s>"  # An empty name is never found.


def test_of_a_merge_that_appears_twice_the_later_place_counts(tmp_path):
    """As in `tokenizers`: ("r", "e") comes after ("o", "r") then, so that "ore" is "or", "e"."""
    merges = [*MERGES, ("r", "e")]
    write_vocabulary(tmp_path, "vocab.json", "merges.txt")
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, merges)), "utf-8")
    library = Tokenizer(models.BPE(VOCABULARY, merges))
    encoder = get_encoder("", tmp_path)
    assert encoder.bpe("ore") == library.encode("ore").tokens == ["or", "e"]
    assert theirs().encode("ore").tokens == ["o", "re"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("encoder.json", b'{"!": 0,', "encoder.json is not a JSON object"),
        ("encoder.json", b'{"a": ' + b"[" * 100_000, "encoder.json is not a JSON object"),
        ("encoder.json", b'{"!": 0, "a": 2}', "encoder.json does not number its tokens"),
        ("encoder.json", json.dumps(VOCABULARY | {"xy": 300}).encode(), "no merge makes .* 'xy'"),
        ("encoder.json", json.dumps(VOCABULARY | {"\n" * 999: 300}).encode(), "no merge makes"),
        ("vocab.bpe", b"#version: 0.2\nq q", "a merge makes 'qq', which is no token"),
        ("vocab.bpe", b"#version: 0.2\n\xc4", "vocab.bpe is not UTF-8"),
        ("vocab.bpe", b"#version: 0.2\n", "no merge makes"),
        ("vocab.bpe", b"h e x\n", "does not have two parts"),
        ("added_tokens.json", b"[]", "added_tokens.json is not a JSON object"),
        ("added_tokens.json", b'{"<s>": 301}', "does not number its tokens"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is not UTF-8"),
    ],
)
def test_a_damaged_file_is_named(name, content, message, tmp_path):
    write_vocabulary(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        get_encoder(tmp_path.name, tmp_path.parent)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(tmp_path)) + 150  # however much is wrong


SWITCHES = ["add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens"]


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_setting_that_changes_the_ids_is_refused_by_name(switch):
    for files in ({}, {"tokenizer.json": json.loads(theirs().to_str())}):
        with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {switch} must be False"):
            ours(files | {"tokenizer_config.json": {switch: True}})
        settings = {switch: False, "pad_token": "[PAD]"}  # which has no id, and so is no token
        assert ours(files | {"tokenizer_config.json": settings}).encode(" the") == [THE]


# --- tokenizer.json, as `tokenizers` writes it ---

NAMES = st.text("ab<> éĠ", min_size=1, max_size=4)


@given(names=st.sets(NAMES), data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_allowed_tokens_have_the_ids_of_tokenizers(names, data):
    library = theirs(names)
    encoder, parts = ours(library), st.sampled_from([*names, *"ab<> é"])
    text = "".join(data.draw(st.lists(parts)))
    assert encoder.encode(text, allowed_special="all") == library.encode(text).ids
    allowed = data.draw(st.sets(parts))
    ids = theirs(names & allowed, library.get_vocab()).encode(text).ids
    assert encoder.encode(text, allowed_special=allowed) == ids
    assert encoder.encode(text, allowed_special=[*allowed, "none"]) == ids


@given(name=NAMES | st.sampled_from(["Ċ", "Ġthe", "日本 ", "two words, é", "[日本]"]))
@settings(deadline=None)
def test_a_token_decodes_to_the_bytes_that_its_characters_spell(name):
    """As with `tokenizers`, except for names such as café, whose bytes are no text."""
    library = theirs(["<|endoftext|>", name])
    id = library.token_to_id(name)
    text = library.decode([id], skip_special_tokens=False)
    expected = name if "\ufffd" in text and len(name) > 1 else text
    assert ours(library).decode([THE, id]) == f" the{expected}"


def test_a_trained_tokenizer_without_all_bytes_is_read_and_a_missing_byte_is_named():
    """As in Hugging Face's course: such a tokenizer knows only the bytes that it has seen."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<pad>", "un début"]
    trainer = trainers.BpeTrainer(vocab_size=50, special_tokens=special, show_progress=False)
    library.train_from_iterator(["the heroes of the day © heard the other one"] * 3, trainer)
    encoder, text = ours(library), "the hero<pad> heard© un début<|endoftext|>day"
    assert encoder.encode(text, allowed_special="all") == library.encode(text).ids
    assert encoder.decode([0, 2, library.token_to_id("©")]) == "<|endoftext|>un début\ufffd"
    for text, byte in [("the Zoo", "0x5a"), ("the é", "0xc3")]:
        with pytest.raises(ValueError, match=rf"\b{byte}\b"):
            encoder.encode(text)


def test_older_and_newer_ways_to_write_a_tokenizer_json_are_read_alike():
    library, text = theirs(["<|endoftext|>", "[PAD]", "<s>"]), "".join(STRINGS[:12]) + "[PAD]"
    content, ids = json.loads(library.to_str()), library.encode(text).ids
    content["model"]["merges"] = [[*pair] for pair in MERGES]
    assert ours({"tokenizer.json": content}).encode(text, allowed_special="all") == ids
    content["model"] = {"vocab": VOCABULARY, "merges": [" ".join(pair) for pair in MERGES]}
    del content["pre_tokenizer"]["use_regex"]
    assert ours({"tokenizer.json": content}).encode(text, allowed_special="all") == ids
    # transformers 5 writes a template without tokens, and "" where `tokenizers` writes null.
    content["post_processor"] = {"type": "TemplateProcessing", "special_tokens": {}}
    content["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "dropout": None}
    assert ours({"tokenizer.json": content}).encode(text, allowed_special="all") == ids


BPE = {"vocab": VOCABULARY, "merges": MERGES}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
BOS = {"type": "TemplateProcessing", "special_tokens": {"<s>": {"ids": [1]}}}
REFUSED = [
    ("normalizer", {"type": "Lowercase"}, "normalizer must be None"),
    ("decoder", {"type": "WordPiece"}, "type must be 'ByteLevel'"),
    ("post_processor", BOS, "post_processor: special_tokens must be None"),
    ("post_processor", {"type": "Sequence", "processors": [BOS]}, "special_tokens must be None"),
    ("post_processor", {"type": "RobertaProcessing", "cls": ["a", 64]}, "cls must be None"),
    ("pre_tokenizer", {"type": "Whitespace"}, "type must be 'ByteLevel'"),
    ("pre_tokenizer", BYTE_LEVEL | {"add_prefix_space": True}, "add_prefix_space must be False"),
    ("pre_tokenizer", BYTE_LEVEL | {"use_regex": False}, "use_regex must be True"),
    ("pre_tokenizer", None, "is not a byte-level BPE"),
    ("model", {"type": "WordPiece", "vocab": VOCABULARY}, "type must be 'BPE'"),
    ("model", BPE | {"vocab": [["a", 0.0]]}, "is not a byte-level BPE"),
    ("model", BPE | {"vocab": VOCABULARY | {"a": 64.0}}, "does not number its tokens"),
    ("model", BPE | {"merges": [["h", 1]]}, "is not a byte-level BPE"),
    ("model", BPE | {"merges": [*MERGES, ("R", "o", "me")]}, "does not have two parts"),
    ("model", BPE | {"merges": [*MERGES, ("q", "q")]}, "do not belong together: .* 'qq'"),
    ("model", BPE | {"ignore_merges": True}, "ignore_merges must be False"),
    ("added_tokens", ["<s>"], "is not a byte-level BPE"),
    ("added_tokens", [{"id": 5, "content": "[PAD]"}], "does not number its tokens"),
    ("added_tokens", [{"id": 300, "content": 5}], "does not number its tokens"),
]


@pytest.mark.parametrize(("part", "value", "message"), REFUSED)
def test_a_damaged_tokenizer_or_one_of_another_kind_is_refused(part, value, message):
    content = json.loads(theirs(["<|endoftext|>"]).to_str())
    with pytest.raises(ValueError, match=message) as error:
        ours({"tokenizer.json": content | {part: value}})
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)
