"""The READMEs: every Python block runs as pasted, prints something, and says what is true."""

import contextlib
import io
import json
import re
from functools import partial

import huggingface
import numpy as np
import pytest
from conftest import ROOT

import gpt2 as gpt2_module
from gpt2 import gpt2, layer_norm


def blocks(path, language="python"):
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


def run_blocks(path):
    """Run the Python blocks of a page in order. Returns all names, and what each block printed."""
    namespace, printed = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for block in blocks(path):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(block, namespace)
            printed.append(output.getvalue())
    return namespace, printed


@pytest.fixture(scope="module")
def readme():
    return run_blocks(ROOT / "README.md")


@pytest.fixture(scope="module")
def examples():
    return run_blocks(ROOT / "examples" / "README.md")


def logits(names, ids):
    return gpt2(ids, **names["params"], n_head=names["n_head"])


# --- The front page ---


def test_every_block_prints_something(readme, examples):
    assert all(text.strip() for text in readme[1] + examples[1])


def test_the_lines_of_code_on_the_page_are_those_of_the_file():
    (excerpt,) = blocks(ROOT / "README.md", "py")
    lines = iter((ROOT / "gpt2.py").read_text("utf-8").splitlines())
    code = [line for line in excerpt.splitlines() if line]
    assert 10 <= len(code) <= 15
    for line in code:
        assert line in lines  # this also takes the lines before it from the iterator


def test_the_tokens_the_verse_and_the_three_prompts_are_printed(readme):
    verse, tokens, *_, prompts = readme[1]
    assert verse.startswith(" Romeo?\nDeny thy father and refuse thy name;")
    assert "".join(eval(tokens)) == "O Romeo, Romeo! wherefore art thou"
    assert len(eval(tokens)) == 9
    assert "What's in a name? that which we call a rose" in prompts


def test_the_five_likeliest_tokens_are_printed_with_their_probabilities(readme):
    names, printed = readme
    lines = [line.split(maxsplit=1) for line in printed[2].splitlines()]
    exp = np.exp(logits(names, names["encoder"].encode("I love"))[-1].astype(float))
    shares = np.sort(exp / exp.sum())[::-1][:5]
    assert [float(share) for share, _ in lines] == pytest.approx(shares, abs=6e-4)
    assert lines[0][1] == "' thee'"


def test_a_line_stops_before_its_end(readme):
    assert readme[1][4] == " Romeo?\n"


def test_the_perplexity_is_that_of_hugging_face(readme):
    recorded = json.loads(huggingface.WRITTEN.read_text("utf-8"))["perplexity"]
    assert float(readme[1][5]) == pytest.approx(recorded, rel=1e-4)


def test_the_prediction_after_the_last_layer_is_that_of_the_model(readme):
    names, printed = readme
    lines = printed[6].splitlines()
    assert len(lines) == names["hparams"]["n_layer"]
    assert lines[-1] == "' Romeo'"
    final = layer_norm(names["x"], **names["params"]["ln_f"]) @ names["params"]["wte"].T
    np.testing.assert_allclose(final, logits(names, names["inputs"]), atol=1e-4)


def test_another_function_in_the_place_of_gelu_changes_the_text_and_gelu_comes_back(readme):
    names, printed = readme
    assert not printed[7].startswith(" Romeo?")
    assert gpt2_module.gelu is names["gelu"]


def test_the_weights_of_each_head_are_kept(readme):
    names, _ = readme
    n, weights = len(names["inputs"]), np.array(names["weights"])
    assert weights.shape == (names["hparams"]["n_layer"], names["n_head"], n, n)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert (weights[:, :, ~np.tri(n, dtype=bool)] == 0).all()


# --- JAX ---


@pytest.mark.parametrize("name", ["compiled", "spread"])
def test_logits_are_the_same_compiled_and_spread_over_devices(examples, name):
    names, _ = examples
    np.testing.assert_allclose(names[name], logits(names, names["inputs"]), atol=1e-4)


def test_the_model_was_really_spread(examples):
    import jax

    shards = [leaf.addressable_shards for leaf in jax.tree.leaves(examples[0]["split"])]
    assert {len({shard.device for shard in of_leaf}) for of_leaf in shards} == {8}
    sizes = [of_leaf[0].data.nbytes for of_leaf in shards]
    assert sum(sizes) * 8 == sum(leaf.nbytes for leaf in jax.tree.leaves(examples[0]["params"]))


def test_a_batch_has_the_logits_of_its_rows(examples):
    names, _ = examples
    rows = [logits(names, names["inputs"]), logits(names, names["inputs"][::-1])]
    np.testing.assert_allclose(names["batched"], rows, atol=1e-4)


def test_a_step_along_the_gradient_lowers_the_loss(examples):
    names, _ = examples
    ids = np.array(names["sentence"])
    exp = np.exp(logits(names, ids[:-1]))
    probabilities = exp[np.arange(len(ids) - 1), ids[1:]] / exp.sum(axis=-1)
    assert np.isclose(names["before"], -np.log(probabilities).mean(), atol=1e-4)
    assert names["after"] < names["before"]


def test_the_gradient_is_the_slope_of_the_loss(examples):
    """Compare with the loss a little to either side, for one bias of each layer."""
    import jax

    names, _ = examples
    for i in range(names["hparams"]["n_layer"]):
        gradient = names["gradients"]["blocks"][i]["mlp"]["c_fc"]["b"]
        direction = np.asarray(gradient / np.linalg.norm(gradient))

        def loss_at(distance, i=i, direction=direction):
            moved = jax.tree.map(np.array, names["params"])
            moved["blocks"][i]["mlp"]["c_fc"]["b"] += distance * direction
            return float(names["loss"](moved, names["sentence"]))

        slope = (loss_at(0.05) - loss_at(-0.05)) / 0.1
        assert np.isclose(slope, np.linalg.norm(gradient), rtol=0.05)


def test_generate_and_sample_work_under_the_swap_too(examples):
    names, _ = examples
    texts = []
    for module in (gpt2_module, names["swapped"]):
        pick = partial(module.sample, random=np.random.default_rng(0), temperature=4.0, top_k=50)
        for picks in ({}, {"pick": pick}):
            arguments = (names["inputs"], names["params"], names["n_head"], 12)
            texts.append(module.generate(*arguments, **picks))
    assert texts[:2] == texts[2:] and texts[0] != texts[1]
