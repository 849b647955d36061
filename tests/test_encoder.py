"""The tokenizer against tiktoken, which reads the same two files here."""

import random
import shutil

import pytest
import tiktoken
from conftest import BUNDLED, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder import bytes_to_unicode, get_encoder, read_text

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
    models_dir = next((d for d in folders if (d / name / "vocab.bpe").exists()), None)
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
def test_any_ids_decode_as_with_tiktoken(both, data):
    ours, theirs = both
    ids = data.draw(st.lists(st.integers(0, len(ours.encoder) - 1)))
    assert ours.decode(ids) == theirs.decode(ids)


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


def test_a_list_of_ids_belongs_to_the_caller(both):
    ids = both[0].encode("Romeo")
    expected = [*ids]
    ids.clear()
    assert both[0].encode("Romeo") == expected


@pytest.mark.parametrize("text", ["\ud800", "Romeo \udcff and Juliet"])
def test_a_lone_surrogate_is_refused_in_one_line(both, text):
    with pytest.raises(ValueError, match=r"^the text has a lone surrogate, '\\ud.+' at \d+$"):
        both[0].encode(text)


@pytest.mark.parametrize("id", [-1, 50257, 10**20])
def test_an_id_outside_the_vocabulary_is_refused_by_name(both, id):
    with pytest.raises(ValueError, match=f"the id {id}$"):
        both[0].decode([0, id])


def test_files_are_utf_8_whatever_the_locale_says(run):
    code = "import encoder; print(encoder.get_encoder('1M', 'models').encode('caf\\xe9 the'))"
    result = run(code=("-c", code), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.stdout == f"{get_encoder('1M', ROOT / 'models').encode('café the')}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("encoder.json", b'{"!": 0,', "encoder.json is not JSON"),
        ("encoder.json", b"[0, 1]", "encoder.json is not a JSON object"),
        ("encoder.json", b'{"!": 0, "a": 2}', "encoder.json does not number its tokens"),
        ("encoder.json", b'{"!": 0, "a": true}', "encoder.json does not number its tokens"),
        ("encoder.json", b'{"!": 0, "a": 1}', "do not belong together"),
        ("vocab.bpe", b"#version: 0.2\n\xc4", "vocab.bpe is not UTF-8"),
        ("vocab.bpe", b"#version: 0.2\nt h", "do not belong together"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    for file in ("encoder.json", "vocab.bpe"):
        shutil.copy(BUNDLED / file, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        get_encoder(tmp_path.name, tmp_path.parent)
