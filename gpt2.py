"""GPT-2 in sixty lines of NumPy, to read beside the tutorial "GPT in 60 Lines of NumPy".

GPT-2 reads a text as ids, the numbers of its tokens (words and parts of words), and scores every
token of its vocabulary as the next one. The sizes in the shapes below are:

    n_seq   how many tokens are read now           n_vocab  how many tokens there are, 50,257
    n_past  how many were read before them         n_head   how many heads attention has
    n_ctx   how many it can take in all, 1,024     d        how many numbers belong to one head,
    n_embd  how many numbers stand for a token              n_embd / n_head

The parameters are nested dicts of arrays, named as in OpenAI's checkpoints; two asterisks make the
entries of a dict arguments: `layer_norm(x, **ln_f)` is `layer_norm(x, g=..., b=...)`. A function
needs NumPy and those it names; with `import jax.numpy as np` for the next import, all run on JAX.
"""

import numpy as np


def gelu(x):
    """Keep positive numbers and hold back negative ones: the Gaussian error linear unit.

    The tanh formula is that of Hendrycks and Gimpel (2016) and OpenAI's code; a power is slower.

    >>> gelu(np.array([-2.0, 0.0, 2.0])).round(4)
    array([-0.0454,  0.    ,  1.9546])
    """
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def softmax(x):
    """Turn each row of scores `[..., n]` into probabilities, or weights: positive, and 1 in sum.

    Less the largest of its row, no score overflows in `exp`, and the result is the same.

    >>> softmax(np.array([1000.0, 1000.0, -1e10]))
    array([0.5, 0.5, 0. ])
    """
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    exp_x /= np.sum(exp_x, axis=-1, keepdims=True)
    return exp_x


def layer_norm(x, g, b, eps=1e-5):
    """Bring each row of `x` `[..., n_embd]` to mean 0 and variance 1; multiply by `g`, add `b`.

    So the next layer finds its input in the same range, however large `x` has grown. Gain `g` and
    bias `b` are learnt; `eps`, 1e-5 in OpenAI's code, prevents a division by zero.

    >>> layer_norm(np.array([[1.0, 2.0, 3.0]]), g=np.ones(3), b=np.zeros(3)).round(3)
    array([[-1.225,  0.   ,  1.225]])
    """
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    return g * centred / np.sqrt(variance + eps) + b


def linear(x, w, b):
    """Multiply by weights and add a bias: `[n_seq, n_in] @ [n_in, n_out] + [n_out]`."""
    return x @ w + b


def ffn(x, c_fc, c_proj):
    """Work on each position by itself: `[n_seq, n_embd] -> [n_seq, 4*n_embd] -> [n_seq, n_embd]`.

    Between the two projections stands `gelu`: without it, they would be no more than one.
    """
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask):
    """Give each query the average of the values, weighted by how well their keys match the query.

    Queries `q` are `[..., n_q, d]`, keys `k` and values `v` `[..., n_k, d]`; the mask `[n_q, n_k]`
    is 0 where a query may look, else hugely negative. The scores `[..., n_q, n_k]` are sums of d
    products, which grow like the root of d: undivided, they would give one key nearly all weight.
    """
    scores = (q / q.shape[-1] ** 0.5) @ k.swapaxes(-1, -2) + mask
    return softmax(scores) @ v


def mha(x, c_attn, c_proj, n_head, kv=None):
    """Let each position of `x` `[n_seq, n_embd]` gather from itself and those before it.

    Each head attends with its own d columns of queries, keys and values, so that it can look for
    something of its own. If `n_past` positions were read before, `kv` `[2, n_head, n_past + n_seq,
    d]` holds their keys and values, which no later position can change; those of `x` go to its end.
    """
    n_seq, n_embd = x.shape
    n_past = 0 if kv is None else kv.shape[2] - n_seq
    # [n_seq, 3*n_embd] -> [n_seq, 3, n_head, d] -> [3, n_head, n_seq, d]: queries, keys, values
    qkv = linear(x, **c_attn).reshape(n_seq, 3, n_head, -1).transpose(1, 2, 0, 3)
    if kv is None:
        kv = qkv[1:]
    else:
        kv[:, :, n_past:] = qkv[1:]
    # 0 up to a query's own position, then -1e10 as in OpenAI's code: infinity * 0 is not a number.
    mask = (np.tri(n_seq, n_past + n_seq, n_past, dtype=x.dtype) - 1) * 1e10
    heads = attention(qkv[0], *kv, mask)  # [n_head, n_seq, d]
    return linear(heads.swapaxes(0, 1).reshape(n_seq, n_embd), **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kv=None):
    """Add to `x` `[n_seq, n_embd]` what attention finds, then what the feed-forward makes of it.

    It only adds, so that what earlier blocks found stays in `x`, and in training the gradient finds
    its way back. The norm, too, changes only what each part reads; in GPT-1 it came after the sum.
    """
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv=kv)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None):
    """Return logits `[n_seq, n_vocab]`, the scores of every token to come after each of `inputs`.

    The weights of token embeddings, `wte` `[n_vocab, n_embd]`, have a row for each token, those of
    position embeddings, `wpe` `[n_ctx, n_embd]`, one for each place, since attention alone sees no
    order. At the end `wte` is used again: a token scores by how well its row matches the result.
    With a cache `[n_layer, 2, n_head, n_past + n_seq, d]`, a `kv` for each block, `inputs` follow
    the `n_past` tokens in it, and only the last position's logits `[1, n_vocab]` come back.
    """
    n_past = 0 if cache is None else cache.shape[3] - len(inputs)
    x = np.take(wte, np.asarray(inputs), axis=0) + wpe[n_past : n_past + len(inputs)]
    for i, block in enumerate(blocks):
        x = transformer_block(x, **block, n_head=n_head, kv=None if cache is None else cache[i])
    return layer_norm(x if cache is None else x[-1:], **ln_f) @ wte.T


def sample(logits, random, temperature=1.0, top_k=None, top_p=1.0):
    """Draw an id by the probabilities that one position's logits `[n_vocab]` stand for.

    A temperature below 1 favours the likely ones. Only the `top_k` likeliest take part, of them the
    fewest that together reach `top_p`. `random` is a generator, such as `np.random.default_rng()`.
    """
    if not (temperature > 0 and 0 <= top_p <= 1 and (top_k is None or top_k >= 1)):
        raise ValueError("temperature must be above 0, top_k 1 or more, and top_p from 0 to 1")
    ids = np.argsort(-logits)[:top_k]
    reached = np.cumsum(softmax(logits[ids] / temperature), dtype=float)
    kept = reached[: 1 + np.sum(reached[:-1] < top_p)]
    return int(ids[np.searchsorted(kept, random.random() * kept[-1], side="right")])


def stream(inputs, params, n_head, pick=np.argmax, n_tokens_to_generate=None):
    """Yield the ids that follow `inputs`, each as soon as `pick` has chosen it by its logits.

    The first step reads the prompt, each later one a single token, since the cache keeps the keys
    and values of those before; a slice of it is a view, into which `mha` writes. It ends when the
    context is full. Raises ValueError if the prompt is empty, or too long with the new tokens.
    """
    from numpy import empty  # NumPy's on JAX too, whose arrays cannot be written into

    n_ctx, n_embd = params["wpe"].shape
    n_total = n_ctx if n_tokens_to_generate is None else len(inputs) + n_tokens_to_generate
    if not len(inputs) or n_total not in range(len(inputs), n_ctx + 1):
        why = f"{len(inputs)} tokens of prompt, {n_total} with new: the context takes 1 to {n_ctx}"
        raise ValueError(why if len(inputs) else "the prompt is empty: it takes at least one id")
    cache = empty((len(params["blocks"]), 2, n_head, n_total, n_embd // n_head), np.float32)
    new_ids = inputs
    for n_known in range(len(inputs), n_total):
        logits = gpt2(new_ids, **params, n_head=n_head, cache=cache[:, :, :, :n_known])
        new_ids = [int(pick(logits[-1]))]
        yield new_ids[0]


def generate(inputs, params, n_head, n_tokens_to_generate, pick=np.argmax):
    """Return the list of ids that follow `inputs`, the likeliest ones if `pick` is left out."""
    return list(stream(inputs, params, n_head, pick, n_tokens_to_generate))


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir="models", temperature=0,
         top_k=None, top_p=1.0, seed=None, *, show=str):  # fmt: skip
    """Continue a prompt with GPT-2, and return the text that it writes.

    Args:
        prompt: the text to go on from, "" for a new one; without it or for -, standard input
        n_tokens_to_generate: how many tokens to add, of about four letters each
        model_size: 124M, 355M, 774M or 1558M, or a folder in models_dir, such as the bundled 1M
        models_dir: where models are, and where a published one is downloaded to
        temperature: 0 takes the likeliest token each time; above 0 draws, 1 as the model learnt
        top_k: draw from this many of the likeliest tokens only
        top_p: draw from the likeliest tokens that together have this probability
        seed: a whole number, which draws the same text again
        show: from Python, called with each piece of text as soon as it is found
    """
    from utils import load_encoder_hparams_and_params, picker, whole_number

    n_new = whole_number("n_tokens_to_generate", n_tokens_to_generate)
    pick = picker(sample, temperature, top_k, top_p, seed)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    inputs = encoder.encode(prompt) or encoder.endoftext  # it stood before every text in training
    pieces = []
    for piece in encoder.decode_stream(stream(inputs, params, hparams["n_head"], pick, n_new)):
        show(piece)
        pieces.append(piece)
    return "".join(pieces)


if __name__ == "__main__":
    from utils import command_line

    command_line(main)
