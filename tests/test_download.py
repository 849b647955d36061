"""Downloads from a server that misbehaves, by processes that die and onto disks that are full."""

import gzip
import http.server
import itertools
import os
import socket
import sys
import tempfile
import threading
from hashlib import sha256
from pathlib import Path
from subprocess import PIPE, Popen

import filelock  # noqa: F401 (early, because the user nobody may not be able to read it)
import pytest
import requests
from conftest import COMMITTED, ROOT, index_of, varint

import gpt2
import utils

ORIGINAL = ROOT.parent / "shared" / "gpt2" / "124M"
DATA = utils.DATA
LONG = "x" * 9000
PAGE = b"<!DOCTYPE html>\n<html>Please log in</html>\n"
DAMAGE = [*itertools.product(utils.FILES[:-1], [0.0, PAGE, b""]), (DATA, 0.0), (DATA, 0.5)]
DAMAGE += [(DATA, 1.0), (DATA, (COMMITTED / DATA).read_bytes() + b"x")]
DAMAGE += [("hparams.json", b'{"n_ctx": 16}'), ("encoder.json", "half without a length")]
DAMAGE += [("checkpoint", b'model_checkpoint_path: "model-1000"')]
posix = pytest.mark.skipif(os.name == "nt", reason="needs the limits and the users of POSIX")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`. For a file's name, `server.faults` has the faults of its answers.

    A whole number is a status, a fraction is the place where a bit flips, bytes come instead, and
    "a tenth" of the file is what comes before the connection breaks. "half of it" looks complete,
    as a proxy may send it, and so does "half without a length".
    """

    def log_message(self, *args): ...

    def do_GET(self):
        server, name, asked = self.server, self.path.rsplit("/", 1)[1], self.headers["Range"]
        fault = next(server.faults.get(name, iter(())), None)
        whole = server.content[name]
        if "gzip" in self.headers["Accept-Encoding"]:
            whole = gzip.compress(whole)
        ranges = "no ranges" not in str(fault)
        start = int(asked[6:-1]) if asked and ranges else 0
        status = 416 if start >= len(whole) else 206 if start else 200
        status = fault if isinstance(fault, int) else 418 if fault == LONG else status
        body = fault if isinstance(fault, bytes) else whole[start:] if status < 400 else b""
        if isinstance(fault, float):
            i = int(fault * (len(body) - 1))
            body = body[:i] + bytes([body[i] ^ 1]) + body[i + 1 :]
        if fault in ("half of it", "half without a length") and len(body) > 1000:
            body = body[: len(body) // 2]
        sent = {"a byte": 1, "a tenth": len(whole) // 10, "a half": len(whole) // 2}
        sent["a tenth, no ranges"] = sent["a tenth"]
        sent = sent.get(fault, len(body))
        server.log.append((self.path, asked, len(body[:sent])))
        self.send_response(status, fault if fault == LONG else None)
        if fault not in ("no length", "half without a length"):
            self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        if server.retry_after:
            self.send_header("Retry-After", server.retry_after)
        self.end_headers()
        self.wfile.write(body[:sent])
        if fault == "a half":  # and the other half when the test says so
            server.in_the_middle.set()
            server.go_on.wait(60)
            self.wfile.write(body[sent:])


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content = {name: (COMMITTED / name).read_bytes() for name in utils.FILES}
    server.faults, server.log, server.retry_after, server.pauses = {}, [], None, []
    server.in_the_middle, server.go_on = threading.Event(), threading.Event()
    server.handle_error = lambda *args: None  # A client may be gone before the answer.
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.right = gpt2.main("Rome", 8, COMMITTED.name, str(COMMITTED.parent)) + "\n"
    server.sha256 = {n: sha256(server.content[n]).hexdigest() for n in utils.SHA256}
    monkeypatch.setattr(utils, "SHA256", server.sha256)
    monkeypatch.setattr("time.sleep", server.pauses.append)  # No test waits for the next try.
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path, server):
    """A folder that has all of 355M but the numbers."""
    (tmp_path / "355M").mkdir()
    for name in utils.FILES[:-1]:
        (tmp_path / "355M" / name).write_bytes(server.content[name])
    return tmp_path / "355M"


@pytest.fixture
def start(server, tmp_path):
    """Start the command on 355M in a process of its own, which runs the code `first` before."""

    def start(first=""):
        code = f"import gpt2, utils; utils.SHA256 = {server.sha256}\n{first}\n"
        code += "utils.command_line(gpt2.main)"
        words = [sys.executable, "-c", code, "Rome", "--n_tokens_to_generate", "8"]
        words += ["--model_size", "355M", "--models_dir", str(tmp_path)]
        return Popen(words, cwd=ROOT, stdout=PIPE, stderr=PIPE, encoding="utf-8")

    return start


def download(folder, size="355M"):
    utils.download_gpt2_files(size, str(folder))


def has(folder, server, names=utils.FILES):
    """Whether a folder has these files, as the server has them, and nothing beside but the lock."""
    here = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    return here == {name: server.content[name] for name in names}


@pytest.mark.parametrize("size", utils.SIZES)
def test_six_files_are_asked_for_once_and_never_again(size, server, tmp_path, capsys):
    for _ in range(2):
        download(tmp_path / size, size)
    assert capsys.readouterr().err.count("Downloading") == 1
    assert has(tmp_path / size, server)
    order = ["checkpoint", "hparams.json", "encoder.json", "vocab.bpe", "model.ckpt.index", DATA]
    assert server.log == [(f"/{size}/{n}", None, len(server.content[n])) for n in order]


@pytest.mark.parametrize("size", ["125M", "1M", "", "../124M"])
def test_only_a_published_size_is_downloaded(size, server, tmp_path):
    with pytest.raises(ValueError, match="must be 124M, 355M, 774M, 1558M, not"):
        download(tmp_path / "here", size)
    assert not server.log and not os.listdir(tmp_path)


@pytest.mark.parametrize("address", ["", "https://a.b/c", "https://a.b/c/"])
def test_the_address_is_openais_or_that_of_a_mirror(address, tmp_path, monkeypatch):
    def send(self, request, **options):
        raise requests.ConnectionError(f"asked for {request.url}")

    monkeypatch.setenv("GPT2_BASE_URL", address)
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    base = "https://a.b/c" if address else "https://openaipublic.blob.core.windows.net/gpt-2/models"
    with pytest.raises(OSError, match=f"asked for {base}/355M/checkpoint\n"):
        download(tmp_path)


@pytest.mark.skipif(not ORIGINAL.exists(), reason="needs OpenAI's vocabulary beside the project")
def test_the_known_digests_are_those_of_openais_vocabulary():
    contents = {name: (ORIGINAL / name).read_bytes() for name in ("encoder.json", "vocab.bpe")}
    assert {name: sha256(contents[name]).hexdigest() for name in contents} == utils.SHA256


@pytest.mark.parametrize("fault, tries", [(403, 1), (404, 1), (LONG, 1), (503, 5)])
def test_a_refusal_ends_at_once_and_a_broken_server_after_five_tries(fault, tries, server, folder):
    server.faults[DATA] = itertools.repeat(fault)
    with pytest.raises(OSError, match=f"^{server.url}/355M/{DATA} did not arrive .*: ") as error:
        download(folder)
    assert len(server.log) == tries and sum(server.pauses) < 10
    assert "Run again" not in str(error.value) and len(str(error.value)) < 800


@pytest.mark.parametrize("retry_after, pauses", [(None, [1, 2]), ("3600", [30, 30, 30])])
@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again_soon(status, retry_after, pauses, server, folder):
    server.faults[DATA], server.retry_after = iter([status] * 3), retry_after
    download(folder)
    assert has(folder, server) and len(server.log) == 4 and server.pauses == pauses


def test_without_a_network_the_message_names_a_model_that_needs_none(server, folder, monkeypatch):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # It does not listen, so a connection is refused.
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv("GPT2_BASE_URL", url)
        with pytest.raises(OSError, match=rf"^{url}/.* did not arrive .*: .*\n.* 1M, needs no"):
            download(folder)
    assert len(server.pauses) <= 2 and sum(server.pauses) <= 4


@pytest.mark.parametrize("fault", ["a tenth", "half of it", "half without a length"])
def test_answers_that_end_too_early_bring_the_file_in_one_run(fault, server, folder):
    server.faults[DATA] = itertools.repeat(fault)
    download(folder)
    size, n_bytes = len(server.content[DATA]), sum(sent for _, _, sent in server.log)
    assert has(folder, server) and size <= n_bytes < size + len(server.log) <= size + 12


@pytest.mark.parametrize("fault", ["no ranges", "no length", None])
@pytest.mark.parametrize("part", [0, 1, 2, 0.5, "all", "more"])
def test_a_part_of_any_length_becomes_the_file(part, fault, server, folder):
    size = len(server.content[DATA])
    n = {0.5: size // 2, "all": size, "more": 2 * size}.get(part, part)
    (folder / f"{DATA}.part").write_bytes((2 * server.content[DATA])[:n])
    server.faults[DATA] = itertools.repeat(fault)
    download(folder)
    n_bytes = size - n + 1 if 1 < n <= size else size  # The last byte of a part comes again.
    assert has(folder, server)
    assert fault == "no ranges" or [sent for _, _, sent in server.log if sent] == [n_bytes]


@pytest.mark.parametrize(("name", "fault"), DAMAGE)
def test_a_damaged_file_never_gets_its_name_and_is_fetched_anew(name, fault, server, tmp_path):
    server.faults[name] = iter([fault])
    before = utils.FILES[: utils.FILES.index(name)]
    with pytest.raises(OSError, match=rf"{name}.*\n.*deleted\. Run again"):
        download(tmp_path)
    assert has(tmp_path, server, before)
    download(tmp_path)
    names = [*before, name, *utils.FILES[len(before) :]]
    assert has(tmp_path, server) and [Path(path).name for path, _, _ in server.log] == names


def test_a_killed_process_loses_nothing(server, folder, start):
    server.faults[DATA] = iter(["a half"])
    # One more tensor, so that a half is more than any buffer: its type, place and checksum.
    place, size = len(server.content[DATA]), 1 << 25
    entry = b"\x08\x01\x12\x00\x20" + varint(place) + b"\x28" + varint(size)
    entry += b"\x35" + utils.masked_crc32c(bytes(size)).to_bytes(4, "little")
    entries = dict(utils.read_table(server.content[utils.INDEX])) | {b"more": entry}
    server.content[DATA] += bytes(size)
    server.content[utils.INDEX] = index_of(entries)
    (folder / utils.INDEX).write_bytes(server.content[utils.INDEX])
    part, half = folder / f"{DATA}.part", len(server.content[DATA]) // 2
    with start() as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size):
            server.go_on.wait(0.01)
        process.kill()
    assert 1 < (n := part.stat().st_size) <= half and DATA not in os.listdir(folder)
    download(folder)
    assert has(folder, server) and server.log[1][1] == f"bytes={n - 1}-"


@pytest.mark.parametrize("name", ["none", *utils.FILES])
def test_two_processes_fetch_each_file_once(name, server, tmp_path, start):
    server.faults[name] = iter(["a half"])
    with start() as first:
        assert name == "none" or server.in_the_middle.wait(60)
        with start() as second:
            assert name == "none" or second.stderr.readline().startswith("Downloading")
            server.go_on.set()
            assert first.communicate()[0] == second.communicate()[0] == server.right
    assert has(tmp_path / "355M", server)
    assert [path for path, _, _ in server.log] == [f"/355M/{name}" for name in utils.FILES]


@posix
def test_a_full_disk_is_a_message_and_the_next_run_goes_on(server, folder, start):
    half = len(server.content[DATA]) // 2
    with start(f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({half}, {half}))") as process:
        text, errors = process.communicate()
    assert "File too large" in errors and "Traceback" not in errors and not text
    assert process.returncode == 1 and DATA not in os.listdir(folder)
    with start() as process:
        assert process.communicate()[0] == server.right
    assert has(folder, server) and server.log[1][1] == f"bytes={half - 1}-"


@posix
def test_a_folder_that_cannot_be_written_is_named(server):
    with tempfile.TemporaryDirectory() as models:  # pytest's own folders are closed to other users
        os.chmod(models, 0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)  # For root, no folder is closed.
        try:
            with pytest.raises(PermissionError, match="355M"):
                download(Path(models, "355M"))
        finally:
            os.seteuid(user)
        os.chmod(models, 0o755)
        download(Path(models, "355M"))
        assert has(Path(models, "355M"), server)


@pytest.mark.parametrize("fault", ["a byte", 416])
def test_every_download_ends_after_a_fixed_number_of_tries(fault, server, folder):
    (folder / f"{DATA}.part").write_bytes(server.content[DATA][:1000])
    server.faults[DATA] = itertools.cycle([fault, "a byte"])
    with pytest.raises(OSError, match=r"did not arrive .*: .*Run again to continue"):
        download(folder)
    assert len(server.log) == utils.MAX_REQUESTS and DATA not in os.listdir(folder)


def test_a_part_loses_nothing_to_an_answer_that_starts_anew_and_breaks_off(server, folder):
    half = server.content[DATA][: len(server.content[DATA]) // 2]
    (folder / f"{DATA}.part").write_bytes(half)
    server.faults[DATA] = itertools.repeat("a tenth, no ranges")
    with pytest.raises(OSError, match="Run again to continue"):
        download(folder)
    assert (folder / f"{DATA}.part").read_bytes() == half


def test_a_file_that_stays_too_short_is_kept(server, folder):
    server.content[DATA] = server.content[DATA][:-1]
    with pytest.raises(OSError, match=r"ended too early\. Run again to continue"):
        download(folder)
    assert (folder / f"{DATA}.part").read_bytes() == server.content[DATA]
