"""The READMEs: every block runs as pasted, and prints what stands below it."""

import contextlib
import io
import json
import re
import shlex
from functools import partial

import huggingface
import numpy as np
import pytest
from conftest import ROOT, run

import gpt2 as gpt2_module
from utils import load_encoder_hparams_and_params

PAGES = {path: (ROOT / path).read_text("utf-8") for path in ("README.md", "examples/README.md")}
BLOCK = r"```{}\n((?:(?!```).)*)```\n"
FRACTION = r"\d*\.\d+"  # which may differ a little from machine to machine


def blocks(page, language):
    """The code blocks of a page, each with the output below it, or None."""
    pattern = BLOCK.format(language) + f"(?:\n{BLOCK.format('text')})?"
    return [match.groups() for match in re.finditer(pattern, PAGES[page], re.DOTALL)]


def assert_prints(printed, below):
    """Compare an output with the one on the page: its words to the letter, its fractions nearly."""
    assert re.sub(FRACTION, "", printed).rstrip() == re.sub(FRACTION, "", below).rstrip()
    fractions = [[*map(float, re.findall(FRACTION, text))] for text in (printed, below)]
    assert fractions[0] == pytest.approx(fractions[1], abs=0.011)


def run_blocks(page):
    """Run the Python blocks of a page in order. Returns all names, and what each block printed."""
    namespace, printed = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for code, _ in blocks(page, "python"):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, namespace)
            printed.append(output.getvalue())
    return namespace, printed


@pytest.fixture(scope="module")
def examples():
    return run_blocks("examples/README.md")


def test_every_snippet_prints_what_stands_below_it(examples):
    for page, (_, printed) in zip(PAGES, (run_blocks("README.md"), examples), strict=True):
        for text, (code, below) in zip(printed, blocks(page, "python"), strict=True):
            assert below and text.strip(), code
            assert_prints(text, below)


def test_every_command_with_the_bundled_model_prints_what_stands_below_it():
    commands = [(line.splitlines()[-1], below) for line, below in blocks("README.md", "sh")]
    commands = [(line, below) for line, below in commands if "1M" in line]
    assert len(commands) == 2
    for line, below in commands:
        assert run(code=shlex.split(line)[1:]).out == below


def test_what_a_model_of_the_source_writes_stands_in_the_source():
    (line, below), *_ = (block for block in blocks("README.md", "sh") if "train.py" in block[0])
    prompt = shlex.split(line.splitlines()[-1])[2]
    assert len(below) > 100 and prompt + below.removesuffix("\n") in (ROOT / "gpt2.py").read_text()


def test_the_perplexity_is_that_of_hugging_face(examples):
    recorded = json.loads(huggingface.WRITTEN.read_text("utf-8"))["perplexity"]
    assert examples[0]["perplexity"] == pytest.approx(recorded, rel=1e-4)


def test_the_weights_of_each_head_are_kept(examples):
    names, _ = examples
    n, weights = len(names["inputs"]), np.array(names["weights"])
    assert weights.shape == (names["hparams"]["n_layer"], names["n_head"], n, n)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert (weights[:, :, ~np.tri(n, dtype=bool)] == 0).all()


# --- JAX ---


def test_logits_are_the_same_compiled_in_a_batch_and_spread_over_devices(examples):
    names, _ = examples
    expected = gpt2_module.gpt2(names["inputs"], **names["params"], n_head=names["n_head"])
    for found in (names["compiled"], names["batched"][0], names["spread"]):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_generate_and_sample_work_under_the_swap_too(examples):
    names, texts = examples[0], []
    numpys = load_encoder_hparams_and_params("1M")[2]
    for module, params in ((gpt2_module, numpys), (names["swapped"], names["params"])):
        pick = partial(module.sample, random=np.random.default_rng(1), temperature=6.0, top_k=50)
        for picks in ({}, {"pick": pick}):
            texts.append(module.generate(names["inputs"], params, names["n_head"], 5, **picks))
    assert texts[:2] == texts[2:] and texts[0] != texts[1]
