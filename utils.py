"""Download OpenAI's GPT-2 checkpoints, convert them once, and open them in milliseconds.

    encoder, hparams, params = load_encoder_hparams_and_params("124M", "models")

A model is a folder `models_dir/model_size` in the layout of OpenAI's release. Its first load writes
the weights beside the checkpoint, as one flat file of float32, `params.f32`; every later load maps
that file into memory, and needs neither TensorFlow nor a network.
"""

import base64
import contextlib
import functools
import hashlib
import math
import os
import re
import sys
import time
import types

import numpy as np

from encoder import get_encoder, read_json

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
SIZES = ("124M", "355M", "774M", "1558M")
FILES = {  # and their SHA-256 in 124M; the vocabulary is the same in all sizes
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "model.ckpt.data-00000-of-00001": (
        "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"
    ),
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
PAUSES = (1, 2, 4)  # seconds before each new try
TIMEOUT = 10  # seconds without an answer, or between two pieces of one


def load_encoder_hparams_and_params(model_size, models_dir):
    """Load the model in `models_dir/model_size`, downloading a published size that is not there.

    Returns the `Encoder`, OpenAI's hparams as a dict, and the parameters as nested dicts of
    float32 arrays, read-only views of the converted file. Raises ValueError for a name that is
    neither a published size nor a folder there, and for a file that is not what it should be;
    OSError where a file is missing or cannot be downloaded.
    """
    model_dir, fetched = os.path.join(models_dir, model_size), None
    inside = os.path.basename(model_size) == model_size and model_size not in ("", ".", "..")
    if model_size not in SIZES and not (inside and os.path.isdir(model_dir)):
        raise ValueError(
            f"model_size must be {', '.join(SIZES)}, or the name of a folder with a checkpoint in "
            f"{os.path.abspath(models_dir)}, not {model_size!r}"
        )
    remedy = (
        "Put back the file that came with the model; `git checkout models/1M` does for that one."
    )
    if model_size in SIZES:
        remedy = "Delete the file and run again: it will be downloaded anew."
    while True:
        try:
            return load_model(model_size, models_dir)
        except FileNotFoundError as error:
            if model_size not in SIZES or fetched is not None:
                raise OSError(f"{error.filename} is missing.\n{remedy}") from None
            fetched = download_gpt2_files(model_size, model_dir)
        except ValueError as error:
            # New files passed every check that their server allows: if they fail now, none is kept.
            for path in fetched or []:
                os.remove(path)
            if fetched:
                remedy = f"The new files are deleted: run again; if that fails, delete {model_dir}."
            raise ValueError(f"{error}\n{remedy}") from None


def load_model(model_size, models_dir):
    """Load a folder that is complete; raises FileNotFoundError where it is not."""
    model_dir = os.path.join(models_dir, model_size)
    path = os.path.join(model_dir, "hparams.json")
    hparams = read_json(path)
    for field in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
        if type(hparams.get(field)) is not int or hparams[field] < 1:
            raise ValueError(f"{path}: {field} must be a number above 0, not {hparams.get(field)}")
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(f"{path}: n_embd must be a multiple of n_head")
    encoder = get_encoder(model_size, models_dir)
    if len(encoder.encoder) != hparams["n_vocab"]:
        raise ValueError(f"{path}: n_vocab must be {len(encoder.encoder)}, as in encoder.json")
    return encoder, hparams, load_params(model_dir, hparams)


def load_params(model_dir, hparams):
    """Open the converted weights, converting the checkpoint first where that is due."""
    converted = os.path.join(model_dir, "params.f32")
    try:
        tf_ckpt_path, changed = find_checkpoint(model_dir)
    except FileNotFoundError:
        params = open_converted(converted, hparams)  # the checkpoint may be gone, to save its space
        if params is None:
            raise
        return params
    params = open_converted(converted, hparams, changed)
    try:
        if params is None:
            with alone(model_dir):
                params = open_converted(converted, hparams, changed)  # another process did it?
                if params is None:
                    convert(tf_ckpt_path, hparams, converted, changed)
                    params = open_converted(converted, hparams, changed)
    except OSError as error:
        print(f"The converted weights could not be kept for next time: {error}", file=sys.stderr)
        params = load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams)
    return params


def find_checkpoint(model_dir):
    """Return the checkpoint's path, as TensorFlow takes it, and when it last changed, in ns."""
    path = os.path.join(model_dir, "checkpoint")
    with open(path, encoding="utf-8", errors="replace") as file:
        latest = re.search(r'^model_checkpoint_path: "(.+)"', file.read(), re.MULTILINE)
    if not latest:
        raise ValueError(f"{path} names no checkpoint")
    # A fine-tuned model may name the folder that it was trained in: only the last part counts.
    tf_ckpt_path = os.path.join(model_dir, re.split(r"[/\\]", latest[1])[-1])
    files = [tf_ckpt_path + ".index", tf_ckpt_path + ".data-00000-of-00001"]
    return tf_ckpt_path, max(os.stat(file).st_mtime_ns for file in files)


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams, keep=lambda tensor: tensor):
    """Read a TensorFlow checkpoint into nested dicts of float32 arrays, as `gpt2` takes them.

    `keep` says what to put in the place of each tensor as it arrives. Raises ValueError for a
    damaged file, and for a tensor that is missing or not of the shape that `hparams` ask for.
    """
    for quiet in {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}.items():
        os.environ.setdefault(*quiet)
    from tqdm import tqdm

    n_layer = hparams["n_layer"]
    # The bar comes first, since TensorFlow, when it is imported, takes its time.
    with tqdm(desc="converting", total=4 + 12 * n_layer, unit=" tensors") as bar:
        import tensorflow as tf

        def read(name, *shape):
            bar.update()
            found = shapes.get(f"model/{name}", "missing")
            if found not in ([*shape], [1, *shape]):
                raise ValueError(f"model/{name} is {found}, but hparams.json says {[*shape]}")
            tensor = checkpoint.get_tensor(f"model/{name}").reshape(shape)
            return keep(np.asarray(tensor, np.float32, order=memory_order(name)))

        try:
            checkpoint = tf.train.load_checkpoint(tf_ckpt_path)
            shapes = checkpoint.get_variable_to_shape_map()
            if f"model/h{n_layer}/ln_1/g" in shapes:
                raise ValueError(f"more layers than n_layer in hparams.json, {n_layer}")
            return build_params(hparams, read)
        except (tf.errors.OpError, IndexError, RuntimeError, ValueError) as error:
            raise ValueError(f"{tf_ckpt_path}.*: {str(error).splitlines()[0]}") from None


def convert(tf_ckpt_path, hparams, converted, changed):
    """Write the weights, tensor by tensor, as one flat file that bears the time `changed`."""
    part = converted + ".part"
    with contextlib.suppress(FileNotFoundError):
        os.remove(converted)  # of another checkpoint: not to be used if this one cannot be read
    try:
        with open(part, "wb") as file:
            load_gpt2_params_from_tf_ckpt(
                tf_ckpt_path, hparams, lambda tensor: file.write(tensor.ravel(order="K"))
            )
            file.flush()
            os.fsync(file.fileno())
        os.utime(part, ns=(changed, changed))
        os.replace(part, converted)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def open_converted(converted, hparams, changed=None):
    """Map a converted file into memory, if it is whole and of the checkpoint of that time."""
    end = 0

    def view(name, *shape):
        nonlocal end
        start, end = end, end + math.prod(shape)
        return flat[start:end].reshape(shape, order=memory_order(name))

    try:
        flat = np.asarray(np.memmap(converted, np.float32, "r"))
        params = build_params(hparams, view)
    except (FileNotFoundError, ValueError):  # ValueError: empty, or too short for one of the views
        return None
    same = end == flat.size and changed in (None, os.stat(converted).st_mtime_ns)
    return params if same else None


def memory_order(name):
    """Keep each column of a matrix in one piece: a product with one row reads it faster so."""
    return "F" if name.endswith("/w") else "C"


def build_params(hparams, leaf):
    """Build the tree of parameters, with `leaf(name, *shape)` for each, in a fixed order.

    Names are OpenAI's without the leading `model/`, shapes those that `gpt2` takes.
    """
    n_embd = hparams["n_embd"]

    def norm(name):
        return {"g": leaf(f"{name}/g", n_embd), "b": leaf(f"{name}/b", n_embd)}

    def dense(name, n_in, n_out):
        return {"w": leaf(f"{name}/w", n_in, n_out), "b": leaf(f"{name}/b", n_out)}

    return {
        "wte": leaf("wte", hparams["n_vocab"], n_embd),
        "wpe": leaf("wpe", hparams["n_ctx"], n_embd),
        "blocks": [
            {
                "ln_1": norm(f"h{i}/ln_1"),
                "attn": {
                    "c_attn": dense(f"h{i}/attn/c_attn", n_embd, 3 * n_embd),
                    "c_proj": dense(f"h{i}/attn/c_proj", n_embd, n_embd),
                },
                "ln_2": norm(f"h{i}/ln_2"),
                "mlp": {
                    "c_fc": dense(f"h{i}/mlp/c_fc", n_embd, 4 * n_embd),
                    "c_proj": dense(f"h{i}/mlp/c_proj", 4 * n_embd, n_embd),
                },
            }
            for i in range(hparams["n_layer"])
        ],
        "ln_f": norm("ln_f"),
    }


def download_gpt2_files(model_size, model_dir):
    """Download those of the seven files of a published size that `model_dir` lacks.

    Returns their paths. `GPT2_BASE_URL` in the environment replaces the address up to
    `/<size>/<file>`. Raises ValueError for a size that was not published, and OSError where the
    network, the server or the disk fails, or a file fails its check; what had arrived of a file is
    kept, and the next call goes on from there.
    """
    if model_size not in SIZES:
        raise ValueError(f"model_size must be {', '.join(SIZES)}, not {model_size!r}")
    base_url = (os.environ.get("GPT2_BASE_URL") or BASE_URL).rstrip("/")
    fetched = []
    with alone(model_dir):
        for name, sha256 in FILES.items():
            path = os.path.join(model_dir, name)
            if not os.path.exists(path):
                known = model_size == "124M" or name in ("encoder.json", "vocab.bpe")
                fetch(f"{base_url}/{model_size}/{name}", path, sha256 if known else None)
                fetched.append(path)
    return fetched


def fetch(url, path, sha256):
    """Bring one file under a temporary name, verify it, and only then give it its own."""
    import requests

    part = path + ".part"
    for pause in (*PAUSES, None):
        try:
            fault = receive(url, part, sha256)
            break
        except requests.RequestException as error:
            status = 500 if error.response is None else error.response.status_code
            if pause is None or status < 500 or isinstance(error, ValueError):
                cause = getattr((*error.args, error)[0], "reason", error)
                advice = "Run again to go on from what came; --model_size 1M needs no network."
                raise OSError(f"{url} did not arrive: {cause}\n{advice}") from None
        except OSError as error:
            raise OSError(
                f"{part}: {error}\nMend that, and run again to go on from there."
            ) from None
        time.sleep(pause)
    if fault:
        os.remove(part)
        raise OSError(f"{url} is deleted again, since {fault}.\nRun again to download it anew.")
    os.replace(part, path)


def receive(url, part, sha256):
    """Append to `part` what it lacks of the file at `url`; returns what is wrong with the whole.

    Raises requests.RequestException where another try may help.
    """
    import requests
    from tqdm import tqdm

    start = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status_code == 416 or (response.status_code == 206 and not resumed):
            with contextlib.suppress(FileNotFoundError):
                os.remove(part)
            raise requests.ConnectionError("the server cannot go on where the last one stopped")
        response.raise_for_status()
        start = start if resumed else 0
        length = response.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise requests.ConnectionError("the server does not say how long it is")
        total = start + int(length)
        sizes = {"total": total, "initial": start, "unit": "B", "unit_scale": True}
        with open(part, "ab" if start else "wb") as file, tqdm(desc=part, **sizes) as bar:
            for chunk in response.iter_content(1 << 16):
                bar.update(file.write(chunk))
            file.flush()
            os.fsync(file.fileno())
    if os.path.getsize(part) != total or not total:
        raise requests.ConnectionError(f"{os.path.getsize(part)} of {total} bytes came")
    content = np.memmap(part, np.uint8, "r")
    if re.match(rb"\W*<(!doctype|\?xml|html|error)\b", bytes(content[:99]), re.IGNORECASE):
        return "a web page came in its place"
    if sha256:
        return hashlib.sha256(content).hexdigest() != sha256 and "its SHA-256 is not OpenAI's"
    # Of a resumed file, some servers tell the MD5 of the whole, others of the part that they sent.
    sums = [base64.b64encode(hashlib.md5(content[i:]).digest()).decode() for i in (0, start)]
    return (
        response.headers.get("Content-MD5", sums[0]) not in sums and "its MD5 is not the server's"
    )


@contextlib.contextmanager
def alone(folder):
    """Keep other processes out of `folder`; the system frees a lock when its owner ends or dies."""
    path = os.path.join(folder, ".lock")
    while True:
        os.makedirs(folder, exist_ok=True)
        with open(path, "w") as file:
            lock(file)
            if not os.fstat(file.fileno()).st_nlink:
                continue  # its last owner removed it while this process waited
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows keeps a file that others have open
                    os.remove(path)
                    os.rmdir(folder)  # if nothing has come into it
            return


def lock(file):
    """Wait for the one lock that there is on an open file."""
    try:
        import fcntl
    except ImportError:  # Windows, where each try to lock waits ten seconds
        import msvcrt

        while True:
            with contextlib.suppress(OSError):
                return msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
    fcntl.flock(file, fcntl.LOCK_EX)


def command_line(main):
    """Run `main` with the arguments of the shell; a mistake ends in a line that says what to do."""

    @functools.wraps(main)
    def plan(*args, **kwargs):
        return types.SimpleNamespace(_run=functools.partial(main, *args, **kwargs))

    try:
        import fire

        fire.parser.DefaultParseValue = str  # otherwise the prompt 42 would arrive as a number
        sys.stdout.reconfigure(errors="replace")  # for a terminal that knows fewer characters
        # Run last, so that a word too many stops it first; no prompt is the NUL, as "-" might be.
        arguments = [*sys.argv[1:], "--", "--separator=\0"]
        fire.Fire(plan, arguments, serialize=lambda planned: planned._run())
    except ImportError as error:
        sys.exit(f"{error}: pip install -r requirements.txt")
    except BrokenPipeError:  # whoever reads has enough, as `head` may
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(130)
