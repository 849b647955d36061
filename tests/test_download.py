"""Downloads from a server that misbehaves, by processes that die and onto disks that are full."""

import base64
import hashlib
import http.server
import itertools
import os
import socket
import sys
import threading
from subprocess import PIPE, Popen

import pytest
import requests
from conftest import COMMITTED, ROOT

import gpt2
import utils
from utils import DATA, FILES

PAGE = b"<!DOCTYPE html>\n<html>Please log in</html>\n"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`. `server.faults` has the faults of its answers.

    Each fault is for one request, named by its method and its file. A number is a status. "break"
    closes the connection after 3,000 bytes, and "pause" in the middle, until the test goes on.
    """

    def log_message(self, *args): ...

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, name, asked = self.server, self.path.rsplit("/", 1)[1], self.headers["Range"]
        fault = next(server.faults.get((self.command, name), iter(())), "none")
        server.log.append((self.command, self.path, asked))
        whole = server.content[name]
        start = int(asked[6:-1]) if asked and "no range" not in str(fault) else 0
        body, status = whole[start:], 206 if start else 200
        if start >= len(whole):
            body, status = b"", 416
        if isinstance(fault, int):
            body, status = b"", fault
        body = {"page": PAGE, "wrong": bytes(len(body)), "longer": body + bytes(9000)}.get(
            fault, body
        )
        self.send_response({"page": 200, "moved": 302}.get(fault, status))
        length = len(body) + ("a byte more" in str(fault)) - ("a byte less" in str(fault))
        first = start + (fault == "another place")
        headers = {
            "Content-Type": "text/html; charset=utf-8" if fault == "page" else "image/any",
            "Content-Length": length if fault != "no length" else None,
            "Content-MD5": base64.b64encode(hashlib.md5(whole).digest()).decode(),
            "Content-Range": f"bytes {first}-{len(whole) - 1}/{len(whole)}" if start else None,
            "Location": f"/elsewhere{self.path}" if fault == "moved" else None,
            "Content-Encoding": "gzip" if fault == "gzip" else None,
        }
        for field, value in headers.items():
            if value is not None and field not in server.not_told:
                self.send_header(field, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        n_sent = {"pause": len(body) // 2, "one byte": 1}.get(fault, len(body))
        n_sent = min(3000, n_sent) if "break" in str(fault) else n_sent
        server.n_sent.append(n_sent)
        self.wfile.write(body[:n_sent])
        if fault == "pause":
            server.in_the_middle.set()
            server.go_on.wait(60)
            self.wfile.write(body[n_sent:])


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content = {name: (COMMITTED / name).read_bytes() for name in FILES}
    server.faults, server.not_told, server.log, server.n_sent = {}, [], [], []
    server.pauses, server.in_the_middle, server.go_on = [], threading.Event(), threading.Event()
    server.handle_error = lambda *args: None  # A client may be gone before the answer.
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.right = gpt2.main("Rome", 8, COMMITTED.name, str(COMMITTED.parent)) + "\n"
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
    for name in FILES[:-1]:
        (tmp_path / "355M" / name).write_bytes(server.content[name])
    return tmp_path / "355M"


@pytest.fixture
def start(tmp_path):
    """Start the command on 355M in a process of its own, which runs the code `first` before."""

    def start(first=""):
        code = f"import gpt2, command\n{first}\ncommand.command_line(gpt2.main)"
        words = [sys.executable, "-c", code, "Rome", "--n_tokens_to_generate", "8"]
        words += ["--model_size", "355M", "--models_dir", str(tmp_path)]
        return Popen(words, cwd=ROOT, stdout=PIPE, stderr=PIPE, encoding="utf-8")

    return start


def download(folder, size="355M"):
    utils.download_gpt2_files(size, str(folder))


def has(folder, server, names=FILES):
    """Whether a folder has these files, as the server has them, and beside them only the lock."""
    here = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    return here == {name: server.content[name] for name in names}


def assert_fails(folder, reason):
    """The download ends in one line, which names the file, the reason and the bundled model."""
    with pytest.raises(OSError, match=rf"{DATA} did not arrive: .*{reason}") as error:
        download(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert str(error.value).endswith("The bundled model, 1M, needs no network: --model_size 1M")
    assert DATA not in os.listdir(folder)


@pytest.mark.parametrize("size", utils.SIZES)
def test_five_files_are_asked_for_once_and_never_again(size, server, tmp_path, capsys):
    for _ in range(2):
        download(tmp_path / size, size)
    errors = capsys.readouterr().err
    assert errors.count("Downloading") == 1 and f"{DATA}: 100%" in errors
    assert has(tmp_path / size, server)
    names = ["checkpoint", "hparams.json", "encoder.json", "vocab.bpe", DATA]
    assert server.log == [(m, f"/{size}/{n}", None) for n in names for m in ("HEAD", "GET")]


@pytest.mark.parametrize("address", ["", "https://a.b/c", "https://a.b/c/"])
def test_the_address_is_openais_or_that_of_a_mirror(address, tmp_path, monkeypatch):
    def send(self, request, **options):
        raise requests.ConnectionError(f"asked for {request.url}")

    monkeypatch.setenv("GPT2_BASE_URL", address)
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    base = "https://a.b/c" if address else "https://openaipublic.blob.core.windows.net/gpt-2/models"
    with pytest.raises(OSError, match=f"asked for {base}/355M/checkpoint\\."):
        download(tmp_path)
    with pytest.raises(ValueError, match="must be 124M, 355M, 774M, 1558M, not '1M'"):
        download(tmp_path, "1M")


REFUSALS = [(method, "page", "the answer is a web page") for method in ("HEAD", "GET")]
REFUSALS += [("HEAD", "no length", "announce the size"), ("GET", "gzip", "compresses the file")]
REFUSALS += [("GET", status, f"answered {status}") for status in (403, 404, 416, 501)]
REFUSALS += [("HEAD", 405, "answered 405"), ("HEAD", 429, "429 error"), ("GET", 503, "503 error")]


@pytest.mark.parametrize(("method", "fault", "reason"), REFUSALS)
def test_a_refusal_ends_in_a_line_and_keeps_the_part(method, fault, reason, server, folder):
    half = server.content[DATA][: len(server.content[DATA]) // 2]
    (folder / f"{DATA}.part").write_bytes(half)
    server.faults[method, DATA] = itertools.repeat(fault)
    assert_fails(folder, reason)
    n_asked = [m for m, _, _ in server.log].count(method)
    assert n_asked == (5 if fault in (429, 503) else 1) and sum(server.pauses) < 10
    assert (folder / f"{DATA}.part").read_bytes() == half


@pytest.mark.parametrize("status", [408, 429, 500, 503, 599])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_busy_server_is_asked_again_after_pauses_that_grow(method, status, server, folder):
    server.faults[method, DATA] = iter([status] * 3)
    download(folder)
    assert has(folder, server) and server.pauses == [1, 2]


def test_without_a_network_the_reason_is_told_and_nothing_is_left(server, tmp_path, monkeypatch):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # It does not listen, so a connection is refused.
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv("GPT2_BASE_URL", url)
        words = rf"^{url}/355M/checkpoint did not arrive: .*refused.*\. The bundled model, 1M"
        with pytest.raises(OSError, match=words):
            download(tmp_path / "models" / "355M")
    assert sum(server.pauses) < 10 and not os.listdir(tmp_path)


@pytest.mark.parametrize("not_told", [[], ["Content-MD5"]], ids=str)
@pytest.mark.parametrize("fault", ["none", "no range", "break", "no length", "moved"])
@pytest.mark.parametrize("part", [0, 1, 0.5, "all", "more"])
def test_a_part_of_any_length_becomes_the_file(part, fault, not_told, server, folder):
    size, server.not_told = len(server.content[DATA]), not_told
    n = {0.5: size // 2, "all": size, "more": 2 * size}.get(part, part)
    (folder / f"{DATA}.part").write_bytes((2 * server.content[DATA])[:n])
    server.faults["GET", DATA] = itertools.cycle([fault, "none"] if fault == "moved" else [fault])
    download(folder)
    assert has(folder, server)
    n_expected = size if n > size or (fault == "no range" and n < size) else size - n
    assert fault == "moved" or sum(server.n_sent) == n_expected


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_a_wrong_md5_never_gets_its_name_and_is_fetched_anew(name, server, tmp_path):
    server.faults["GET", name] = iter(["wrong"])
    with pytest.raises(OSError, match=rf"{name} did not arrive: the file had a wrong MD5"):
        download(tmp_path)
    assert has(tmp_path, server, FILES[: FILES.index(name)])
    download(tmp_path)
    assert has(tmp_path, server)


LIES = [(m, f"no range, a byte {n}", "another") for m in ("HEAD", "GET") for n in ("less", "more")]
LIES += [("GET", "another place", "another part"), ("GET", "longer", "longer than the server")]
LIES += [("GET", "one byte", "too early"), ("GET", "break, no range", "too early")]


@pytest.mark.parametrize(("method", "fault", "reason"), LIES)
def test_a_server_that_contradicts_itself_costs_no_byte_of_the_part(
    method, fault, reason, server, folder
):
    whole, server.not_told = server.content[DATA], ["Content-MD5"]
    (folder / f"{DATA}.part").write_bytes(whole[:20_000])
    server.faults[method, DATA] = itertools.repeat(fault)
    assert_fails(folder, reason)
    n_requests = utils.MAX_REQUESTS if reason == "too early" else len(server.log) - 1
    assert len(server.log) == 1 + n_requests <= 21
    part = (folder / f"{DATA}.part").read_bytes()
    assert len(part) >= 20_000 and whole.startswith(part)
    server.faults.clear()
    server.log.clear()
    download(folder)
    ranges = [asked for method, _, asked in server.log if method == "GET"]
    assert ranges == ([f"bytes={len(part)}-"] if len(part) < len(whole) else [])
    assert has(folder, server)


def test_a_killed_process_loses_nothing(server, folder, start):
    server.faults["GET", DATA] = iter(["pause"])
    server.content[DATA] += bytes(1 << 25)  # so that a half is more than any buffer
    part, half = folder / f"{DATA}.part", len(server.content[DATA]) // 2
    with start() as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size):
            server.go_on.wait(0.01)
        process.kill()
    assert 1 < (n := part.stat().st_size) <= half and DATA not in os.listdir(folder)
    download(folder)
    assert has(folder, server) and server.log[-1][2] == f"bytes={n}-"


@pytest.mark.parametrize("name", ["none", *FILES])
def test_two_processes_fetch_each_file_once(name, server, tmp_path, start):
    server.faults["GET", name] = iter(["pause"])
    with start() as first:
        assert name == "none" or server.in_the_middle.wait(60)
        with start() as second:
            assert name == "none" or second.stderr.readline().startswith("Downloading")
            server.go_on.set()
            assert first.communicate()[0] == second.communicate()[0] == server.right
    assert has(tmp_path / "355M", server)
    assert [path for m, path, _ in server.log if m == "GET"] == [f"/355M/{n}" for n in FILES]


@pytest.mark.skipif(os.name == "nt", reason="needs the limits of POSIX")
def test_a_full_disk_is_a_message_and_the_next_run_goes_on(server, folder, start):
    half = len(server.content[DATA]) // 2
    with start(f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, ({half}, {half}))") as process:
        text, errors = process.communicate()
    assert "did not arrive: [Errno 27] File too large" in errors and "Traceback" not in errors
    assert process.returncode == 1 and not text and DATA not in os.listdir(folder)
    with start() as process:
        assert process.communicate()[0] == server.right
    assert has(folder, server) and server.log[-1][2] == f"bytes={half}-"
