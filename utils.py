"""Load a GPT-2 model from its folder, download OpenAI's models, and run the command.

    encoder, hparams, params = load_encoder_hparams_and_params("124M", "models")

A model is a table of contents and raw numbers. The table says for every tensor its name, its type,
its shape and where its bytes are. OpenAI's table is `model.ckpt.index`, and Hugging Face's is the
header of `model.safetensors`. The file of numbers is mapped into memory, and the parameters are
views of it. So numbers in float32 need no copy, and the system reads a page of the file when it is
first used.

Packages that only some models need, and those for downloads and for the command, are imported in
the functions that use them.
"""

import collections
import contextlib
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import reprlib
import sys
import time
from pathlib import Path

import numpy as np

from encoder import UserError, get_encoder, home, read_json, read_text, require

MODELS = Path(__file__).resolve().parent / "models"
SIZES = ("124M", "355M", "774M", "1558M")
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
# In the order of their downloads: the data file is checked with the index.
FILES = ("checkpoint", "hparams.json", "encoder.json", "vocab.bpe", INDEX, DATA)
SHA256 = {  # of the tokenizer, which is the same for all sizes
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
MAX_REQUESTS = 20  # for each file; if the connection breaks, the next request is for the rest
BUNDLED = "The bundled model, 1M, needs no network: add --model_size 1M."

# --- Load: from a folder to the tokenizer, the sizes and the parameters ---

# OpenAI's names of the hparams, and Hugging Face's.
HPARAMS = {
    "n_vocab": "vocab_size", "n_ctx": "n_positions",
    "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer",
}  # fmt: skip
# Hugging Face's defaults for them.
DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
# Settings that change what a model computes, each with the only value that `gpt2` supports. None
# means that it must not be set.
FIXED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True, "scale_attn_weights": True, "add_cross_attention": False,
    "scale_attn_by_inverse_layer_idx": False, "quantization_config": None,
    # Other names for n_head and n_layer. The numbers under these names would not be read.
    "num_attention_heads": None, "num_hidden_layers": None,
}  # fmt: skip
# NumPy's names for the types of the two formats. NumPy has no bfloat16: it is read as uint16.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # safetensors
DTYPES |= {1: "<f4", 19: "<f2", 14: "<u2"}  # TensorFlow: DT_FLOAT, DT_HALF, DT_BFLOAT16


# A tensor in a file: where it is, and its bytes as an array.
Tensor = collections.namedtuple("Tensor", "path dtype shape data")


def load_encoder_hparams_and_params(model_size, models_dir):
    """Load a model.

    `model_size` is a published size, the name of a folder in `models_dir`, or the path of any other
    folder. A published size that is missing is downloaded into `models_dir/model_size`. With
    `models_dir` None, the models are in `models` beside this file.

    A folder with a `config.json` has Hugging Face's layout. From its `generation_config.json`, only
    the ids that start and end a text are used. A file may pad `wte` with rows that belong to no
    token. They are cut off, so that they cannot be chosen.

    Returns the `Encoder`, OpenAI's hparams as a dict, and the parameters as nested dicts and lists
    of float32 arrays, which are read-only. Raises ValueError for a name that is not a model's, and
    for a folder that is damaged, not complete, or not GPT-2's; OSError for a file that cannot be
    read or downloaded.
    """
    folder = find_model(model_size, models_dir)
    check_folder(folder)
    encoder = get_encoder(folder.name, folder.parent)
    if (folder / "config.json").exists():
        hparams, params = load_hugging_face(folder)
    else:
        hparams = read_hparams(folder / "hparams.json", HPARAMS)
        params = load_gpt2_params_from_tf_ckpt(find_checkpoint(folder / "checkpoint"), hparams)
    params["wte"] = params["wte"][: len(encoder.encoder)]  # It can also have fewer rows than that.
    hparams["n_vocab"] = len(params["wte"])
    set_ends(encoder, folder, hparams["n_vocab"])
    return encoder, hparams, params


def find_model(model_size, models_dir):
    """Return the folder of a model. A published size that is missing is downloaded first."""
    models = MODELS if models_dir is None else home(models_dir)
    names = {path.parent.name for path in models.glob("*/*")}  # An empty folder is not a model.
    if model_size in names.union(SIZES):
        folder = models / model_size
    elif model_size and home(model_size).is_dir():
        folder = home(model_size)
    else:
        others = ", ".join(sorted(names.difference(SIZES))[:10]) or "there is none"
        choices = f"{', '.join(SIZES)}, or a folder in {models.absolute()} ({others})"
        raise UserError(f"model_size must be {choices}, not {model_size!r}")
    if model_size in SIZES and not is_hugging_face(folder):
        download_gpt2_files(model_size, folder)
    return folder


def is_hugging_face(folder):
    """Whether a folder has a file of Hugging Face's layout, even if others are missing."""
    names = ("config.json", "tokenizer.json", "vocab.json", "model*.safetensors*")
    return any(any(folder.glob(name)) for name in names)


def check_folder(folder):
    """Raise UserError for a folder that cannot be read as it is, and say what to do."""
    has_config = (folder / "config.json").exists()
    has_pickle = any(folder.glob("pytorch_model*"))
    if is_hugging_face(folder) and not has_config:
        raise UserError(f"{folder} is not complete: config.json is missing. Copy or save it again.")
    if has_config and has_pickle and not any(folder.glob("model*.safetensors*")):
        raise UserError(
            f"{folder} has its weights as a pickle. Convert them with these lines of Python:\n"
            "import transformers\n"
            f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
            f"model.save_pretrained({str(folder)!r})\n"
            f"tokenizer = transformers.AutoTokenizer.from_pretrained({str(folder)!r})\n"
            f"tokenizer.save_pretrained({str(folder)!r})"
        )


def read_hparams(path, names, **defaults):
    """Return the content of a JSON file that has the hparams under these names.

    Raises UserError unless they are whole numbers above 0, and n_embd is a multiple of n_head.
    """
    hparams = defaults | read_json(path)
    for name in names:
        value = hparams.get(name)
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {name} must be a number above 0, not {reprlib.repr(value)}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise UserError(f"{path}: n_embd must be a multiple of n_head")
    return hparams


def load_hugging_face(folder):
    """Load the hparams and the parameters from a folder that `save_pretrained` wrote."""
    path = folder / "config.json"
    config = read_hparams(path, HPARAMS.values(), **DEFAULTS)
    require(path, config, **FIXED)
    hparams = {name: config[other_name] for name, other_name in HPARAMS.items()}
    table = read_safetensors(folder)
    # `lm_head.weight` is a second name of `wte.weight`. A file may have one of them, or both.
    has_lm_head = "lm_head.weight" in table
    if has_lm_head:
        table.setdefault("wte.weight", table["lm_head.weight"])

    def leaf(name, *shape):
        return read_tensor(table, huggingface_name(name), *shape)

    params = build_params(hparams, leaf)
    if has_lm_head:
        lm_head = read_tensor(table, "lm_head.weight", *params["wte"].shape)
        if not np.array_equal(lm_head, params["wte"]):
            raise UserError(f"{folder}: lm_head.weight is not wte.weight, as it would be in GPT-2")
    return hparams, params


def set_ends(encoder, folder, n_vocab):
    """Set the ids that start and end a text, if the model's configuration names some.

    A field in `generation_config.json` replaces the same field in `config.json`.
    """
    config = read_json(folder / "config.json", optional=True)
    config |= read_json(folder / "generation_config.json", optional=True)

    def valid_ids(value):
        ids = value if isinstance(value, list) else [value]
        return [id for id in ids if type(id) is int and 0 <= id < n_vocab]

    encoder.bos = valid_ids(config.get("bos_token_id")) or encoder.bos
    encoder.eos = {*valid_ids(config.get("eos_token_id"))} or encoder.eos


def build_params(hparams, leaf):
    """Build the tree of parameters, with `leaf(name, *shape)` for each of them.

    The names are OpenAI's without the `model/` at their start. The shapes are those that `gpt2`
    takes. The calls always come in the same order, because a `leaf` may return random numbers.
    """
    n_embd = hparams["n_embd"]

    def norm(name):
        return {"g": leaf(f"{name}/g", n_embd), "b": leaf(f"{name}/b", n_embd)}

    def linear(name, n_in, n_out):
        return {"w": leaf(f"{name}/w", n_in, n_out), "b": leaf(f"{name}/b", n_out)}

    def attn(name):
        return {
            "c_attn": linear(f"{name}/c_attn", n_embd, 3 * n_embd),
            "c_proj": linear(f"{name}/c_proj", n_embd, n_embd),
        }

    def mlp(name):
        return {
            "c_fc": linear(f"{name}/c_fc", n_embd, 4 * n_embd),
            "c_proj": linear(f"{name}/c_proj", 4 * n_embd, n_embd),
        }

    def block(name):
        return {
            "ln_1": norm(f"{name}/ln_1"),
            "attn": attn(f"{name}/attn"),
            "ln_2": norm(f"{name}/ln_2"),
            "mlp": mlp(f"{name}/mlp"),
        }

    wte, wpe = leaf("wte", hparams["n_vocab"], n_embd), leaf("wpe", hparams["n_ctx"], n_embd)
    blocks = [block(f"h{i}") for i in range(hparams["n_layer"])]
    return {"wte": wte, "wpe": wpe, "blocks": blocks, "ln_f": norm("ln_f")}


def read_tensor(table, name, *shape):
    """Return a tensor of this shape from a table of contents, as a read-only float32 array.

    An aligned float32 tensor is a view of the mapped file. Any other one is copied once, here,
    because otherwise every matrix product would copy it.
    """
    if name not in table:
        raise UserError(f"{name} is missing from the weights")
    tensor = table[name]
    # OpenAI's weights `w` are stored with a first axis of 1.
    if tensor.dtype not in DTYPES or tensor.shape not in ([*shape], [1, *shape]):
        what = f"{name} is {tensor.dtype} {reprlib.repr(tensor.shape)}"
        wanted = f"float32, float16 or bfloat16 {reprlib.repr([*shape])}"
        raise UserError(f"{tensor.path}: {what}, not {wanted}")
    dtype = np.dtype(DTYPES[tensor.dtype])
    if tensor.data.size != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{tensor.path} is damaged or cut off: {name} is not complete")
    array = tensor.data.view(dtype).reshape(shape)
    if dtype == "<u2":  # bfloat16, which is the upper half of a float32
        array = (array.astype("<u4") << 16).view("<f4")
    array = np.require(array, np.float32, ["ALIGNED"])
    array.flags.writeable = False
    return array


def map_file(path):
    """Return the bytes of a file as an array, mapped into memory."""
    try:
        return np.asarray(np.memmap(path, np.uint8, "r"))  # slices of a plain array are faster
    except (OSError, ValueError):  # Some drives cannot map files. An empty file cannot be mapped.
        return np.fromfile(path, np.uint8)


# --- Hugging Face's table of contents: huggingface.co/docs/safetensors describes the format ---


def read_safetensors(folder):
    """Read the table of `model.safetensors`, or of the files that an index names."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        return read_header(path)  # If both are missing, the error is about model.safetensors.
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} is damaged: it has no weight_map")
    table = {}
    for name in sorted({*map(str, weight_map.values())}):
        if name not in os.listdir(folder):  # So the name cannot be a path to another folder.
            raise UserError(f"{index} is damaged: there is no file {reprlib.repr(name)}")
        table |= read_header(folder / name)
    return table


def read_header(path):
    """Read the table of contents at the start of a file.

    The first 8 bytes are the length of the header. The header is JSON. For each tensor it has the
    type, the shape, and where the bytes begin and end, counted from the end of the header.
    """
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > len(data):
        advice = "If you cloned the folder with git, run `git lfs pull` (Git LFS)."
        raise UserError(f"{path} is damaged or cut off: its header is not complete. {advice}")
    table, numbers = {}, data[start:]
    try:
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = str(entry["dtype"])[:9]  # cut short, because a message may quote it
            name = name.removeprefix("transformer.")
            table[name] = Tensor(path, dtype, entry["shape"], numbers[begin:end])
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    if sum(tensor.data.size for tensor in table.values()) != numbers.size:
        raise UserError(f"{path} is damaged or cut off: its numbers do not end where the file ends")
    return table


def huggingface_name(name):
    """Turn OpenAI's name of a parameter into Hugging Face's.

    >>> huggingface_name("h0/attn/c_attn/w"), huggingface_name("wte")
    ('h.0.attn.c_attn.weight', 'wte.weight')
    """
    name = re.sub(r"^h(\d+)", r"h.\1", name).replace("/", ".")
    if name in ("wte", "wpe"):
        return f"{name}.weight"
    layer, last = name.rsplit(".", 1)
    return f"{layer}.bias" if last == "b" else f"{layer}.weight"


# --- TensorFlow's table of contents ---
#
# It is a table of LevelDB: google/leveldb, doc/table_format.md. Its values are protocol buffers:
# protobuf.dev, Encoding. Their fields are in tensorflow/core/protobuf/tensor_bundle.proto.

MAGIC = bytes.fromhex("57fb808b247547db")  # the last bytes of a table
# An entry of the table. `file` is the end of the name of a data file.
Entry = collections.namedtuple("Entry", "dtype shape file start size checksum")


def find_checkpoint(path):
    """Return the path of the checkpoint that the file `checkpoint` names, without `.index`.

    A fine-tuned model may name the folder that it was trained in, so only the last part counts.
    """
    latest = re.search(r'(?m)^model_checkpoint_path: "([^"\0]+)"', read_text(path))
    if not latest:
        raise UserError(f"{path} names no checkpoint")
    name = re.split(r"[/\\]", latest[1])[-1]
    return path.parent / name[:255]  # No name of a file is longer, and a message may quote it.


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Read a TensorFlow checkpoint into nested dicts and lists of float32 arrays.

    `tf_ckpt_path` is the path without `.index`. Raises ValueError for a damaged file, and for a
    tensor that is missing or not of the shape that `hparams` ask for.
    """
    entries = read_index(f"{tf_ckpt_path}.index")
    table = {}
    for file in {entry.file for entry in entries.values()}:
        path = f"{tf_ckpt_path}.{file}"
        data = map_file(path)
        in_file = {name: entry for name, entry in entries.items() if entry.file == file}
        if data.size != size_of(in_file):
            raise UserError(f"{path} is damaged or cut off: its size is not the one in the index")
        for name, entry in in_file.items():
            part = data[entry.start : entry.start + entry.size]
            table[name] = Tensor(path, entry.dtype, entry.shape, part)
    return build_params(hparams, lambda name, *shape: read_tensor(table, f"model/{name}", *shape))


def size_of(entries):
    """Return the size in bytes of the file that these tensors fill."""
    return max((entry.start + entry.size for entry in entries.values()), default=0)


def read_index(path):
    """Return the `Entry` for each name in a table.

    Raises UserError if a checksum is wrong, or anything else is not as TensorFlow writes it.
    """
    data = Path(path).read_bytes()
    try:
        # Not all names are UTF-8. In Latin-1, every byte is a character.
        table = {key.decode("latin-1"): read_fields(value) for key, value in read_table(data)}
        # The entry without a name has the number of data files in its field 1.
        n_files = integer(table.pop(""), 1)
        return {name: read_entry(fields, n_files) for name, fields in table.items()}
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None


def read_entry(fields, n_files):
    """Turn the fields of a BundleEntryProto into an `Entry`.

    Its fields are 1 type, 2 shape, 3 number of the file, 4 first byte, 5 size in bytes, 6 checksum,
    and 7 partitions. A shape has a message for each axis in its field 2, with the size in field 1.
    """
    dtype, n_file, start, size, checksum = (integer(fields, i) for i in (1, 3, 4, 5, 6))
    shape_message = fields[2][0]
    axes = read_fields(shape_message)[2]
    shape = [integer(read_fields(axis), 1) for axis in axes]
    if dtype == 0 or n_file >= n_files:
        raise ValueError("a tensor has no type, or it is in a file that does not exist")
    if fields[7]:
        dtype = "in partitions"  # `read_tensor` refuses it, like any type that it does not know.
    return Entry(dtype, shape, f"data-{n_file:05}-of-{n_files:05}", start, size, checksum)


def read_table(data):
    """Yield the keys and the values of a table.

    A handle says where a block is. The last 48 bytes have the handles of two blocks. The first
    block is not needed. The values in the second one are the handles of the blocks with entries.
    """
    if data[-8:] != MAGIC:
        raise ValueError("it does not end as an index does")
    footer = io.BytesIO(data[-48:])
    _, second = read_handle(footer), read_handle(footer)
    for _, value in read_block(data, *second):
        yield from read_block(data, *read_handle(io.BytesIO(value)))


def read_handle(stream):
    """Read where a block begins, and how many bytes it has."""
    return read_varint(stream), read_varint(stream)


def read_block(data, start, size):
    """Yield the keys and the values of a block.

    An entry has three numbers: how many bytes the key shares with the key before, how many more it
    has, and how many bytes the value has. After the entries come restart points of 4 bytes, which
    are for searching, and their count. After the block come one byte, which is 0 if the block is
    not compressed, and 4 bytes, which are the checksum of the block and that byte.
    """
    end = start + size
    block_and_byte = data[start : end + 1]
    checksum = int.from_bytes(data[end + 1 : end + 5], "little")
    if masked_crc32c(block_and_byte) != checksum:
        raise ValueError("a checksum is wrong")
    if data[end] != 0:
        raise ValueError("a block is compressed")
    block = data[start:end]
    n_restarts = int.from_bytes(block[-4:], "little")
    end_of_entries = size - 4 - 4 * n_restarts
    stream, key = io.BytesIO(block), b""
    while stream.tell() < end_of_entries:
        n_shared, n_more, n_value = read_varint(stream), read_varint(stream), read_varint(stream)
        key = key[:n_shared] + stream.read(n_more)
        yield key, stream.read(n_value)


def read_fields(message):
    """Return the values in a protocol buffer, as a list for each field number.

    A value is a number, or bytes. Before it come the number of its field and its wire type.
    """
    fields, stream = collections.defaultdict(list), io.BytesIO(message)
    while stream.tell() < len(message):
        field, wire_type = divmod(read_varint(stream), 8)
        if wire_type == 0:
            fields[field].append(read_varint(stream))
        elif wire_type == 5:  # a number of 4 bytes
            fields[field].append(int.from_bytes(stream.read(4), "little"))
        elif wire_type == 2:  # bytes, after their count
            fields[field].append(stream.read(read_varint(stream)))
        else:
            raise ValueError("a field has a wire type that TensorFlow does not use here")
    return fields


def integer(fields, i):
    """Return the value of a field that is a number. A field with the value 0 is not stored."""
    value = fields[i][0] if fields[i] else 0
    if not isinstance(value, int):
        raise ValueError("a field has bytes instead of a number")
    return value


def read_varint(stream):
    """Read a number of variable length.

    Each byte has 7 bits of the number, the lowest bits first. If its highest bit is 1, another byte
    follows.

    >>> read_varint(io.BytesIO(bytes([0b1_0101100, 0b0_0000010])))
    300
    """
    number = 0
    for shift in range(0, 70, 7):  # at most ten bytes
        byte = stream.read(1)[0]
        number += (byte & 0b0_1111111) << shift
        if not byte & 0b1_0000000:
            return number
    raise ValueError("a number is too long")


def masked_crc32c(data):
    """Return the checksum of some bytes as LevelDB stores it: rotated, plus a constant."""
    import google_crc32c

    crc = google_crc32c.value(data)
    rotated = (crc >> 15) | (crc << 17)  # by 15 bits; the bits above 32 are dropped below
    return (rotated + 0xA282EAD8) % 2**32


# --- Download: OpenAI's six files, each whole or not at all ---


def download_gpt2_files(model_size, model_dir):
    """Download those files of a published size that `model_dir` lacks.

    `GPT2_BASE_URL` in the environment replaces the address up to `/<size>/<file>`. Raises
    ValueError for a size that was not published, or if the index in `model_dir` is damaged, and
    OSError if the network, the server or the disk fails, or if a new file fails its check. If the
    connection breaks, the part that has come is kept, and the next call continues there.
    """
    if model_size not in SIZES:
        raise UserError(f"model_size must be {', '.join(SIZES)}, not {model_size!r}")
    folder = home(model_dir)
    paths = [folder / name for name in FILES]
    if all(path.exists() for path in paths):
        return
    from filelock import FileLock

    url = f"{(os.environ.get('GPT2_BASE_URL') or BASE_URL).rstrip('/')}/{model_size}"
    print(f"Downloading {model_size} from {url} to {folder}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    # Only one process downloads. Otherwise, one could write into a file that another has checked.
    with FileLock(folder / ".lock"):
        for path in paths:
            if not path.exists():
                fetch(f"{url}/{path.name}", path)


def fetch(url, path):
    """Download a file under a temporary name, check it, and rename it."""
    part = path.with_name(f"{path.name}.part")
    min_size = 0
    if path.name == DATA:
        min_size = size_of(read_index(path.with_name(INDEX)))
    try:
        receive_all(url, part, min_size)
    except (OSError, OverflowError, ValueError) as error:  # The last two: nonsense in the headers.
        reason = str(error)[:300]  # A server can make it long.
        raise OSError(f"{url} did not arrive in {part}: {reason}\n{BUNDLED}") from None
    try:
        check_download(path.name, part)
    except UserError as error:
        part.unlink()
        raise OSError(f"{error}\nThat file is deleted. Run again to download it again.") from None
    part.replace(path)


def receive_all(url, part, min_size):
    """Repeat a request until the whole file is in `part`. Raises OSError if that fails."""
    for _ in range(MAX_REQUESTS):
        if receive(url, part, min_size):
            return
    raise OSError(f"{MAX_REQUESTS} answers ended too early. Run again to continue there.")


def receive(url, part, min_size):
    """Request the rest of a file, and append it to `part`. Return whether the file is complete.

    The file has at least `min_size` bytes, which counts if the server does not tell its size.
    Raises OSError if another request would not help. The comments say what a server may do, and the
    server in tests/test_download.py does all of it.
    """
    import urllib3
    from tqdm import tqdm

    with open(part, "ab") as file, new_session(url) as session:
        n_have = file.tell()  # The part has this many bytes already.
        # If the part is complete, a request from its end would be an error. So its last byte is
        # requested again.
        response, start = request_from(session, url, max(n_have - 1, 0))
        n_bytes = response.raw.length_remaining  # None if the server does not tell it
        size = max(min_size, start + (n_bytes or 0))  # of the whole file, as far as it is known
        is_too_long = n_bytes is not None and n_have > size
        if is_too_long or response.status_code == 416:
            file.truncate(0)  # The part is longer than the file.
            return False
        with tqdm.wrapattr(file, "write", size, desc=part.stem, initial=n_have) as out:
            try:
                for chunk in read_chunks(response.raw, n_have - start):
                    out.write(chunk)
            except urllib3.exceptions.HTTPError:  # The connection broke.
                return False
        return file.tell() >= size


def request_from(session, url, start):
    """Request a file from the byte `start` on. Return the answer, and the byte it starts with."""
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    response = session.get(url, headers=headers, stream=True, timeout=(3, 10))
    if response.status_code not in (200, 206, 416):
        raise OSError(f"the server answered {response.status_code}")
    sent = response.headers.get("Content-Range", "")
    if response.status_code == 206 and sent and not sent.startswith(f"bytes {start}-"):
        raise OSError("the server sent another part of the file")
    # With status 200, the whole file comes, whatever was requested.
    return response, (start if response.status_code == 206 else 0)


def read_chunks(stream, n_skipped):
    """Yield what comes in a stream, without its first `n_skipped` bytes."""
    while chunk := stream.read1(1 << 16):
        yield chunk[n_skipped:]
        n_skipped = max(n_skipped - len(chunk), 0)


def new_session(url):
    """Return a session of the library `requests` that asks a busy server up to five times."""
    import requests
    import urllib3

    options = {"status_forcelist": [408, 429, *range(500, 600)], "retry_after_max": 30}
    retry = urllib3.Retry(total=4, connect=2, backoff_factor=0.5, **options)
    session = requests.Session()
    session.mount(url, requests.adapters.HTTPAdapter(max_retries=retry))
    return session


def check_download(name, part):
    """Raise UserError if a downloaded file cannot be OpenAI's file of this name."""
    if name in SHA256 and hashlib.sha256(part.read_bytes()).hexdigest() != SHA256[name]:
        raise UserError(f"{part} is not OpenAI's file: its SHA-256 does not match.")
    if name == "checkpoint" and find_checkpoint(part).name != "model.ckpt":
        raise UserError(f"{part} is not OpenAI's file: it names another checkpoint.")
    if name == "hparams.json":
        read_hparams(part, HPARAMS)
    if name == INDEX:
        read_index(part)
    if name == DATA:
        check_data(part, read_index(part.with_name(INDEX)))


def check_data(path, tensors):
    """Raise UserError unless a data file has the size and the checksums in its index."""
    if path.stat().st_size != size_of(tensors):
        raise UserError(f"{path} is damaged: its size is not the one in the index.")
    with open(path, "rb") as file:
        for name, tensor in tensors.items():
            file.seek(tensor.start)
            if masked_crc32c(file.read(tensor.size)) != tensor.checksum:
                raise UserError(f"{path} is damaged: the checksum of {name[:40]} does not match.")


# --- Command: from the words in a shell to the text ---


def command_line(main):
    """Run `main` with the words typed in a shell.

    Prints the text that `main` returns. If `main` has a parameter `show`, it gets a function that
    prints each piece of the text at once. An error that the user can correct ends in a message, and
    so do errors of the system, a missing package, and a lack of memory. Any other error is a bug,
    and keeps its traceback.
    """
    try:
        use_utf_8()
        arguments = read_arguments(main)
        text = main(**arguments)
        # `show` has printed the text already, but not the end of the line.
        print("" if "show" in arguments else text, flush=True)
        return
    except ModuleNotFoundError as error:
        status = f"{error}: pip install -r requirements.txt"
    except BrokenPipeError:  # The reader closed the pipe, as `head` does.
        status = 141
    except KeyboardInterrupt:
        status = 130
    except MemoryError:
        status = "There is not enough memory."
    except (OSError, UserError) as error:
        status = str(error)
    # End the line after Ctrl-C, and print what is still in the buffer.
    try:
        print(end="\n" if status == 130 else "", flush=True)
    except OSError:  # The pipe is closed, or the disk is full. At exit, Python would try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)  # If the status is a text, Python prints it and exits with 1.


def use_utf_8():
    """Read and write UTF-8 if standard input and output are redirected, whatever the code page is.

    PYTHONIOENCODING can name another encoding. Characters that it lacks are written as "?".
    """
    for stream in (sys.stdin, sys.stdout):
        if not isinstance(stream, io.TextIOWrapper):  # as in a notebook
            continue
        if not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
            stream.reconfigure(encoding="utf-8")
        if stream is sys.stdout:
            stream.reconfigure(errors="replace")


def read_arguments(main):
    """Return the arguments for `main`. With -h or --help, print the help and exit."""
    signature = shell_signature(main)
    if {"-h", "--help"} & {*sys.argv}:
        print_help(main, signature)
        sys.exit()
    parameters = signature.parameters.values()
    # A prompt that is left out comes from standard input. So Fire must not ask for it.
    parameters = [p.replace(default=None) if p.name == "prompt" else p for p in parameters]
    arguments = parse_words(sys.argv[1:], signature.replace(parameters=parameters))
    if "prompt" in signature.parameters:
        arguments["prompt"] = read_prompt(arguments.get("prompt"))
    if "show" in inspect.signature(main).parameters:  # It is not in the shell's signature.
        arguments["show"] = new_show()
    return arguments


def new_show():
    """Return a function that prints the pieces of a text, and finds the best number of threads.

    A number of threads that the user has set in the environment is kept.
    """
    if {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys():
        return functools.partial(print, end="", flush=True)
    import threadpoolctl

    tuner = tune_threads(threadpoolctl.ThreadpoolController().select(user_api="blas"))

    def show(piece):
        print(piece, end="", flush=True)
        next(tuner)

    return show


def tune_threads(blas):
    """Use all threads or half of them, whichever is faster; call `next` on this for each token.

    OpenBLAS, which NumPy mostly uses, cuts each product into as many parts as there are processors,
    and waits for the last part. If another program keeps one processor busy, every product waits.
    Half of the threads leave room for that program. Both are timed again every 50 tokens. The least
    time of two or three tokens counts, because the first one after a change may be slow.
    """
    all_threads = max((library["num_threads"] for library in blas.info()), default=1)
    half = max(all_threads // 2, 1)

    def least_seconds(n_threads, n_tokens):
        blas.limit(limits=n_threads)  # until the next limit is set
        seconds = []
        for _ in range(n_tokens):
            start = time.perf_counter()
            yield  # until the next token is there
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    while True:
        with_all = yield from least_seconds(all_threads, 2)
        with_half = yield from least_seconds(half, 3)
        blas.limit(limits=all_threads if with_all < with_half else half)
        for _ in range(45):
            yield


def print_help(main, signature):
    """Print the help that Fire makes from the docstring of `main` and from this signature."""
    import fire

    @functools.wraps(main)  # It has the name and the docstring of `main`.
    def command(): ...

    command.__signature__ = signature
    trace = fire.trace.FireTrace(command, name=os.path.basename(sys.argv[0]))
    print(fire.helptext.HelpText(command, trace), flush=True)


def parse_words(words, signature):
    """Return the arguments that Fire finds in the words, for a function with this signature.

    They are strings. Examples of what people type are in tests/test_command.py.
    """
    import fire

    words = complete_flags(words, signature)
    arguments = {}

    def command(*args, **flags):
        arguments.update(signature.bind(*args, **flags).arguments)

    command.__signature__ = signature
    fire.decorators.SetParseFn(str)(command)  # Otherwise the prompt 42 would arrive as a number.
    # Words after the last -- are options of Fire. For Fire, the word - separates two commands, but
    # here, - is a prompt. So the separator is a character that no word can have.
    words += ["--", "--separator=\0"]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            fire.Fire(command, words)
    except fire.core.FireExit as error:
        fault = error.trace.elements[-1].ErrorAsStr()
        advice = "If a text has several words, put it in quotes."
        raise UserError(f"{fault}\n{advice} See python {sys.argv[0]} --help.") from None
    return arguments


FLAG = r"--?[a-zA-Z][\w-]*"  # a word such as --seed or -s


def complete_flags(words, signature):
    """Return the words, with =True after each flag that is only on or off.

    Otherwise, Fire would take the next word for its value. Any other flag without a value is a
    UserError, because Fire would give it the value True.
    """
    switches = {name for name, p in signature.parameters.items() if p.default is False}
    completed = []
    end = "--end"  # A flag that is the last word has no value either.
    for word, next_word in itertools.pairwise([*words, end]):
        if re.fullmatch(FLAG, word) and word.strip("-").replace("-", "_") in switches:
            word += "=True"
        elif re.fullmatch(FLAG, word) and re.match(FLAG, next_word):
            raise UserError(f"{word} needs a value. See python {sys.argv[0]} --help.")
        completed.append(word)
    return completed


def shell_signature(main):
    """Return the signature that `main` has in a shell.

    Only parameters without a default are positional. All others are flags, so that no word of a
    prompt becomes the value of an option if the quotes are missing. Parameters that are
    keyword-only in `main` are left out, because they are for Python.
    """
    signature = inspect.signature(main)
    in_shell = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    positional = [p for p in in_shell if p.default is p.empty]
    flags = [p.replace(kind=p.KEYWORD_ONLY) for p in in_shell if p.default is not p.empty]
    return signature.replace(parameters=positional + flags)


def read_prompt(prompt):
    """Return the prompt, with a line feed at each line end.

    If it is "-", or if it is missing and standard input is redirected, standard input is read.
    """
    is_missing = prompt is None
    stdin = sys.stdin or io.StringIO()  # It can be closed.
    try:
        if prompt == "-" or (is_missing and not stdin.isatty()):
            prompt = stdin.read().removesuffix("\n")
        if is_missing and not prompt:
            raise UserError(f"There is no prompt. See python {sys.argv[0]} --help.")
        prompt.encode("utf-8")  # This fails if an argument had a byte that is not UTF-8.
    except UnicodeError as error:
        raise UserError(f"The prompt is not valid {error.encoding}: {error.reason}") from None
    # "$(cat file)" with a file from Windows leaves its byte order mark and the last "\r".
    prompt = prompt.removeprefix("\ufeff").removesuffix("\r")
    prompt = re.sub("\r\n?", "\n", prompt)
    if prompt.endswith(" "):
        advice = "The prompt ends in a space. Omit the space: GPT-2's words begin with one."
        print(advice, file=sys.stderr)
    return prompt


def encode_prompt(prompt, encoder, hparams, n_new):
    """Return the ids of a prompt, or `encoder.bos` if it is empty.

    Raises UserError if the model cannot read them, or if there is no room for `n_new` more.
    """
    ids = encoder.encode(prompt, allowed_special="all") or [*encoder.bos]
    if not ids:
        raise UserError("The prompt is empty, and this model has no token that starts a text.")
    if max(ids) >= hparams["n_vocab"]:
        token = encoder.decoder[max(ids)]
        raise UserError(f"The prompt has the token {token!r}, but its id has no row in wte.")
    room = hparams["n_ctx"] - len(ids)
    if n_new > room:
        context = f"the context of this model has {hparams['n_ctx']:,}"
        advice = "Shorten the prompt."
        if room > 0:
            advice = f"n_tokens_to_generate may be {room:,} at most."
        raise UserError(f"The prompt has {len(ids):,} tokens, and {context}. {advice}")
    return ids


def number(name, value, kind, least, most=np.inf):
    """Return an option as a number. `kind` is int or float. The option may be text.

    Raises UserError, with the limits, for anything else and for what is out of range.
    """
    with contextlib.suppress(ValueError):
        result = kind(str(value))  # As text, so that int does not turn 3.7 into 3.
        if least <= result <= most:
            return result
    limits = f"{least} or more" if most == np.inf else f"from {least} to {most}"
    what = "a whole number" if kind is int else "a number"
    raise UserError(f"{name} must be {what}, {limits}, not {value!r}")


def picker(sample, temperature, top_k, top_p, seed):
    """Return the function that picks each token: greedy, or `sample` with these limits.

    If a temperature, top_k, top_p or a seed is given, tokens are sampled. The default temperature
    is then 1. With temperature 0, the likeliest token is taken each time, whatever else is given.
    """
    if temperature is None:
        temperature = 0 if (top_k, top_p, seed) == (None, None, None) else 1
    limits = {"temperature": number("temperature", temperature, float, 0)}
    if top_k is not None:
        limits["top_k"] = number("top_k", top_k, int, 1)
    if top_p is not None:
        limits["top_p"] = number("top_p", top_p, float, 0, 1)
    if seed is not None:
        seed = number("seed", seed, int, 0)
    sampling = functools.partial(sample, random=np.random.default_rng(seed), **limits)
    return sampling if limits["temperature"] else np.argmax
