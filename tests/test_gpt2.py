"""The model: equal to Hugging Face's, to loops that can be checked by eye, and to itself."""

import ast
import inspect
import io
import tokenize
import warnings

import huggingface
import numpy as np
import pytest

import gpt2
from gpt2 import attention, generate, layer_norm, mha

FUNCTIONS = [function for _, function in inspect.getmembers(gpt2, inspect.isfunction)]
OF_INTEGERS = ("whole_number", "generate", "main")


@pytest.fixture(scope="module")
def small():
    """Parameters, head count and ids of a small random model, its context of 16 filled."""
    hparams, params, _, ids = huggingface.random_model(40, 16, 12, 3, 2, n_seq=16)
    return params, hparams["n_head"], ids.tolist()


@pytest.mark.parametrize("model", huggingface.MODELS, ids=str)
def test_logits_are_those_of_hugging_face(model):
    *fields, n_seq = model
    hparams, params, _, ids = huggingface.random_model(*fields, n_seq=n_seq)
    recorded = np.load(huggingface.RECORDED)[str(model)]
    np.testing.assert_allclose(
        gpt2.gpt2(ids, **params, n_head=hparams["n_head"]), recorded, atol=1e-5
    )


def naive_gpt2(ids, wte, wpe, blocks, ln_f, n_head):
    """GPT-2 in float64, one position and one head at a time."""

    def norm(v, g, b):
        return g * (v - v.mean()) / np.sqrt(v.var() + 1e-5) + b

    x = [wte[id].astype(float) + wpe[position] for position, id in enumerate(ids)]
    for block in blocks:
        attn, mlp = block["attn"], block["mlp"]
        qkv = [norm(v, **block["ln_1"]) @ attn["c_attn"]["w"] + attn["c_attn"]["b"] for v in x]
        q, k, v = zip(*(np.split(row, 3) for row in qkv), strict=True)
        for position in range(len(ids)):
            heads = []
            for head in np.split(np.arange(len(x[0])), n_head):
                scores = [q[position][head] @ k[j][head] for j in range(position + 1)]
                weights = np.exp(np.array(scores) / np.sqrt(len(head)))
                mixed = sum(w * v[j][head] for j, w in enumerate(weights / weights.sum()))
                heads.extend(mixed)
            x[position] = x[position] + heads @ attn["c_proj"]["w"] + attn["c_proj"]["b"]
            hidden = norm(x[position], **block["ln_2"]) @ mlp["c_fc"]["w"] + mlp["c_fc"]["b"]
            inner = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
            hidden = hidden * (1 + np.tanh(inner)) / 2
            x[position] = x[position] + hidden @ mlp["c_proj"]["w"] + mlp["c_proj"]["b"]
    return np.array([wte @ norm(v, **ln_f) for v in x])


def test_logits_are_those_of_a_loop_over_heads_and_positions(small):
    params, n_head, ids = small
    expected = naive_gpt2(ids, **params, n_head=n_head)
    np.testing.assert_allclose(gpt2.gpt2(ids, **params, n_head=n_head), expected, atol=1e-5)


def test_a_later_token_changes_no_earlier_logit(small):
    params, n_head, ids = small
    logits = gpt2.gpt2(ids, **params, n_head=n_head)
    for position in range(len(ids)):
        changed = ids.copy()
        changed[position] = (ids[position] + 1) % 40
        same = np.isclose(gpt2.gpt2(changed, **params, n_head=n_head), logits, atol=1e-6).all(
            axis=-1
        )
        assert same.tolist() == [True] * position + [False] * (len(ids) - position)


@pytest.mark.parametrize("n_prompt", [1, 2, 7, 15, 16])
def test_generate_gives_what_the_plain_loop_gives_up_to_the_last_position(small, n_prompt):
    params, n_head, ids = small
    looped = ids[:n_prompt]
    while len(looped) < 16:
        looped.append(int(gpt2.gpt2(looped, **params, n_head=n_head)[-1].argmax()))
    new = generate(ids[:n_prompt], params, n_head, 16 - n_prompt)
    assert new == looped[n_prompt:]
    assert all(type(id) is int for id in new)


def test_a_cache_gives_the_last_logits_whatever_the_split(small):
    params, n_head, ids = small
    logits = gpt2.gpt2(ids, **params, n_head=n_head)
    for n_first in range(1, 16):
        cache = np.full((2, 2, n_head, 16, 4), np.nan, np.float32)
        first = gpt2.gpt2(ids[:n_first], **params, n_head=n_head, cache=cache[:, :, :, :n_first])
        rest = gpt2.gpt2(ids[n_first:], **params, n_head=n_head, cache=cache)
        np.testing.assert_allclose([first[0], rest[0]], logits[[n_first - 1, -1]], atol=1e-5)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_ids_come_in_lists_tuples_and_arrays_and_stay_as_they_are(small, kind):
    params, n_head, ids = small
    inputs = kind(ids[:9])
    assert generate(inputs, params, n_head, 3) == generate(ids[:9], params, n_head, 3)
    assert list(inputs) == ids[:9]


def test_parameters_stay_as_they_are(small):
    params, n_head, ids = small
    before = params["wte"].copy(), params["blocks"][0]["mlp"]["c_fc"]["w"].copy()
    generate(ids[:9], params, n_head, 3)
    after = params["wte"], params["blocks"][0]["mlp"]["c_fc"]["w"]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_float32_stays_float32_in_every_function(small, monkeypatch):
    params, n_head, ids = small
    results = []

    def spied(function):
        def spy(*args, **kwargs):
            results.append((function.__name__, function(*args, **kwargs)))
            return results[-1][1]

        return spy

    for function in FUNCTIONS:
        monkeypatch.setattr(gpt2, function.__name__, spied(function))
    gpt2.generate(ids[:9], params, n_head, 2)
    dtypes = {name: str(result.dtype) for name, result in results if name not in OF_INTEGERS}
    assert dtypes == {f.__name__: "float32" for f in FUNCTIONS if f.__name__ not in OF_INTEGERS}


def test_attention_takes_one_head_as_in_the_tutorial_or_any_number(small):
    random = np.random.RandomState(0)
    q, k, v = random.normal(size=(3, 2, 5, 6, 4))
    mask = (1 - np.tri(6)) * -1e10
    together = attention(q, k, v, mask)
    assert together.shape == (2, 5, 6, 4)
    for i, j in np.ndindex(2, 5):
        np.testing.assert_allclose(together[i, j], attention(q[i, j], k[i, j], v[i, j], mask))
    # The first query sees the first key alone.
    np.testing.assert_allclose(together[:, :, 0], v[:, :, 0])


def test_heads_may_not_be_a_number_that_does_not_divide_the_width(small):
    block = small[0]["blocks"][0]
    with pytest.raises(ValueError, match="reshape"):
        mha(np.ones((3, 12), np.float32), **block["attn"], n_head=5)


def test_layer_norm_of_equal_numbers_is_its_bias():
    assert (
        layer_norm(np.full((2, 4), 7.0), g=np.ones(4), b=np.arange(4.0)).tolist()
        == [[0, 1, 2, 3]] * 2
    )


def test_large_activations_give_no_warning_and_no_nan(small):
    params, n_head, ids = small
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huge = params | {"wte": params["wte"] * 1e4, "wpe": params["wpe"] * 1e-4}
        assert np.isfinite(gpt2.gpt2(ids, **huge, n_head=n_head)).all()
        assert gpt2.gelu(np.float32([-1e4, 1e4])).tolist() == [0, 1e4]


@pytest.mark.parametrize("count", [-1, "x", "", None, 1.5, True, "-3", "1e2"])
def test_a_count_that_is_not_a_whole_number_is_an_error(small, count):
    params, n_head, ids = small
    with pytest.raises(ValueError, match="n_tokens_to_generate must be a whole number"):
        generate(ids[:4], params, n_head, count)
    with pytest.raises(ValueError, match="n_tokens_to_generate must be a whole number"):
        gpt2.main("x", count, "124M", "nowhere")  # before anything is downloaded


@pytest.mark.parametrize(("n_prompt", "count"), [(4, 13), (16, 1), (0, 1), (17, 0)])
def test_more_than_the_context_or_nothing_to_go_on_from_is_an_error(small, n_prompt, count):
    params, n_head, ids = small
    words = f"^{n_prompt} tokens of prompt, {n_prompt + count} with .*: the context takes 1 to 16"
    with pytest.raises(ValueError, match=words):
        generate((ids + ids)[:n_prompt], params, n_head, count)


def test_no_tokens_are_generated_where_none_are_asked_for(small):
    params, n_head, ids = small
    assert generate(ids, params, n_head, 0) == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_each_function_works_where_only_numpy_and_what_it_names_are(function, small, bundled):
    """Paste it, and those it names, into an empty namespace, and compare."""
    params, n_head, ids = small
    block = params["blocks"][0]
    x = params["wpe"]
    q = x.reshape(16, 3, 4).swapaxes(0, 1)
    arguments = {
        "gelu": (x,),
        "softmax": (x,),
        "layer_norm": (x, *block["ln_1"].values()),
        "linear": (x, *block["attn"]["c_attn"].values()),
        "ffn": (x, *block["mlp"].values()),
        "attention": (q, q, q, (1 - np.tri(16)) * -1e10),
        "mha": (x, *block["attn"].values(), n_head),
        "transformer_block": (
            x, block["mlp"], block["attn"], block["ln_1"], block["ln_2"], n_head,
        ),
        "gpt2": (ids, *(params[name] for name in ("wte", "wpe", "blocks", "ln_f")), n_head),
        "whole_number": ("12",),
        "generate": (ids[:5], params, n_head, 3),
        "main": ("ROMEO:", 3, "1M", str(huggingface.RECORDED.parents[1] / "models")),
    }[function.__name__]  # fmt: skip
    names, namespace = [function.__name__], {"np": np}
    for name in names:
        source = inspect.getsource(getattr(gpt2, name))
        exec(source, namespace)
        used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        names += [f.__name__ for f in FUNCTIONS if f.__name__ in used - set(names)]
    assert np.all(namespace[function.__name__](*arguments) == function(*arguments))


def test_the_file_has_sixty_lines_of_code_one_statement_each():
    source = inspect.getsource(gpt2)
    tree = ast.parse(source)
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {
        line for t in tokens if t.type not in blank for line in range(t.start[0], t.end[0] + 1)
    }
    code = lines - docstrings - {source.count("\n") + 1}
    statements = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert len(code) <= 60
    assert max(map(len, source.splitlines())) <= 100
    assert len(statements) == len(set(statements))


def test_numpy_is_the_only_import_at_the_top():
    imports = [n for n in ast.parse(inspect.getsource(gpt2)).body if isinstance(n, ast.Import)]
    assert [ast.unparse(n) for n in imports] == ["import numpy as np"]
