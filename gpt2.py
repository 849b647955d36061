"""GPT-2 in sixty lines of NumPy, to read beside the tutorial "GPT in 60 Lines of NumPy".

GPT-2 reads a text as ids, the numbers of its tokens (words and parts of words), and scores every
token of its vocabulary as the next one. The sizes in the shapes below, with those of OpenAI's 124M:

    n_seq   how many tokens are read now           n_vocab  how many tokens there are, 50,257
    n_past  how many were read before them         n_layer  how many blocks there are, 12
    n_ctx   how many it can take in all, 1,024     n_head   how many heads a block has, 12
    n_embd  how many numbers stand for one, 768    d        one head's share, n_embd / n_head

The parameters are nested dicts and lists of arrays, named as in OpenAI's checkpoints. `**` passes a
dict's entries by name: `layer_norm(x, **ln_f)` is `layer_norm(x, g=..., b=...)`. A function needs
NumPy and the functions it calls; with `import jax.numpy as np` below instead, all run on JAX.
"""

import numpy as np


def gelu(x):
    """Keep large positive numbers, turn large negative ones into 0: the Gaussian error linear unit.

    A tanh approximates it, as in Hendrycks and Gimpel (2016) and OpenAI's code; `x**3` is slower.

    >>> gelu(np.array([-2.0, 0.0, 2.0])).round(4)
    array([-0.0454,  0.    ,  1.9546])
    """
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def softmax(x):
    """Turn each row of scores `[..., n]` into probabilities, or weights: none below 0, 1 in sum.

    The largest of a row is taken away first, so that `exp` cannot overflow; it cancels out.

    >>> softmax(np.array([1000.0, 1000.0, -1e10]))
    array([0.5, 0.5, 0. ])
    """
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    exp_x /= np.sum(exp_x, axis=-1, keepdims=True)
    return exp_x


def layer_norm(x, g, b, eps=1e-5):
    """Bring each row of `x` `[..., n_embd]` to mean 0 and variance 1; multiply by `g`, add `b`.

    So the next layer finds its input in the same range, however large `x` has grown. Gain `g` and
    bias `b` are learnt; `eps`, as in OpenAI's code, prevents a division by zero.

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

    Without `gelu`, `c_fc` (fully connected) and `c_proj` (projection) would act as one matrix.
    """
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask):
    """Give each query the average of the values, weighted by how well their keys match the query.

    Queries `q` are `[..., n_q, d]`, keys `k` and values `v` `[..., n_k, d]`. The scores `[..., n_q,
    n_k]`, sums of d products, grow with the root of d: undivided, they would give one key almost
    all weight. The mask `[n_q, n_k]` is 0, or so negative that the weight of a key becomes 0.
    """
    scores = (q / q.shape[-1] ** 0.5) @ k.swapaxes(-1, -2) + mask
    return softmax(scores) @ v


def mha(x, c_attn, c_proj, n_head, kv=None):
    """Multi-head attention: let each position of `x` `[n_seq, n_embd]` see those up to itself.

    Each head attends with its own d columns of queries, keys and values; `c_proj` mixes what all
    found. A `kv` `[2, n_head, n_past + n_seq, d]` begins with the keys and values of positions read
    before, if any, which stay valid because none of them looks ahead; those of `x` go after them.
    """
    n_seq, n_embd = x.shape
    n_past = 0 if kv is None else kv.shape[2] - n_seq
    # [n_seq, 3*n_embd] -> [n_seq, 3, n_head, d] -> [3, n_head, n_seq, d]: queries, keys, values
    qkv = linear(x, **c_attn).reshape(n_seq, 3, n_head, -1).transpose(1, 2, 0, 3)
    if kv is None:
        kv = qkv[1:]
    else:
        kv[:, :, n_past:] = qkv[1:]
    # 0 up to a query's own position, then -1e10, as in OpenAI's code: 0 * infinity would be NaN.
    mask = (np.tri(n_seq, n_past + n_seq, n_past, dtype=x.dtype) - 1) * 1e10
    heads = attention(qkv[0], kv[0], kv[1], mask)  # [n_head, n_seq, d]
    return linear(heads.swapaxes(0, 1).reshape(n_seq, n_embd), **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kv=None):
    """Add to `x` `[n_seq, n_embd]` what `attn` finds, and then what `mlp`, the feed-forward, finds.

    It only adds, so that what earlier blocks found stays in `x`, and in training the gradient finds
    its way back. Norms come before each part: after the sum, as in GPT-1, they would rescale it.
    """
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv=kv)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None):
    """Return logits `[n_seq, n_vocab]`: after each of the ids `inputs`, each next token's score.

    `wte` `[n_vocab, n_embd]` and `wpe` `[n_ctx, n_embd]` (weights of token and position embeddings)
    say what each token and each position is like; an average alone knows no order. `wte` serves
    again at the end: a token's score is the product of its row with what the blocks made of `x`.
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

    A temperature below 1 favours likely ids, one above 1 levels all. Of the `top_k` likeliest, only
    the fewest that together reach `top_p` can be drawn. `random` is NumPy's `default_rng()`, say.
    """
    if not (temperature > 0 and 0 <= top_p <= 1 and (top_k is None or top_k >= 1)):
        raise ValueError("temperature must be above 0, top_k 1 or more, and top_p from 0 to 1")
    ids = np.argsort(-logits)[:top_k]  # the likeliest first
    reached = np.cumsum(softmax(logits[ids] / temperature), dtype=float)
    kept = reached[: 1 + np.sum(reached < top_p)]  # up to the first that reaches top_p
    return int(ids[np.searchsorted(kept, random.random() * kept[-1], side="right")])


def stream(inputs, params, n_head, pick=np.argmax, n_tokens_to_generate=None):
    """Yield the ids that follow `inputs`, one by one, as `pick` chooses them by logits `[n_vocab]`.

    The first step reads the prompt, each later one a single token, since the cache keeps the keys
    and values of those before; a slice of it is a view, into which `mha` writes. By default it
    fills the context. Raises ValueError if the prompt is empty, or too long with the new tokens.
    """
    from numpy import empty  # even on JAX, whose own arrays cannot be written into

    n_ctx, n_embd = params["wpe"].shape
    n_total = n_ctx if n_tokens_to_generate is None else len(inputs) + n_tokens_to_generate
    if not len(inputs) or n_total not in range(len(inputs), n_ctx + 1):
        why = f"{len(inputs)} tokens of prompt, {n_total} with new: the context takes 1 to {n_ctx}"
        raise ValueError(why if len(inputs) else "the prompt is empty: it takes at least one id")
    cache = empty((len(params["blocks"]), 2, n_head, n_total, n_embd // n_head), np.float32)
    unread = inputs
    for n_known in range(len(inputs), n_total):
        logits = gpt2(unread, **params, n_head=n_head, cache=cache[:, :, :, :n_known])
        unread = [int(pick(logits[-1]))]
        yield unread[0]


def generate(inputs, params, n_head, n_tokens_to_generate, pick=np.argmax):
    """Return the list of ids that follow `inputs`, each time the likeliest without a `pick`."""
    return list(stream(inputs, params, n_head, pick, n_tokens_to_generate))


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir="models", temperature=0,
         top_k=None, top_p=1.0, seed=None, *, show=str):  # fmt: skip
    """Continue a prompt with GPT-2, and return the text that it writes.

    Args:
        prompt: the text to go on from, "" for a new one; in a shell, none or - is standard input
        n_tokens_to_generate: how many tokens to add, of about four letters each
        model_size: 124M, 355M, 774M or 1558M, or a folder in models_dir, such as the bundled 1M
        models_dir: where models are, and where a published one is downloaded to
        temperature: 0 takes the likeliest token each time; above 0 draws, 1 as the model learnt
        top_k: where it draws, from this many of the likeliest tokens only
        top_p: where it draws, from the likeliest tokens that together have this probability
        seed: a whole number, for drawing the same text at each run
        show: from Python, called with each piece of text as it is found
    """
    from utils import load_encoder_hparams_and_params, picker, whole_number

    n_new = whole_number("n_tokens_to_generate", n_tokens_to_generate)
    pick = picker(sample, temperature, top_k, top_p, seed)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    inputs = encoder.encode(prompt) or encoder.endoftext  # which stood between texts in training
    pieces = []
    for piece in encoder.decode_stream(stream(inputs, params, hparams["n_head"], pick, n_new)):
        show(piece)
        pieces.append(piece)
    return "".join(pieces)


if __name__ == "__main__":
    from utils import command_line

    command_line(main)
