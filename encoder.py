"""GPT-2's byte-level byte-pair encoding (BPE): from text to the ids of tokens, and back."""

import codecs
import json
import reprlib
from itertools import pairwise
from pathlib import Path

import regex

END_OF_TEXT = "<|endoftext|>"
# The text is cut into words first, because no token reaches from one word into the next. A word is
# a run of letters, of digits or of other signs, with the space before it. In longer white space,
# the last character belongs to the word that follows.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class UserError(ValueError):
    """A mistake that the user can mend, such as a damaged file or a number that is out of range.

    The command prints it as one line. Any other ValueError is a mistake in the code, whose
    traceback is needed.
    """


def bytes_to_unicode():
    """Return a visible character for each byte: Latin-1's own, or one from U+0100 on.

    >>> "".join(bytes_to_unicode()[byte] for byte in "a café".encode("utf-8"))
    'aĠcafÃ©'
    """
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Encoder:
    """A tokenizer: the ids of its tokens, and the pairs to merge into tokens, the first one first.

    `special` and `added` name the tokens that stand for a text as a whole, such as <|endoftext|>.
    Special ones are found first and added ones in the rest, as in Hugging Face's `tokenizers`.
    `bos` has the ids that an empty prompt starts from, and `eos` those that end a text. Both are
    <|endoftext|>, if the vocabulary has it. The loader of a model may set others.

    >>> merges = [("l", "o"), ("lo", "w"), ("e", "r")]
    >>> tokens = [*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    >>> toy = Encoder({token: id for id, token in enumerate(tokens)}, merges, ["<|endoftext|>"])
    >>> toy.bpe("lower")
    ['low', 'er']
    >>> toy.encode("lower<|endoftext|>", allowed_special="all")
    [257, 258, 259]
    >>> toy.decode([257, 258])
    'lower'
    """

    def __init__(self, encoder, bpe_merges, special=(), added=()):
        self.encoder = encoder
        self.decoder = {id: token for token, id in encoder.items()}
        self.bpe_ranks = {tuple(pair): rank for rank, pair in enumerate(bpe_merges)}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        self.special = {token: encoder[token] for token in (*special, *added) if token}
        self.added = {*added}
        self.bos = [encoder[END_OF_TEXT]] if END_OF_TEXT in encoder else []
        self.eos = {*self.bos}
        self.cache = {}

    def bpe(self, word):
        """Merge neighbours in one word, each time the pair that comes first in the merges."""
        # Every part stands between two spaces of its own, so that only whole parts are replaced.
        parts = "".join(f" {char} " for char in word)
        while pairs := {pair for pair in pairwise(parts.split()) if pair in self.bpe_ranks}:
            first, second = min(pairs, key=self.bpe_ranks.get)
            parts = parts.replace(f" {first}  {second} ", f" {first}{second} ")
        return parts.split()

    def encode(self, text, allowed_special=()):
        """Turn text into ids. As in OpenAI's code, <|endoftext|> is plain text like any other.

        With `allowed_special`, special and added tokens in the text become one id each: "all" of
        them, or those in a set of their names. Where several begin, the longest counts. Raises
        ValueError for a lone surrogate, which has no UTF-8, and for a byte that has no token.
        """
        allowed = self.special if allowed_special == "all" else allowed_special
        names = self.special.keys() & allowed
        ids = []
        for piece in cut(text, names - self.added):
            parts = [piece] if piece in names else cut(piece, names & self.added)
            for part in parts:
                ids += [self.special[part]] if part in names else self.encode_ordinary(part)
        return ids

    def encode_ordinary(self, text):
        """Turn text into ids, without a look for special and added tokens."""
        words = regex.findall(PATTERN, text)
        for word in {*words}.difference(self.cache):
            tokens = self.bpe(self.byte_encoder[byte] for byte in word.encode("utf-8"))
            if missing := [token for token in tokens if token not in self.encoder]:
                byte = f"{self.byte_decoder[missing[0]]:#04x} in {reprlib.repr(word)}"
                raise UserError(f"the vocabulary has no token for the byte {byte}")
            self.cache[word] = [self.encoder[token] for token in tokens]
        return [id for word in words for id in self.cache[word]]

    def decode(self, ids):
        """Turn ids into text, with U+FFFD for what is no UTF-8. Raises ValueError for no id."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids):
        """Yield the text of each id as it comes. A character that is cut in two waits for its rest.

        >>> toy = Encoder({char: byte for byte, char in bytes_to_unicode().items()}, [])
        >>> list(toy.decode_stream(toy.encode("né!")))
        ['n', '', 'é', '!', '']
        """
        utf_8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            if id not in self.decoder:
                raise UserError(f"the vocabulary has no token with the id {id}")
            yield utf_8.decode(self.token_bytes(self.decoder[id]))
        yield utf_8.decode(b"", final=True)

    def token_bytes(self, token):
        """Return the bytes that a token stands for.

        Most tokens are spelled with one visible character for each byte. Special and added tokens
        are spelled as they look, and so is an unused token such as [日本].
        """
        if token in self.special or not self.byte_decoder.keys() >= {*token}:
            return token.encode("utf-8")
        return bytes(self.byte_decoder[char] for char in token)


def cut(text, names):
    """Cut a text before and after each of these tokens."""
    pattern = "|".join(map(regex.escape, sorted(names, key=len, reverse=True)))
    return regex.split(f"({pattern})", text) if names else [text]


# --- Reading a tokenizer from its folder ---

# A tokenizer has its tokens in one of these files. Two of them have their merges in another one.
TOKENIZERS = {"tokenizer.json": None, "vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}


def get_encoder(model_name, models_dir):
    """Read the tokenizer in the folder `models_dir/model_name`.

    It is in Hugging Face's `tokenizer.json`, or else in `vocab.json` and `merges.txt`, or else in
    OpenAI's `encoder.json` and `vocab.bpe`. The flags `lstrip`, `rstrip` and `single_word` of added
    tokens are ignored. Raises FileNotFoundError where a file is missing, and ValueError where one
    is damaged, or asks for other ids than GPT-2's byte-level BPE would give.
    """
    folder = Path(models_dir, model_name).expanduser()
    found = [folder / name for name in TOKENIZERS if (folder / name).exists()]
    path = found[0] if found else folder / "tokenizer.json"
    read = read_two_files if TOKENIZERS[path.name] else read_tokenizer_json
    more = read_json(folder / "added_tokens.json", optional=True)
    try:
        vocabulary, merges, special, added = read(path, more, read_named_tokens(folder))
        check_vocabulary(path, vocabulary, merges, special | added)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no byte-level BPE: {error!r}") from None
    special |= ({END_OF_TEXT} & vocabulary.keys()) - added
    return Encoder(vocabulary, merges, special, added)


def read_tokenizer_json(path, more, named):
    """Read a `tokenizer.json`: its vocabulary, merges, special tokens and added tokens.

    It should have all tokens in `added_tokens.json`, which are `more`, and in the settings.
    """
    content = read_json(path)
    model, splits = content["model"], content["pre_tokenizer"]
    require(path, content, normalizer=None)
    require(path, splits, type="ByteLevel", add_prefix_space=False, use_regex=True)
    require(path, content.get("decoder") or {}, type="ByteLevel")
    require(path, model, dropout=None, ignore_merges=False, byte_fallback=False)
    require(path, model, continuing_subword_prefix=None, end_of_word_suffix=None)
    last = content.get("post_processor") or {}
    for step in last.get("processors", [last]):  # None of them may add tokens to every text.
        where = f"{path}: post_processor {reprlib.repr(step.get('type'))}"
        require(where, step, special_tokens=None, cls=None, sep=None, processors=None)
    entries = content.get("added_tokens", [])
    ids = {entry["content"]: entry["id"] for entry in entries}
    # `tokenizers` calls those tokens normalized that it finds after the others.
    added = {e["content"] for e in entries if e.get("normalized", not e.get("special"))}
    # Older files have each merge as one text.
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    special = (named | more.keys() | ids.keys()) - added
    return model["vocab"] | ids, merges, special, added


def read_two_files(path, more, named):
    """Read the same from `vocab.json` and `merges.txt`, or from OpenAI's two files."""
    lines = read_text(path.with_name(TOKENIZERS[path.name])).split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    return read_json(path) | more, merges, named, more.keys() - named


def read_named_tokens(folder):
    """Return the tokens that the settings beside a tokenizer name, such as its `pad_token`.

    Hugging Face's library finds these tokens in a text, even if the tokenizer itself does not.
    """
    values = []
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        settings = read_json(path, optional=True)
        require(path, settings, add_bos_token=False, add_eos_token=False, add_prefix_space=False)
        require(path, settings, split_special_tokens=False)
        values += [settings[field] for field in settings if field.endswith("_token")]
        for field in ("additional_special_tokens", "extra_special_tokens"):
            several = settings.get(field) or []
            values += several.values() if isinstance(several, dict) else several
        values += settings.get("added_tokens_decoder", {}).values()
    contents = [value["content"] for value in values if isinstance(value, dict)]
    return {value for value in [*values, *contents] if isinstance(value, str)}


def check_vocabulary(path, vocabulary, merges, names):
    """Raise UserError unless the ids have no gap, and the merges make just the tokens.

    `names` are the special and the added tokens, which no merge makes.
    """
    ids = vocabulary.values()
    if {*map(type, ids)} != {int} or sorted(ids) != [*range(len(ids))]:
        raise UserError(f"{path} does not number its tokens from 0 on without a gap")
    for token in names - vocabulary.keys():
        raise UserError(f"{path} has no token {reprlib.repr(token)}, but a file beside it names it")
    problem = f"{path}: its tokens and its merges do not belong together"
    if {*map(len, merges)} - {2}:
        raise UserError(f"{problem}, because a merge has more or less than two parts")
    merged = {*map("".join, merges)}
    for token in merged - vocabulary.keys():
        raise UserError(f"{problem}: a merge makes {reprlib.repr(token)}, which is no token")
    # What is left are single bytes, and unused tokens such as [PAD].
    for token in vocabulary.keys() - merged - names:
        if not regex.fullmatch(r".?|<.+>|\[.+\]", token):
            raise UserError(f"{problem}: no merge makes the token {reprlib.repr(token)}")


def require(path, settings, **wanted):
    """Raise UserError if a setting is there and has another value. null and "" count as False."""
    for name, value in wanted.items():
        found = settings.get(name, value)
        if found != value and (found or value):
            raise UserError(f"{path}: {name} must be {value!r}, not {reprlib.repr(found)}")


def read_json(path, optional=False):
    """Read the dict in a JSON file. An optional file that is not there counts as an empty dict.

    Raises UserError, which names the file, for anything else.
    """
    if optional and not path.exists():
        return {}
    text = read_text(path)
    try:
        return {**json.loads(text)}
    except (RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a JSON object: {error}") from None


def read_text(path):
    """Read UTF-8, with or without a byte order mark; every line end becomes "\n".

    Raises UserError, which names the file, for anything else.
    """
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason}") from None
