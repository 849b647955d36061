"""Open a GPT-2 from its folder, download OpenAI's models, and run the command.

    encoder, hparams, params = load_encoder_hparams_and_params("124M", "models")

A model is a table of contents and raw numbers. The table says for every tensor its name, its type,
its shape and where its bytes lie. OpenAI's table is `model.ckpt.index`, and Hugging Face's is the
header of `model.safetensors`. So nothing is converted: the file of numbers is mapped into memory,
and the parameters are views of it. The system reads a page of the file when it is first used.
"""

import collections
import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import re
import reprlib
import sys
from pathlib import Path

import numpy as np

from encoder import TOKENIZERS, UserError, get_encoder, read_json, read_text, require

MODELS = Path(__file__).resolve().parent / "models"
SIZES = ("124M", "355M", "774M", "1558M")
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
FILES = ("checkpoint", "hparams.json", "encoder.json", "vocab.bpe", INDEX, DATA)
SHA256 = {  # of the tokenizer, which is the same in all sizes
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
TRIES = 20  # of each download
BUNDLED = "The bundled model, 1M, needs no network."

# --- Load: from a folder to the tokenizer, the sizes and the parameters ---

# OpenAI's name of each size, and Hugging Face's.
HPARAMS = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
HPARAMS |= {name: name for name in ("n_embd", "n_head", "n_layer")}
# What Hugging Face's library takes for a size that is left out.
DEFAULTS = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
# What a config.json must say, or leave out: `gpt2` computes nothing else. The last two are other
# names of n_head and n_layer.
FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
FIXED |= {"tie_word_embeddings": True, "scale_attn_weights": True, "add_cross_attention": False}
FIXED |= {"scale_attn_by_inverse_layer_idx": False, "quantization_config": None}
FIXED |= {"num_attention_heads": None, "num_hidden_layers": None}
# NumPy's names for the types of safetensors, and for those of TensorFlow, which are numbers. NumPy
# has no bfloat16: it is read as whole numbers of the same size.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", 1: "<f4", 19: "<f2", 14: "<u2"}


def load_encoder_hparams_and_params(model_size, models_dir):
    """Load a model. A published size that is missing is downloaded into `models_dir/model_size`.

    `model_size` is a published size, the name of a folder in `models_dir`, or the path of any other
    folder. With `models_dir` None, the models are in `models` beside this file. A folder with a
    `config.json` has Hugging Face's layout. Of its `generation_config.json`, only the tokens that
    start and end a text are read.

    Returns the `Encoder`, OpenAI's hparams as a dict, and the parameters as nested dicts and lists
    of float32 arrays, which are read-only. `wte` may have more rows than there are tokens, to pad
    it to a round number. Such rows are cut off, so that they cannot be chosen.

    Raises ValueError for a name that is no model, and for a file that is damaged or that holds
    something else than GPT-2; OSError for a file that is missing or cannot be downloaded.
    """
    folder = find_model(model_size, models_dir)
    check_folder(folder)
    encoder = get_encoder(folder.name, folder.parent)
    if (folder / "config.json").exists():
        hparams, params = load_hugging_face(folder)
    else:
        hparams = read_hparams(folder / "hparams.json", HPARAMS)
        params = load_gpt2_params_from_tf_ckpt(find_checkpoint(folder / "checkpoint"), hparams)
    params["wte"] = params["wte"][: len(encoder.encoder)]
    hparams["n_vocab"] = len(params["wte"])
    set_ends(encoder, folder, hparams["n_vocab"])
    return encoder, hparams, params


def find_model(model_size, models_dir):
    """Return the folder of a model. A published size that is not there is downloaded first."""
    models = MODELS if models_dir is None else home(models_dir)
    names = {path.parent.name for path in models.glob("*/*")}
    if model_size in names.union(SIZES):
        folder = models / model_size
    elif model_size and home(model_size).is_dir():
        folder = home(model_size)
    else:
        others = ", ".join(sorted(names.difference(SIZES))) or "there is none"
        where = f"{', '.join(SIZES)}, or a folder in {models.absolute()} ({others})"
        raise UserError(f"model_size must be {where}, not {model_size!r}")
    if model_size in SIZES and not is_hugging_face(folder):
        download_gpt2_files(model_size, folder)
    return folder


def home(path):
    """Return a path with the home of the user in place of a ~ at its start."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from None


def is_hugging_face(folder):
    """Whether a folder has a file of Hugging Face's layout, even if others are missing."""
    names = ("config.json", "tokenizer.json", "vocab.json", "model*.safetensors*")
    return any(any(folder.glob(name)) for name in names)


def check_folder(folder):
    """Raise UserError for a folder that cannot be read as it is, and say what to do."""
    has_config = (folder / "config.json").exists()
    has_pickles = any(folder.glob("pytorch_model*"))
    if is_hugging_face(folder) and not has_config:
        raise UserError(f"{folder} is not complete, because config.json is missing.")
    if has_config and has_pickles and not any(folder.glob("model*.safetensors*")):
        lines = [f"{folder} has its weights as a pickle. Convert them with these lines of Python:"]
        for name, kind in {"model": "AutoModelForCausalLM", "tokenizer": "AutoTokenizer"}.items():
            lines.append(f"{name} = transformers.{kind}.from_pretrained({str(folder)!r})")
            lines.append(f"{name}.save_pretrained({str(folder)!r})")
        raise UserError("\n".join(lines))
    if not any((folder / name).exists() for name in TOKENIZERS):
        kinds = "tokenizer.json, or vocab.json and merges.txt, or encoder.json and vocab.bpe"
        raise UserError(f"{folder} has no tokenizer that is understood. It must have {kinds}.")


def read_hparams(path, names, **defaults):
    """Read a JSON file that has the five sizes of a model under these names.

    Raises UserError unless they are whole numbers above 0, and the heads share n_embd.
    """
    sizes = defaults | read_json(path)
    for name in names:
        size = sizes.get(name)
        if type(size) is not int or size < 1:
            raise UserError(f"{path}: {name} must be a number above 0, not {reprlib.repr(size)}")
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(f"{path}: n_embd must be a multiple of n_head")
    return sizes


def load_hugging_face(folder):
    """Load the sizes and the parameters from a folder as `save_pretrained` writes it."""
    path = folder / "config.json"
    config = read_hparams(path, HPARAMS.values(), **DEFAULTS)
    require(path, config, **FIXED)
    hparams = {name: config[field] for name, field in HPARAMS.items()}
    table = read_safetensors(folder)
    head = "lm_head.weight"
    if head in table:  # Some files have the tied weights under this name only.
        table.setdefault("wte.weight", table[head])

    def leaf(name, *shape):
        return read_tensor(table, huggingface_name(name), *shape)

    params = build_params(hparams, leaf)
    if head in table and (read_tensor(table, head, *params["wte"].shape) != params["wte"]).any():
        raise UserError(f"{folder}: {head} is not wte.weight, as it is in GPT-2")
    return hparams, params


def set_ends(encoder, folder, n_vocab):
    """Set the ids that a text starts from and ends with, if the model has others than usual.

    As in Hugging Face's library, `generation_config.json` counts more than `config.json`.
    """
    config = read_json(folder / "config.json", optional=True)
    config |= read_json(folder / "generation_config.json", optional=True)

    def known(value):
        ids = value if isinstance(value, list) else [value]
        return [id for id in ids if id in range(n_vocab)]

    encoder.bos = known(config.get("bos_token_id")) or encoder.bos
    encoder.eos = {*known(config.get("eos_token_id"))} or encoder.eos


def build_params(hparams, leaf):
    """Build the tree of parameters, with `leaf(name, *shape)` for each, in a fixed order.

    Names are OpenAI's without the leading `model/`. Shapes are those that `gpt2` takes.
    """
    n_embd = hparams["n_embd"]

    def norm(name):
        return {"g": leaf(f"{name}/g", n_embd), "b": leaf(f"{name}/b", n_embd)}

    def linear(name, n_in, n_out):
        return {"w": leaf(f"{name}/w", n_in, n_out), "b": leaf(f"{name}/b", n_out)}

    def block(name):
        ln_1 = norm(f"{name}/ln_1")
        attn = {"c_attn": linear(f"{name}/attn/c_attn", n_embd, 3 * n_embd)}
        attn["c_proj"] = linear(f"{name}/attn/c_proj", n_embd, n_embd)
        ln_2 = norm(f"{name}/ln_2")
        mlp = {"c_fc": linear(f"{name}/mlp/c_fc", n_embd, 4 * n_embd)}
        mlp["c_proj"] = linear(f"{name}/mlp/c_proj", 4 * n_embd, n_embd)
        return {"ln_1": ln_1, "attn": attn, "ln_2": ln_2, "mlp": mlp}

    wte, wpe = leaf("wte", hparams["n_vocab"], n_embd), leaf("wpe", hparams["n_ctx"], n_embd)
    blocks = [block(f"h{i}") for i in range(hparams["n_layer"])]
    return {"wte": wte, "wpe": wpe, "blocks": blocks, "ln_f": norm("ln_f")}


def read_tensor(table, name, *shape):
    """Return a tensor of this shape from a table of contents, as a read-only float32 array.

    It is a view of the mapped file where that has aligned float32. Everything else is copied once,
    here: a product with numbers that are not aligned would copy them each time.
    """
    if name not in table:
        raise UserError(f"{name} is missing from the weights")
    path, dtype, found, data = table[name]
    if dtype not in DTYPES or found not in ([*shape], [1, *shape]):  # OpenAI's have an axis of 1
        found = f"{dtype} {reprlib.repr(found)}"
        raise UserError(f"{path}: {name} is {found}, not float32 or float16 {[*shape]}")
    if data.size != np.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise UserError(f"{path} is damaged or cut off: {name} is not complete")
    array = data.view(DTYPES[dtype]).reshape(shape)
    if DTYPES[dtype] == "<u2":  # bfloat16 is the upper half of a float32
        array = (array.astype("<u4") << 16).view("<f4")
    array = np.require(array, np.float32, "A")
    array.flags.writeable = False
    return array


def map_file(path):
    """Return the bytes of a file as an array, mapped into memory."""
    try:
        return np.asarray(np.memmap(path, np.uint8, "r"))
    except (OSError, ValueError):  # Some drives cannot map a file, and no drive an empty one.
        return np.fromfile(path, np.uint8)


# --- Hugging Face's table of contents: huggingface.co/docs/safetensors describes the format ---


def read_safetensors(folder):
    """Read the headers of the weights: of `model.safetensors`, or of the files in its index."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        return read_header(path)
    weight_map, table = read_json(index).get("weight_map"), {}
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} is damaged: it has no weight_map")
    for name in {*map(str, weight_map.values())}:
        if name not in os.listdir(folder):
            raise UserError(f"{index} is damaged: there is no file {reprlib.repr(name)}")
        table |= read_header(folder / name)
    return table


def read_header(path):
    """Read the table of contents at the start of a file: each tensor's place, by its name.

    The first 8 bytes are the length of the header. The header is JSON. For each tensor it has the
    type, the shape, and where the bytes begin and end, counted from the end of the header.
    """
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if start > len(data):
        advice = "If it came by git, `git lfs pull` may bring the whole file (Git LFS)."
        raise UserError(f"{path} is damaged or cut off: its header is not complete. {advice}")
    table, ends = {}, [0]
    try:
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            numbers = data[start + begin : start + end]
            name = name.removeprefix("transformer.")
            table[name] = path, str(entry["dtype"])[:20], entry["shape"], numbers
            ends.append(end)
        if start + max(ends) != len(data):
            raise ValueError("header and numbers do not fill the file exactly")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    return table


def huggingface_name(name):
    """Turn OpenAI's name of a parameter into Hugging Face's.

    >>> huggingface_name("h0/attn/c_attn/w"), huggingface_name("wte")
    ('h.0.attn.c_attn.weight', 'wte.weight')
    """
    *path, last = re.sub(r"^h(\d+)", r"h/\1", name).split("/")
    kinds = {"g": "weight", "w": "weight", "b": "bias"}
    return ".".join([*path, kinds.get(last, f"{last}.weight")])


# --- TensorFlow's table of contents ---
#
# Its form is that of a LevelDB table: google/leveldb, doc/table_format.md. Its values are protocol
# buffers (protobuf.dev, Encoding) with the fields of tensorflow/core/protobuf/tensor_bundle.proto.

DTYPE, SHAPE, FILE, START, SIZE, CHECKSUM, SLICES = range(1, 8)  # the fields of a tensor
MAGIC = bytes.fromhex("57fb808b247547db")  # the last bytes of a table
Tensor = collections.namedtuple("Tensor", "dtype shape file start size checksum")


def find_checkpoint(path):
    """Return the checkpoint that the file `checkpoint` names, as TensorFlow takes it.

    A fine-tuned model may name the folder that it was trained in, so only the last part counts.
    """
    latest = re.search(r'(?m)^model_checkpoint_path: "(?:.*[/\\])?(.{1,200})"', read_text(path))
    if not latest:
        raise UserError(f"{path} names no checkpoint")
    return path.parent / latest[1]


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams):
    """Read a TensorFlow checkpoint into nested dicts of float32 arrays, as `gpt2` takes them.

    `tf_ckpt_path` is the path up to `.index`. Raises ValueError for a damaged file, and for a
    tensor that is missing or not of the shape that `hparams` ask for.
    """
    n_files, tensors = read_index(f"{tf_ckpt_path}.index")
    table = {}
    for file in {tensor.file for tensor in tensors.values()}:
        path = f"{tf_ckpt_path}.data-{file:05}-of-{n_files:05}"
        data = map_file(path)
        here = {name: tensor for name, tensor in tensors.items() if tensor.file == file}
        if len(data) != data_size(here):
            raise UserError(f"{path} is damaged or cut off: its index says another size")
        for name, tensor in here.items():
            numbers = data[tensor.start : tensor.start + tensor.size]
            table[name] = path, tensor.dtype, tensor.shape, numbers
    return build_params(hparams, lambda name, *shape: read_tensor(table, f"model/{name}", *shape))


def data_size(tensors):
    """Return the size in bytes of the file that these tensors fill."""
    return max((tensor.start + tensor.size for tensor in tensors.values()), default=0)


def read_index(path):
    """Read a table: return the number of data files, and a `Tensor` for each name.

    Raises UserError if a checksum is wrong, or anything else is not as TensorFlow writes it.
    """
    data = Path(path).read_bytes()
    try:
        entries = {key.decode("latin-1"): read_fields(value) for key, value in read_table(data)}
        n_files = sum(entries.pop("")[1])  # The empty name has the header of the table.
        tensors = {name: read_entry(entry) for name, entry in entries.items()}
        if any(tensor.file >= n_files for tensor in tensors.values()):
            raise ValueError("a tensor is in a file that does not exist")
    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    return n_files, tensors


def read_entry(fields):
    """Turn the fields of an entry into a `Tensor`. A field that is 0 is left out: `sum` gives 0."""
    shape = [sum(read_fields(dimension)[1]) for dimension in read_fields(fields[SHAPE][0])[2]]
    dtype, *numbers = (sum(fields[i]) for i in (DTYPE, FILE, START, SIZE, CHECKSUM))
    if dtype == 0:
        raise ValueError("a tensor has no type")
    return Tensor("in partitions" if fields[SLICES] else dtype, shape, *numbers)


def read_table(data):
    """Yield the keys and the values of a table.

    The last 48 bytes have the handles of two blocks, which are their places. The first block does
    not matter here. The values in the second one are the handles of the blocks with the entries.
    """
    if data[-8:] != MAGIC:
        raise ValueError("it does not end as an index does")
    footer = io.BytesIO(data[-48:])
    read_handle(footer)
    for _, value in read_block(data, *read_handle(footer)):
        yield from read_block(data, *read_handle(io.BytesIO(value)))


def read_handle(stream):
    """Read where a block begins, and how many bytes it has."""
    return read_varint(stream), read_varint(stream)


def read_block(data, start, size):
    """Yield the keys and the values of a block, if its checksum is right.

    An entry has three numbers: how many bytes of the key before are taken over, how many follow,
    and how many bytes the value has. Behind the entries stand the restart points, which are for a
    search, and their number. Behind the block stand a byte, which is 0 if the block is not
    compressed, and the checksum.
    """
    block, checksum = data[start : start + size + 1], data[start + size + 1 :][:4]
    if masked_crc32c(block) != int.from_bytes(checksum, "little") or block[-1] != 0:
        raise ValueError("a checksum is wrong")
    n_restarts = int.from_bytes(block[-5:-1], "little")
    end = size - 4 - 4 * n_restarts
    stream, key = io.BytesIO(block), b""
    while stream.tell() < end:
        n_shared, n_key, n_value = read_varint(stream), read_varint(stream), read_varint(stream)
        key = key[:n_shared] + stream.read(n_key)
        yield key, stream.read(n_value)


def read_fields(message):
    """Read a protocol buffer: the values of each field, numbers or bytes, by the field's number."""
    fields, stream = collections.defaultdict(list), io.BytesIO(message)
    while stream.tell() < len(message):
        field, kind = divmod(read_varint(stream), 8)
        if kind == 0:
            fields[field].append(read_varint(stream))
        elif kind == 5:  # a number of 4 bytes
            fields[field].append(int.from_bytes(stream.read(4), "little"))
        else:
            fields[field].append(stream.read(read_varint(stream)))
    return fields


def read_varint(stream):
    """Read a number that has 7 bits in each byte, the lowest first, and at most 64 in all.

    >>> read_varint(io.BytesIO(bytes([0b1010_1100, 0b0000_0010])))
    300
    """
    number = 0
    for shift in range(0, 64, 7):
        byte = stream.read(1)[0]
        number += (byte & 0b0111_1111) << shift
        if byte < 128:
            return number
    raise ValueError("a number is too long")


def masked_crc32c(data):
    """Return the checksum of some bytes as TensorFlow stores it."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


# --- Download: OpenAI's six files, each whole or not at all ---


def download_gpt2_files(model_size, model_dir):
    """Download those files of a published size that `model_dir` lacks.

    `GPT2_BASE_URL` in the environment replaces the address up to `/<size>/<file>`. Raises
    ValueError for a size that was not published, and OSError where the network, the server or the
    disk fails, or a file fails its check. If an answer breaks off, what has come is kept, and the
    next call goes on from there.
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
    # One process at a time, so that none writes into what another one has checked.
    with FileLock(folder / ".lock"):
        for path in paths:
            if not path.exists():
                fetch(f"{url}/{path.name}", path)


def fetch(url, path):
    """Bring one file under a temporary name, check it, and only then give it its own."""
    part = path.with_name(f"{path.name}.part")
    least = data_size(read_index(path.with_name(INDEX))[1]) if path.name == DATA else 0
    try:
        for _ in range(TRIES):
            problem = receive(url, part, least)
            if problem is None:
                break
    except OSError as error:
        problem = error
    if problem is not None:
        # A server can make the reason long.
        raise OSError(f"{url} did not arrive in {part}: {str(problem)[:300]}\n{BUNDLED}")
    try:
        check_download(path.name, part)
    except UserError as error:
        part.unlink()
        raise OSError(f"{error}\nThat file is deleted. Run again to download it anew.") from None
    part.replace(path)


def receive(url, part, least):
    """Ask for what `part` lacks of a file of `least` bytes or more, and append what comes.

    Returns None if the file is complete, and otherwise why it is worth asking again. Raises OSError
    where it is not.
    """
    import urllib3
    from tqdm import tqdm

    with open(part, "ab") as file, new_session(url) as session:
        # The last byte is asked for again, so that a complete file is no case of its own.
        start = max(file.tell() - 1, 0)
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-" if start else None}
        response = session.get(url, headers=headers, stream=True, timeout=(3, 10))
        if response.status_code == 416:
            file.truncate(0)
            return "the part was longer than the file. Run again to go on."
        if response.status_code not in (200, 206):
            raise OSError(f"the server answered {response.status_code}")
        if response.status_code == 200:  # The whole file comes, whatever was asked for.
            start = 0
        file.truncate(file.seek(start))
        size = max(least, size_by_server(response, start))
        try:
            with tqdm.wrapattr(file, "write", size, desc=part.stem, initial=start) as out:
                while chunk := response.raw.read1(1 << 16):
                    out.write(chunk)
        except urllib3.exceptions.HTTPError as error:
            return f"{error}. Run again to go on from what came."
        if file.tell() < size:
            return "the answer ended too early. Run again to go on from what came."


def new_session(url):
    """Return a session of `requests` that asks a busy server again, up to four times."""
    import requests
    import urllib3

    busy = [408, 429, *range(500, 600)]
    retry = urllib3.Retry(4, 2, backoff_factor=0.5, status_forcelist=busy, retry_after_max=30)
    session = requests.Session()
    session.mount(url, requests.adapters.HTTPAdapter(max_retries=retry))
    return session


def size_by_server(response, start):
    """Return the size of the whole file, as far as the headers of a part from `start` on say it."""
    size = re.search(r"/(\d{1,15})$", response.headers.get("Content-Range", ""))
    return int(size[1]) if size else start + (response.raw.length_remaining or 0)


def check_download(name, part):
    """Raise UserError unless the file that came for a name is what the name promises."""
    if name in SHA256 and hashlib.sha256(part.read_bytes()).hexdigest() != SHA256[name]:
        raise UserError(f"{part} is not OpenAI's file: it has another SHA-256.")
    if name == "checkpoint" and find_checkpoint(part).name != "model.ckpt":
        raise UserError(f"{part} is not OpenAI's file: it names another checkpoint.")
    if name == "hparams.json":
        read_hparams(part, HPARAMS)
    if name == INDEX:
        read_index(part)
    if name == DATA:
        check_data(part, read_index(part.with_name(INDEX))[1])


def check_data(path, tensors):
    """Raise UserError unless a data file has the tensors of its index, number for number."""
    if path.stat().st_size != data_size(tensors):
        raise UserError(f"{path} is damaged: its index says another size.")
    with open(path, "rb") as file:
        for name, tensor in tensors.items():
            file.seek(tensor.start)
            if masked_crc32c(file.read(tensor.size)) != tensor.checksum:
                raise UserError(f"{path} is damaged: {name} has another checksum.")


# --- Command: from the words in a shell to the text ---


def command_line(main):
    """Run `main` with the words typed in a shell. A mistake of the user ends in a line or two.

    What `main` returns is printed, or, if it takes an argument `show`, what it gives to that. Any
    error but a UserError, an OSError and a lack of packages or memory is a mistake in the code, and
    keeps its traceback.
    """
    try:
        use_utf_8()
        arguments = read_arguments(main)
        text = main(**arguments)
        return print("" if "show" in arguments else text, flush=True)
    except ModuleNotFoundError as error:
        status = f"{error}: pip install -r requirements.txt"
    except BrokenPipeError:  # The reader has enough, as `head` may.
        status = 141
    except KeyboardInterrupt:
        status = 130
    except (MemoryError, OSError, UserError) as error:
        status = str(error) or "There is not enough memory."
    try:
        print(end="\n" if status == 130 else "", flush=True)
    except OSError:  # The rest goes nowhere, so that Python's own end does not fail by it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def use_utf_8():
    """Read and write UTF-8, whatever the system's code page is."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # In a notebook, it is something else.
            is_redirected = not stream.isatty() and "PYTHONIOENCODING" not in os.environ
            stream.reconfigure(encoding="utf-8" if is_redirected else None)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for a terminal that knows fewer characters


def read_arguments(main):
    """Return what was typed for `main`, by name and as text. Prints help if that was asked for.

    Only parameters without a default are taken by their place. All others are flags, so that no
    word of a prompt without quotes becomes the value of an option.
    """
    import fire

    def record(*words, **flags):
        typed.update(signature.bind_partial(*words, **flags).arguments)

    signature, typed = inspect.signature(main), {}
    # Keyword-only parameters of `main` are for Python.
    options = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
    options = [p if p.default is p.empty else p.replace(kind=p.KEYWORD_ONLY) for p in options]
    functools.update_wrapper(record, main).__signature__ = signature.replace(parameters=options)
    if {"-h", "--help"} & {*sys.argv}:
        trace = fire.trace.FireTrace(record, name=os.path.basename(sys.argv[0]))
        print(fire.helptext.HelpText(record, trace), flush=True)
        sys.exit()
    # A prompt that is left out comes from standard input.
    options = [p.replace(default=None) if p.name == "prompt" else p for p in options]
    record.__signature__ = signature.replace(parameters=options)
    # A flag that is only on or off takes no value.
    switches = {f"--{p.name}" for p in options if p.default is False}
    words = [f"{word}=True" if word in switches else word for word in sys.argv[1:]]
    fire.parser.DefaultParseValue = str  # Otherwise the prompt 42 would arrive as a number.
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            # What follows the last -- are Fire's own flags. Its separator would be -, a prompt.
            fire.Fire(record, [*words, "--", "--separator=\0"])
    except fire.core.FireExit as error:
        fault = error.trace.elements[-1].ErrorAsStr()
        advice = "If a text has several words, put it in quotes."
        raise UserError(f"{fault}\n{advice} See python {sys.argv[0]} --help.") from None
    if "prompt" in signature.parameters:
        typed["prompt"] = read_prompt(typed.get("prompt"))
    if "show" in signature.parameters:
        typed["show"] = functools.partial(print, end="", flush=True)
    return typed


def read_prompt(prompt):
    """Return the prompt, from standard input where it is - or left out, with "\\n" as line ends."""
    left_out = prompt is None
    try:
        if prompt == "-" or (left_out and not sys.stdin.isatty()):
            prompt = sys.stdin.read().removesuffix("\n")
        (prompt or "").encode("utf-8")  # A shell may pass bytes that are not UTF-8.
    except UnicodeError as error:
        raise UserError(f"The prompt is not {error.encoding}: {error.reason}") from None
    if left_out and not prompt:
        raise UserError(f"There is no prompt. See python {sys.argv[0]} --help.")
    prompt = re.sub("\r\n?", "\n", prompt.removeprefix("\ufeff").removesuffix("\r"))
    if prompt.endswith(" "):
        print("The prompt ends in a space. Omit it: GPT-2's words begin with one.", file=sys.stderr)
    return prompt


def encode_prompt(prompt, encoder, hparams, n_new):
    """Return the ids of a prompt. Special tokens are found in it, and bos starts an empty one.

    Raises UserError if the model cannot read the ids, or if `n_new` more do not fit after them.
    """
    ids = encoder.encode(prompt, allowed_special="all") or encoder.bos
    if not ids or max(ids) >= hparams["n_vocab"]:
        raise UserError("The prompt is empty, or it has an id without a row in wte.")
    room = hparams["n_ctx"] - len(ids)
    if n_new > room:
        advice = f"n_tokens_to_generate may be {room} at most." if room > 0 else "Shorten it."
        context = f"the context of this model has {hparams['n_ctx']:,}"
        raise UserError(f"The prompt has {len(ids):,} tokens, and {context}. {advice}")
    return ids


def number(name, value, kind, least, most=np.inf):
    """Read an option, which may be text, as a `kind` of number.

    Raises UserError, with the limits, for anything else and for what is out of range.
    """
    with contextlib.suppress(ValueError):
        if least <= kind(str(value)) <= most:
            return kind(str(value))
    limits = f"{least} or more" if most == np.inf else f"from {least} to {most}"
    what = "a whole number" if kind is int else "a number"
    raise UserError(f"{name} must be {what}, {limits}, not {value!r}")


def picker(sample, temperature, top_k, top_p, seed):
    """Return the function that picks each token: greedy, or `sample` with these limits.

    Any of the four options switches sampling on, at temperature 1 unless another one is given.
    Temperature 0 is greedy.
    """
    given = [value for value in (temperature, top_k, top_p, seed) if value is not None]
    if temperature is None:
        temperature = 1 if given else 0
    limits = {"temperature": number("temperature", temperature, float, 0)}
    if top_k is not None:
        limits["top_k"] = number("top_k", top_k, int, 1)
    if top_p is not None:
        limits["top_p"] = number("top_p", top_p, float, 0, 1)
    if seed is not None:
        seed = number("seed", seed, int, 0)
    sampling = functools.partial(sample, random=np.random.default_rng(seed), **limits)
    return sampling if limits["temperature"] else np.argmax
