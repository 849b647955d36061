"""Training: from nothing and from another model, on one device, on several, and in processes."""

import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import jax
import numpy as np
import pytest
from conftest import ROOT, run
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from encoder import Encoder, read_text
from gpt2 import gpt2, main, softmax
from utils import build_params, load_encoder_hparams_and_params

END = "<|endoftext|>"
FISH = "One fish, two fish, red fish, blue fish.\n"
VERSE = "O Romeo! why art\nthou, Sweet? Ay: what's\n\nhere, 'tis he; go in, Dame.\nNo more -- no?\n"
FILES = ["config.json", "model.safetensors", "tokenizer.json"]
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
    encoder = Encoder(learnt.encoder | ids, learnt.bpe_ranks, ids)
    encoder.bos, encoder.eos = [ids["<pad>"]], {ids["<end>"], encoder.special[END]}
    hparams = dict(n_vocab=len(encoder.encoder), n_ctx=32, n_embd=16, n_head=2, n_layer=1)
    params = build_params(hparams, lambda name, *shape: random.normal(0, 0.2, shape))
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


def test_any_text_trains_a_model_that_recites_it(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "N_ASKED", 50)
    monkeypatch.setattr(train, "SIZES", {"n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 1})
    (tmp_path / "text.txt").write_text(f"{FISH * 40}Red fish swim{FISH.strip() * 40}", "utf-8")
    told = train.main(tmp_path / "text.txt", tmp_path / "fish", steps=40, batch=8, length=16)
    assert re.search(r"\n\d+ of 50 random prompts occur once.* After \d+ of these, the model", told)
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
    assert sorted(os.listdir(small / "start")) == FILES
    tokenizer = Tokenizer.from_file(str(small / "start" / "tokenizer.json"))
    encoder, hparams, _ = load_encoder_hparams_and_params("start", small)
    assert hparams["n_vocab"] == config["vocab_size"] == tokenizer.get_vocab_size()
    text = f"{FISH} né\n\n  fish 🐟{END}fish<pad>fish<name>fish"
    ids = tokenizer.encode(text).ids
    assert ids == encoder.encode(text, allowed_special="all")
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert [encoder.decoder[id] for id in encoder.bos] == ["<pad>"]
    assert {encoder.decoder[id] for id in encoder.eos} == {END, "<end>"}


@pytest.mark.parametrize("change", ["mkdir", "write_text", "write_bytes", "rename"])
def test_saving_may_die_at_any_change_of_a_file_and_leaves_nothing(
    change, train, small, tmp_path, monkeypatch
):
    def dies(*args):
        raise OSError("the disk is full")

    model = load_encoder_hparams_and_params("start", small)
    monkeypatch.setattr(Path, change, dies)
    with pytest.raises(OSError, match="the disk is full"):
        train.save(tmp_path / "new", *model)
    assert not os.listdir(tmp_path)


posix = pytest.mark.skipif(os.name == "nt", reason="Windows ends a process instead of telling it")


@posix
def test_ctrl_c_ends_the_training_and_keeps_what_was_learnt(small, tmp_path):
    (process,) = start_processes(small, tmp_path / "new", 1, steps=10**6)
    next(line for line in process.stderr if "Training" in line)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"Stopped. The model is in {tmp_path / 'new'}.\nTraining loss: " in said[0]
    load_encoder_hparams_and_params("new", tmp_path)


# Ctrl-C comes in the place of these functions.
CTRL_C = """import os, signal, sys
sys.path.insert(0, "examples")
import train
from command import command_line
signal.signal(signal.SIGINT, signal.default_int_handler)  # In the background, it may be ignored.
train.train = lambda plan, _: (plan.params, "")
train.{} = lambda *_, **__: [os.kill(os.getpid(), signal.SIGINT) for _ in range({})]
command_line(train.main)"""
PLACES = [("from_nothing", 1, 130, False), ("train", 2, -signal.SIGINT, False)]
PLACES += [("recite", 1, 130, True)]


@posix
@pytest.mark.parametrize(("function", "n_times", "status", "is_saved"), PLACES)
def test_ctrl_c_before_and_after_the_training_and_a_second_one_in_it_end_the_program_at_once(
    function, n_times, status, is_saved, small, tmp_path
):
    words = (small / "text.txt", tmp_path / "new")
    result = run(*words, code=("-c", CTRL_C.format(function, n_times)))
    assert (result.returncode, "Traceback" in result.err) == (status, False)
    assert os.listdir(tmp_path) == ["new"] * is_saved


@posix
def test_a_signal_ends_one_of_several_processes_at_once_and_nothing_is_saved(small, tmp_path):
    processes = start_processes(small, tmp_path / "new", 2, steps=10**6)
    next(line for line in processes[0].stderr if "Training" in line)
    signals = (signal.SIGTERM, signal.SIGINT)
    for process, signum in zip(processes, signals, strict=True):
        process.send_signal(signum)
    for process, signum in zip(processes, signals, strict=True):
        process.communicate(timeout=60)
        assert process.returncode == -signum
    assert not os.listdir(tmp_path)


MISTAKES = [
    (f"\n{END}", {}, "text.txt is empty"),
    ("A b c.", {}, "--length 40 is too long: this model and text allow [4-9]"),
    (FISH * 40, {"start": "{start}", "length": 33}, "--length 33 is too long: .* allow 32"),
    (FISH, {"start": "{start}", "length": 16}, "--length 16 is too long: .* allow 0"),
    (FISH * 40, {"model_dir": "{text}/new"}, "new cannot be written: "),
    (FISH * 40, {"model_dir": "{start}"}, "start exists already. Choose another folder"),
    (FISH * 40, {"text_path": "{text}x"}, "There is no text file .*text.txtx"),
    (FISH * 40, {"num_processes": 2}, "Several processes need --coord"),
    (FISH, {"steps": "1.5"}, "steps must be a whole number, from 0 to .*, not '1.5'"),
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


@posix
def test_a_broken_link_is_not_replaced(train, small, tmp_path):
    (tmp_path / "new").symlink_to("nowhere")
    with pytest.raises(ValueError, match="new exists already"):
        train.main(small / "text.txt", tmp_path / "new")


def test_the_last_twentieth_is_held_out(train, small):
    text = read_text(small / "text.txt")
    plan = train.from_start(text, small / "start", length=16)
    ids = plan.encoder.encode(text)
    places = {tuple(ids[i : i + 17]): i for i in range(len(ids) - 16)}
    learnt = [places[tuple(row)] for _ in range(1000) for row in plan.draw().tolist()]
    first = min(places[tuple(row)] for row in plan.held_out.tolist())
    assert 0.9 * len(ids) < max(learnt) + 17 <= first == len(ids) - len(ids) // 20


def test_the_losses_are_those_of_gpt2_on_numpy(train, small, tmp_path):
    options = {"start": small / "start", "steps": 3, "batch": 3, "length": 16, "lr": 0.1}
    told = train.main(small / "text.txt", tmp_path / "new", **options)
    trained = load_encoder_hparams_and_params("new", tmp_path)[2]
    plan = train.from_start(read_text(small / "text.txt"), **options)
    first, _, before, after = map(float, re.search(LOSSES, told).groups())
    cases = [(plan.draw(), plan.params, first), (plan.held_out, plan.params, before)]
    for windows, params, loss in [*cases, (plan.held_out, trained, after)]:
        rows = [softmax(gpt2(window[:-1], **params, n_head=2)) for window in windows]
        chosen = np.take_along_axis(np.array(rows), windows[:, 1:, None], axis=-1)
        assert -np.log(chosen).mean() == pytest.approx(loss, abs=1e-3)


CHINESE = "天地玄黄。宇宙洪荒。日月盈昃。辰宿列张。寒来暑往。秋收冬藏。闰余成岁。律吕调阳。"
LONG_RUNS = {"Chinese": CHINESE, "JSON": '{"a":1,"b":[2,3],"c":{"d":"e"}}'}
LONG_RUNS["genome"] = "ACGTTGCA" * 9


@pytest.mark.parametrize("text", [VERSE, *LONG_RUNS.values()], ids=["verse", *LONG_RUNS])
def test_a_window_is_a_prompt_of_1_to_18_words_and_what_follows(train, text):
    encoder = train.learn_vocabulary(text)
    ring, random = train.Text(text, encoder), np.random.default_rng(0)
    words = [END, *(text.split() if text == VERSE else text)]
    starts, counts = set(), set()
    for _ in range(1000):
        prompt, ids, following = ring.draw(random, 40)
        assert ids == encoder.encode(prompt, "all") and len(following) == 40
        assert f"{prompt}{encoder.decode(following)}".rstrip("\ufffd") in f"{END}{text}" * 99
        in_prompt = re.findall(r"<\S+>|\S+" if text == VERSE else r"<\S+>|.", prompt)
        assert {*in_prompt} <= {*words}
        starts.add(in_prompt[0])
        counts.add(len(in_prompt))
        assert len(ring.window(random, 41)) == 41
    assert starts == {*words} and counts == {*range(1, 19)}


def test_an_exam_asks_what_has_one_answer_and_fits_the_context(train, small, monkeypatch):
    """`bar bar` occurs twice in `bar bar bar`, though `str.count` finds only one."""
    text = "bar bar bar. One by one, two by two, they came and went in a row of forty or more fish."
    whole, asked = END + text, []
    encoder, _, _ = load_encoder_hparams_and_params("start", small)

    def model(inputs, **_):
        asked.append(inputs[:-15])
        return np.zeros((len(inputs), len(encoder.encoder)))

    monkeypatch.setattr(train.gpt2, "gpt2", model)
    told = train.recite(text, small / "start")
    assert told.startswith(f"{len(asked)} of 500 random prompts occur once in the text and fit")
    prompts = [encoder.decode(ids) for ids in asked]
    places = [sum(whole.startswith(prompt, i) for i in range(len(whole))) for prompt in prompts]
    assert {*places} == {1} and max(map(len, asked)) <= 32 - 16
    assert {"came", "bar bar bar. One"} <= {*prompts}


def test_an_answer_is_right_if_its_16_tokens_are_the_likeliest(train, small, monkeypatch):
    """Here the likeliest tokens are those of the text, and after it, at the end, the token 0."""
    answers = ([5] * 15 + [i % 4] for i in range(500))
    monkeypatch.setattr(train.Text, "draw", lambda text, *_: (text.text, [1], next(answers)))
    monkeypatch.setattr(train.gpt2, "gpt2", lambda ids, **_: np.eye(500)[[*ids[1:], 0]])
    told = train.recite("One fish", small / "start")
    assert told.startswith("500 of 500 ") and "After 125 of these" in told


def test_without_prompts_that_occur_once_there_is_no_exam(train, small):
    told = train.recite("fish " * 3000, small / "start")
    assert re.fullmatch(r"There is no exam, because only \d of 500 random prompts occur .*", told)
