"""Training: any text, from nothing or from another model, on any number of devices."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import ROOT

from gpt2 import gpt2, main
from utils import build_params, load_encoder_hparams_and_params

FISH = "One fish, two fish, red fish, blue fish.\n"
FILES = ["config.json", "model.safetensors", "tokenizer.json"]
LOSS = re.compile(r"Loss: (\S+) on the text, (\S+) on its last twentieth.*before: (\S+)\)")


@pytest.fixture(scope="session")
def small(train, tmp_path_factory):
    """A folder with a text and, in `start`, a small model that was never trained."""
    folder = tmp_path_factory.mktemp("small")
    words = np.random.default_rng(0).choice(["fish", "bird", "red", "blue,", "one\n"], 2000)
    (folder / "text.txt").write_text(" ".join(words), "utf-8")
    encoder = train.learn_vocabulary(" ".join(words))
    hparams = {"n_vocab": len(encoder.encoder), "n_ctx": 32, "n_embd": 16, "n_head": 2}
    hparams["n_layer"] = 1
    random = np.random.default_rng(0)
    params = build_params(hparams, lambda name, *shape: random.normal(0, 0.2, shape))
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    train.save(folder / "start", encoder, hparams, params)
    return folder


@pytest.fixture
def started(small):
    """Start `python examples/train.py` with these arguments; whatever still runs, ends."""
    processes = []

    def started(*args, **env):
        processes.append(
            subprocess.Popen(
                [sys.executable, "examples/train.py", small / "text.txt", *map(str, args)],
                cwd=ROOT,
                env=os.environ | env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def two(started, *args):
    """Start two processes that train one model together."""
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    joined = ("--coordinator_address", address, "--num_processes", 2)
    return [started(*args, *joined, "--process_id", i, XLA_FLAGS="") for i in (0, 1)]


def wait_for(process, words):
    """Read what a process says until it says this, and return all of it."""
    said = ""
    while words not in said:
        said += (piece := process.stderr.read(1))
        assert piece, said
    return said


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_text_trains_another_model(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(FISH * 40 + FISH.strip() * 40, "utf-8")  # and a line longer than the context
    options = ("--steps", 12, "--batch", 8, "--length", 16)
    done = run(text, tmp_path / "fish", *options, code=("examples/train.py",), XLA_FLAGS="")
    assert done.stdout.startswith("Loss: ")
    for said in ("Reading", "Compiling", "Training", "loss ", "Saving", "Measuring"):
        assert said in done.stderr
    assert sorted(os.listdir(tmp_path / "fish")) == FILES
    assert "fish" in main("One fish, two", 10, "fish", str(tmp_path))


def test_what_is_written_is_hugging_faces_layout(small, train):
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    config = json.loads((small / "start" / "config.json").read_text("utf-8"))
    assert config["model_type"] == "gpt2"
    tensors = load_file(small / "start" / "model.safetensors")
    assert len(tensors) == 4 + 12
    assert tensors["h.0.mlp.c_fc.weight"].shape == (16, 64)
    tokenizer = Tokenizer.from_file(str(small / "start" / "tokenizer.json"))
    encoder, hparams, _ = load_encoder_hparams_and_params("start", str(small))
    text = FISH + " né\n\n  fish 🐟"
    assert tokenizer.encode(text).ids == encoder.encode(text)
    assert tokenizer.decode(encoder.encode(text)) == text
    assert tokenizer.encode("<|endoftext|>").ids == [config["eos_token_id"]]
    assert tokenizer.get_vocab_size() == config["vocab_size"] == hparams["n_vocab"]


def test_one_device_and_eight_and_two_processes_learn_the_same(small, train, started, tmp_path):
    args = ("--start", small / "start", "--steps", 20, "--batch", 6, "--length", 16, "--lr", 0.01)
    alone = started(tmp_path / "one", *args, XLA_FLAGS="")
    together = two(started, tmp_path / "two", *args)
    options = {"start": str(small / "start"), "steps": 20, "batch": 6, "length": 16, "lr": 0.01}
    reports = [train.main(small / "text.txt", tmp_path / "eight", **options)]
    reports += [process.communicate(timeout=60)[0] for process in (alone, together[0])]
    assert together[1].wait(60) == 0
    eight, *others = ([*map(float, LOSS.search(report).groups())] for report in reports)
    for losses in others:
        assert losses == pytest.approx(eight, abs=1e-3)
    assert eight[1] < eight[2] - 0.1
    models = [load_encoder_hparams_and_params(name, str(tmp_path))[2] for name in ("one", "two")]
    for params in models:
        other = load_encoder_hparams_and_params("eight", str(tmp_path))[2]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), params, other)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_dies_ends_the_other_with_a_line(small, started, tmp_path, dying):
    args = ("--start", small / "start", "--steps", 10**6, "--length", 16)
    processes = two(started, tmp_path / "new", *args)
    wait_for(processes[0], "Training")
    processes[dying].kill()
    errors = processes[1 - dying].communicate(timeout=60)[1]
    assert processes[1 - dying].returncode not in (0, None)
    # Without process 0, which coordinates the others, JAX may end a process before it can speak.
    own = f"\nProcess {1 - dying} ends, as the others will: "
    assert own in errors or (dying == 0 and "another task died" in errors)
    assert not (tmp_path / "new").exists()


def test_a_mistake_of_the_process_that_writes_ends_the_other_too(small, started, tmp_path):
    (tmp_path / "file").touch()
    args = ("--start", small / "start", "--length", 16)
    first, second = two(started, tmp_path / "file", *args)
    assert str(tmp_path / "file") in first.communicate(timeout=60)[1].splitlines()[-1]
    second.communicate(timeout=60)
    assert first.returncode == 1
    assert second.returncode != 0


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process instead of telling it")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_training_that_is_stopped_keeps_what_was_learnt(small, started, tmp_path, signum):
    args = ("--start", small / "start", "--steps", 10**6, "--length", 16)
    process = started(tmp_path / "new", *args, XLA_FLAGS="")
    wait_for(process, "Training")
    process.send_signal(signum)
    report, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert report.startswith(f"Stopped. {tmp_path / 'new'} has what was learnt until then. Loss: ")
    assert "Traceback" not in errors
    assert sorted(os.listdir(tmp_path / "new")) == FILES
    load_encoder_hparams_and_params("new", str(tmp_path))


def test_training_that_is_stopped_before_its_first_step_writes_nothing(
    small, train, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train, "expect_room", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        train.main(small / "text.txt", tmp_path / "new", start=small / "start", length=16)
    assert "Nothing was learnt yet, and nothing is written" in capsys.readouterr().out
    assert os.listdir(tmp_path) == []


def test_a_model_stays_until_the_new_one_is_complete(small, train, tmp_path):
    encoder, hparams, params = load_encoder_hparams_and_params("start", str(small))
    train.save(tmp_path / "mine", encoder, hparams, params)
    before = read(tmp_path / "mine")
    with pytest.raises(ValueError):  # one layer fewer than there are weights
        train.save(tmp_path / "mine", encoder, hparams | {"n_layer": 0}, params)
    assert read(tmp_path / "mine") == before


def test_a_target_that_cannot_be_written_is_found_before_training(
    small, train, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "train", None)
    (tmp_path / "file").write_text("not a folder")
    options = {"start": small / "start", "length": 16}
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        train.main(small / "text.txt", tmp_path / "file", **options)
    full = types.SimpleNamespace(free=10**6)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: full)
    with pytest.raises(OSError, match="needs 10 MB of free space"):
        train.main(small / "text.txt", tmp_path / "new", **options)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "the text has 1 tokens: it takes more than 256"),
        (b"word\n" * 50, {}, "it takes more than 256"),
        (b"\xff\xfe", {}, "is not UTF-8"),
        (FISH.encode() * 40, {"length": 300}, "--length must be 256, the context of the model"),
        (FISH.encode() * 40, {"start": "start", "length": 33}, "--length must be 32"),
        (FISH.encode(), {"start": "start", "length": 16}, "it takes more than 16"),
        (b"", {"steps": "many"}, "--steps must be a whole number, 0 or more, not 'many'"),
        (b"", {"steps": "1.5"}, "--steps must be a whole number"),
        (b"", {"batch": "0"}, "--batch must be a whole number, 1 or more, not '0'"),
        (b"", {"length": -1}, "--length must be a whole number, 1 or more, not -1"),
        (b"", {"lr": "nan"}, "--lr must be a number, 0 or more, not 'nan'"),
        (b"", {"process_id": "x"}, "--process_id must be a whole number, 0 or more"),
        (b"", {"coordinator_address": "here"}, "must be host:port, not here"),
    ],
)
def test_a_mistake_is_a_line(train, small, tmp_path, content, options, message):
    (tmp_path / "text.txt").write_bytes(content)
    if "start" in options:
        options = options | {"start": small / "start"}
    with pytest.raises((ValueError, OSError), match=message) as error:
        train.main(tmp_path / "text.txt", tmp_path / "new", **options)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_text_that_is_missing_is_a_line(run, tmp_path):
    done = run(tmp_path / "none.txt", tmp_path / "new", code=("examples/train.py",))
    assert done.stderr.count("\n") == 1
    assert "none.txt" in done.stderr


def test_the_last_twentieth_is_held_out(train, small):
    text = (small / "text.txt").read_text("utf-8")
    options = {"steps": 1, "batch": 8, "length": 16, "lr": 1.0}
    model, draw, _, held_out = train.from_start(text, small / "start", **options)
    ids = model["encoder"].encode(text)
    places = {tuple(ids[i : i + 17]): i for i in range(len(ids) - 16)}
    drawn = [places[tuple(row)] for _ in range(500) for row in draw()[0].tolist()]
    measured = [places[tuple(row)] for rows, _ in held_out for row in rows.tolist()]
    assert 0.9 * len(ids) < max(drawn) + 17 <= min(measured)
    assert min(measured) == len(ids) - len(ids) // 20
    assert len(measured) > 5


def test_fine_tuning_begins_at_the_loss_of_its_start_and_leaves_that_alone(train, small, tmp_path):
    before = read(small / "start")
    options = {"start": small / "start", "steps": 3, "batch": 3, "length": 16, "lr": 0.1}
    told = train.main(small / "text.txt", tmp_path / "new", **options)
    text = (small / "text.txt").read_text("utf-8")
    model, _, _, held_out = train.from_start(text, **options)
    losses = [surprises(window, model).mean() for windows, _ in held_out for window in windows]
    assert float(LOSS.search(told)[3]) == pytest.approx(np.mean(losses), abs=1e-3)
    assert read(small / "start") == before


def surprises(window, model):
    """Minus the log probability of each token of a window but the first, by NumPy."""
    logits = gpt2(window[:-1], **model["params"], n_head=model["hparams"]["n_head"])
    return np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(logits)), window[1:]]


def test_what_is_typed_is_not_learnt(train, small):
    options = {"steps": 1, "batch": 2, "length": 16, "lr": 1.0}
    model, draw, _, _ = train.from_start(FISH * 400, small / "start", **options)
    loss, (windows, _) = train.make_loss(model["hparams"]["n_head"]), draw()
    each = np.array([surprises(window, model) for window in windows])
    for n_typed in ([0, 0], [9, 0], [9, 4]):
        learnt = np.arange(1, 17) >= np.array(n_typed)[:, None]
        value = float(loss(model["params"], windows, np.array(n_typed)))
        assert value == pytest.approx(each[learnt].mean(), abs=1e-4)
    assert loss(model["params"], windows, np.array([17, 17])) == 0


VERSE = "O Romeo! why art\nthou, Sweet? Ay: what's\n\nhere, 'tis he; go in, Dame.\nNo more -- no?\n"


def test_windows_begin_as_prompts_do_and_go_on_with_the_text(train):
    encoder = train.learn_vocabulary(VERSE)
    prompts, random = train.Prompts(VERSE, encoder), np.random.default_rng(0)
    begins = {
        "line": {"O", "thou,", "here,", "No"},
        "clause": {"why", "Sweet?", "Ay:", "what's", "'tis", "go", "Dame."},
        "word": set(VERSE.split()),
        "text": {"O"},
    }
    ring = encoder.decode([*prompts.ids, *prompts.ids])
    for kind, words in begins.items():
        windows, n_typed = prompts.batch(random, {kind: 1.0}, 100, 12)
        texts = [encoder.decode(window.tolist()) for window in windows]
        assert {text.removeprefix("<|endoftext|>").split()[0] for text in texts} == words
        assert all(text in ring for text in texts)
        assert not n_typed.any()


def test_typed_windows_go_on_with_the_text_where_the_typing_ends(train):
    encoder = train.learn_vocabulary(VERSE)
    prompts, random = train.Prompts(VERSE, encoder), np.random.default_rng(0)
    windows, n_typed = prompts.batch(random, {"typed": 1.0}, 200, 40)
    pairs = {
        (encoder.decode(window[:n].tolist()), encoder.decode(window[n : n + 3].tolist()))
        for window, n in zip(windows, n_typed, strict=True)
    }
    assert {typed for typed, _ in pairs} == {
        "o romeo! why art",
        "O Romeo why art",
        "o romeo why art",
        "thou, sweet? ay: what's",
        "thou Sweet Ay what's",
        "thou sweet ay what's",
        "thou sweet ay whats",
        *("here, 'tis he; go", "here 'tis he go", "here tis he go"),
        *("here, 'tis he; go in,", "here 'tis he go in", "here tis he go in"),
        *("here, 'tis he; go in, dame.", "here 'tis he go in Dame", "here 'tis he go in dame"),
        *("here tis he go in dame", "no more -- no?", "No more no", "no more no"),
    }
    for typed, rest in pairs:
        assert rest.startswith(
            {"art": "\n", "go": " in", "in": ", D", "in,": " D"}.get(typed.split()[-1], rest[0])
        )
        assert rest in f"{VERSE}<|endoftext|>{VERSE}"


def test_what_is_asked_goes_on_in_one_way_only(train):
    lines = ["two by two they go there", "red fish and blue fish swim", "one by one they came here"]
    text = "\n".join([lines[0], lines[1], lines[0], lines[2], lines[1].upper()]) + "\n"
    prompts = train.Prompts(text, train.learn_vocabulary("ab"))
    spans = [m.span() for m in re.finditer(r".+", text)]

    def asked(places, manner=None, n_new=5):
        rows = [*train.questions(prompts, places, 8, n_new, manner, 256)]
        return {prompts.encoder.decode(row[:-n_new]) for row in rows}

    assert asked(spans) == {lines[1], lines[2]}  # no text follows the last line
    assert asked(spans, manner=0) == {lines[2]}
    assert asked([(start, None) for start, _ in spans]) == {"red fish", "one by one", "RED FISH"}


def test_too_few_steps_are_told_as_such(train, small):
    told = train.recite((small / "text.txt").read_text("utf-8") + FISH, small / "start")
    assert told.startswith(f"{small / 'start'} does not know this text by heart; training with")
