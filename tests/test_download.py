"""Downloads from a server that misbehaves, folders that are damaged, processes that die or race."""

import base64
import concurrent.futures
import contextlib
import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import struct
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import BUNDLED, ROOT

import gpt2
import utils

PROMPT = "Alan Turing theorized that computers would one day become"
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
posix = pytest.mark.skipif(os.name == "nt", reason="needs the signals, limits or users of POSIX")
PAGES = {
    "a web page": b"<!DOCTYPE html>\n<html>Please log in</html>",
    "Azure's XML": b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>ServerBusy</Code></Error>',
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the bundled model; `server.faults` has, by file, the faults of its next answers."""

    def handle(self):
        with contextlib.suppress(ConnectionError):  # of a client that has gone
            super().handle()

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, name = self.server, self.path.rsplit("/", 1)[1]
        if name == "start":
            server.barrier.wait(60)  # for the other process
            return self.send_error(204)
        fault = next(server.faults.get(name, iter(())), None)
        whole, asked = (BUNDLED / name).read_bytes(), self.headers["Range"]
        start = int(asked[6:-1]) if asked and fault != "ignores Range" else 0
        fault = 416 if start >= len(whole) else fault
        if isinstance(fault, int):
            server.log.append((self.path, asked, 0))
            return self.send_error(fault)
        rest = PAGES.get(fault, whole[start:])
        body = flip(rest) if "flipped" in str(fault) else rest
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        lie = {"too long": 9, "too short": -9}.get(fault, 0)
        self.send_header("Content-Length", str(len(body) + lie))
        if "MD5" in str(fault):
            md5 = hashlib.md5(rest if "of the rest" in fault else whole).digest()
            self.send_header("Content-MD5", base64.b64encode(md5).decode())
        self.end_headers()
        if fault in ("an end", "a reset", "a stall"):
            half = len(body) // 2  # in whole chunks, if it can be, as they are written
            body = body[: half >> 16 << 16 or half]
        server.log.append((self.path, asked, len(body)))
        self.wfile.write(body)
        if fault == "a stall":
            server.closing.wait()
        if fault == "a reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.faults, server.log = {}, []
    server.barrier, server.closing = threading.Barrier(2), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(utils, "PAUSES", (0, 0, 0))
    for name, sha256 in digests().items():
        monkeypatch.setitem(utils.FILES, name, sha256)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path, bundled):
    """A complete 355M, converted."""
    folder = tmp_path / "355M"
    folder.mkdir()
    for name in (*utils.FILES, "params.f32"):
        shutil.copy2(BUNDLED / name, folder)
    return folder


@pytest.fixture(scope="session")
def right(bundled):
    return gpt2.main(PROMPT, 8, "1M", str(ROOT / "models"))


@pytest.fixture
def child(run, tmp_path):
    """Run the command on 355M in a process of its own, after the code `first`."""

    def child(first=""):
        code = f"import utils, gpt2; utils.FILES.update({digests()}); utils.PAUSES = 0, 0, 0\n"
        code = f"{code}{first}\nutils.command_line(gpt2.main)"
        return run(PROMPT, 8, "355M", tmp_path, code=("-c", code))

    return child


def digests():
    names = ("encoder.json", "vocab.bpe")
    return {name: hashlib.sha256((BUNDLED / name).read_bytes()).hexdigest() for name in names}


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def text(models_dir):
    return gpt2.main(PROMPT, 8, "355M", str(models_dir))


def final(folder):
    """The files under a final name, each of which must be complete."""
    names = {path.name for path in folder.glob("*") if path.suffix != ".part"} - {".lock"}
    for name in names:
        assert (folder / name).read_bytes() == (BUNDLED / name).read_bytes()
    return names


def whole(models_dir):
    """Whether 355M is complete, with nothing beside it."""
    folder = models_dir / "355M"
    return final(folder) == {*os.listdir(folder)} == {*utils.FILES, "params.f32"}


@pytest.mark.parametrize(
    "name, faults",
    [
        ("hparams.json", [500]),
        ("encoder.json", ["an end"]),
        (DATA, ["a reset"]),
        (DATA, ["a stall"]),
        (DATA, ["too long"]),
        (DATA, ["an end", "ignores Range"]),
        (DATA, ["an end", "MD5 of the whole"]),
        (DATA, ["an end", "MD5 of the rest"]),
        (DATA, ["a reset", 500, "a reset"]),
    ],
)
def test_a_fault_that_passes_is_only_a_delay(name, faults, server, tmp_path, right, monkeypatch):
    monkeypatch.setattr(utils, "TIMEOUT", 0.5)
    server.faults[name] = left = iter(faults)
    assert text(tmp_path) == right and whole(tmp_path)
    assert next(left, None) is None


@pytest.mark.parametrize(
    "fault, name, error, message",
    [
        (404, "hparams.json", OSError, "404"),
        (500, DATA, OSError, "500"),
        ("an end", DATA, OSError, "did not arrive"),
        ("a reset", DATA, OSError, "did not arrive"),
        ("a stall", DATA, OSError, "did not arrive"),
        ("too long", DATA, OSError, "did not arrive"),
        ("too short", "encoder.json", OSError, "SHA-256"),
        ("too short", "hparams.json", ValueError, "new files are deleted"),
        ("too short", DATA, ValueError, "new files are deleted"),
        ("a flipped byte", "vocab.bpe", OSError, "SHA-256"),
        ("a flipped byte, MD5", DATA, OSError, "MD5"),
        ("a flipped byte", DATA, ValueError, "new files are deleted"),
        ("a flipped byte", INDEX, ValueError, "new files are deleted"),
        ("a web page", "vocab.bpe", OSError, "web page"),
        ("a web page", DATA, OSError, "web page"),
        ("Azure's XML", "checkpoint", OSError, "web page"),
        ("Azure's XML", DATA, OSError, "web page"),
    ],
)
def test_a_fault_that_lasts_is_an_error_until_it_ends(
    fault, name, error, message, server, tmp_path, right, monkeypatch
):
    monkeypatch.setattr(utils, "TIMEOUT", 0.5)
    server.faults[name] = iter([fault] * 9)
    with pytest.raises(error, match=message):
        text(tmp_path)
    assert name not in final(tmp_path / "355M")
    server.faults.clear()
    assert text(tmp_path) == right and whole(tmp_path)


def test_a_refused_connection_leaves_no_files(server, tmp_path, right, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("GPT2_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(OSError, match="did not arrive"):
            text(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
    assert text(tmp_path) == right and whole(tmp_path)


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_address_may_end_with_a_slash(slash, server, tmp_path, right, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", f"{server.url}/gpt-2/models{slash}")
    assert text(tmp_path) == right
    assert [path for path, _, _ in server.log] == [f"/gpt-2/models/355M/{n}" for n in utils.FILES]


def sent(server):
    """What the server was asked for of the weights, and how much of them it sent."""
    log = [entry[1:] for entry in server.log if entry[0].endswith(DATA)]
    return [asked for asked, _ in log], sum(n for _, n in log)


def test_a_download_cut_off_goes_on_where_it_stopped(server, tmp_path, right):
    server.faults[DATA] = iter(["an end"])
    assert text(tmp_path) == right
    size = (BUNDLED / DATA).stat().st_size
    assert sent(server) == ([None, f"bytes={size // 2 >> 16 << 16}-"], size)


def test_a_part_of_another_file_is_no_part_of_this_one(server, tmp_path, right):
    (tmp_path / "355M").mkdir()
    (tmp_path / "355M" / "vocab.bpe.part").write_bytes(b"#version: 0.1\n")
    (tmp_path / "355M" / f"{DATA}.part").write_bytes(bytes(1 << 24))  # longer than the file
    with pytest.raises(OSError, match="SHA-256"):
        text(tmp_path)
    assert text(tmp_path) == right and whole(tmp_path)


KILL = """
import os, tqdm

class Bar(tqdm.tqdm):
    def update(self, n=1):
        super().update(n)
        if {name!r} in self.desc and self.n >= {n}:
            os.kill(os.getpid(), 9)

tqdm.tqdm = Bar
"""


@posix
def test_a_process_killed_in_a_download_loses_nothing(server, tmp_path, right, child):
    size = (BUNDLED / DATA).stat().st_size
    half = size // 2 >> 16 << 16
    server.faults[DATA] = iter(["a stall"])
    assert child(KILL.format(name=DATA, n=half)).returncode == -signal.SIGKILL
    assert DATA not in final(tmp_path / "355M")
    assert text(tmp_path) == right and whole(tmp_path)
    assert sent(server) == ([None, f"bytes={half}-"], size)


@posix
def test_a_process_killed_in_the_conversion_leaves_the_checkpoint(folder, right, child):
    (folder / "params.f32").unlink()
    assert child(KILL.format(name="converting", n=20)).returncode == -signal.SIGKILL
    assert (folder / "params.f32.part").exists() and not (folder / "params.f32").exists()
    assert text(folder.parent) == right and whole(folder.parent)


def test_two_processes_that_start_together_download_and_convert_once(
    server, tmp_path, right, child
):
    start = f"from urllib import request; request.urlopen('{server.url}/start')"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = [future.result() for future in [pool.submit(child, start) for _ in range(2)]]
    assert [done.stdout for done in both] == [right + "\n"] * 2
    assert sorted(path for path, _, _ in server.log) == sorted(f"/355M/{n}" for n in utils.FILES)
    assert sum("converting" in done.stderr for done in both) == 1 and whole(tmp_path)


@contextlib.contextmanager
def disk_of(n_bytes):
    """Let no file grow beyond so many bytes: a write fails then, as on a disk that is full."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@posix
def test_a_full_disk_stops_a_download_that_then_goes_on(server, tmp_path, right):
    with disk_of(3 << 19), pytest.raises(OSError, match=r"\.part: .*File too large"):
        text(tmp_path)
    assert DATA not in final(tmp_path / "355M")
    assert text(tmp_path) == right and whole(tmp_path)
    assert sent(server)[0] == [None, f"bytes={3 << 19}-"]


@posix
def test_a_full_disk_costs_only_the_converted_file(folder, right, capsys):
    (folder / "params.f32").unlink()
    with disk_of(3 << 19):
        assert text(folder.parent) == right
    assert "could not be kept for next time: [Errno 27] File too large" in capsys.readouterr().err
    assert {*os.listdir(folder)} == {*utils.FILES}
    assert text(folder.parent) == right and whole(folder.parent)


@posix
def test_a_read_only_folder_still_runs(folder, right, capsys):
    import tensorflow  # noqa: F401 (while its files can be read)

    (folder / "params.f32").unlink()
    with tempfile.TemporaryDirectory() as models:  # pytest's own are closed to other users
        shutil.copytree(folder, f"{models}/355M")
        os.chmod(models, 0o755)
        os.chmod(f"{models}/355M", 0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)  # for root, no folder is read-only
        try:
            assert text(models) == right
        finally:
            os.seteuid(user)
        assert "could not be kept for next time" in capsys.readouterr().err
        os.chmod(f"{models}/355M", 0o755)
        assert text(models) == right and whole(Path(models))


@pytest.mark.parametrize(
    "damage, seconds",
    [
        (lambda content: content[:-4], 0),
        (lambda content: content[:-1], 0),
        (lambda content: content + bytes(4), 0),
        (lambda content: b"", 0),
        (lambda content: bytes(len(content)), -60),
        (lambda content: bytes(len(content)), 60),
    ],
    ids=["cut short", "cut within a number", "too long", "empty", "older", "newer"],
)
def test_a_converted_file_that_does_not_fit_is_made_anew(damage, seconds, folder, right):
    path = folder / "params.f32"
    time = path.stat().st_mtime_ns + seconds * 10**9
    path.write_bytes(damage(path.read_bytes()))
    os.utime(path, ns=(time, time))
    assert text(folder.parent) == right and whole(folder.parent)


def change(field, function):
    def damage(content):
        hparams = json.loads(content)
        return json.dumps(hparams | {field: function(hparams[field])}).encode()

    return damage


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("encoder.json", lambda content: b"", "encoder.json is not JSON"),
        ("encoder.json", lambda content: content[:-9], "encoder.json is not JSON"),
        ("encoder.json", lambda content: b"[]", "encoder.json is not a JSON object"),
        ("encoder.json", lambda content: b"\xff" + content, "encoder.json is not UTF-8"),
        ("vocab.bpe", lambda content: content[:-3], "vocab.bpe and encoder.json"),
        ("vocab.bpe", lambda content: content[: content.rindex(b"\n", 0, -1) + 1], "vocab.bpe and"),
        ("vocab.bpe", lambda content: b"\xff" + content, "vocab.bpe is not UTF-8"),
        ("hparams.json", lambda content: content[:-1], "hparams.json is not JSON"),
        ("hparams.json", lambda content: b"null", "hparams.json is not a JSON object"),
        ("hparams.json", change("n_head", lambda n: 0), "n_head must be a number above 0"),
        ("hparams.json", change("n_layer", str), "n_layer must be a number above 0"),
        ("hparams.json", lambda content: b"{}", "n_vocab must be a number above 0"),
        ("hparams.json", change("n_vocab", lambda n: n - 1), "n_vocab must be"),
        ("hparams.json", change("n_ctx", lambda n: n + 1), "wpe is"),
        ("hparams.json", change("n_embd", lambda n: 2 * n), "wte is"),
        ("hparams.json", change("n_head", lambda n: 2 * n + 1), "n_embd must be a multiple"),
        ("hparams.json", change("n_layer", lambda n: n - 1), "more layers than n_layer"),
        ("hparams.json", change("n_layer", lambda n: n + 1), "is missing, but hparams.json says"),
        ("checkpoint", lambda content: b"", "checkpoint names no checkpoint"),
        (DATA, lambda content: content[: len(content) // 2], r"model.ckpt\.\*: ."),
        (DATA, lambda content: content[:-1], r"model.ckpt\.\*: ."),
        (DATA, flip, r"model.ckpt\.\*: ."),
        (INDEX, lambda content: content[:-1], r"model.ckpt\.\*: ."),
        (INDEX, flip, r"model.ckpt\.\*: ."),
    ],
)
def test_a_damaged_file_is_an_error_and_once_deleted_comes_anew(
    name, damage, message, server, folder, right
):
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{message}.*\nDelete the file and run again"):
        text(folder.parent)
    path.unlink()
    if name in ("checkpoint", DATA, INDEX):  # else the converted file of before would do
        (folder / "params.f32").unlink(missing_ok=True)
    assert text(folder.parent) == right and whole(folder.parent)
    assert server.log == [(f"/355M/{name}", None, path.stat().st_size)]


@pytest.mark.parametrize("name", [name for name in utils.FILES if name != "model.ckpt.meta"])
def test_a_missing_file_alone_is_downloaded(name, server, folder, right):
    (folder / "params.f32").unlink()
    (folder / name).unlink()
    assert text(folder.parent) == right and whole(folder.parent)
    assert [path for path, _, _ in server.log] == [f"/355M/{name}"]


@pytest.mark.parametrize("name", ["checkpoint", "encoder.json", "hparams.json", DATA, INDEX])
def test_a_missing_file_of_a_model_of_ones_own_is_an_error(name, models_dir, right):
    for gone in ("params.f32", name):
        (models_dir / "mine" / gone).unlink()
    with pytest.raises(OSError, match=f"{name} is missing.\nPut back"):
        gpt2.main(PROMPT, 8, "mine", str(models_dir))
    shutil.copy2(BUNDLED / name, models_dir / "mine")
    assert gpt2.main(PROMPT, 8, "mine", str(models_dir)) == right


def test_a_converted_model_runs_without_its_checkpoint(folder, right):
    for name in ("checkpoint", DATA, INDEX, "model.ckpt.meta"):
        (folder / name).unlink()
    assert text(folder.parent) == right


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("model/ln_f/b"), r"model/ln_f/b is missing"),
        (lambda tensors: tensors.update({"model/ln_f/b": [0.0]}), r"model/ln_f/b is \[1\]"),
    ],
    ids=["missing", "of the wrong shape"],
)
def test_a_tensor_that_is_not_as_it_should_be_is_an_error(change, message, server, folder, right):
    import tensorflow as tf

    prefix = str(folder / "model.ckpt")
    reader = tf.train.load_checkpoint(prefix)
    tensors = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    change(tensors)
    n = len(tensors)
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=[*tensors],
        shape_and_slices=[""] * n,
        tensors=[*tensors.values()],
    )
    with pytest.raises(ValueError, match=message):
        text(folder.parent)
    for name in (DATA, INDEX):
        (folder / name).unlink()
    assert text(folder.parent) == right and whole(folder.parent)


def test_damage_from_an_earlier_run_does_not_stay_for_ever(server, tmp_path, right):
    server.faults = {DATA: iter(["a flipped byte"]), INDEX: iter([404])}
    with pytest.raises(OSError, match="404"):
        text(tmp_path)
    with pytest.raises(ValueError, match=r"\n.*delete .*355M"):
        text(tmp_path)
    shutil.rmtree(tmp_path / "355M")
    assert text(tmp_path) == right and whole(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "../mine", "mine/", "no_such", "/abs"])
def test_a_name_that_is_no_folder_in_models_dir_is_refused(name, models_dir):
    name = str(models_dir / "mine") if name == "/abs" else name
    with pytest.raises(ValueError, match="model_size must be 124M, 355M, 774M, 1558M, or"):
        utils.load_encoder_hparams_and_params(name, str(models_dir / "mine"))


def test_the_command_ends_with_two_lines_and_no_traceback(server, folder, child):
    (folder / "vocab.bpe").rename(folder / "gone")
    server.faults["vocab.bpe"] = iter([404])
    missing = child()
    (folder / "gone").rename(folder / "vocab.bpe")
    (folder / "hparams.json").write_bytes(b"")
    damaged = child()
    for done, start in (
        (missing, f"{server.url}/355M/vocab.bpe did"),
        (damaged, f"{folder}/hparams"),
    ):
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.startswith(start) and len(done.stderr.splitlines()) == 2
