"""The model: equal to Hugging Face's, to loops that can be checked by eye, and to itself."""

import ast
import copy
import functools
import inspect
import io
import tokenize
import warnings
from types import SimpleNamespace

import huggingface
import numpy as np
import pytest

import gpt2
from gpt2 import attention, generate, sample, stream

FUNCTIONS = [function for _, function in inspect.getmembers(gpt2, inspect.isfunction)]


@pytest.fixture(scope="module")
def small():
    """Parameters, head count and ids of a small random model, its context of 16 filled."""
    hparams, params, _, ids = huggingface.random_model(40, 16, 12, 3, 2, 16)
    return params, hparams["n_head"], ids.tolist()


@pytest.mark.parametrize("model", huggingface.MODELS, ids=str)
def test_logits_are_those_of_hugging_face_in_float32(model):
    hparams, params, _, ids = huggingface.random_model(*model)
    logits = gpt2.gpt2(ids, **params, n_head=hparams["n_head"])
    np.testing.assert_allclose(logits, np.load(huggingface.RECORDED)[str(model)], atol=1e-5)
    assert logits.dtype == np.float32


def test_a_later_token_changes_no_earlier_logit(small):
    params, n_head, ids = small
    logits = gpt2.gpt2(ids, **params, n_head=n_head)
    for position in range(len(ids)):
        changed = ids.copy()
        changed[position] = (ids[position] + 1) % 40
        after = gpt2.gpt2(changed, **params, n_head=n_head)
        same = np.isclose(after, logits, atol=1e-6).all(axis=-1)
        assert same.tolist() == [True] * position + [False] * (len(ids) - position)


def sampler(seed=0):
    """Sample at a temperature where all ids are likely, so that any change of the logits shows."""
    return functools.partial(sample, random=np.random.default_rng(seed), temperature=3.0)


@pytest.mark.parametrize("n, kind", [(1, np.array), (7, tuple), (15, list), (16, list)])
def test_generate_equals_the_plain_loop_up_to_the_last_position(small, n, kind):
    params, n_head, ids = small
    looped, pick = ids[:n], sampler()
    while len(looped) < 16:
        looped.append(pick(gpt2.gpt2(looped, **params, n_head=n_head)[-1]))
    new = generate(kind(ids[:n]), params, n_head, 16 - n, sampler())
    assert new == looped[n:]
    assert len(set(looped)) > 8  # The text does not repeat itself.


def test_a_stream_fills_the_context_one_step_at_a_time(small, monkeypatch):
    params, n_head, ids = small
    steps, step = [], gpt2.gpt2
    monkeypatch.setattr(gpt2, "gpt2", lambda ids, **kw: steps.append(len(ids)) or step(ids, **kw))
    new = stream(ids[:9], params, n_head, sampler())
    first = [next(new), next(new)]
    assert steps == [9, 1]
    assert first + list(new) == generate(ids[:9], params, n_head, 7, sampler())


def test_generate_is_greedy_by_default(small):
    params, n_head, ids = small
    new = generate(ids[:4], params, n_head, 12)
    logits = gpt2.gpt2(ids[:4] + new, **params, n_head=n_head)[3:-1]
    assert new == list(stream(ids[:4], params, n_head)) == logits.argmax(axis=-1).tolist()
    assert {type(id) for id in new} == {int}


def test_a_cache_gives_the_last_logits_for_every_split_of_the_ids(small):
    params, n_head, ids = small
    logits = gpt2.gpt2(ids, **params, n_head=n_head)
    for n_first in range(1, 16):
        cache = np.full((2, 2, n_head, 16, 4), np.nan, np.float32)
        first = gpt2.gpt2(ids[:n_first], **params, n_head=n_head, cache=cache[:, :, :, :n_first])
        rest = gpt2.gpt2(ids[n_first:], **params, n_head=n_head, cache=cache)
        np.testing.assert_allclose([first[0], rest[0]], logits[[n_first - 1, -1]], atol=1e-5)


def test_attention_takes_one_head_or_any_number_of_heads(small):
    random = np.random.RandomState(0)
    q, k, v = random.normal(size=(3, 2, 5, 6, 4))
    mask = (1 - np.tri(6)) * -1e10
    together = attention(q, k, v, mask)
    assert together.shape == (2, 5, 6, 4)
    for i, j in np.ndindex(2, 5):
        np.testing.assert_allclose(together[i, j], attention(q[i, j], k[i, j], v[i, j], mask))
    np.testing.assert_allclose(together[:, :, 0], v[:, :, 0])  # The first sees one key alone.


def test_large_activations_give_no_warning_and_no_nan(small):
    params, n_head, ids = small
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        huge = params | {"wte": params["wte"] * 1e4, "wpe": params["wpe"] * 1e-4}
        assert np.isfinite(gpt2.gpt2(ids, **huge, n_head=n_head)).all()
        assert gpt2.gelu(np.float32([-1e4, 1e4])).tolist() == [0, 1e4]


@pytest.mark.parametrize(("n_prompt", "count"), [(4, 13), (16, 1), (4, -1), (4, 1.5), (17, 0)])
def test_a_count_that_does_not_fit_into_the_context_is_an_error(small, n_prompt, count):
    params, n_head, ids = small
    with pytest.raises(ValueError, match="and 0 or more new tokens must fit into 16 tokens"):
        generate((ids + ids)[:n_prompt], params, n_head, count)


@pytest.mark.parametrize("inputs", [[], (), np.array([], int), [40], [3, -1]], ids=str)
def test_an_empty_prompt_or_an_id_without_a_row_is_an_error(small, inputs):
    params, n_head, _ = small
    with pytest.raises(ValueError, match=r"^The prompt is empty, or it has an id without a row"):
        generate(inputs, params, n_head, 1)


@pytest.mark.parametrize("warp", huggingface.WARPS, ids=str)
def test_limits_give_the_probabilities_of_hugging_faces_warpers(warp):
    recorded = np.load(huggingface.RECORDED)
    limits = dict(zip(("temperature", "top_k", "top_p"), warp, strict=True))
    for logits, expected in zip(recorded["warped from"], recorded[f"warped {warp}"], strict=True):
        evenly = SimpleNamespace(random=iter((np.arange(10_000) + 0.5) / 10_000).__next__)
        sampled = [sample(logits, evenly, **limits) for _ in range(10_000)]
        shares = np.bincount(sampled, minlength=len(logits)) / 10_000
        np.testing.assert_allclose(shares, expected, atol=2e-4)


LIMITS = [{"temperature": temperature} for temperature in (0, -1.0, np.nan)]
LIMITS += [{"top_k": 0}, {"top_k": -2}, {"top_p": -0.1}, {"top_p": 1.1}, {"top_p": np.nan}]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_limits_out_of_range_are_an_error(limits):
    with pytest.raises(ValueError, match="temperature must be above 0, top_k 1 or more"):
        sample(np.float32([2.0, -1.0, 0.5]), np.random.default_rng(0), **limits)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_pasted_function_needs_only_numpy_and_the_functions_that_it_calls(function):
    names = {name for name in function.__code__.co_names if hasattr(gpt2, name)}
    assert names <= {"np", *(f.__name__ for f in FUNCTIONS)}


def test_no_function_changes_an_argument(small):
    params, n_head, ids = small
    before = copy.deepcopy((params, ids))
    generate(ids[:5], params, n_head, 11, sampler())
    gpt2.gpt2(ids, **params, n_head=n_head)
    np.testing.assert_equal((params, ids), before)
    x = params["wpe"].copy()
    for function in (gpt2.gelu, gpt2.softmax, lambda x: sample(x[0], np.random.default_rng())):
        function(x)
    np.testing.assert_array_equal(x, params["wpe"])


def test_the_file_has_sixty_lines_of_code_with_one_statement_each():
    """They run from the import to the end of `generate`; `main` and the entry come after them."""
    source = inspect.getsource(gpt2)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    kinds = (tokenize.NAME, tokenize.NUMBER, tokenize.OP)  # no blanks, comments and docstrings
    code = {token.start[0] for token in tokens if token.type in kinds}
    main = source[: source.index("def main(")].count("\n") + 1
    statements = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
    assert source.index("def generate(") == source.rindex("def ", 0, source.index("def main("))
    assert sum(line < main for line in code) <= 60
    assert sum(line >= main for line in code) <= 19
    assert source.count("\n") <= 300
    assert max(map(len, source.splitlines())) <= 100
    assert len(statements) == len(set(statements))


def test_main_shows_each_piece_and_returns_the_whole_text(capfd):
    assert gpt2.main.__defaults__[:2] == (40, "124M") and {*gpt2.main.__defaults__[2:]} == {None}
    pieces = []
    text = gpt2.main("But, soft!", 12, "1M", show=pieces.append)
    assert "".join(pieces) == text == gpt2.main("But, soft!", 12, "1M")
    assert len(pieces) == 13 and capfd.readouterr() == ("", "")  # The last piece is empty.
