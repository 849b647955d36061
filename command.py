"""The command: from the words in a shell to the text.

`command_line(main)` runs `main` with the words. The functions of the last section are for `main`
itself, which checks its arguments with them, in a shell and in Python.
"""

import contextlib
import functools
import inspect
import io
import itertools
import os
import re
import reprlib
import sys
import time

import numpy as np

from encoder import UserError

SEE_HELP = f"See python {sys.argv[0]} --help."


def command_line(main):
    """Run `main` with the words typed in a shell.

    Prints the text that `main` returns. If `main` has a parameter `show`, it gets a function that
    prints each piece of the text at once. An error that the user can correct ends in a message, and
    so do errors of the system, a missing package, and a lack of memory. Any other error is a bug,
    and keeps its traceback.
    """
    try:
        use_utf_8()
        arguments = read_arguments(main)
        with np.errstate(all="ignore"):  # `picker` finds infinity and NaN, so NumPy need not warn.
            text = main(**arguments)
        # `show` has printed the text already, but not the end of the line.
        print("" if "show" in arguments else text, flush=True)
        return
    except ModuleNotFoundError as error:
        status = f"{error}: pip install -r requirements.txt"
    except BrokenPipeError:  # The reader closed the pipe, as `head` does.
        status = 141
    except KeyboardInterrupt:
        status = 130
    except MemoryError:
        status = "There is not enough memory."
    except (OSError, UserError) as error:
        status = str(error)
    try:
        if status == 130:
            print()  # Ctrl-C may have come in the middle of a line.
        sys.stdout.flush()
    except OSError:  # The pipe is closed, or the disk is full. At exit, Python would flush again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)  # If the status is a text, Python prints it and exits with 1.


def use_utf_8():
    """Read and write UTF-8 where standard input or output is redirected, whatever the code page is.

    Characters that a terminal cannot show are written as "?".
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # In a notebook, it is something else.
            encoding = stream.encoding if stream.isatty() else "utf-8"
            errors = "replace" if stream is sys.stdout else "strict"
            stream.reconfigure(encoding=encoding, errors=errors)


# --- Words: from what is typed to the arguments of `main` ---


def read_arguments(main):
    """Return the arguments for `main`. With -h or --help, print the help and exit."""
    arguments = parse_words(sys.argv[1:], main)
    parameters = inspect.signature(main).parameters
    if "prompt" in parameters:
        arguments["prompt"] = read_prompt(arguments.get("prompt"))
    if "show" in parameters:
        arguments["show"] = new_show()
    return arguments


def check_flags(words):
    """Raise UserError for a flag that has no value: the next word is a flag too, or there is none.

    Fire would give such a flag the value True.
    """
    flag = r"--?[a-zA-Z][\w-]*"
    for word, next_word in itertools.pairwise([*words, "--end"]):
        if re.fullmatch(flag, word) and re.match(flag, next_word):
            raise UserError(f"{word[:40]} needs a value. {SEE_HELP}")


def parse_words(words, main):
    """Return the arguments for `main` that the library Fire finds in the words, as strings.

    Only parameters without a default take words without a flag, so that no word of a prompt becomes
    the value of an option if the quotes are missing. Parameters that are keyword-only in `main` are
    left out, because they are for Python.

    >>> def main(prompt, seed=None, *, show=print): ...
    >>> parse_words(["42", "--seed", "1"], main)
    {'prompt': '42', 'seed': '1'}

    No other function knows how Fire works. Fire calls `keep` instead of `main`, because it would
    apply a word too many to the text that `main` returns.
    """
    import fire

    parameters = inspect.signature(main).parameters.values()
    positional = [p for p in parameters if p.default is p.empty]
    optional = [p for p in parameters if p.default is not p.empty and p.kind != p.KEYWORD_ONLY]
    flags = [p.replace(kind=p.KEYWORD_ONLY) for p in optional]
    arguments = {}

    @functools.wraps(main)  # The help has the name and the docstring of `main`.
    def keep(*values, **options):
        arguments.update(keep.__signature__.bind(*values, **options).arguments)

    keep.__signature__ = inspect.Signature(positional + flags)
    if {"-h", "--help"} & {*words}:
        # Fire itself would show its help in a pager.
        trace = fire.trace.FireTrace(keep, name=os.path.basename(sys.argv[0]))
        print(fire.helptext.HelpText(keep, trace), flush=True)
        sys.exit()
    check_flags(words)
    # A prompt that is left out comes from standard input. Words too many are collected.
    positional = [p.replace(default=None) if p.name == "prompt" else p for p in positional]
    too_many = inspect.Parameter("too_many", inspect.Parameter.VAR_POSITIONAL)
    keep.__signature__ = inspect.Signature([*positional, too_many, *flags])
    fire.decorators.SetParseFn(str)(keep)  # Otherwise the prompt 42 would become a number.
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            # Words after the last -- are options of Fire. For Fire, the word - separates two
            # commands, but here, - is a prompt. So the separator is a character that no word has.
            fire.Fire(keep, [*words, "--", "--separator=\0"])
    except fire.core.FireExit as error:
        fault, _, word = error.trace.elements[-1].ErrorAsStr().partition(": ")
        raise UserError(f"{fault}: {word[:40]}. {SEE_HELP}") from None
    for word in arguments.pop("too_many", ()):
        quotes = "If a text has several words, put it in double quotes."
        raise UserError(f"{reprlib.repr(word)} is a word too many. {quotes} {SEE_HELP}")
    return arguments


def read_prompt(prompt):
    """Return the prompt, with a line feed at each line end.

    A prompt that is typed stays as it is, and "" starts a new text. With "-", or if no prompt is
    typed and standard input is redirected, the prompt is what comes from there.
    """
    is_missing = prompt is None
    stdin = sys.stdin or io.StringIO()  # It can be closed.
    try:
        if prompt == "-" or (is_missing and not stdin.isatty()):
            prompt = stdin.read().removesuffix("\n")
        if is_missing and not prompt:
            raise UserError(f"There is no prompt. {SEE_HELP}")
        prompt.encode("utf-8")  # This fails if an argument had a byte that is not UTF-8.
    except UnicodeError as error:
        raise UserError(f"The prompt is not valid {error.encoding}: {error.reason}") from None
    # "$(cat file)" with a file from Windows leaves its byte order mark and the last "\r".
    prompt = prompt.removeprefix("\ufeff").removesuffix("\r")
    prompt = re.sub("\r\n?", "\n", prompt)
    if prompt.endswith(" "):
        advice = "The prompt ends in a space. Omit the space: GPT-2's words begin with one."
        print(advice, file=sys.stderr)
    return prompt


# --- Threads: what `show` does beside printing ---


def new_show():
    """Return a function that prints the pieces of a text, and finds the best number of threads.

    A number of threads that the user has set in the environment is kept.
    """
    if {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys():
        return functools.partial(print, end="", flush=True)
    import threadpoolctl

    tuner = tune_threads(threadpoolctl.ThreadpoolController().select(user_api="blas"))

    def show(piece):
        print(piece, end="", flush=True)
        next(tuner)

    return show


def tune_threads(blas):
    """Use all threads or half of them, whichever is faster; call `next` on this for each token.

    OpenBLAS, which NumPy mostly uses, cuts each product into as many parts as there are processors,
    and waits for the last part. If another program keeps one processor busy, every product waits.
    Half of the threads leave room for that program.

    Of 50 tokens, 5 are timed: 2 with all threads and 3 with half of them. Then the faster number is
    used for 45. The fastest token counts, because the first one after a change may be slow.
    """
    all_threads = max((library["num_threads"] for library in blas.info()), default=1)
    half = max(all_threads // 2, 1)
    while True:
        fastest = {}
        for n_threads, n_tokens in [(all_threads, 2), (half, 3)]:
            blas.limit(limits=n_threads)  # until the next limit is set
            seconds = []
            for _ in range(n_tokens):
                start = time.perf_counter()
                yield  # until the next token is there
                seconds.append(time.perf_counter() - start)
            fastest[n_threads] = min(seconds)
        blas.limit(limits=min(fastest, key=fastest.get))
        for _ in range(45):
            yield


# --- Arguments: what `main` checks, in a shell and in Python ---


def number(name, value, kind, least, most=np.inf):
    """Return an option as a number. `kind` is int or float. The option may be text.

    Raises UserError, with the limits, for anything else and for what is out of range.
    """
    with contextlib.suppress(ValueError):
        result = kind(str(value))  # As text, so that int does not turn 3.7 into 3.
        if least <= result <= most:
            return result
    limits = f"{least} or more" if most == np.inf else f"from {least} to {most}"
    what = "a whole number" if kind is int else "a number"
    raise UserError(f"{name} must be {what}, {limits}, not {reprlib.repr(value)}")


def read_options(limits, **options):
    """Return those options that are not None, as numbers.

    `limits` has for each name what `number` needs: the kind, the least and perhaps the most.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return {name: number(name, value, *limits[name]) for name, value in given.items()}


def picker(sample, **options):
    """Return the function that picks each token: greedy, or `sample` with these options.

    Any option that is given switches sampling on, even if it is only a seed. With temperature 0,
    the likeliest token is taken each time, whatever else is given.
    """
    limits = dict(temperature=(float, 0), top_k=(int, 1), top_p=(float, 0, 1), seed=(int, 0))
    given = read_options(limits, **options)
    choose = np.argmax
    if given and given.get("temperature") != 0:
        random = np.random.default_rng(given.pop("seed", None))
        choose = functools.partial(sample, random=random, **given)

    def pick(logits):
        if not np.isfinite(logits).all():
            raise UserError("The model's scores are not numbers. Perhaps its training diverged.")
        return choose(logits)

    return pick


def encode_prompt(prompt, encoder, hparams, n_new):
    """Return the ids of a prompt, or `encoder.bos` if it is empty.

    Raises UserError if the model cannot read them, or if there is no room for `n_new` more.
    """
    ids = encoder.encode(prompt, allowed_special="all") or [*encoder.bos]
    if not ids:
        raise UserError("The prompt is empty, and this model has no token that starts a text.")
    if max(ids) >= hparams["n_vocab"]:
        token = reprlib.repr(encoder.decoder[max(ids)])
        raise UserError(f"The prompt has the token {token}, but its id has no row in wte.")
    room = hparams["n_ctx"] - len(ids)
    if n_new > room:
        sizes = f"{len(ids):,} tokens, and the context of this model has {hparams['n_ctx']:,}"
        most = f"n_tokens_to_generate may be {room:,} at most"
        raise UserError(f"The prompt has {sizes}. {most if room > 0 else 'Shorten the prompt'}.")
    return ids
