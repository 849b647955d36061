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
TINY = ("--model_size", "1M", "--n_tokens_to_generate", "12")
posix = pytest.mark.skipif(os.name == "nt", reason="needs the shell, signals or files of POSIX")


@pytest.fixture
def shell():
    """Run a line of the shell, in which `gpt2` stands for the command; Python's buffers are on."""

    def shell(line, stdin=b"", **env):
        env = os.environ | env
        env.pop("PYTHONUNBUFFERED", None)
        line = line.replace("gpt2", f"{shlex.quote(sys.executable)} gpt2.py")
        bash = ["bash", "-o", "pipefail", "-c", line]
        return subprocess.run(bash, cwd=ROOT, input=stdin, capture_output=True, env=env, timeout=60)

    return shell


def test_the_text_is_all_that_is_on_standard_output(run):
    result = run(VERSE, "--model_size", "1M", "--n_tokens_to_generate", 20)
    assert result.stdout == main(VERSE, 20, "1M", str(ROOT / "models")) + "\n"
    assert (result.returncode, result.stderr) == (0, "")


def test_the_text_appears_piece_by_piece(run):
    """Each piece is flushed, so that it can be read before the next is found."""
    code = "import sys, gpt2, utils; flush = sys.stdout.flush\n"
    code += "sys.stdout.flush = lambda: sys.stdout.write('|') and flush()\n"
    result = run(VERSE, *TINY, code=("-c", code + "utils.command_line(gpt2.main)"))
    pieces = result.stdout.split("|")
    assert len([piece for piece in pieces if piece.strip()]) >= 10
    assert "".join(pieces) == main(VERSE, 12, "1M", str(ROOT / "models")) + "\n"


PROMPTS = (
    """42 [1,2] "quoted" None 1e5 a,b {'a':1} True -5 (1) 1_000 ' 0x10 b'x' a=b #x é 日本語 \\n"""
)


@pytest.mark.parametrize("prompt", [*PROMPTS.split(), "[1, 2]", "- x", " x", "two\nlines", ""])
def test_a_prompt_arrives_exactly_as_typed(prompt, monkeypatch, capsys):
    for typed in ([prompt], [f"--prompt={prompt}"]):
        monkeypatch.setattr(sys, "argv", ["gpt2.py", *typed, "7"])
        command_line(lambda prompt, n=0: ascii([prompt, n]))
        assert capsys.readouterr().out == ascii([prompt, "7"]) + "\n"


@posix
@pytest.mark.parametrize(
    ("line", "stdin", "prompt"),
    [
        ("gpt2 {}", b"ROMEO:\n", "ROMEO:"),
        ("gpt2 - {}", b"ROMEO:", "ROMEO:"),
        ("gpt2 --prompt=- {}", b"ROMEO:\n\n", "ROMEO:\n"),
        ("gpt2 {}", b"JULIET:\r\n", "JULIET:"),
        ("gpt2 - {}", b"", ""),
        ("gpt2 {}", "Où es-tu, Roméo?".encode(), "Où es-tu, Roméo?"),
    ],
)
def test_a_prompt_that_is_left_out_or_a_dash_is_read_from_standard_input(
    shell, line, stdin, prompt
):
    result = shell(line.format(shlex.join(TINY)), stdin)
    assert result.stdout.decode() == main(prompt, 12, "1M", str(ROOT / "models")) + "\n"


def test_an_empty_prompt_starts_from_endoftext(run, bundled):
    encoder, hparams, params = bundled
    ids = generate([encoder.encoder["<|endoftext|>"]], params, hparams["n_head"], 10)
    assert run("", 10, "1M").stdout == encoder.decode(ids) + "\n"


def test_a_seed_draws_the_same_text_again_and_none_another(run):
    def text(*options):
        return run("JULIET:\n", *TINY, "--temperature", "1.5", *options).stdout

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert len({text(), text(), text()}) > 1
    greedy = run("JULIET:\n", *TINY).stdout
    assert text("--top_k", "1") == text("--top_p", "0") == greedy


def test_a_prompt_that_ends_in_a_space_is_told_that_it_goes_on_badly(run):
    with_space, without = (run(prompt, *TINY) for prompt in ("But, soft! ", "But, soft!"))
    assert "ends in a space" in with_space.stderr and with_space.stderr.count("\n") == 1
    assert with_space.returncode == 0 and without.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--n_tokens_to_generate", "-1"], "must be a whole number, 0 or more, not '-1'"),
        (["x", "--n_tokens_to_generate", "ten"], "must be a whole number, 0 or more, not 'ten'"),
        (["x", "--n_tokens_to_generate", "1.5"], "must be a whole number, 0 or more, not '1.5'"),
        (["x", "--model_size", "1M", "--n_tokens_to_generate", "256"], "the context takes 1 to"),
        (["x x" * 300, "--model_size", "1M"], "the context takes 1 to 256"),
        (["x", "--model_size", "117M"], "must be 124M, 355M, 774M, 1558M, or"),
        (["x", "--model_size", "../models/1M"], "must be 124M, 355M, 774M, 1558M, or"),
        (["x", "--temperature", "-1"], "temperature must be above 0"),
        (["x", "--temperature", "warm"], "temperature and top_p must be numbers"),
        (["x", "--top_k", "0"], "top_k 1 or more"),
        (["x", "--top_k", "2.5"], "top_k must be a whole number, 0 or more, not '2.5'"),
        (["x", "--top_p", "1.01"], "top_p from 0 to 1"),
        (["x", "--seed", "-3"], "seed must be a whole number, 0 or more, not '-3'"),
        ([b"\xff", "--model_size", "1M"], "surrogate"),
    ],
)
def test_a_value_that_cannot_be_used_is_told_in_a_line(arguments, words):
    command = [sys.executable, "gpt2.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, b"")
    assert words in result.stderr.decode()
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["x", "--model", "1M"], "--model\n"),
        (["x", "--show", "print"], "--show"),
        (["x", "9", "1M", "models", "0", "1", "1", "1", "more"], "more"),
        (["x", "9", "1M", "models", "0", "1", "1", "1", "_run"], "_run"),
        (["x", "-m", "1M"], "-m"),
        ([], "prompt"),
    ],
)
def test_a_flag_or_word_that_is_wrong_is_named_and_the_help_pointed_to(arguments, word):
    command = [sys.executable, "gpt2.py", *arguments]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, stdin=subprocess.DEVNULL, timeout=60
    )
    error = result.stderr.decode()
    assert result.returncode == 1 and result.stdout == b""
    assert word in error and "--help" in error
    assert len(error.splitlines()) <= 3 and "Traceback" not in error


@pytest.mark.parametrize("typed", ["--help", "-h", "x -h", "x 9 --help 1M", "--model 1M --help"])
def test_help_is_the_same_wherever_it_is_asked_for(run, typed):
    result = run(*typed.split(), PAGER="false")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == run("--help").stdout
    for words in ("--n_tokens_to_generate", "124M, 355M, 774M or 1558M", "--seed", "FLAGS"):
        assert words in result.stdout
    for strange in ("GROUP", "--show", "\0", "Namespace", "\x1b"):
        assert strange not in result.stdout


def test_without_a_network_the_error_names_the_model_that_needs_none(run, tmp_path):
    code = "import gpt2, utils; utils.PAUSES = (); utils.command_line(gpt2.main)"
    arguments = ("x", "--models_dir", tmp_path)
    result = run(*arguments, code=("-c", code), GPT2_BASE_URL="http://127.0.0.1:9/models")
    assert result.returncode == 1
    assert "http://127.0.0.1:9/models/124M/checkpoint did not arrive" in result.stderr
    assert "--model_size 1M needs no network" in result.stderr
    assert not os.listdir(tmp_path)


def test_a_package_that_is_missing_is_named(run):
    code = (
        "import sys; sys.modules['fire'] = None; import gpt2, utils; utils.command_line(gpt2.main)"
    )
    result = run("x", "9", "1M", code=("-c", code))
    assert result.returncode == 1
    assert "fire" in result.stderr and "pip install -r requirements.txt" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("encoding", "text"), [("cp1252", "café ??"), ("ascii", "caf? ??"), ("utf-8", "café 日\ufffd")]
)
def test_no_terminal_is_too_old_for_what_the_model_writes(run, encoding, text):
    code = "import utils; utils.command_line(lambda: 'caf\\u00e9 \\u65e5\\ufffd')"
    result = run(code=("-c", code), encoding=encoding, PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stdout) == (0, text + "\n")


@posix
@pytest.mark.parametrize(("after", "left"), [(0, b""), (5, b"word word word word word \n")])
def test_ctrl_c_leaves_the_text_so_far_a_newline_and_status_130(after, left):
    # A shell's background jobs, the tests perhaps among them, start with the signal ignored.
    code = "import os, signal, utils; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"""
def main(*, show=str):
    for _ in range({after}):
        show("word ")
    os.kill(os.getpid(), signal.SIGINT)

utils.command_line(main)"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, left, b"")


@posix
@pytest.mark.parametrize("what", [f"x {shlex.join(TINY)}", "--help"])
@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("| true", ""),
        ("| head -c 0", ""),
        (">&-", "Standard output is closed."),
        ("> /dev/full", "[Errno 28] No space left on device"),
    ],
)
def test_a_text_that_does_not_get_out_ends_quietly_with_a_status(shell, what, where, error):
    """It is shorter than a buffer, so that it fails when it is flushed, if not before."""
    if where.endswith("/dev/full") and not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")
    result = shell(f"gpt2 {what} {where}")
    assert result.stderr.decode() == (error and f"{error}\n")
    assert result.returncode != 0


@posix
@pytest.mark.parametrize("where", ["2>&-", "2> /dev/full"])
def test_a_closed_or_full_standard_error_does_not_keep_the_text_from_coming(shell, where):
    if where.endswith("/dev/full") and not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")
    result = shell(f"gpt2 'But, soft! ' {shlex.join(TINY)} {where}")
    assert result.stdout.decode() == main("But, soft! ", 12, "1M", str(ROOT / "models")) + "\n"
    assert result.returncode == 0


@posix
def test_a_reader_who_has_enough_ends_the_command_quietly(shell):
    result = shell(f"gpt2 {shlex.quote(VERSE)} 200 1M | head -c 5")
    assert (result.stdout, result.stderr) == (b"\nIt i", b"")


def test_the_readmes_first_block_ends_with_verse(run):
    blocks = (ROOT / "README.md").read_text("utf-8").split("```sh\n")[1:]
    python, *arguments = shlex.split(blocks[0].split("```")[0].splitlines()[-1])
    assert python == "python"
    assert "\nIt is the east, and Juliet is the sun.\n" in run(code=arguments).stdout
