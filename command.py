"""The command: from the words in a shell to the text.

`command_line(main)` runs `main` with the words. `main` checks its arguments with the functions of
the last section, in a shell and in Python.
"""

import contextlib
import functools
import inspect
import io
import itertools
import os
import re
import sys
import time

import numpy as np

from encoder import UserError, brief

SEE_HELP = "See --help."


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
    else:
        return
    end_output("\n" if status == 130 else "")  # Ctrl-C may have come in the middle of a line.
    sys.exit(status)  # If the status is a text, Python prints it and exits with 1.


def end_output(end):
    """Write what is left in the buffer of standard output, or drop it if nobody can take it."""
    try:
        print(end=end, flush=True)
    except OSError:  # The pipe is closed, or the disk is full.
        # At exit, Python flushes again, and would report the same error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def use_utf_8():
    """Read and write UTF-8 where standard input or output is redirected, whatever the code page is.

    Characters that cannot be written are replaced by "?".
    """
    for stream in (sys.stdin, sys.stdout):
        # A terminal knows its encoding. In a notebook, a stream is something else.
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


# --- Words: from what is typed to the arguments of `main` ---


def read_arguments(main):
    """Return the arguments for `main`. With -h or --help, print the help and exit.

    Parameters that are keyword-only in `main`, such as `show`, are for Python: no word sets them.
    """
    words, parameters = sys.argv[1:], inspect.signature(main).parameters
    in_shell = [p for p in parameters.values() if p.kind != p.KEYWORD_ONLY]
    if {"-h", "--help"} & {*words}:
        print_help(main, in_shell)
        sys.exit()
    check_flags(words, in_shell)
    arguments = parse_words(words, in_shell)
    if "prompt" in parameters:
        arguments["prompt"] = read_prompt(arguments.get("prompt"))
    if "show" in parameters:
        arguments["show"] = new_show()
    return arguments


def print_help(main, parameters):
    """Print what the library Fire makes of the docstring of `main` and of these parameters.

    Fire itself would write to standard error, and into a pager in a terminal. So this function uses
    two parts of Fire that its manual does not mention.
    """
    import fire

    # Fire reads only the docstring of this function, and its signature, which is set below.
    @functools.wraps(main)
    def command(): ...

    # In the help, parameters without a default come first, and all others are flags.
    positional = [p for p in parameters if p.default is p.empty]
    flags = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.default is not p.empty]
    command.__signature__ = inspect.Signature(positional + flags)
    trace = fire.trace.FireTrace(command, name=os.path.basename(sys.argv[0]))
    print(fire.helptext.HelpText(command, trace), flush=True)


def check_flags(words, parameters):
    """Raise UserError for a flag that is not an option, and for an option without a value.

    Fire would give an option without a value the value True.

    >>> parameters = inspect.signature(lambda prompt, seed=None: ...).parameters.values()
    >>> check_flags(["-", "-5", "-s", "-1", "--seed=1"], parameters)
    >>> check_flags(["--noseed"], parameters)
    Traceback (most recent call last):
    encoder.UserError: '--noseed' is not an option. See --help.
    >>> check_flags(["--seed", "-s=1"], parameters)
    Traceback (most recent call last):
    encoder.UserError: --seed needs a value. See --help.
    """
    flag = "--|-[a-zA-Z]"  # the start of what Fire takes for a flag
    for word, next_word in itertools.pairwise([*words, None]):
        if re.match(flag, word):
            key, equals, _ = word.lstrip("-").partition("=")
            if find_option(key, parameters) is None:
                raise UserError(f"{brief(word)} is not an option. {SEE_HELP}")
            if not equals and (next_word is None or re.match(flag, next_word)):
                raise UserError(f"{word} needs a value. {SEE_HELP}")


def find_option(key, parameters):
    """Return the name of the only parameter with this name or this first letter, or None."""
    names = [p.name for p in parameters if key.replace("-", "_") in (p.name, p.name[0])]
    return names[0] if len(names) == 1 else None


def parse_words(words, parameters):
    """Return the arguments that are in the words, as strings. The words have passed `check_flags`.

    The library Fire finds the flags, such as --seed or -s. The words that are left are for the
    parameters without a default, in their order. So no word of a prompt becomes the value of an
    option if the quotes are missing.

    >>> parameters = inspect.signature(lambda prompt, seed=None: ...).parameters.values()
    >>> parse_words(["42", "-s", "1"], parameters)
    {'seed': '1', 'prompt': '42'}
    """
    import fire

    kept = []

    # Fire does not get `main`, because it would look for a word too many in the text that `main`
    # returns: after "Romeo upper", it would print the text in upper case.
    @fire.decorators.SetParseFn(str)  # Otherwise the prompt 42 would become a number.
    def keep(*values, **options):
        kept.append((values, options))

    # Words after the last -- are options of Fire. For Fire, the word - separates two commands, but
    # here, - is a prompt. So the separator is a character that no word has.
    fire.Fire(keep, [*words, "--", "--separator=\0"])
    values, options = kept.pop()
    arguments = {find_option(key, parameters): value for key, value in options.items()}
    # The words that are left are for the parameters without a default that have no value yet.
    waiting = [p.name for p in parameters if p.default is p.empty and p.name not in arguments]
    if len(values) > len(waiting):
        word = brief(values[len(waiting)])
        quotes = "If a text has several words, put it in double quotes."
        raise UserError(f"{word} is one word too many. {quotes} {SEE_HELP}")
    for name in waiting[len(values) :]:
        if name != "prompt":  # which comes from standard input then
            raise UserError(f"{name} is missing. {SEE_HELP}")
    return arguments | dict(zip(waiting, values, strict=False))


def read_prompt(prompt):
    """Return the prompt, with a line feed at each line end.

    With "-", or if no prompt is typed and standard input is redirected, the prompt is read from
    standard input. A prompt may be "", which starts a new text.
    """
    is_missing = prompt is None
    stdin = sys.stdin or io.StringIO()  # It is None if it is closed.
    try:
        if prompt == "-" or (is_missing and not stdin.isatty()):
            prompt = stdin.read().removesuffix("\n")  # the end of the last line
        if is_missing and not prompt:
            raise UserError(f"There is no prompt. {SEE_HELP}")
        prompt.encode("utf-8")  # This fails if an argument had a byte that is not UTF-8.
    except UnicodeError as error:
        raise UserError(f"The prompt is not valid {error.encoding}: {error.reason}") from None
    # "$(cat file)" leaves the byte order mark of a file from Windows, and "\r" at the line ends.
    prompt = prompt.removeprefix("\ufeff").removesuffix("\r")
    prompt = re.sub("\r\n?", "\n", prompt)
    if prompt.endswith(" "):
        advice = "The prompt ends in a space. Omit the space: GPT-2's words begin with one."
        print(advice, file=sys.stderr)
    return prompt


# --- Show: the text as it comes, and the best number of threads ---


def new_show():
    """Return a function that prints the pieces of a text, and sets the number of threads.

    A number of threads that the user has set in the environment is kept.
    """
    if {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"} & os.environ.keys():
        return functools.partial(print, end="", flush=True)
    import threadpoolctl

    blas = threadpoolctl.ThreadpoolController().select(user_api="blas")
    all_threads = max((library["num_threads"] for library in blas.info()), default=1)
    times = []

    def show(piece):
        print(piece, end="", flush=True)
        times.append(time.perf_counter())  # once for each token
        # The limit stays until the next call.
        blas.limit(limits=best_threads(np.diff(times), all_threads))

    return show


def best_threads(seconds, all_threads):
    """Return the number of threads for the next token. `seconds` are those of the tokens so far.

    OpenBLAS, which NumPy mostly uses, cuts each product into as many parts as there are processors,
    and waits for the last part. If another program keeps one processor busy, every product waits.
    Half of the threads leave room for that program. So of 50 tokens, two are tried with all
    threads, and three with half of them. The rest get the faster number. The fastest token of each
    trial counts, because the first one after a change may be slow. In `seconds`, the first two
    numbers are those with all threads, and the next three those with half of them.

    >>> best_threads([], 4), best_threads([9, 2], 4)
    (4, 2)
    >>> best_threads([9, 2, 3, 3, 9], 4), best_threads([9, 4, 3, 3, 9], 4)
    (4, 2)
    """
    half = max(all_threads // 2, 1)
    recent = seconds[len(seconds) // 50 * 50 :]  # since the last trial began
    if len(recent) < 2:
        return all_threads
    if len(recent) < 5:
        return half
    return all_threads if min(recent[:2]) < min(recent[2:5]) else half


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
    raise UserError(f"{name} must be {what}, {limits}, not {brief(value)}")


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
            raise UserError("The model's scores are not numbers. Has its training diverged?")
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
        token = brief(encoder.decoder[max(ids)])
        raise UserError(f"The prompt has the token {token}, but its id has no row in wte.")
    room = hparams["n_ctx"] - len(ids)
    if n_new > room:
        sizes = f"{len(ids):,} tokens, and the context of this model has {hparams['n_ctx']:,}"
        most = f"n_tokens_to_generate may be {room:,} at most"
        raise UserError(f"The prompt has {sizes}. {most if room > 0 else 'Shorten the prompt'}.")
    return ids
