"""The command, `python gpt2.py "prompt"`, as people type it in a shell."""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import sys

import numpy as np
import pytest
from conftest import COMMITTED, ROOT, run

import gpt2
from command import command_line
from utils import DATA

VERSE = "But, soft! what light through yonder window breaks?"
TINY = ("--model_size", "1M", "--n_tokens_to_generate", "12")
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # the default encoding
ECHO = ("-c", "import command; command.command_line(lambda prompt: ascii(prompt))")
PROMPTS = """42 [1,2] "quoted" None 1e5 a,b {'a':1} True -5 (1) 1_000 ' 0x10 b'x' #x é 日本語 \\n"""
QUOTES = "If a text has several words, put it in double quotes."
NINE = "But soft what light through yonder window breaks it"
MISTAKES = {  # what is typed, and the words of the message
    "": ["prompt", "--help"],
    "x --temprature 1": ["'--temprature' is not an option", "--help"],
    "x --show print": ["--show", "--help"],
    "x -m 1M": ["'-m' is not an option", "--help"],
    "x --models_dir": ["--models_dir needs a value"],
    "x --foo": ["'--foo' is not an option"],
    "x --": ["'--' is not an option"],
    "--prompt --model_size 1M": ["--prompt needs a value"],
    "Romeo Juliet --model_size 1M": ["'Juliet'", QUOTES, "--help"],
    "Henry 5 --model_size 1M": [QUOTES],
    NINE: [QUOTES],
    f"x {'y' * 9999}": [QUOTES],
    f"x --{'y' * 9999} 1": ["--yyy"],
    "x --model_size 117M": ["must be 124M, 355M, 774M, 1558M, 1M, a folder in", "not '117M'"],
    f"x --model_size {'y' * 9999}": ["must be 124M"],
    f"{'x' * 255} --model_size 1M": ["has 255 tokens", "has 256", "may be 1 at most"],
    f"{'x' * 256} --model_size 1M": ["has 256 tokens", "has 256", "Shorten the prompt"],
}
SAMPLING = {
    "": {},
    "--seed 1": {"temperature": 1.0, "seed": 1},
    "--top_k 5": {"temperature": 1.0, "seed": 1, "top_k": 5},
    "--top_p 0.9": {"temperature": 1.0, "seed": 1, "top_p": 0.9},
    "--top_k 5 --temperature 2": {"temperature": 2.0, "seed": 1, "top_k": 5},
    "--temperature 0 --top_k 5 --top_p 0.9 --seed 1": {},
}
LIMITS = {
    "n_tokens_to_generate": ("a whole number, 0 or more", [-1, "ten", "", None, True, "1e2", "½"]),
    "temperature": ("a number, 0 or more", ["-1", "warm", "nan"]),
    "top_k": ("a whole number, 1 or more", ["0", "2.5"]),
    "top_p": ("a number, from 0 to 1", ["1.01", "-0.1", "nan"]),
    "seed": ("a whole number, 0 or more", ["-3", 1.5]),
}
posix = pytest.mark.skipif(os.name == "nt", reason="needs the shell, signals or files of POSIX")


def main(prompt, n=12, **limits):
    """The text that the command should print."""
    return gpt2.main(prompt, n, "1M", **limits)


def shell(line, stdin=b""):
    """Run a line of the shell, in which `gpt2` stands for the command."""
    line = line.replace("gpt2", f"{shlex.quote(sys.executable)} gpt2.py", 1)
    return run(command=["bash", "-o", "pipefail", "-c", line], stdin=stdin)


def is_one_line(result):
    """Whether the command ended with status 1 and one line that says why."""
    return (result.returncode, result.out, result.err.count("\n")) == (1, "", 1)


@pytest.fixture
def typed(monkeypatch, capsys):
    """Run the command in this process, and return what it prints."""

    def typed(*words, main=gpt2.main):
        monkeypatch.setattr(sys, "argv", ["gpt2.py", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        monkeypatch.chdir(ROOT)
        command_line(main)
        return capsys.readouterr().out

    return typed


def test_the_text_is_printed_piece_by_piece_and_nothing_else_is():
    code = "import sys, gpt2, command; flush = sys.stdout.flush\n"
    code += "sys.stdout.flush = lambda: sys.stdout.write('|') and flush()\n"
    result = run(VERSE, *TINY, code=("-c", code + "command.command_line(gpt2.main)"))
    pieces = result.out.split("|")
    assert len([piece for piece in pieces if piece.strip()]) >= 10
    assert ("".join(pieces), result.err) == (main(VERSE) + "\n", "")


@pytest.mark.parametrize("prompt", [*PROMPTS.split(), "[1, 2]", "- x", " x", "two\nlines", ""])
def test_a_prompt_arrives_exactly_as_typed(prompt, typed):
    for word in (prompt, f"--prompt={prompt}"):
        printed = typed(word, "--n", "7", main=lambda prompt, n=0: ascii([prompt, n]))
        assert printed == ascii([prompt, "7"]) + "\n"


@posix
@pytest.mark.parametrize("line", ["gpt2 {}", "gpt2 - {}", "gpt2 --prompt=- {}"])
def test_a_dash_or_no_prompt_reads_standard_input(line):
    assert shell(line.format(shlex.join(TINY)), b"JULIET:\n").out == main("JULIET:") + "\n"
    assert main("JULIET:") != main("JULIET:\n") != main("")


THREADS = """import itertools, time, threadpoolctl, command
clock = itertools.accumulate({})
time.perf_counter = lambda: next(clock)
show = command.new_show()
for _ in range({}):
    show("")
print(*{{library["num_threads"] for library in threadpoolctl.threadpool_info()}})"""


@pytest.mark.skipif(os.cpu_count() < 2, reason="needs two processors")
def test_half_of_the_threads_are_used_if_that_is_faster_and_the_user_set_none():
    def threads(*seconds, **settings):
        code = THREADS.format([0, *seconds], 1 + len(seconds))
        return int(run(code=("-c", code), **{"OPENBLAS_NUM_THREADS": None} | settings).out)

    every = threads(9, 2, 3, 3, 9)  # seconds for two tokens with all threads, and three with half
    half = [3, 4, 9, 9, 2]
    assert every > 1 and threads(*half) == threads(*half, *[1] * 44) == every // 2
    assert threads(*half, *[1] * 45) == every  # After 50 tokens, it tries again.
    assert threads(*half, *[1] * 45, 3, 4) == every // 2
    assert threads(*half, OMP_NUM_THREADS="2") == threads(*half, OPENBLAS_NUM_THREADS="2") == 2


def test_a_seed_repeats_a_text():
    one, same, two = (main("JULIET:", temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert one == same != two and len({main("JULIET:", temperature=1.5) for _ in range(4)}) > 1


@pytest.mark.parametrize(("options", "limits"), SAMPLING.items())
def test_any_option_of_sampling_alone_switches_sampling_on(options, limits, typed, monkeypatch):
    expected, real = main("JULIET:\n", **limits), np.random.default_rng
    assert (expected == main("JULIET:\n")) == (not limits)  # Sampling shows in the text.
    monkeypatch.setattr(np.random, "default_rng", lambda seed=None: real(seed or 1))
    assert typed("--prompt=JULIET:\n", *TINY, *options.split()) == expected + "\n"


def test_a_prompt_that_ends_in_a_space_gets_a_hint():
    with_space, without = (run(prompt, *TINY) for prompt in ("But, soft! ", "But, soft!"))
    assert "ends in a space" in with_space.err and with_space.err.count("\n") == 1
    assert with_space.returncode == 0 and without.err == ""


@pytest.mark.parametrize("line", MISTAKES)
def test_the_message_for_a_mistake_says_what_to_do_in_a_line(line):
    result = run(*line.split())
    assert is_one_line(result) and len(result.err) < 200 + len(str(ROOT))
    assert all(words in result.err for words in MISTAKES[line])
    assert ("quotes" in result.err) == (QUOTES in MISTAKES[line])


@pytest.mark.parametrize("option", LIMITS)
def test_the_message_for_a_value_out_of_range_has_the_limits_of_its_option(option):
    limits, values = LIMITS[option]
    for value in values:
        message = re.escape(f"{option} must be {limits}, not {value!r}")
        with pytest.raises(ValueError, match=f"^{message}$"):
            gpt2.main("x", **{option: value}, models_dir="nowhere")  # before anything is loaded
    result = run("x", f"--{option}", "z")
    assert is_one_line(result) and result.err == f"{option} must be {limits}, not 'z'\n"


def test_help_is_the_same_wherever_it_is_asked_for():
    lines = ("--help", "-h", "x -h", "x --seed 9 --help 1M", "--model 1M --help")
    first, *others = (run(*line.split(), PAGER="false") for line in lines)
    assert (first.returncode, first.err) == (0, "")
    assert all((r.returncode, r.out, r.err) == (0, first.out, "") for r in others)
    shown = ("--n_tokens_to_generate", "124M, 355M, 774M or 1558M", "--top_p or --seed\n", "FLAGS")
    assert all(words in first.out for words in shown)
    assert not any(words in first.out for words in ("GROUP", "--show", "\0", "\x1b", str(ROOT)))


def test_a_missing_package_and_a_lack_of_memory_are_errors_in_one_line(typed):
    code = "import sys, gpt2, command; sys.modules['fire'] = None; command.command_line(gpt2.main)"
    result = run("x", code=("-c", code))
    assert is_one_line(result) and "fire" in result.err
    assert "pip install -r requirements.txt" in result.err
    with pytest.raises(SystemExit, match=r"^There is not enough memory\.$"):
        typed(main=lambda n=0: [n] * sys.maxsize)


MISTAKES_IN_THE_CODE = [("**2, axis=-1, keepdims=True)", "**2, axis=-1)"), ("int(pick", "int('p'")]


@pytest.mark.parametrize(("right", "wrong"), MISTAKES_IN_THE_CODE)
def test_a_mistake_in_the_code_keeps_its_traceback(right, wrong, tmp_path):
    source = (ROOT / "gpt2.py").read_text("utf-8")
    (tmp_path / "gpt2.py").write_text(source.replace(right, wrong), "utf-8")
    result = run(VERSE, *TINY, code=(tmp_path / "gpt2.py",), PYTHONPATH=str(ROOT))
    assert result.returncode == 1 and wrong in result.err and "Traceback" in result.err


def test_windows_line_ends_and_a_byte_order_mark_are_cleaned():
    """The shell's "$(cat file)" removes the last line feed and leaves the carriage return."""
    clean = ascii("Où es-tu?\n\nROMEO:") + "\n"
    dirty = "\ufeffOù es-tu?\r\n\rROMEO:\r"
    for settings in ({}, ASCII):
        assert run(code=ECHO, stdin=f"{dirty}\n".encode(), **settings).out == clean
    assert run(dirty, code=ECHO).out == clean


@pytest.mark.parametrize("settings", [{}, ASCII], ids=str)
def test_a_prompt_that_is_not_utf_8_is_an_error_in_one_line(settings):
    results = [run("-", *TINY, stdin=b"\xff", **settings)]
    results += [run(b"caf\xe9", *TINY, **settings)] if os.name != "nt" else []
    assert all(is_one_line(result) and "not valid utf-8" in result.err for result in results)


@pytest.mark.parametrize("settings", [{}, ASCII, {"PYTHONIOENCODING": "cp1252"}], ids=str)
def test_redirected_output_is_utf_8_whatever_the_settings_say(settings):
    code = "import command; command.command_line(lambda n=0: 'caf\\u00e9 \\u65e5\\ud800')"
    result = run(code=("-c", code), **settings)
    assert (result.returncode, result.out, result.err) == (0, "café 日?\n", "")


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("options", [(), ("--seed", "1")])
def test_a_model_that_has_diverged_is_told_in_a_line(number, options, tmp_path):
    shutil.copytree(COMMITTED, tmp_path / "model")
    numbers = np.fromfile(tmp_path / "model" / DATA, np.float32)
    numbers[1000:] = number
    numbers.tofile(tmp_path / "model" / DATA)
    result = run("x", "--n", 8, "--model_size", tmp_path / "model", *options)
    assert is_one_line(result) and "scores are not numbers" in result.err


def test_the_text_is_printed_where_standard_output_is_no_file_as_in_a_notebook(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpt2.py", "But, soft!", *TINY])
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(ROOT / "gpt2.py"), run_name="__main__")
    assert output.getvalue() == main("But, soft!") + "\n"


@posix
def test_ctrl_c_leaves_the_text_so_far_a_newline_and_status_130():
    # A shell's background jobs start with the signal ignored, and the tests may be one.
    code = """import os, signal, command
def main(n=0, *, show=str):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    show("word ")
    os.kill(os.getpid(), signal.SIGINT)
command.command_line(main)"""
    result = run(code=("-c", code))
    assert (result.returncode, result.out, result.err) == (130, "word \n", "")


@posix
@pytest.mark.parametrize("what", [f"x {shlex.join(TINY)}", "--help"])
@pytest.mark.parametrize("where", ["| true", "| head -c 0", "> /dev/full"])
def test_a_text_that_nobody_takes_ends_quietly_with_a_status(what, where):
    if "full" in where and not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")
    result = shell(f"gpt2 {what} {where}")
    full = "[Errno 28] No space left on device\n"
    assert (result.returncode, result.err) == ((1, full) if "full" in where else (141, ""))
