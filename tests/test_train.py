"""Training: from nothing and from another model, on one device, on several, and in processes."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired

import jax
import numpy as np
import pytest
from conftest import BUNDLED, COMMITTED, ROOT, run
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from encoder import Encoder, bytes_to_unicode, read_text
from gpt2 import gpt2, main
from utils import DATA, build_params, load_encoder_hparams_and_params

END = "<|endoftext|>"
FISH = "One fish, two fish, red fish, blue fish.\n"
VERSE = "O Romeo! why art\nthou, Sweet? Ay: what's\n\nhere, 'tis he; go in, Dame.\nNo more -- no?\n"
BYTES = Encoder({char: byte for byte, char in bytes_to_unicode().items()}, [])
LOSSES = r"loss: (\S+) at first, (\S+) at the end.\nHeld-out loss: (\S+) before .*, (\S+) after"


@pytest.fixture(scope="session")
def small(train, tmp_path_factory):
    """A folder with a text and, in `start`, a small model that was never trained."""
    folder = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(0)
    text = " ".join(random.choice(["fish", "bird", "red", "blue,", "one\n"], 2000))
    (folder / "text.txt").write_text(text, "utf-8")
    learnt = train.learn_vocabulary(text)
    ids = {token: len(learnt.encoder) + i for i, token in enumerate(["<pad>", "<end>", "<name>"])}
    encoder = Encoder(learnt.encoder | ids, learnt.bpe_ranks, [END, "<pad>", "<end>"], ["<name>"])
    encoder.bos, encoder.eos = [ids["<pad>"]], {ids["<end>"], encoder.special[END]}
    hparams = dict(n_vocab=len(encoder.encoder), n_ctx=32, n_embd=16, n_head=2, n_layer=1)
    params = build_params(hparams, lambda name, *shape: random.normal(0, 0.2, shape))
    (folder / "start").mkdir()
    train.save(folder / "start", encoder, hparams, jax.tree.map(np.float32, params))
    return folder


def start_processes(folder, model_dir, n, steps, code=("examples/train.py",)):
    """Start the command `n` times. The processes fine-tune a model together."""
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"  # a port that is free
    words = [sys.executable, *code, folder / "text.txt", model_dir, "--steps", steps]
    words += ["--start", folder / "start", "--batch", 5, "--length", 16, "--lr", 0.01]
    together = ["--coordinator_address", address, "--num_processes", n, "--process_id"]
    commands = [[*words, *together, id] for id in range(n)] if n > 1 else [words]
    options = {"cwd": ROOT, "env": os.environ | {"XLA_FLAGS": ""}, "stdout": PIPE, "stderr": PIPE}
    return [Popen([*map(str, command)], text=True, **options) for command in commands]


def losses(windows, params):
    """Return minus the log probability of each token of the windows but the first, by NumPy."""
    logits = np.array([gpt2(window[:-1], **params, n_head=2) for window in windows])
    chosen = np.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    return np.log(np.exp(logits).sum(axis=-1)) - chosen


def test_any_text_trains_a_model_that_recites_it(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "N_ASKED", 50)
    monkeypatch.setattr(train, "SIZES", {"n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 1})
    (tmp_path / "text.txt").write_text(f"{FISH * 40}Red fish swim{FISH.strip() * 40}", "utf-8")
    told = train.main(tmp_path / "text.txt", tmp_path / "fish", steps=40, batch=8, length=16)
    assert re.search(r"\nAfter prompts as they stand.* the next 16 tokens: \d+ of [1-9]", told)
    assert main("One fish, two", 10, "fish", str(tmp_path)).startswith(" fish")


def test_devices_and_processes_learn_the_same(train, small, tmp_path, monkeypatch):
    processes = start_processes(small, tmp_path / "2 processes", 2, steps=10)
    # Neither two nor eight divides the batch.
    options = {"start": small / "start", "steps": 10, "batch": 5, "length": 16, "lr": 0.01}
    devices, told = jax.devices(), []
    for n in (1, 8):
        monkeypatch.setattr(jax, "devices", lambda n=n: devices[:n])
        told.append(train.main(small / "text.txt", tmp_path / f"{n} devices", **options))
    told += [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "loss" not in told.pop()  # only process 0 reports
    one, *others = [[*map(float, re.search(LOSSES, text).groups())] for text in told]
    assert min(one[0] - one[1], one[2] - one[3]) > 0.1
    assert others == [pytest.approx(one, abs=1e-3)] * 2
    names = ("1 devices", "8 devices", "2 processes")
    one, *others = [load_encoder_hparams_and_params(name, tmp_path)[2] for name in names]
    for params in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), one, params)


def test_the_saved_folder_has_hugging_faces_layout_and_all_special_tokens(small):
    config = json.loads((small / "start" / "config.json").read_text("utf-8"))
    weight = load_file(small / "start" / "model.safetensors")["h.0.mlp.c_fc.weight"]
    assert (config["model_type"], weight.shape) == ("gpt2", (16, 64))
    tokenizer = Tokenizer.from_file(str(small / "start" / "tokenizer.json"))
    encoder, hparams, _ = load_encoder_hparams_and_params("start", small)
    assert hparams["n_vocab"] == config["vocab_size"] == tokenizer.get_vocab_size()
    text = f"{FISH} né\n\n  fish 🐟{END}fish<pad>fish<name>fish"
    ids = tokenizer.encode(text).ids
    assert ids == encoder.encode(text, allowed_special="all")
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.replace(END, "").replace("<pad>", "")  # the special ones
    assert encoder.added == {"<name>"}
    assert [encoder.decoder[id] for id in encoder.bos] == ["<pad>"]
    assert {encoder.decoder[id] for id in encoder.eos} == {END, "<end>"}


REPLACE = "has a model already. Use another folder, or add --replace."
OTHER_FILES = ["README.md", "ds_config.json", "my_tokens_2024.json", "pytorch_model.bin"]
OLD_FILES = ["generation_config.json", "special_tokens_map.json", "tokenizer_config.json"]
OLD_FILES += ["added_tokens.json", "vocab.json", "merges.txt", "model-1.safetensors"]


def test_only_replace_replaces_a_model_and_only_its_own_files_go(small, tmp_path):
    words = (small / "text.txt", tmp_path, "--start", small / "start", "--steps", 1, "--length", 16)
    for name in ("config.json", *OTHER_FILES, *OLD_FILES, "other.safetensors"):
        (tmp_path / name).write_text('{"eos_token_id": 7}')
    parts = {"weight_map": {"a": "model-1.safetensors", "b": "README.md", "c": "../text.txt"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(parts))
    refused = run(*words, code=("examples/train.py",))
    assert (refused.returncode, refused.err) == (1, f"{tmp_path} {REPLACE}\n")
    for replace in (("x", "--replace"), ("--replace", "x")):  # The flag takes no word.
        assert "Could not consume arg: x" in run(*words, *replace, code=("examples/train.py",)).err
    assert (tmp_path / "merges.txt").exists()
    assert run(*words, "--replace", code=("examples/train.py",)).returncode == 0
    new = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path)) == sorted([*new, *OTHER_FILES, "other.safetensors"])


@pytest.mark.parametrize("old", [BUNDLED, COMMITTED], ids=["hugging face", "openai"])
def test_saving_may_die_before_any_change_of_a_file(old, train, small, tmp_path, monkeypatch):
    """The folder loads as the old model or as the new one, or it says that it is not complete."""
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")  # Nobody answers there.
    encoder, hparams, params = load_encoder_hparams_and_params("start", small)
    with pytest.raises(AttributeError):  # An incomplete model does not even begin to replace.
        train.save(tmp_path, encoder, hparams, params | {"wte": "not an array"})
    assert not os.listdir(tmp_path)
    real, found, left = {name: getattr(Path, name) for name in ("replace", "unlink")}, [], []

    def dying(name):
        def change(*args, **options):
            left.pop()  # This raises IndexError if no change is left.
            return real[name](*args, **options)

        return change

    for name in real:
        monkeypatch.setattr(Path, name, dying(name))
    while not found or found[-1] != hparams:
        folder = shutil.copytree(old, tmp_path / f"{len(found)}" / "124M")
        left[:] = [None] * len(found)
        with contextlib.suppress(IndexError):
            train.save(folder, encoder, hparams, params)
        try:
            found.append(load_encoder_hparams_and_params("124M", folder.parent)[1])
        except ValueError as error:
            assert "124M is not complete" in str(error)
            found.append(None)
        assert (folder / DATA).exists() == (old / DATA).exists()
    n_old, n_none = found.index(None), found.count(None)
    before = load_encoder_hparams_and_params(old, None)[1]
    assert found == [before] * n_old + [None] * n_none + [hparams] and n_none >= 5


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process instead of telling it")
@pytest.mark.parametrize(("n", "signum"), [(1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_to_any_process_stops_all_and_keeps_what_was_learnt(small, tmp_path, n, signum):
    processes = start_processes(small, tmp_path / "new", n, steps=10**6)
    next(line for line in processes[0].stderr if "loss " in line)
    processes[-1].send_signal(signum)
    said = [process.communicate(timeout=60) for process in processes]
    assert {process.returncode for process in processes} == {128 + signum}, said
    assert f"Stopped. The model is in {tmp_path / 'new'}.\nTraining loss: " in said[0][0]
    load_encoder_hparams_and_params("new", tmp_path)


# As a step of JAX, the hash works for minutes without the lock of Python.
LONG_STEP = """import hashlib, sys
sys.path.insert(0, "examples")
import train, utils
def long_step(*_):
    print("Training", file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
train.train = long_step
utils.command_line(train.main)"""


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process instead of telling it")
def test_a_second_signal_does_not_wait_for_the_step(small, tmp_path):
    (process,) = start_processes(small, tmp_path / "new", 1, 1, code=("-c", LONG_STEP))
    next(line for line in process.stderr if "Training" in line)
    for _ in range(100):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(TimeoutExpired):
            process.wait(0.1)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGINT


MISTAKES = [
    ("", {}, "text.txt is empty"),
    (f"\n{END}\n{END}", {}, "text.txt is empty"),
    ("A b c.", {}, "--length 40 is too long: this model and text allow [4-9]"),
    (FISH * 40, {"start": "{start}", "length": 33}, "--length 33 is too long: .* allow 32"),
    (FISH, {"start": "{start}", "length": 16}, "--length 16 is too long: .* allow 0"),
    (FISH * 40, {"model_dir": "{text}/new"}, "text.txt"),
    (FISH, {"start": "{text}"}, "must be .* or a folder in .*, not .*text.txt"),
    (FISH, {"steps": "1.5"}, "steps must be a whole number, 0 or more, not '1.5'"),
    (FISH, {"lr": "nan"}, "lr must be a number, from 0 to 1, not 'nan'"),
]


@pytest.mark.parametrize(("text", "options", "message"), MISTAKES)
def test_a_mistake_is_told_in_one_line(train, small, tmp_path, monkeypatch, text, options, message):
    monkeypatch.setattr(train, "train", None)  # every mistake is found before training
    path = tmp_path / "text.txt"
    path.write_text(text, "utf-8")
    options = {k: str(v).format(text=path, start=small / "start") for k, v in options.items()}
    with pytest.raises((ValueError, OSError), match=message) as error:
        train.main(**{"text_path": path, "model_dir": tmp_path / "new"} | options)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_package_that_is_missing_is_told_in_one_line():
    code = "import sys; sys.modules['optax'] = None; sys.path.insert(0, 'examples'); import train"
    errors = run(code=("-c", code)).err
    assert re.fullmatch(r".*optax.*: pip install -r examples/requirements.txt\n", errors)


def test_the_last_twentieth_is_held_out(train, small):
    text = read_text(small / "text.txt")
    encoder, _, _, draw, _, held_out, _ = train.from_start(text, small / "start", length=16)
    ids = encoder.encode(text)
    places = {tuple(ids[i : i + 17]): i for i in range(len(ids) - 16)}
    learnt = [places[tuple(row)] for _ in range(1000) for row in draw()[0].tolist()]
    first = min(places[tuple(row)] for row in held_out.tolist())
    assert 0.9 * len(ids) < max(learnt) + 17 <= first == len(ids) - len(ids) // 20


def test_the_losses_are_those_of_gpt2_on_numpy(train, small, tmp_path):
    options = {"start": small / "start", "steps": 3, "batch": 3, "length": 16, "lr": 0.1}
    told = train.main(small / "text.txt", tmp_path / "new", **options)
    trained = load_encoder_hparams_and_params("new", tmp_path)[2]
    _, _, params, draw, _, held_out, _ = train.from_start(read_text(small / "text.txt"), **options)
    windows, _ = draw()
    each = [losses(windows, params), losses(held_out, params), losses(held_out, trained)]
    first, _, before, after = map(float, re.search(LOSSES, told).groups())
    assert [v.mean() for v in each] == pytest.approx([first, before, after], abs=1e-3)
    n_typed = np.array([0, 9, 4])
    learnt = each[0][np.arange(1, 17) >= n_typed[:, None]]  # typed tokens do not count
    assert train.loss(params, windows, n_typed, 2) == pytest.approx(learnt.mean(), abs=1e-3)


CHINESE = "天地玄黄。宇宙洪荒。日月盈昃。辰宿列张。寒来暑往。秋收冬藏。闰余成岁。律吕调阳。"
LONG_RUNS = {"Chinese": CHINESE, "JSON": '{"a":1,"b":[2,3],"c":{"d":"e"}}'}
LONG_RUNS["genome"] = "ACGTTGCA" * 9


@pytest.mark.parametrize("text", [VERSE, *LONG_RUNS.values()], ids=["verse", *LONG_RUNS])
def test_windows_begin_with_any_word_and_continue_like_the_text(train, text):
    encoder = train.learn_vocabulary(text)
    ring, random = train.Text(text, encoder), np.random.default_rng(0)
    starts, prompts = set(), set()
    for _ in range(2000):
        ids, n = ring.window(random, 40)
        typed, rest = encoder.decode(ids[:n]), encoder.decode(ids[n:])
        assert rest.strip("\ufffd") in f"{END}{text}" * 99 and len(ids) == 41
        prompts.add((typed, rest[:2]))
        starts |= set() if n else {rest[:2]}
    words = [END, *text.split()] if text == VERSE else [END, *text]
    assert {start[0] for start in starts} == {word[0] for word in words}
    assert len(ring.words) == len(words)
    if text == VERSE:
        assert prompts >= {("o romeo why art", "\nt"), ("no more no", "?\n")}
        assert prompts >= {("here 'tis he go in", ", "), ("thou sweet ay what's", "\n\n")}


@pytest.mark.parametrize("text", [CHINESE, LONG_RUNS["JSON"]], ids=["Chinese", "JSON"])
def test_any_token_after_the_first_few_can_be_asked_for(train, text):
    ring = train.Text(text, train.learn_vocabulary(text))
    asked = {id for ids in train.questions(ring, False, 256) for id in ids[-16:]}
    assert asked >= {*ring.ids_from(len(END), 99)[8:]}


def test_an_exam_question_has_only_one_answer(train):
    red, one = "Red fish and blue fish swim", "one by one they came here"
    ring = train.Text("\n".join([red, "two by two", one, "two by two", red.upper()]), BYTES)
    for is_typed, whole in [(False, ring.text), (True, train.as_typed(ring.text))]:
        prompts = [BYTES.decode(ids[:-16]) for ids in train.questions(ring, is_typed, 256)]
        assert prompts and all(whole.count(prompt) == 1 for prompt in prompts)
        assert not [prompt for prompt in prompts if prompt in ("two by", "red fish")]


@pytest.mark.parametrize("text", ["Two", f"Two{END}"])
def test_a_text_without_a_question_is_told(train, text, small, tmp_path):
    told = train.recite(text, small / "start")
    assert told.count("there is no test: the text is too short, or it repeats itself") == 2


def test_endoftext_is_one_token_and_windows_line_ends_change_no_ids(train, tmp_path):
    text = f"To be, or not to be.{END}That is.\n" * 200
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    encoder = train.learn_vocabulary(text)
    assert not [token for token in encoder.encoder if "endof" in token and token != END]
    ring = train.Text(read_text(tmp_path / "text.txt"), encoder)
    ids = ring.encode(ring.text)
    assert ids == encoder.encode(END + text, "all")
    assert ids.count(encoder.special[END]) == 201
    assert sum(ring.text[start:end] == END for start, end in ring.words) == 201
