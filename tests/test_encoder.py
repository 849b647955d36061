"""The tokenizer against tiktoken and `tokenizers`, which read the same files here."""

import json
import random

import pytest
import tiktoken
from conftest import MERGES, ROOT, TOKENS, write_vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from encoder import Encoder, bytes_to_unicode, get_encoder, read_text

# As in tiktoken's own definition of "gpt2".
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
SHARED = ROOT.parent / "shared"
STRINGS = [
    "",
    " ",
    "   a  b   ",
    "\n\n  \n\tdef f(x):\n        return x\r\n\r\n",
    "I'm sure we've said it's what they'll do, 'tis 'S IT'STEAD '\u2019s ''s 're' x'\u017f",
    "naïve café, cafe\u0301, ÅNGSTRÖM, ß, ﬁ, ǅ, İ",
    "\u05d9\u05c1 Ελληνικά русский עברית العربية हिन्दी ไทย",
    "今日は、世界\uff01你好\uff0c世界。안녕하세요",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇺🇳 ☺️",
    "½ ² ⅷ 1,234.5e-6 ١٢٣ 三 10²³",
    " \x00 \x1c \x1f \x7f \x85 \xa0 \xad \u180e \u200b \u2028 \u3000 \ufeff \ufffd \uffff",
    "<|endoftext|> x = {'a': [1, 2]}; <br/> \\n http://a.b/c?d=e&f#g",
]
LONG = {
    "one letter": "a" * 20_000,
    "one sign": "=" * 20_000,
    "digits": "".join(random.Random(0).choices("0123456789", k=20_000)),
    "letters": "".join(random.Random(0).choices("etaoinshrdlu", k=20_000)),
    "ideographs": "".join(map(chr, range(0x4E00, 0x4E00 + 20_000))),
}
if SHARED.is_dir():
    LONG["a megabyte"] = read_text(SHARED / "text" / "tinyshakespeare.txt")


@pytest.fixture(scope="module", params=["1M", "124M"])
def both(request):
    """Our encoder, and tiktoken with the same tokens."""
    name, folders = request.param, (ROOT / "models", SHARED / "gpt2")
    files = ("tokenizer.json", "vocab.bpe")
    models_dir = next((d for d in folders for f in files if (d / name / f).exists()), None)
    if models_dir is None:
        pytest.skip("OpenAI's vocabulary is not here: `python gpt2.py hello` downloads it")
    ours = get_encoder(name, models_dir)
    byte = {char: byte for byte, char in bytes_to_unicode().items()}
    special = {"<|endoftext|>": len(ours.encoder) - 1}
    ranks = {bytes(map(byte.get, t)): id for t, id in ours.encoder.items() if t not in special}
    theirs = tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return ours, theirs


@pytest.mark.parametrize("text", STRINGS)
def test_ids_are_those_of_tiktoken_and_decode_to_the_text(both, text):
    ours, theirs = both
    assert ours.encode(text) == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text


# A letter newer than this Python may be one for only one of the two, by the age of their tables.
ASSIGNED = st.characters(exclude_categories=["Cs", "Cn"])
KINDS = st.sampled_from("aZ9é中½👍'\u2019sStmdrvel.=\x85\xa0\u3000 \n\t")


@given(text=st.text(ASSIGNED) | st.text(KINDS))
@settings(max_examples=300, deadline=None)
def test_any_text_has_the_ids_of_tiktoken(both, text):
    ours, theirs = both
    assert ours.encode(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize("start", range(0, 0x3400, 0x400))
def test_any_character_between_others_has_the_ids_of_tiktoken(both, start):
    ours, theirs = both
    text = "".join(f" {chr(c)}s {chr(c)}\n" for c in range(start, start + 0x400))
    assert ours.encode(text) == theirs.encode_ordinary(text)


@given(text=st.text())
@settings(deadline=None)
def test_any_text_comes_back(both, text):
    assert both[0].decode(both[0].encode(text)) == text


@given(data=st.data())
@settings(deadline=None)
def test_any_ids_decode_as_with_tiktoken_whole_or_in_pieces(both, data):
    ours, theirs = both
    ids = data.draw(st.lists(st.integers(0, len(ours.encoder) - 1)))
    assert ours.decode(ids) == "".join(ours.decode_stream(iter(ids))) == theirs.decode(ids)


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_long_word_or_text_has_the_ids_of_tiktoken(both, text):
    ours, theirs = both
    assert ours.encode(text) == theirs.encode_ordinary(text)


@pytest.mark.parametrize("both", ["124M"], indirect=True)
def test_the_famous_example(both):
    ids = both[0].encode("Not all heroes wear capes.")
    assert ids == [3673, 477, 10281, 5806, 1451, 274, 13]


def test_ids_that_end_inside_a_character_decode_with_a_replacement_character(both):
    ids = both[0].encode("so \U0001fae8")
    assert both[0].decode(ids[:-1]) == "so \ufffd"


def test_a_stream_gives_each_character_as_soon_as_it_is_whole(both):
    taken = []

    def ids():
        for id in both[0].encode("né 👍!"):
            taken.append(id)
            yield id

    pieces, text = [], ""
    for piece in both[0].decode_stream(ids()):
        text += piece
        pieces.append(piece)
        assert len(taken) == min(len(pieces), len(both[0].encode("né 👍!")))
        assert "né 👍!".startswith(text)
    assert text == "né 👍!"
    assert both[1].decode_bytes(taken).decode() == text


def test_there_is_a_character_for_each_byte_and_no_more():
    assert sorted(bytes_to_unicode()) == [*range(256)]
    assert len({*bytes_to_unicode().values()}) == 256


def test_a_list_of_ids_belongs_to_the_caller(both):
    ids = both[0].encode("Romeo")
    expected = [*ids]
    ids.clear()
    assert both[0].encode("Romeo") == expected


def test_words_are_kept_for_the_next_time_but_not_without_end():
    encoder = Encoder({token: id for id, token in enumerate(TOKENS)}, MERGES)
    encoder.encode("the heroes of")
    encoder.encode(" the day")
    assert {"the", " heroes", " of", " the", " day"} == {*encoder.cache}
    encoder.encode(" ".join(map(str, range(100_002))))
    encoder.encode("Romeo")
    assert len(encoder.cache) < 100


def test_merges_may_be_lists_as_json_has_them():
    vocabulary = {token: id for id, token in enumerate(TOKENS)}
    encoder = Encoder(vocabulary, [[*pair] for pair in MERGES])
    assert encoder.encode("the") == Encoder(vocabulary, MERGES).encode("the")
    assert encoder.encode(" the Romeo") == [TOKENS.index("Ġthe"), 220, TOKENS.index("Romeo")]


@pytest.mark.parametrize(
    "text, lone", [("\ud800", r"'\\ud800' at 0"), ("Romeo \udcff and", r"'\\udcff' at 6")]
)
def test_a_lone_surrogate_is_refused_by_its_place(both, text, lone):
    with pytest.raises(ValueError, match=rf"^the text has a lone surrogate, {lone}$"):
        both[0].encode(text)


@pytest.mark.parametrize("id", [-1, 50257, 10**20, None, "0", 0.5])
def test_an_id_outside_the_vocabulary_is_refused_by_name(both, id):
    with pytest.raises(ValueError, match=f"the id {id}$"):
        both[0].decode([0, id])


def test_files_are_utf_8_whatever_the_locale_says(run, tmp_path):
    write_vocabulary(tmp_path)
    code = "import sys, encoder; print(encoder.get_encoder('', sys.argv[1]).encode('caf\\xe9 the'))"
    result = run(tmp_path, code=("-c", code), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.stdout == f"{get_encoder('', tmp_path).encode('café the')}\n"


# --- Two files: OpenAI's, or Hugging Face's older ones ---


def ids_of(tokens):
    return json.dumps({token: id for id, token in enumerate(tokens)}).encode()


def lines(function):
    """The merges after a change to the third, `h e`."""
    pairs = [" ".join(pair) for pair in MERGES]
    pairs[2] = function(pairs[2])
    return "\n".join(["#version: 0.2", *pairs, ""]).encode()


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_two_files_are_read_alike_under_either_name(names, tmp_path):
    write_vocabulary(tmp_path, *names)
    encoder = get_encoder(tmp_path.name, tmp_path.parent)
    assert encoder.encoder == {token: id for id, token in enumerate(TOKENS)}
    assert [*encoder.bpe_ranks] == MERGES and encoder.endoftext == [299]


def test_tokens_need_not_be_in_the_order_of_their_ids(tmp_path):
    write_vocabulary(tmp_path)
    ids = json.loads((tmp_path / "encoder.json").read_text("utf-8"))
    (tmp_path / "encoder.json").write_text(json.dumps(dict(reversed(ids.items()))))
    assert get_encoder("", tmp_path).encode(" the") == [TOKENS.index("Ġthe")]


@pytest.mark.parametrize("line", ["\r\n", "\n\n"])
def test_lines_may_end_as_on_windows_or_with_an_empty_one(line, tmp_path):
    write_vocabulary(tmp_path)
    content = (tmp_path / "vocab.bpe").read_bytes().replace(b"\n", line.encode())
    (tmp_path / "vocab.bpe").write_bytes(content)
    assert [*get_encoder("", tmp_path).bpe_ranks] == MERGES


@pytest.mark.parametrize("added", ["<pad>", "[PAD]", "<|user|>", "<a b>"])
def test_tokens_of_a_fine_tuned_model_decode_to_themselves(added, tmp_path):
    write_vocabulary(tmp_path, "vocab.json", "merges.txt")
    (tmp_path / "vocab.json").write_bytes(ids_of([*TOKENS, added]))
    encoder = get_encoder("", tmp_path)
    assert encoder.decode([TOKENS.index("Rome"), 300]) == f"Rome{added}"
    assert max(encoder.encode(added)) < 299  # written in a prompt, it is text as any other


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("encoder.json", b'{"!": 0,', "encoder.json is not JSON"),
        ("encoder.json", b"[0, 1]", "encoder.json is not a JSON object"),
        ("encoder.json", b'{"!": 0, "a": 2}', "encoder.json does not number its tokens"),
        ("encoder.json", b'{"!": 0, "a": true}', "encoder.json does not number its tokens"),
        ("encoder.json", b'{"!": 0, "a": 1.0}', "encoder.json does not number its tokens"),
        ("encoder.json", b'{"!": 0, "a": "1"}', "encoder.json does not number its tokens"),
        ("encoder.json", b'{"!": 0, "a": [1]}', "encoder.json does not number its tokens"),
        ("encoder.json", b'{"!": 0, "a": 1}', "do not belong together"),
        ("encoder.json", ids_of([*TOKENS, "<|x"]), "do not belong together"),
        ("encoder.json", ids_of([*TOKENS, "x|>"]), "do not belong together"),
        ("encoder.json", ids_of([*TOKENS, "[x"]), "do not belong together"),
        ("encoder.json", ids_of([*TOKENS, "xy"]), "do not belong together"),
        ("encoder.json", ids_of([t for t in TOKENS if t != "a"]), "do not belong together"),
        ("encoder.json", ids_of([t for t in TOKENS if t != "Rome"]), "do not belong together"),
        ("vocab.bpe", b"#version: 0.2\n\xc4", "vocab.bpe is not UTF-8"),
        ("vocab.bpe", b"", "do not belong together"),
        ("vocab.bpe", b"#version: 0.2\nt h", "do not belong together"),
        ("vocab.bpe", lines(lambda pair: pair.replace(" ", "")), "do not belong together"),
        ("vocab.bpe", lines(lambda pair: pair.replace(" ", "  ")), "do not belong together"),
        ("vocab.bpe", lines(lambda pair: f"{pair} x"), "do not belong together"),
        ("vocab.bpe", lines(lambda pair: ""), "do not belong together"),
        ("vocab.bpe", lines(lambda pair: "q q"), "do not belong together"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    write_vocabulary(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        get_encoder(tmp_path.name, tmp_path.parent)
    assert str(tmp_path) in str(error.value) and name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "there, missing",
    [
        ("encoder.json", "vocab.bpe"),
        ("vocab.bpe", "encoder.json"),
        ("vocab.json", "merges.txt"),
    ],
)
def test_a_missing_file_is_named(there, missing, tmp_path):
    names = ("vocab.json", "merges.txt") if "merges.txt" in (there, missing) else ()
    write_vocabulary(tmp_path, *names)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError) as error:
        get_encoder("", tmp_path)
    assert str(error.value.filename) == str(tmp_path / missing)


# --- tokenizer.json, as `tokenizers` writes it ---


@pytest.fixture
def theirs():
    """A tokenizer by the library `tokenizers`, with tokens added after the vocabulary."""
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(TOKENS)}, MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|endoftext|>", "[PAD]", AddedToken("two words, é"), "<s>"])
    return made


@pytest.mark.parametrize("text", STRINGS)
def test_the_bundled_file_has_the_ids_of_tokenizers(text):
    folder = ROOT / "models" / "1M"
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = text.replace("<|endoftext|>", "")  # which it takes for the token; here it is text
    assert get_encoder("1M", folder.parent).encode(text) == library.encode(text).ids


@pytest.mark.parametrize("text", STRINGS)
def test_a_file_with_added_tokens_has_the_ids_of_tokenizers(text, theirs, tmp_path):
    theirs.save(str(tmp_path / "tokenizer.json"))
    encoder, text = get_encoder("", tmp_path), text.replace("<|endoftext|>", "")
    assert encoder.encode(text) == theirs.encode(text).ids


def test_added_tokens_are_in_the_vocabulary_and_decode_to_themselves(theirs, tmp_path):
    theirs.save(str(tmp_path / "tokenizer.json"))
    encoder = get_encoder("", tmp_path)
    assert len(encoder.encoder) == theirs.get_vocab_size() == 303
    for content in ("<|endoftext|>", "[PAD]", "two words, é", "<s>"):
        assert encoder.decode([theirs.token_to_id(content)]) == content
    assert encoder.endoftext == [theirs.token_to_id("<|endoftext|>")]


def test_a_file_without_endoftext_says_that_there_is_none(tmp_path):
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(TOKENS[:-1])}, MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    assert get_encoder("", tmp_path).endoftext == []


def test_special_tokens_may_come_first_as_where_the_vocabulary_was_learnt_anew(tmp_path):
    tokens = ["<début>", "a b", *TOKENS]
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, MERGES))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<début>", "a b", "<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    encoder = get_encoder("", tmp_path)
    assert encoder.encode(" the day") == made.encode(" the day").ids
    assert encoder.decode([0, 1]) == "<début>a b"


def test_a_token_of_the_vocabulary_may_be_named_among_the_added_ones(theirs, tmp_path):
    theirs.add_tokens(["Rome"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    encoder = get_encoder("", tmp_path)
    assert len(encoder.encoder) == 303
    assert encoder.encode("Rome") == [theirs.token_to_id("Rome")] == theirs.encode("Rome").ids


@pytest.fixture
def rewritten(theirs, tmp_path):
    """Read the file after a change to what is in it."""

    def rewritten(change):
        content = json.loads(theirs.to_str())
        changed = change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(changed or content), "utf-8")
        return get_encoder(tmp_path.name, tmp_path.parent)

    return rewritten


def strings(content):
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def lists(content):
    content["model"]["merges"] = [[*pair] for pair in MERGES]


def as_the_hubs_gpt2(content):
    """As the file of the hub's `gpt2` is: without what came into the format later."""
    strings(content)
    for part, fields in {
        "model": ("type", "byte_fallback", "ignore_merges"),
        "pre_tokenizer": ("use_regex",),
    }.items():
        for field in fields:
            content[part].pop(field, None)


@pytest.mark.parametrize("change", [strings, lists, as_the_hubs_gpt2])
def test_older_and_newer_ways_to_write_it_are_read_alike(change, rewritten, theirs):
    encoder = rewritten(change)
    for text in STRINGS[:-1]:
        assert encoder.encode(text) == theirs.encode(text).ids


def test_it_comes_before_the_files_of_older_layouts(rewritten, tmp_path):
    write_vocabulary(tmp_path)
    write_vocabulary(tmp_path, "vocab.json", "merges.txt")
    assert len(rewritten(lists).encoder) == 303


def put(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (put("normalizer", value={"type": "NFC"}), "normalizer must be None"),
        (put("pre_tokenizer", "add_prefix_space", value=True), "add_prefix_space must be False"),
        (put("pre_tokenizer", "use_regex", value=False), "use_regex must be True"),
        (put("pre_tokenizer", "type", value="Whitespace"), "type must be 'ByteLevel'"),
        (put("pre_tokenizer", value={"type": "Sequence", "pretokenizers": []}), "type must be"),
        (put("pre_tokenizer", value=None), "is no byte-level BPE"),
        (put("model", value=None), "is no byte-level BPE"),
        (put("model", "merges", value=None), "is no byte-level BPE"),
        (put("model", "merges", value=[1, 2]), "is no byte-level BPE|do not belong together"),
        (put("model", "merges", 2, value=["h", 1]), "is no byte-level BPE|do not belong together"),
        (put("model", "merges", 2, value=["h", "e", "r"]), "do not belong together"),
        (put("model", "merges", 2, value="he"), "do not belong together"),
        (put("model", "merges", value=[]), "do not belong together"),
        (put("model", "vocab", value=[["a", 0.5]]), "is no byte-level BPE"),
        (put("model", "vocab", value={"a": 0}), "does not number its tokens|do not belong"),
        (put("model", "vocab", "more", value=303), "do not belong together"),
        (put("model", "vocab", "a", value=0.0), "does not number its tokens"),
        (put("added_tokens", value=None), "is no byte-level BPE"),
        (put("added_tokens", value=["<s>"]), "is no byte-level BPE"),
        (put("added_tokens", 1, "id", value=304), "does not number its tokens"),
        (put("added_tokens", 1, "id", value=5), "does not number its tokens"),
        (lambda content: {"version": "1.0"}, "is no byte-level BPE"),
        (lambda content: [content], "is not a JSON object"),
    ],
)
def test_what_is_not_gpt2s_kind_of_tokenizer_is_refused_by_name(change, message, rewritten):
    with pytest.raises(ValueError, match=message) as error:
        rewritten(change)
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("normalizer", normalizers.Lowercase()),
        ("pre_tokenizer", pre_tokenizers.Whitespace()),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ],
)
def test_another_tokenizer_of_that_library_is_refused(field, value, theirs, tmp_path):
    setattr(theirs, field, value)
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: \w+ must be"):
        get_encoder("", tmp_path)
