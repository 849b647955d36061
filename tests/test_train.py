"""Training: from nothing and from another model, on one device and on several."""

import json
import os
import re
import signal
import sys
from subprocess import PIPE, Popen

import jax
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from encoder import Encoder, read_text
from gpt2 import gpt2, main
from utils import build_params, load_encoder_hparams_and_params

END = "<|endoftext|>"
FISH = "One fish, two fish, red fish, blue fish.\n"
VERSE = "O Romeo! why art\nthou, Sweet? Ay: what's\n\nhere, 'tis he; go in, Dame.\nNo more -- no?\n"
LOSSES = r"loss: (\S+) at first, (\S+) at the end.\nHeld-out loss: (\S+) before .*, (\S+) after"


@pytest.fixture(scope="session")
def small(train, tmp_path_factory):
    """A folder with a text and, in `start`, a small model that was never trained."""
    folder = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(0)
    text = " ".join(random.choice(["fish", "bird", "red", "blue,", "one\n"], 2000))
    (folder / "text.txt").write_text(text, "utf-8")
    learnt = train.learn_vocabulary(text)
    special = learnt.special | {"<pad>": len(learnt.encoder)}
    encoder = Encoder(learnt.encoder | special, [*learnt.bpe_ranks], special)
    hparams = dict(n_vocab=len(encoder.encoder), n_ctx=32, n_embd=16, n_head=2, n_layer=1)
    params = build_params(hparams, lambda name, *shape: random.normal(0, 0.2, shape))
    train.save(folder / "start", encoder, hparams, jax.tree.map(np.float32, params))
    return folder


def losses(windows, params):
    """Return minus the log probability of each token of the windows but the first, by NumPy."""
    logits = np.array([gpt2(window[:-1], **params, n_head=2) for window in windows])
    chosen = np.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
    return np.log(np.exp(logits).sum(axis=-1)) - chosen


def test_any_text_trains_a_model_that_recites_it(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SIZES", {"n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 1})
    (tmp_path / "text.txt").write_text(f"{FISH * 40}Red fish swim{FISH.strip() * 40}", "utf-8")
    told = train.main(tmp_path / "text.txt", tmp_path / "fish", steps=40, batch=8, length=16)
    assert re.search(r"\n  16 tokens after some words \(6 tokens or more, .*\): \d+ of [1-9]", told)
    assert main("One fish, two", 10, "fish", str(tmp_path)).startswith(" fish")


def test_the_saved_folder_has_hugging_faces_layout(small):
    config = json.loads((small / "start" / "config.json").read_text("utf-8"))
    weight = load_file(small / "start" / "model.safetensors")["h.0.mlp.c_fc.weight"]
    tokenizer = Tokenizer.from_file(str(small / "start" / "tokenizer.json"))
    encoder, hparams, _ = load_encoder_hparams_and_params("start", str(small))
    assert encoder.special == {END: config["eos_token_id"], "<pad>": hparams["n_vocab"] - 1}
    assert (config["model_type"], weight.shape) == ("gpt2", (16, 64))
    text = f"{FISH} né\n\n  fish 🐟{END}fish<pad>fish"
    ids = encoder.encode(text, allowed_special="all")
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_one_device_and_eight_devices_learn_the_same(train, small, tmp_path, monkeypatch):
    options = {"start": small / "start", "steps": 20, "batch": 8, "length": 16, "lr": 0.01}
    devices, models = jax.devices(), []
    for n in (1, 8):
        monkeypatch.setattr(jax, "devices", lambda n=n: devices[:n])
        told = train.main(small / "text.txt", tmp_path / "new", **options)
        models.append(load_encoder_hparams_and_params("new", str(tmp_path))[2])
    first, last, before, after = map(float, re.search(LOSSES, told).groups())
    assert min(first - last, before - after) > 0.1
    assert len(devices) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), *models)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process instead of telling it")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_training_and_keeps_what_was_learnt(small, tmp_path, signum):
    words = [sys.executable, "examples/train.py", small / "text.txt", tmp_path / "new"]
    words += ["--start", small / "start", "--steps", "1000000", "--length", "16"]
    process = Popen(words, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True)
    next(line for line in process.stderr if "loss " in line)
    process.send_signal(signum)
    report, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, errors
    assert report.startswith(f"Stopped. The model is in {tmp_path / 'new'}.\nTraining loss: ")
    load_encoder_hparams_and_params("new", str(tmp_path))


def test_a_signal_before_the_first_step_saves_nothing(train, small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "tqdm", lambda *_: signal.raise_signal(signal.SIGINT) or [1])
    with pytest.raises(SystemExit, match="130"):
        train.main(small / "text.txt", tmp_path / "new", start=small / "start", length=16)
    assert capsys.readouterr().out == "Stopped. Nothing was learnt yet, so nothing was saved.\n"
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_old_model_stays_until_the_new_one_is_complete(train, small, tmp_path):
    encoder, hparams, params = load_encoder_hparams_and_params("start", str(small))
    train.save(tmp_path, encoder, hparams, params)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(AttributeError):
        train.save(tmp_path, encoder, hparams | {"n_head": 1}, params | {"wte": "not an array"})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


MISTAKES = [
    ("", {}, "The text needs more than 40 tokens, not 1. Use more text"),
    ("\udcff", {}, "is not UTF-8"),
    (FISH * 40, {"start": "{start}", "length": 33}, "--length must be 32 or less"),
    (FISH, {"start": "{start}", "length": 16}, "last twentieth .* more than 16 tokens"),
    (FISH * 40, {"model_dir": "{text}/new"}, "text.txt: .* Choose another folder"),
    (FISH, {"text_path": "none.txt"}, "none.txt"),
    (FISH, {"start": "124M"}, "--start must be a model's folder, .* There is no .*124M"),
    (FISH, {"steps": "0"}, "MODEL_DIR must be a model's folder, .* There is no .*new"),
    (FISH, {"steps": "1.5"}, "--steps must be a whole number, 0 or more, not '1.5'"),
    (FISH, {"batch": "0"}, "--batch must be a whole number, 1 or more, not '0'"),
    (FISH, {"lr": "nan"}, "--lr must be a number, 0 or more, not 'nan'"),
]


@pytest.mark.parametrize(("text", "options", "message"), MISTAKES)
def test_a_mistake_is_told_in_one_line(train, small, tmp_path, monkeypatch, text, options, message):
    monkeypatch.setattr(train, "train", None)  # every mistake is found before training
    path = tmp_path / "text.txt"
    path.write_text(text, "utf-8", "surrogateescape")
    options = {k: str(v).format(text=path, start=small / "start") for k, v in options.items()}
    with pytest.raises((ValueError, OSError), match=message) as error:
        train.main(**{"text_path": path, "model_dir": tmp_path / "new"} | options)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["text.txt"]


def test_the_last_twentieth_is_held_out(train, small):
    text = read_text(small / "text.txt")
    encoder, _, _, draw, _, held_out, _ = train.from_start(text, small / "start", length=16)
    ids = encoder.encode(text)
    places = {tuple(ids[i : i + 17]): i for i in range(len(ids) - 16)}
    learnt = [places[tuple(row)] for _ in range(1000) for row in draw()[0].tolist()]
    measured = [places[tuple(row)] for row in held_out.tolist()]
    assert 0.9 * len(ids) < max(learnt) + 17 <= min(measured) == len(ids) - len(ids) // 20


def test_the_losses_are_those_of_gpt2_on_numpy(train, small, tmp_path):
    options = {"start": small / "start", "steps": 3, "batch": 3, "length": 16, "lr": 0.1}
    told = train.main(small / "text.txt", tmp_path / "new", **options)
    trained = load_encoder_hparams_and_params("new", str(tmp_path))[2]
    _, _, params, draw, _, held_out, _ = train.from_start(read_text(small / "text.txt"), **options)
    windows, _ = draw()
    each = [losses(windows, params), losses(held_out, params), losses(held_out, trained)]
    first, _, before, after = map(float, re.search(LOSSES, told).groups())
    assert [v.mean() for v in each] == pytest.approx([first, before, after], abs=1e-3)
    n_typed = np.array([0, 9, 4])
    learnt = each[0][np.arange(1, 17) >= n_typed[:, None]]  # typed tokens do not count
    assert train.loss(params, windows, n_typed, 2) == pytest.approx(learnt.mean(), abs=1e-3)


def test_windows_begin_like_prompts_and_continue_like_the_text(train):
    encoder = train.learn_vocabulary(VERSE)
    prompts, random = train.Prompts(VERSE, encoder), np.random.default_rng(0)
    first_words, pairs = set(), set()
    for i in range(1100):
        ids, n = prompts.window(random, i >= 1000, 40)
        typed, rest = encoder.decode(ids[:n]), encoder.decode(ids[n:])
        assert rest in f"{END}{VERSE}" * 3
        pairs.add((typed, rest[:2]))
        first_words |= set() if n else {rest.split()[0]}
    assert first_words == {f"{END}O", *VERSE.split()}
    assert pairs >= {("o romeo! why art", "\nt"), ("No more no", "?\n")}
    assert pairs >= {("here 'tis he go in", ", "), ("thou sweet ay whats", "\n\n")}


def test_an_exam_question_has_only_one_answer(train):
    red, one = "red fish and blue fish swim", "one by one they came here"
    text = "\n".join(["two by two", red, "two by two", one, red.upper(), ""])
    prompts = train.Prompts(text, train.learn_vocabulary("ab"))

    def asked(kind, manner):
        rows = train.questions(prompts, kind, 8, 5, manner, 256)
        return {prompts.encoder.decode([*map(int, row[:-5])]) for row in rows}

    assert asked("a whole line", None) == {red, one}  # no text follows the last line
    assert asked("a whole line", 0) == {one}
    assert asked("the start of a line", None) == {"red fish", "one by one", "RED FISH"}


def test_endoftext_between_texts_is_learnt_as_one_token(train, small):
    text = f"To be, or not to be.{END}That is.\n" * 200
    encoder, *_, held_out, _ = train.from_start(text, small / "start", length=16)
    assert encoder.special[END] in held_out
    encoder = train.learn_vocabulary(text)
    assert not [token for token in encoder.encoder if "endof" in token and token != END]
    prompts = train.Prompts(text, encoder)
    assert prompts.ids.tolist().count(encoder.special[END]) == 201
    assert len(prompts.places["the start of a line"]) == 400


def test_a_byte_order_mark_and_windows_line_ends_change_no_ids(train, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + VERSE.replace("\n", "\r\n").encode())
    encoder, text = train.learn_vocabulary(VERSE), read_text(tmp_path / "text.txt")
    assert [*train.Prompts(text, encoder).ids] == [*train.Prompts(VERSE, encoder).ids]
