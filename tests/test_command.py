"""The command, `python gpt2.py "prompt"`, as typed in a shell, and what can go wrong there."""

import os
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from gpt2 import generate, main
from utils import command_line

VERSE = "But, soft! what light through yonder window breaks?"


def test_the_text_is_all_that_is_on_standard_output(run):
    result = run(VERSE, "--model_size", "1M", "--n_tokens_to_generate", 20)
    assert result.stdout == main(VERSE, 20, "1M", str(ROOT / "models")) + "\n"
    assert result.returncode == 0


PROMPTS = (
    """42 [1,2] "quoted" None 1e5 a,b {'a':1} True -5 - (1) 1_000 ' 0x10 b'x' a=b #x é 日本語 \\n"""
)


@pytest.mark.parametrize("prompt", [*PROMPTS.split(), "[1, 2]", "- x", " x ", "two\nlines", ""])
def test_a_prompt_arrives_exactly_as_typed(prompt, monkeypatch, capsys):
    for typed in ([prompt], [f"--prompt={prompt}"]):
        monkeypatch.setattr(sys, "argv", ["gpt2.py", *typed, "7"])
        command_line(lambda prompt, n=0: ascii([prompt, n]))
        assert capsys.readouterr().out == ascii([prompt, "7"]) + "\n"


def test_an_empty_prompt_starts_from_endoftext(run, bundled):
    encoder, hparams, params = bundled
    ids = generate([encoder.encoder["<|endoftext|>"]], params, hparams["n_head"], 10)
    assert run("", 10, "1M").stdout == encoder.decode(ids) + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--n_tokens_to_generate", "-1"], "must be a whole number, 0 or more, not '-1'"),
        (
            ["x", "--n_tokens_to_generate", "forty"],
            "must be a whole number, 0 or more, not 'forty'",
        ),
        (["x", "--n_tokens_to_generate", "1.5"], "must be a whole number, 0 or more, not '1.5'"),
        (
            ["x", "--model_size", "1M", "--n_tokens_to_generate", "256"],
            "the context takes 1 to 256",
        ),
        (["x " * 300, "--model_size", "1M"], "the context takes 1 to 256"),
        (["x", "--model_size", "117M"], "must be 124M, 355M, 774M, 1558M, or"),
        (["x", "--model_size", "../models/1M"], "must be 124M, 355M, 774M, 1558M, or"),
        ([b"\xff", "--model_size", "1M"], "surrogate"),
        (["x", "--model", "1M"], "--model"),
        (["x", "40", "1M", "models", "more"], "more"),
        ([], "prompt"),
    ],
)
def test_a_mistake_is_told_in_a_line_or_two(arguments, words):
    command = [sys.executable, "gpt2.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    error = result.stderr.decode()
    assert result.returncode not in (0, 130)
    assert result.stdout == b""
    assert words in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 6


def test_without_a_network_the_error_names_the_model_that_needs_none(run, tmp_path):
    code = "import gpt2, utils; utils.PAUSES = (); utils.command_line(gpt2.main)"
    arguments = ("x", "--models_dir", tmp_path)
    result = run(*arguments, code=("-c", code), GPT2_BASE_URL="http://127.0.0.1:9/models")
    assert result.returncode == 1
    assert "http://127.0.0.1:9/models/124M/checkpoint did not arrive" in result.stderr
    assert "--model_size 1M needs no network" in result.stderr
    assert len(result.stderr.splitlines()) == 2
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_no_terminal_is_too_old_for_what_the_model_writes(run, encoding):
    code = "import utils; utils.command_line(lambda: 'caf\\u00e9 \\u65e5\\ufffd')"
    result = run(code=("-c", code), encoding=encoding, PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    assert result.stdout.startswith("caf")


def test_help_reads_well(run):
    result = run("--help")
    assert result.returncode == 0
    page = result.stdout + result.stderr
    for words in ("PROMPT", "n_tokens_to_generate", "124M, 355M, 774M or 1558M", "FLAGS"):
        assert words in page
    assert "GROUP" not in page


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_ends_quietly_with_status_130():
    # A shell's background jobs, the tests perhaps among them, start with the signal ignored.
    code = "import os, signal, utils; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "utils.command_line(lambda: os.kill(os.getpid(), signal.SIGINT))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


@pytest.mark.skipif(os.name == "nt", reason="the shell's pipe is that of POSIX")
def test_a_reader_who_has_enough_ends_the_command_quietly():
    code = "import utils; utils.command_line(lambda: 'word ' * 100_000)"
    command = f"{shlex.join([sys.executable, '-c', code])} | head -c 5"
    result = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, timeout=60)
    assert (result.stdout, result.stderr) == (b"word ", b"")


def test_the_readmes_first_block_ends_with_verse(run):
    blocks = (ROOT / "README.md").read_text("utf-8").split("```sh\n")[1:]
    python, *arguments = shlex.split(blocks[0].split("```")[0].splitlines()[-1])
    assert python == "python"
    assert "\nIt is the east, and Juliet is the sun.\n" in run(code=arguments).stdout


def test_the_readmes_second_block_installs_and_runs_the_tests():
    blocks = (ROOT / "README.md").read_text("utf-8").split("```sh\n")[1:]
    assert blocks[1].split("```")[0] == "pip install -r tests/requirements.txt\npytest\n"
