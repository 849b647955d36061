"""Downloads from a server that misbehaves, folders that are damaged, processes that die or race."""

import base64
import concurrent.futures
import contextlib
import errno
import hashlib
import http.server
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import types
from pathlib import Path

import filelock
import pytest
import tqdm
from conftest import ROOT, SIZES, write_checkpoint

import gpt2
import utils

PROMPT = "O Romeo"
DATA, INDEX = "model.ckpt.data-00000-of-00001", "model.ckpt.index"
PUBLISHED = ROOT.parent / "shared" / "gpt2" / "124M"
posix = pytest.mark.skipif(os.name == "nt", reason="needs the signals, limits or users of POSIX")
PAGES = {
    "a web page": b"<!DOCTYPE html>\n<html>Please log in</html>",
    "a bare page": b"\n<html><body>Please log in</body></html>",
    "Azure's XML": b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>ServerBusy</Code></Error>',
    "bare XML": b"<Error><Code>ServerBusy</Code></Error>",
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`; `server.faults` has, by file, the faults of its next answers."""

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
        fault = next(server.faults.get(name, iter(())), "")
        whole, asked = server.content[name], self.headers["Range"]
        server.encodings.add(self.headers["Accept-Encoding"])
        start = int(asked[6:-1]) if asked and fault != "ignores Range" else 0
        if isinstance(fault, int) or (asked and start >= len(whole)):
            server.log.append((self.path, asked, 0))
            self.send_response(fault or 416)
            if not fault and server.tells_size:
                self.send_header("Content-Range", f"bytes */{len(whole)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start += {"another range": -1 if start else 1}.get(fault, 0)
        body = rest = PAGES.get(fault, b"" if fault == "nothing" else whole[start:])
        if fault in ("206 unasked", "206 that ends early"):
            body = rest[: len(rest) // 2]
        if "flipped" in fault:
            body = flip(rest)
        partial = (asked and fault != "ignores Range") or "206" in fault or fault == "another range"
        self.send_response(206 if partial else 200)
        if partial:
            end = start + len(body) - 1
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(whole)}")
        if fault != "no length":
            lie = {"too long": 9, "too short": -9}.get(fault, 0)
            self.send_header("Content-Length", str(len(body) + lie))
        if "MD5" in fault:  # Azure tells that of the whole beside a part of it
            content = rest if "of the rest" in fault else whole
            field = "x-ms-blob-content-md5" if partial and content is whole else "Content-MD5"
            self.send_header(field, base64.b64encode(hashlib.md5(content).digest()).decode())
        self.end_headers()
        if fault == "a trickle":
            for i in range(len(body)):
                self.wfile.write(body[i : i + 1])
                if server.closing.wait(0.02):
                    return
        if fault.endswith("at once"):
            body = b""
        elif fault in ("an end", "a reset", "a stall"):
            body = body[: len(body) // 2]
        elif fault == "a twentieth":
            body = body[: len(whole) // 20]
        server.log.append((self.path, asked, len(body)))
        self.wfile.write(body)
        if fault.startswith("a stall"):
            server.closing.wait()
        if fault.startswith("a reset"):
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()


@pytest.fixture
def server(monkeypatch, openai):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content = {name: (openai / name).read_bytes() for name in utils.FILES}
    server.faults, server.log, server.encodings, server.tells_size = {}, [], set(), True
    server.barrier, server.closing = threading.Barrier(2), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.pauses = []
    monkeypatch.setattr("time.sleep", server.pauses.append)
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name, sha256 in digests(openai).items():
        monkeypatch.setitem(utils.FILES, name, sha256)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path, openai):
    """A complete 355M, converted."""
    return shutil.copytree(openai, tmp_path / "355M")


@pytest.fixture(scope="module")
def right(openai):
    """What the model writes."""
    return gpt2.main(PROMPT, 8, openai.name, str(openai.parent))


@pytest.fixture
def child(run, tmp_path, openai):
    """Run the command on 355M in a process of its own, after the code `first`."""

    def child(first=""):
        code = f"import utils, gpt2; utils.FILES.update({digests(openai)}); utils.PAUSES = 0, 0, 0"
        code = f"{code}\n{first}\nutils.command_line(gpt2.main)"
        return run(PROMPT, 8, "355M", tmp_path, code=("-c", code), PYTHONIOENCODING="utf-8")

    return child


@pytest.fixture
def final(openai):
    """The files of a folder under a final name, each of which must be complete."""

    def final(folder):
        names = {path.name for path in folder.glob("*") if path.suffix != ".part"} - {".lock"}
        for name in names:
            assert (folder / name).read_bytes() == (openai / name).read_bytes()
        return names

    return final


@pytest.fixture
def whole(final):
    """Whether 355M is complete, with nothing beside it; Windows may keep the lock."""

    def whole(models_dir):
        names = {*os.listdir(models_dir / "355M")} - {".lock"}
        return final(models_dir / "355M") == names == {*utils.FILES, "params.f32"}

    return whole


def digests(folder, names=("encoder.json", "vocab.bpe")):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def text(models_dir):
    return gpt2.main(PROMPT, 8, "355M", str(models_dir))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def asked(server):
    """The files that the server was asked for."""
    return [path.rsplit("/", 1)[1] for path, _, _ in server.log]


def sent(server, file=DATA):
    """Which ranges of a file the server was asked for, and how many bytes it sent."""
    log = [entry[1:] for entry in server.log if entry[0].endswith(file)]
    return [asked for asked, _ in log], sum(n for _, n in log)


# --- The server ---


@pytest.mark.parametrize(
    "name, faults",
    [
        ("hparams.json", [500]),
        ("hparams.json", [408, 429, 503]),
        ("encoder.json", ["an end"]),
        (DATA, ["a reset"]),
        (DATA, ["a stall"]),
        (DATA, ["too long"]),
        (DATA, ["no length"]),
        (DATA, ["another range", 500]),
        (DATA, ["an end", "another range"]),
        (DATA, ["206 unasked"]),
        (DATA, ["an end", "206 that ends early"]),
        (DATA, ["an end", "ignores Range"]),
        (DATA, ["MD5"]),
        (DATA, ["an end", "MD5"]),
        (DATA, ["an end", "MD5 of the rest"]),
        (DATA, ["a reset", 500, "a reset"]),
    ],
    ids=str,
)
def test_a_fault_that_passes_is_only_a_delay(
    name, faults, server, tmp_path, right, whole, monkeypatch
):
    monkeypatch.setattr(utils, "TIMEOUT", 0.5)
    server.faults[name] = left = iter(faults)
    assert text(tmp_path) == right and whole(tmp_path)
    assert next(left, None) is None
    assert len(server.pauses) == sum("MD5" not in str(f) and f != "ignores Range" for f in faults)


@pytest.mark.parametrize(
    "fault, name, message, pauses",
    [
        (404, "hparams.json", "404", []),
        (403, DATA, "403", []),
        (416, DATA, "416", []),
        (408, DATA, "408", [1, 2, 3]),
        (429, DATA, "429", [1, 2, 3]),
        (500, DATA, "500", [1, 2, 3]),
        ("an end at once", DATA, "did not arrive", [1, 2, 3]),
        ("a reset at once", DATA, "did not arrive", [1, 2, 3]),
        ("a stall at once", DATA, "did not arrive", [1, 2, 3]),
        ("a trickle", DATA, r"only \d+ bytes came in 0.2 seconds", [1, 2, 3]),
        ("no length", DATA, "does not say which bytes it sends", [1, 2, 3]),
        ("another range", DATA, "does not say which bytes it sends", [1, 2, 3]),
        ("nothing", "hparams.json", "it is empty", []),
        ("too short", "encoder.json", "SHA-256", []),
        ("a flipped byte", "vocab.bpe", "SHA-256", []),
        ("a flipped byte, MD5", DATA, "MD5", []),
        ("a web page", "vocab.bpe", "web page", []),
        ("a web page", DATA, "web page", []),
        ("a bare page", DATA, "web page", []),
        ("Azure's XML", "checkpoint", "web page", []),
        ("bare XML", "hparams.json", "web page", []),
    ],
)
def test_a_fault_that_lasts_is_an_error_until_it_ends(
    fault, name, message, pauses, server, tmp_path, right, final, whole, monkeypatch, capsys
):
    monkeypatch.setattr(utils, "TIMEOUT", 0.5)
    monkeypatch.setattr(utils, "PATIENCE", 0.2)
    server.faults[name] = itertools.repeat(fault)
    with pytest.raises(OSError, match=message) as error:
        text(tmp_path)
    assert len(str(error.value).splitlines()) == 2
    assert server.pauses == pauses
    assert capsys.readouterr().err.count("trying again in") == len(pauses)
    before = final(tmp_path / "355M")
    assert before == {*itertools.takewhile(lambda n: n != name, utils.FILES)}
    server.faults.clear()
    server.log.clear()
    assert text(tmp_path) == right and whole(tmp_path)
    assert [*dict.fromkeys(asked(server))] == [n for n in utils.FILES if n not in before]


@pytest.mark.parametrize(
    "fault, name",
    [
        ("too short", DATA),
        ("a flipped byte", DATA),
        ("a flipped byte", INDEX),
        ("too short", INDEX),
    ],
)
def test_what_tensorflow_refuses_is_deleted_alone_and_comes_anew(
    fault, name, server, tmp_path, right, final, whole
):
    server.faults[name] = iter([fault])
    with pytest.raises(ValueError, match=r"model.ckpt.*\n.*deleted: run again"):
        text(tmp_path)
    assert final(tmp_path / "355M") == {*utils.FILES} - {name}
    server.log.clear()
    assert text(tmp_path) == right and whole(tmp_path)
    assert asked(server) == [name]


@pytest.mark.parametrize("fault, name", [("too short", "hparams.json"), ("a flipped byte", DATA)])
def test_damage_of_an_earlier_run_is_deleted_by_the_user_alone(
    fault, name, server, tmp_path, right, whole
):
    server.faults = {name: iter([fault]), "model.ckpt.meta": iter([404])}
    with pytest.raises(OSError, match="404"):
        text(tmp_path)
    with contextlib.suppress(ValueError):
        text(tmp_path)  # fetches what is still missing, if the damage lets it come so far
    server.log.clear()
    before = contents(tmp_path / "355M")
    with pytest.raises(ValueError, match=f"{name}.*\nDelete the file and run again"):
        text(tmp_path)
    assert contents(tmp_path / "355M") == before and name in before
    (tmp_path / "355M" / name).unlink()
    assert text(tmp_path) == right and whole(tmp_path)
    assert asked(server) == [n for n in utils.FILES if n == name or n not in before]


def test_bytes_that_arrive_renew_the_count_of_tries(server, tmp_path, right):
    server.faults[DATA] = iter([500, 500, "an end", 500, 500, "an end"])
    assert text(tmp_path) == right
    assert server.pauses == [1, 2, 1, 2, 3, 1]


def test_a_line_that_breaks_at_every_twentieth_gets_through_in_one_run(
    server, tmp_path, right, whole
):
    server.faults[DATA] = itertools.repeat("a twentieth")
    assert text(tmp_path) == right and whole(tmp_path)
    ranges, n_bytes = sent(server)
    assert len(ranges) == 21 and n_bytes == len(server.content[DATA])
    assert server.pauses == [1] * 20


def test_a_refused_connection_leaves_nothing_behind(server, tmp_path, right, whole, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("GPT2_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(OSError, match="did not arrive"):
            text(tmp_path)
    assert server.pauses == [1, 2, 3]
    left = [path.name for path in tmp_path.rglob("*")]
    assert not left or (os.name == "nt" and left == ["355M", ".lock"])  # it keeps what is open
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
    assert text(tmp_path) == right and whole(tmp_path)


@pytest.mark.parametrize(
    "address", ["nonsense", "http://", "ftp://a/b", "http://[", "http://a b:c"]
)
def test_an_address_that_is_none_fails_at_once(address, server, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", address)
    with pytest.raises(OSError, match="did not arrive"):
        text(tmp_path)
    assert server.pauses == []


@pytest.mark.parametrize("address", [None, "", "https://a.b/c", "https://a.b/c/"])
def test_without_another_address_openais_counts(address, tmp_path, monkeypatch):
    monkeypatch.delenv("GPT2_BASE_URL", raising=False)
    if address is not None:
        monkeypatch.setenv("GPT2_BASE_URL", address)
    urls = []
    monkeypatch.setattr(utils, "fetch", lambda url, path, sha256: urls.append(url))
    utils.download_gpt2_files("774M", str(tmp_path / "774M"))
    start = address and "https://a.b/c"
    start = start or "https://openaipublic.blob.core.windows.net/gpt-2/models"
    assert urls == [f"{start}/774M/{name}" for name in utils.FILES]


def test_it_is_asked_for_each_file_once_as_it_is_and_told_at_once(
    server, tmp_path, monkeypatch, capsys
):
    fetch = utils.fetch

    def spy(url, path, sha256):
        told.append(capsys.readouterr().err.splitlines()[0])
        fetch(url, path, sha256)

    told = []
    monkeypatch.setattr(utils, "fetch", spy)
    utils.download_gpt2_files("355M", str(tmp_path / "355M"))
    names = ", ".join(utils.FILES)
    assert told[0] == f"Downloading {names} from {server.url}/355M to {tmp_path / '355M'}"
    assert server.log == [(f"/355M/{n}", None, len(server.content[n])) for n in utils.FILES]
    assert server.encodings == {"identity"}


@pytest.mark.parametrize("size", ["125M", "", "../124M"])
def test_only_a_published_size_is_downloaded(size, server, tmp_path):
    with pytest.raises(ValueError, match="must be 124M, 355M, 774M, 1558M, not"):
        utils.download_gpt2_files(size, str(tmp_path / "here"))
    assert not server.log and not os.listdir(tmp_path)


# --- What came ---


def test_the_digests_are_those_of_openais_files():
    if not PUBLISHED.is_dir():
        pytest.skip("needs OpenAI's files, beside the project")
    here = [path.name for path in PUBLISHED.iterdir() if path.name in utils.FILES]
    assert len(here) >= 4
    assert digests(PUBLISHED, here) == {name: utils.FILES[name] for name in here}


@pytest.mark.parametrize("name", utils.FILES)
def test_every_file_of_124m_is_verified_and_one_alone_deleted(
    name, server, openai, tmp_path, monkeypatch
):
    for file, sha256 in digests(openai, utils.FILES).items():
        monkeypatch.setitem(utils.FILES, file, sha256)
    server.faults[name] = iter(["a flipped byte"])
    for _ in range(2):
        with contextlib.suppress(OSError):
            utils.download_gpt2_files("124M", str(tmp_path))
    assert sorted(asked(server)) == sorted([*utils.FILES, name])
    assert contents(tmp_path) == server.content


@pytest.mark.parametrize(
    "size, fault, hashed",
    [
        ("124M", "MD5", [(name, "sha256") for name in utils.FILES]),
        ("124M", "", [(name, "sha256") for name in utils.FILES]),
        ("355M", "", [("encoder.json", "sha256"), ("vocab.bpe", "sha256")]),
        (
            "355M",
            "MD5",
            [(n, "sha256" if n in ("encoder.json", "vocab.bpe") else "md5") for n in utils.FILES],
        ),
    ],
)
def test_nothing_is_hashed_twice(size, fault, hashed, server, openai, tmp_path, monkeypatch):
    for file, sha256 in digests(openai, utils.FILES).items():
        monkeypatch.setitem(utils.FILES, file, sha256)
    server.faults = {name: itertools.repeat(fault) for name in utils.FILES}
    new, n_bytes, log = hashlib.new, [], []

    def spy(kind):
        content = new(kind)
        log.append(kind)
        return types.SimpleNamespace(
            update=lambda data: n_bytes.append(len(data)) or content.update(data),
            digest=content.digest,
        )

    monkeypatch.setattr(utils.hashlib, "new", spy)
    utils.download_gpt2_files(size, str(tmp_path))
    assert log == [kind for _, kind in hashed]
    assert sum(n_bytes) == sum(len(server.content[name]) for name, _ in hashed)


def test_a_tag_inside_good_content_makes_no_page_of_it(server, tmp_path, right):
    server.content["checkpoint"] = b'model_checkpoint_path: "model.ckpt"\n# <html> <Error>\n'
    server.content["model.ckpt.meta"] = b"<htmlx>" + server.content["model.ckpt.meta"]
    assert text(tmp_path) == right


def test_a_checkpoint_that_names_no_file_of_the_seven_is_an_error(server, tmp_path):
    server.content["checkpoint"] = b'model_checkpoint_path: "other"\n'
    with pytest.raises(OSError, match=r"other\.index is missing"):
        text(tmp_path)
    assert asked(server) == [*utils.FILES]


def test_a_download_cut_off_goes_on_where_it_stopped(server, tmp_path, right):
    server.faults[DATA] = iter(["an end"])
    assert text(tmp_path) == right
    size = len(server.content[DATA])
    assert sent(server) == ([None, f"bytes={size // 2}-"], size)


@pytest.mark.parametrize("tells_size", [True, False])
@pytest.mark.parametrize("name", [DATA, "vocab.bpe"])
def test_what_is_complete_but_was_not_verified_is_used(
    name, tells_size, server, folder, right, whole, monkeypatch
):
    """Ctrl-C came after the last byte. A bare 416 does not tell the size: the next answer does."""
    server.tells_size = tells_size
    (folder / name).rename(folder / f"{name}.part")
    (folder / "params.f32").unlink()
    inode = (folder / f"{name}.part").stat().st_ino
    monkeypatch.setattr(utils, "keep_writing", lambda *args: pytest.fail("it is fetched again"))
    assert text(folder.parent) == right and whole(folder.parent)
    assert (folder / name).stat().st_ino == inode
    size = len(server.content[name])
    assert sent(server, name)[0] == [f"bytes={size}-", None][: 1 if tells_size else 2]


@pytest.mark.parametrize("tells_size", [True, False])
def test_what_is_complete_is_verified_too(tells_size, server, folder, right, whole):
    server.tells_size = tells_size
    (folder / "vocab.bpe.part").write_bytes(flip(server.content["vocab.bpe"]))
    (folder / "vocab.bpe").unlink()
    with pytest.raises(OSError, match="SHA-256"):
        text(folder.parent)
    assert text(folder.parent) == right and whole(folder.parent)


@pytest.mark.parametrize("tells_size", [True, False])
def test_a_part_of_another_file_is_no_part_of_this_one(tells_size, server, tmp_path, right, whole):
    server.tells_size = tells_size
    (tmp_path / "355M").mkdir()
    (tmp_path / "355M" / "vocab.bpe.part").write_bytes(b"#version: 0.1\n")
    (tmp_path / "355M" / f"{DATA}.part").write_bytes(bytes(1 << 22))  # longer than the file
    with pytest.raises(OSError, match="SHA-256"):
        text(tmp_path)
    assert text(tmp_path) == right and whole(tmp_path)


def test_hashing_shows_a_bar(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    n_bytes, bars = [], []
    bar = types.SimpleNamespace(update=n_bytes.append)

    def progress(**options):
        bars.append(options)
        return contextlib.nullcontext(bar)

    monkeypatch.setattr(utils, "progress", progress)
    assert utils.digest(tmp_path / "file", "md5") == hashlib.md5(bytes(3 << 20)).digest()
    assert bars[0]["total"] == sum(n_bytes) == 3 << 20 and len(n_bytes) > 1


def test_a_bar_goes_on_while_nothing_comes(monkeypatch):
    class Bar(tqdm.tqdm):
        def refresh(self, *args, **kwargs):
            if threading.current_thread() is not main:
                refreshed.set()

    main, refreshed = threading.current_thread(), threading.Event()
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with utils.progress(desc="a long wait"):
        assert refreshed.wait(60)


# --- Processes ---

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
def test_a_process_killed_in_a_download_loses_nothing(server, tmp_path, right, child, final, whole):
    size = len(server.content[DATA])
    server.faults[DATA] = iter(["a stall"])
    assert child(KILL.format(name=DATA, n=size // 4)).returncode == -signal.SIGKILL
    assert DATA not in final(tmp_path / "355M")
    came = (tmp_path / "355M" / f"{DATA}.part").stat().st_size
    assert came > size // 5
    server.log.clear()
    assert text(tmp_path) == right and whole(tmp_path)
    assert sent(server) == ([f"bytes={came}-"], size - came)


@posix
def test_a_process_killed_in_the_conversion_leaves_the_weights_of_before(
    folder, right, child, openai, whole
):
    old = contents(folder)["params.f32"][:-32] + bytes(32)  # of another checkpoint
    (folder / "params.f32").write_bytes(old)
    assert child(KILL.format(name="converting", n=20)).returncode == -signal.SIGKILL
    assert contents(folder)["params.f32"] == old and (folder / "params.f32.part").exists()
    assert text(folder.parent) == right and whole(folder.parent)


def test_two_processes_that_start_together_download_and_convert_once(
    server, tmp_path, right, child, whole
):
    start = f"from urllib import request; request.urlopen('{server.url}/start')"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = [future.result() for future in [pool.submit(child, start) for _ in range(2)]]
    assert [done.stdout for done in both] == [right + "\n"] * 2
    assert sorted(asked(server)) == sorted(utils.FILES)
    assert sum("converting" in done.stderr for done in both) == 1 and whole(tmp_path)


@pytest.mark.parametrize("lacking", [["params.f32"], [*utils.FILES, "params.f32"]], ids=len)
def test_what_another_process_made_in_the_meantime_is_used(
    lacking, server, folder, openai, right, whole, monkeypatch, no_tensorflow
):
    alone = utils.alone

    def after_another(path):
        for name in lacking:
            shutil.copy(openai / name, path)
        return alone(path)

    for name in lacking:
        (folder / name).unlink()
    monkeypatch.setattr(utils, "alone", after_another)
    assert text(folder.parent) == right and whole(folder.parent)
    assert not server.log


def test_whoever_waits_for_another_process_says_so(
    server, tmp_path, right, whole, monkeypatch, capsys
):
    acquire, timeouts = filelock.FileLock.acquire, []

    def busy_at_first(self, timeout=None, **kwargs):
        timeouts.append(timeout)
        if len(timeouts) == 1:
            raise filelock.Timeout(self.lock_file)
        return acquire(self, timeout, **kwargs)

    monkeypatch.setattr(filelock.FileLock, "acquire", busy_at_first)
    utils.download_gpt2_files("355M", str(tmp_path / "355M"))
    assert timeouts == [0, None]
    waiting = f"waiting for another process that is at work in {tmp_path / '355M'}"
    assert capsys.readouterr().err.strip().startswith(waiting)
    assert text(tmp_path) == right and whole(tmp_path)


@posix
def test_a_lock_that_its_last_owner_removed_is_taken_anew(tmp_path, monkeypatch):
    import fcntl

    def remove_and_lock(descriptor, operation):
        if operation & fcntl.LOCK_EX and not removed:
            removed.append((tmp_path / ".lock").unlink())
        return flock(descriptor, operation)

    flock, removed = fcntl.flock, []
    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    with utils.alone(str(tmp_path)):
        assert removed and (tmp_path / ".lock").exists()


@posix
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_that_cannot_lock_is_named_and_used(
    code, server, tmp_path, right, whole, monkeypatch, capsys
):
    def fail(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", fail)
    assert text(tmp_path) == right and whole(tmp_path)
    line = f"Going on without a lock on {tmp_path / '355M'}, so start no second process there: "
    assert line in capsys.readouterr().err


def test_a_machine_that_cannot_lock_is_named_and_used(
    server, tmp_path, right, whole, monkeypatch, capsys
):
    def fail(*args, **kwargs):
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    assert text(tmp_path) == right and whole(tmp_path)
    assert "Going on without a lock" in capsys.readouterr().err


@posix
def test_a_lock_that_is_a_link_leaves_its_target_alone(server, tmp_path, right, capsys):
    (tmp_path / "355M").mkdir()
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "355M" / ".lock").symlink_to(tmp_path / "mine")
    assert text(tmp_path) == right
    assert (tmp_path / "mine").read_text() == "precious"
    assert "Going on without a lock" in capsys.readouterr().err


# --- The disk ---


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
def test_a_full_disk_stops_a_download_that_then_goes_on(server, tmp_path, right, final, whole):
    with disk_of(1 << 20), pytest.raises(OSError, match=r"\.part: .*File too large"):
        text(tmp_path)
    assert DATA not in final(tmp_path / "355M") and server.pauses == []
    assert text(tmp_path) == right and whole(tmp_path)
    assert sent(server)[0] == [None, f"bytes={1 << 20}-"]


@posix
def test_a_full_disk_costs_only_the_converted_file(folder, right, whole, capsys):
    (folder / "params.f32").unlink()
    with disk_of(1 << 20):
        assert text(folder.parent) == right
    assert "could not be kept for next time: [Errno 27] File too large" in capsys.readouterr().err
    assert {*contents(folder)} == {*utils.FILES}
    assert text(folder.parent) == right and whole(folder.parent)


@posix
def test_a_read_only_folder_still_runs(folder, right, whole, capsys):
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


# --- The folder ---


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-4],
        lambda content: content[:-1],
        lambda content: content[:-32],
        lambda content: content[:-33] + content[-32:],
        lambda content: content + bytes(4),
        lambda content: bytes(4) + content,
        lambda content: content[:31],
        lambda content: b"",
        lambda content: content[:-32] + flip(content[-32:]),
    ],
    ids=[
        *("cut short", "cut within a number", "without its mark", "a byte lost", "too long"),
        *("too long before its mark", "less than a mark", "empty", "of another checkpoint"),
    ],
)
def test_a_converted_file_that_does_not_fit_is_made_anew(damage, folder, right, whole):
    path = folder / "params.f32"
    path.write_bytes(damage(path.read_bytes()))
    assert text(folder.parent) == right and whole(folder.parent)


def change(field, function):
    def damage(content):
        hparams = json.loads(content)
        return json.dumps(hparams | {field: function(hparams[field])}).encode()

    return damage


def a_layer_less_in_as_many_numbers(content):
    hparams = json.loads(content)
    n_ctx = hparams["n_ctx"] + 12 * hparams["n_embd"] + 13
    return json.dumps(hparams | {"n_layer": hparams["n_layer"] - 1, "n_ctx": n_ctx}).encode()


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
        ("hparams.json", lambda content: b"{}", "n_vocab must be a number above 0"),
        ("hparams.json", change("n_head", lambda n: 0), "n_head must be a number above 0"),
        ("hparams.json", change("n_layer", str), "n_layer must be a number above 0"),
        ("hparams.json", change("n_ctx", str), "n_ctx must be a number above 0"),
        ("hparams.json", change("n_embd", str), "n_embd must be a number above 0"),
        ("hparams.json", change("n_vocab", float), "n_vocab must be a number above 0"),
        ("hparams.json", change("n_vocab", lambda n: n - 1), "n_vocab must be"),
        ("hparams.json", change("n_ctx", lambda n: n + 1), r"model.ckpt\.\*: model/wpe is"),
        ("hparams.json", change("n_embd", lambda n: 2 * n), "wte is"),
        ("hparams.json", change("n_head", lambda n: 2 * n + 1), "n_embd must be a multiple"),
        ("hparams.json", change("n_layer", lambda n: n - 1), "more layers than n_layer"),
        ("hparams.json", change("n_layer", lambda n: n + 1), "is missing, .*hparams.json says"),
        ("hparams.json", a_layer_less_in_as_many_numbers, "more layers than n_layer"),
        ("checkpoint", lambda content: b"", "checkpoint names no checkpoint"),
        ("checkpoint", lambda content: b'model_checkpoint_path: ""', "names no checkpoint"),
        (DATA, lambda content: content[: len(content) // 2], rf"model.ckpt\.\*: {DATA}: ."),
        (DATA, lambda content: content[:-1], rf"model.ckpt\.\*: {DATA}: ."),
        (DATA, flip, rf"model.ckpt\.\*: {DATA}: ."),
        (INDEX, lambda content: content[:-1], rf"model.ckpt\.\*: {INDEX}: ."),
        (INDEX, flip, rf"model.ckpt\.\*: {INDEX}: ."),
        (INDEX, lambda content: b"", rf"model.ckpt\.\*: {INDEX}: ."),
    ],
)
def test_a_damaged_file_costs_no_other_and_once_deleted_comes_anew(
    name, damage, message, server, folder, right, whole
):
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    if name == DATA:  # else the converted file would do
        (folder / "params.f32").unlink()
    before = contents(folder)
    with pytest.raises(ValueError, match=f"{message}.*\nDelete the file and run again") as error:
        text(folder.parent)
    assert len(str(error.value).splitlines()) == 2
    assert contents(folder) == before
    path.unlink()
    if name in ("checkpoint", INDEX):
        (folder / "params.f32").unlink()
    assert text(folder.parent) == right and whole(folder.parent)
    assert server.log == [(f"/355M/{name}", None, path.stat().st_size)]


def test_the_old_weights_stay_until_the_new_are_complete(folder, server):
    write_checkpoint(folder, **SIZES, seed=1)
    (folder / DATA).write_bytes(flip((folder / DATA).read_bytes()))
    before = contents(folder)
    with pytest.raises(ValueError, match="Delete the file"):
        text(folder.parent)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name", [name for name in utils.FILES if name not in ("model.ckpt.meta", "hparams.json")]
)
def test_a_missing_file_alone_is_downloaded(name, server, folder, right, whole):
    (folder / "params.f32").unlink()
    (folder / name).unlink()
    assert text(folder.parent) == right and whole(folder.parent)
    assert asked(server) == [name]


@pytest.mark.parametrize("name", ["hparams.json", "encoder.json", "vocab.bpe"])
def test_what_tensorflow_does_not_read_comes_without_it(
    name, server, folder, right, whole, no_tensorflow
):
    (folder / name).unlink()
    assert text(folder.parent) == right and whole(folder.parent)
    assert asked(server) == [name]


@pytest.mark.parametrize(
    "name", ["checkpoint", "encoder.json", "vocab.bpe", "hparams.json", DATA, INDEX]
)
def test_a_missing_file_of_a_model_of_ones_own_is_an_error(name, models_dir, openai, right):
    for gone in ("params.f32", name):
        (models_dir / "mine" / gone).unlink()
    with pytest.raises(OSError, match=f"{name} is missing.\nPut back"):
        gpt2.main(PROMPT, 8, "mine", str(models_dir))
    shutil.copy2(openai / name, models_dir / "mine")
    assert gpt2.main(PROMPT, 8, "mine", str(models_dir)) == right


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("model/ln_f/b"), r"model/ln_f/b is missing"),
        (lambda tensors: tensors.update({"model/ln_f/b": [0.0]}), r"model/ln_f/b is \[1\]"),
    ],
    ids=["missing", "of the wrong shape"],
)
def test_a_tensor_that_is_not_as_it_should_be_is_an_error(
    change, message, server, folder, right, whole
):
    import tensorflow as tf

    prefix = str(folder / "model.ckpt")
    reader = tf.train.load_checkpoint(prefix)
    tensors = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    change(tensors)
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=[*tensors],
        shape_and_slices=[""] * len(tensors),
        tensors=[*tensors.values()],
    )
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"model.ckpt\.\*: {message}"):
        text(folder.parent)
    assert contents(folder) == before
    for name in (DATA, INDEX, "params.f32"):
        (folder / name).unlink()
    assert text(folder.parent) == right and whole(folder.parent)


# --- TensorFlow and the machine are no reason to delete anything ---


@pytest.mark.parametrize(
    "source",
    [
        "raise ImportError('no such file: libtensorflow_framework.so')",
        "raise ValueError('numpy.dtype size changed, may indicate binary incompatibility')",
        "raise AttributeError('_ARRAY_API not found')",
        "raise SystemError('initialization failed')",
        "raise MemoryError('not enough')",
    ],
)
def test_a_tensorflow_that_cannot_be_imported_is_told_and_costs_nothing(
    source, server, tmp_path, right, final, whole, monkeypatch
):
    with monkeypatch.context() as without:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "tensorflow.py").write_text(source)
        without.syspath_prepend(tmp_path / "broken")
        without.delitem(sys.modules, "tensorflow", raising=False)
        for _ in range(2):
            cause = source.split("'")[1]
            with pytest.raises(OSError, match=f"TensorFlow.*: {cause}\nInstall it, or "):
                text(tmp_path)
            assert final(tmp_path / "355M") == {*utils.FILES}
    assert asked(server) == [*utils.FILES]
    assert text(tmp_path) == right and whole(tmp_path)


def test_a_failure_that_is_not_of_the_folder_is_not_tried_a_second_time(folder, monkeypatch):
    def fail():
        tries.append(1)
        raise OSError("no TensorFlow here")

    tries = []
    (folder / "params.f32").unlink()
    monkeypatch.setattr(utils, "import_tensorflow", fail)
    with pytest.raises(OSError, match="no TensorFlow here"):
        text(folder.parent)
    assert tries == [1]


def test_without_tensorflow_it_is_told_what_does_without(folder, child):
    (folder / "params.f32").unlink()
    done = child("import sys; sys.modules['tensorflow'] = None")
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr
    for words in ("TensorFlow", "Install it", "converted folder", "Hugging Face's layout"):
        assert words in done.stderr
    assert {*contents(folder)} == {*utils.FILES}


def failures():
    import tensorflow as tf

    return {
        "memory": MemoryError("Unable to allocate 147. MiB"),
        "TensorFlow's memory": tf.errors.ResourceExhaustedError(None, None, "OOM when allocating"),
        "C++'s memory": RuntimeError("std::bad_alloc\nand a stack trace"),
        "permission": tf.errors.PermissionDeniedError(None, None, "model.ckpt; denied"),
        "the disk": tf.errors.UnknownError(None, None, "model.ckpt; Input/output error"),
    }


@pytest.mark.parametrize("when", ["load_checkpoint", "get_tensor"])
@pytest.mark.parametrize(
    "cause", ["memory", "TensorFlow's memory", "C++'s memory", "permission", "the disk"]
)
def test_a_failure_of_the_machine_is_a_line_and_costs_nothing(
    cause, when, server, tmp_path, right, final, whole, monkeypatch
):
    import tensorflow as tf

    failure = failures()[cause]

    def fail(*args):
        raise failure

    def load_checkpoint(prefix):
        shapes = tf.train.load_checkpoint(prefix).get_variable_to_shape_map
        return types.SimpleNamespace(get_variable_to_shape_map=shapes, get_tensor=fail)

    train = types.SimpleNamespace(
        load_checkpoint=fail if when == "load_checkpoint" else load_checkpoint
    )
    fake = types.SimpleNamespace(errors=tf.errors, train=train)
    with monkeypatch.context() as scarce:
        scarce.setattr(utils, "import_tensorflow", lambda: fake)
        with pytest.raises((OSError, MemoryError)) as error:
            text(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert str(failure).splitlines()[0] in str(error.value)
    assert final(tmp_path / "355M") == {*utils.FILES}
    assert {*contents(tmp_path / "355M")} == {*utils.FILES}
    server.log.clear()
    assert text(tmp_path) == right and whole(tmp_path)
    assert not server.log


def test_the_command_ends_with_two_lines_and_no_traceback(server, folder, child):
    (folder / "vocab.bpe").rename(folder / "gone")
    server.faults["vocab.bpe"] = iter([404])
    missing = child()
    (folder / "gone").rename(folder / "vocab.bpe")
    (folder / "hparams.json").write_bytes(b"")
    damaged = child()
    for done, start in (
        (missing, f"{server.url}/355M/vocab.bpe did"),
        (damaged, str(folder / "hparams.json")),
    ):
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.splitlines()[-2].startswith(start) and "Traceback" not in done.stderr
    assert len(damaged.stderr.splitlines()) == 2
