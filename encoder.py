"""GPT-2's byte-level byte-pair encoding (BPE): from text to the ids of tokens, and back."""

import codecs
import json
import os
import reprlib
from itertools import pairwise
from pathlib import Path

import regex

END_OF_TEXT = "<|endoftext|>"
# A text is cut into words first, and each word into tokens. A word is an ending such as 's, or a
# run of letters, of digits or of other signs, with the space before it. The rest of the white space
# is a word too: "to   be" is "to", "  " and " be".
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class UserError(ValueError):
    """A mistake that the user can correct, such as a damaged file or a number that is too large.

    The command prints only its message. Any other ValueError is a bug, and keeps its traceback.
    """


def bytes_to_unicode():
    """Return a visible character for each byte.

    GPT-2's vocabulary is written in these characters. If a byte is a visible character in Latin-1,
    it gets that one. The others get the characters from U+0100 on.

    >>> "".join(bytes_to_unicode()[byte] for byte in "a café".encode("utf-8"))
    'aĠcafÃ©'
    """
    chars = {byte: chr(byte) for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")}
    hidden = [byte for byte in range(256) if byte not in chars]
    return chars | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


class Encoder:
    """A tokenizer, made of the ids of its tokens, and of the pairs to merge, in order of priority.

    Special tokens, such as <|endoftext|>, can be found in a text before it is cut into words. `bos`
    is the list of the ids that start a text, and `eos` the set of those that end one. Both have
    <|endoftext|>, if the vocabulary has it. The loader of a model may set others.

    >>> merges = [("l", "o"), ("lo", "w"), ("e", "r")]
    >>> tokens = [*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    >>> toy = Encoder({token: id for id, token in enumerate(tokens)}, merges)
    >>> toy.bpe("lower")
    ['low', 'er']
    >>> toy.encode("lower<|endoftext|>", allowed_special="all")
    [257, 258, 259]
    >>> toy.decode([257, 258])
    'lower'
    """

    def __init__(self, encoder, bpe_merges, special=()):
        self.encoder = encoder
        self.decoder = {id: token for token, id in encoder.items()}
        self.bpe_ranks = {tuple(pair): rank for rank, pair in enumerate(bpe_merges)}
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {char: byte for byte, char in self.byte_encoder.items()}
        names = {END_OF_TEXT, *special} & encoder.keys()
        # An empty name would be found between any two characters.
        self.special = {token: encoder[token] for token in names if token}
        self.bos = [encoder[END_OF_TEXT]] if END_OF_TEXT in encoder else []
        self.eos = {*self.bos}
        self.cache = {}

    def bpe(self, word):
        """Merge neighbours in one word, each time the pair with the highest priority.

        `word` is a string or another iterable of characters. None of them may be white space.
        """
        # Each part has a space of its own on both sides, so that only whole parts are replaced. The
        # pair ("l", "o") turns " l  o  w " into " lo  w ".
        parts = "".join(f" {char} " for char in word)
        while pairs := {pair for pair in pairwise(parts.split()) if pair in self.bpe_ranks}:
            first, second = min(pairs, key=self.bpe_ranks.get)
            parts = parts.replace(f" {first}  {second} ", f" {first}{second} ")
        return parts.split()

    def encode(self, text, allowed_special=()):
        """Turn text into ids. By default, special tokens are plain text, as in OpenAI's code.

        `allowed_special` is a set of special tokens, or "all". In the text, these become one id
        each. If several begin at one place, the longest is taken. Raises ValueError for a text that
        cannot be written in UTF-8, and for a byte without a token.
        """
        allowed = self.special if allowed_special == "all" else allowed_special
        names = sorted(self.special.keys() & allowed, key=len, reverse=True)
        pattern = "|".join(map(regex.escape, names))
        pieces = regex.split(f"({pattern})", text) if names else [text]
        ids = []
        for piece in pieces:
            ids += [self.special[piece]] if piece in names else self.encode_ordinary(piece)
        return ids

    def encode_ordinary(self, text):
        """Turn text into ids, without looking for special tokens."""
        words = regex.findall(PATTERN, text)
        for word in {*words}.difference(self.cache):
            tokens = self.bpe(self.byte_encoder[byte] for byte in word.encode("utf-8"))
            for token in tokens:
                # Only a single byte can be missing: `checked_encoder` wants a token for each merge.
                if token not in self.encoder:
                    where = f"{self.byte_decoder[token]:#04x} in {brief(word)}"
                    raise UserError(f"the vocabulary has no token for the byte {where}")
            self.cache[word] = [self.encoder[token] for token in tokens]
        return [id for word in words for id in self.cache[word]]

    def decode(self, ids):
        """Turn ids into text, with U+FFFD for bytes that are not UTF-8.

        Raises ValueError for an id that is not in the vocabulary.
        """
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids):
        """Yield the text of each id as it comes, and in the end what is left.

        A part of a character waits for the next id. Raises ValueError as `decode` does.

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
        """Return the bytes that a token stands for: one byte for each of its characters.

        Two kinds of tokens are spelled as they look: those with a character that stands for no
        byte, such as [日本], and special tokens whose bytes would not be UTF-8, such as café. The
        library `tokenizers` does the same for the first kind. Of café, it would print caf and
        U+FFFD.

        >>> toy = Encoder({"[日本]": 0, "Ġthe": 1, "Ġ<s>": 2, "café": 3}, [], ["Ġ<s>", "café"])
        >>> [toy.token_bytes(token).decode() for token in toy.encoder]
        ['[日本]', ' the', ' <s>', 'café']
        """
        as_it_looks = token.encode("utf-8", "surrogatepass")  # JSON can hold half of a character.
        if any(char not in self.byte_decoder for char in token):
            return as_it_looks
        spelled = bytes(self.byte_decoder[char] for char in token)
        if token not in self.special or len(token) == 1:
            return spelled  # It may be one byte of a character that has several.
        is_utf_8 = "\ufffd" not in spelled.decode("utf-8", "replace")
        return spelled if is_utf_8 else as_it_looks


# --- Reading a tokenizer from its folder ---

# The look of special or unused tokens that no merge makes and no file lists: <s>, [PAD].
LOOKS_SPECIAL = r"<.+>|\[.+\]"


def get_encoder(model_name, models_dir):
    """Read the tokenizer in the folder `models_dir/model_name`.

    The tokenizer is in Hugging Face's `tokenizer.json`, or else in `vocab.json` and `merges.txt`,
    or else in OpenAI's `encoder.json` and `vocab.bpe`. The flags `lstrip`, `rstrip` and
    `single_word` of added tokens are ignored. Raises FileNotFoundError if a file is missing, and
    ValueError if a file is damaged, or has other settings that would change the ids.
    """
    folder = home(models_dir) / model_name
    check_tokenizer_config(folder / "tokenizer_config.json")
    if not (folder / "tokenizer.json").exists():
        for tokens, merges in [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]:
            if (folder / tokens).exists() or (folder / merges).exists():
                return read_two_files(folder / tokens, folder / merges)
    return read_tokenizer_json(folder / "tokenizer.json")  # If it is missing, the error names it.


def check_tokenizer_config(path):
    """Raise UserError if a `tokenizer_config.json` has a switch on that changes the ids."""
    settings = read_json(path, optional=True)
    require(path, settings, add_bos_token=False, add_eos_token=False)
    require(path, settings, add_prefix_space=False, split_special_tokens=False)


def read_tokenizer_json(path):
    """Read a `tokenizer.json`, the format of the library `tokenizers`.

    Its special tokens are its `added_tokens`. It is refused if one of its other settings would make
    that library find other ids than `Encoder`, except for `truncation` and `padding`, which
    transformers sets anew for each text. The tests compare the ids.
    """
    content = read_json(path)
    try:
        check_settings(path, content)
        vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
        added = {entry["content"]: entry["id"] for entry in content.get("added_tokens", [])}
        # Older files have each merge as one string.
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        return checked_encoder(path, vocabulary | added, merges, added)
    except (AttributeError, KeyError, TypeError) as error:  # A part is missing, or of another type.
        raise UserError(f"{path} is not a byte-level BPE tokenizer: {error!r}") from None


def check_settings(path, content):
    """Raise UserError if a `tokenizer.json` has a setting that changes the ids."""
    require(path, content, normalizer=None)
    where, settings = f"{path}: pre_tokenizer", content["pre_tokenizer"]
    require(where, settings, type="ByteLevel", add_prefix_space=False, use_regex=True)
    where, settings = f"{path}: model", content["model"]
    require(where, settings, type="BPE", dropout=None, ignore_merges=False, byte_fallback=False)
    require(where, settings, continuing_subword_prefix=None, end_of_word_suffix=None)
    require(f"{path}: decoder", content.get("decoder") or {}, type="ByteLevel")
    processor = content.get("post_processor") or {}
    # A TemplateProcessing adds `special_tokens` to every text, and some others `cls` and `sep`.
    # A sequence has a list of `processors`, but none of them may be a sequence again.
    unwanted = dict(special_tokens=None, cls=None, sep=None, processors=None)
    for step in processor.get("processors", [processor]):
        require(f"{path}: post_processor", step, **unwanted)


def read_two_files(path, merges_path):
    """Read a vocabulary and its merges, and the `added_tokens.json` beside them, if there is one.

    Its special tokens are the added ones, and those that no merge makes and that look like <s>.
    """
    lines = read_text(merges_path).split("\n")
    # The first line is "#version: 0.2". Other lines that begin with # are merges.
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version:")]
    added = read_json(path.with_name("added_tokens.json"), optional=True)
    vocabulary = read_json(path) | added
    not_merged = vocabulary.keys() - {*map("".join, merges)}
    special = [token for token in not_merged if regex.fullmatch(LOOKS_SPECIAL, token)]
    return checked_encoder(path, vocabulary, merges, [*special, *added])


def checked_encoder(path, vocabulary, merges, special):
    """Return an `Encoder`, if its vocabulary and its merges belong together.

    Otherwise, raise UserError. The ids must be 0, 1, 2 and so on. A merge must have two parts, and
    make a token. A token must be made by a merge, or be special, look special, or be one character.
    """
    ids = vocabulary.values()
    # For an empty vocabulary, there are no kinds. For the id True, its type is bool.
    kinds = {(type(token), type(id)) for token, id in vocabulary.items()}
    if kinds != {(str, int)} or sorted(ids) != [*range(len(ids))]:
        raise UserError(f"{path} does not number its tokens 0, 1, 2 and so on")
    problem = f"{path}: its tokens and its merges do not belong together"
    if any(len(pair) != 2 for pair in merges):
        raise UserError(f"{problem}: a merge does not have two parts")
    merged = {*map("".join, merges)}
    unknown = merged - vocabulary.keys()
    if unknown:
        raise UserError(f"{problem}: a merge makes {brief(min(unknown))}, which is no token")
    rest = vocabulary.keys() - merged - {*special}
    orphans = [t for t in rest if len(t) > 1 and not regex.fullmatch(LOOKS_SPECIAL, t)]
    if orphans:
        raise UserError(f"{problem}: no merge makes the token {brief(min(orphans))}")
    return Encoder(vocabulary, merges, special)


# --- Reading files ---

BRIEF = reprlib.Repr()
BRIEF.maxstring = 40


def require(where, settings, **wanted):
    """Raise UserError if a setting is there and is not as wanted.

    A setting that is missing has its default, which is as wanted. Where None or False is wanted,
    any empty value will do, such as 0 or "".

    >>> require("a.json", {"n": 1, "x": ""}, n=1, x=None, y=False)
    >>> require("a.json", {"n": 1}, n=None)
    Traceback (most recent call last):
    encoder.UserError: a.json: n must be None, not 1
    """
    for name, value in wanted.items():
        found = settings.get(name, value)
        both_are_off = not found and not value
        if found != value and not both_are_off:
            raise UserError(f"{where}: {name} must be {value!r}, not {brief(found)}")


def read_json(path, optional=False):
    """Return the dict in a JSON file. An optional file that is not there counts as an empty dict.

    Raises a UserError that names the file, if it holds anything else.
    """
    if optional and not path.exists():
        return {}
    text = read_text(path)
    try:
        content = json.loads(text)
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is not a JSON object: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def read_text(path):
    """Read UTF-8, with or without a byte order mark. Every line end becomes a line feed.

    Raises a UserError that names the file, if it is not UTF-8.
    """
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason}") from None


def home(path):
    """Return a path, with the user's home in place of a ~ at its start."""
    return Path(os.path.expanduser(path))


def brief(value):
    """Return a value as Python writes it, cut to about 40 characters, for a message."""
    text = BRIEF.repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
