"""The same file on JAX: the README's blocks, run in order, give the logits that NumPy gives."""

import re
from functools import partial

import numpy as np
import pytest
from conftest import ROOT

import gpt2 as gpt2_module
from gpt2 import generate, gpt2


@pytest.fixture(scope="module")
def readme():
    """All names that the README's Python blocks leave behind when they are run in order."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    namespace = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        exec("".join(blocks), namespace)
    return namespace


def logits(readme, ids):
    return gpt2(ids, **readme["params"], n_head=readme["hparams"]["n_head"])


def test_the_likeliest_word_is_the_one_that_the_readme_says(readme):
    assert readme["encoder"].decode([readme["likeliest"]]) == " Romeo"


@pytest.mark.parametrize("name", ["compiled", "spread"])
def test_compiled_and_spread_over_devices_the_logits_are_numpys(readme, name):
    np.testing.assert_allclose(readme[name], logits(readme, readme["inputs"]), atol=1e-4)


def test_the_model_was_really_spread(readme):
    import jax

    shards = [leaf.addressable_shards for leaf in jax.tree.leaves(readme["split"])]
    assert {len({shard.device for shard in of_leaf}) for of_leaf in shards} == {8}
    sizes = [of_leaf[0].data.nbytes for of_leaf in shards]
    assert sum(sizes) * 8 == sum(leaf.nbytes for leaf in jax.tree.leaves(readme["params"]))


def test_a_batch_has_the_logits_of_its_rows(readme):
    rows = [logits(readme, readme["inputs"]), logits(readme, readme["inputs"][::-1])]
    np.testing.assert_allclose(readme["batched"], rows, atol=1e-4)


def test_a_step_along_the_gradient_lowers_the_loss(readme):
    ids = np.array(readme["sentence"])
    exp = np.exp(logits(readme, ids[:-1]))
    probabilities = exp[np.arange(len(ids) - 1), ids[1:]] / exp.sum(axis=-1)
    assert np.isclose(readme["before"], -np.log(probabilities).mean(), atol=1e-4)
    assert readme["after"] < readme["before"]


def test_the_gradient_is_the_slope_of_the_loss(readme):
    """Compare with the loss a little to either side, for one bias of each layer."""
    import jax

    for i in range(readme["hparams"]["n_layer"]):
        gradient = readme["gradients"]["blocks"][i]["mlp"]["c_fc"]["b"]
        direction = np.asarray(gradient / np.linalg.norm(gradient))

        def loss_at(distance, i=i, direction=direction):
            moved = jax.tree.map(np.array, readme["params"])
            moved["blocks"][i]["mlp"]["c_fc"]["b"] += distance * direction
            return float(readme["loss"](moved, readme["sentence"]))

        slope = (loss_at(0.05) - loss_at(-0.05)) / 0.1
        assert np.isclose(slope, np.linalg.norm(gradient), rtol=0.05)


def test_generate_and_sample_work_under_the_swap_too(readme):
    arguments = (readme["inputs"], readme["params"], readme["hparams"]["n_head"], 12)
    swapped = readme["swapped"]
    assert swapped.generate(*arguments) == generate(*arguments)
    limits = {"temperature": 4.0, "top_k": 50, "top_p": 0.9}
    drawn = [
        module.generate(
            *arguments, partial(module.sample, random=np.random.default_rng(0), **limits)
        )
        for module in (swapped, gpt2_module)
    ]
    assert drawn[0] == drawn[1] != generate(*arguments)


def test_attention_weights_and_states_are_seen_as_the_readme_says(readme):
    n_layer, n_head = readme["hparams"]["n_layer"], readme["hparams"]["n_head"]
    n = len(readme["inputs"])
    weights = np.array(readme["weights"])
    assert weights.shape == (n_layer, n_head, n, n)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    assert (weights[:, :, ~np.tri(n, dtype=bool)] == 0).all()
    last = gpt2_module.layer_norm(readme["states"][-1], **readme["params"]["ln_f"])
    np.testing.assert_allclose(
        last @ readme["params"]["wte"].T, logits(readme, readme["inputs"]), atol=1e-4
    )
