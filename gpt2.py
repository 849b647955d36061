"""GPT-2 in sixty lines of NumPy, to read beside the tutorial "GPT in 60 Lines of NumPy".

GPT-2 continues a text. It reads the text as tokens: words, parts of words and punctuation marks,
often with the space before them, and parts of rare characters. "Hello, world!" is "Hello", ",",
" world" and "!". Every token in the vocabulary of the model has a number, its id. Here the ids are
15496, 11, 995 and 0. For a list of ids, the model returns logits: scores that say how well each
token would fit next. `stream` picks a token by these scores, adds it to the text, and goes on.

Inside the model, each token is a row of numbers. The rows form an array `x`, the residual stream,
which runs through all blocks. A block only adds to `x`, and what it adds is called a residual. At
first, a row says which token it stands for and at which position. In each block, attention adds to
each row what it finds in that row and in the rows before. Then a feed-forward network adds what it
computes from each row alone. In the end, each row describes the token that should come after its
own. The sizes in 124M, the smallest GPT-2:

    n_vocab  tokens in the vocabulary                                50,257
    n_ctx    the context: the most tokens that a text can have       1,024
    n_embd   numbers in the row of a token                           768
    n_layer  blocks                                                  12
    n_head   attention heads in each block                           12
    d        numbers in a head's query, key or value (see `mha`)     64, n_embd / n_head

The parameters are the numbers that training has found, 124 million of them in 124M. They are nested
dicts and lists of arrays, named as in OpenAI's checkpoints: `wte` and `wpe` (the token and position
embeddings: a row for each id or position), `ln_f` (the final layer norm), and, in each of `blocks`:

    attn  c_attn  w [n_embd, 3*n_embd]  b [3*n_embd]    makes queries, keys and values
          c_proj  w [n_embd, n_embd]    b [n_embd]      projection: mixes what the heads found
    mlp   c_fc    w [n_embd, 4*n_embd]  b [4*n_embd]    fully connected: widens each row
          c_proj  w [4*n_embd, n_embd]  b [n_embd]      projection: narrows it again
    ln_1, ln_2    g [n_embd]            b [n_embd]      layer norms before `attn` and before `mlp`

`attn` goes to the function `mha`, and `mlp` (multi-layer perceptron) to `ffn`. `linear(x, **c_fc)`
means `linear(x, w=c_fc["w"], b=c_fc["b"])`. `stream` reads the whole prompt in its first step, and
one new token in each later step. A cache keeps, for each block, the key and the value of each token
read before. In 124M, with a prompt of 7 tokens (from `q` to the scores, see `attention` and `mha`):

                                        step 1          step 2
    n_past, the tokens read before      0               7
    n_seq, the tokens read now          7               1
    n_k, the keys, n_past + n_seq       7               8
    inputs                              7 ids           1 id
    x, the residual stream              [7, 768]        [1, 768]
    q, in one block, for 12 heads       [12, 7, 64]     [12, 1, 64]
    k and v, with those in the cache    [12, 7, 64]     [12, 8, 64]
    scores, each query with each key    [12, 7, 7]      [12, 1, 8]
    logits, after the last token only   [1, 50257]      [1, 50257]

The sixty lines are the code before `main`, without docstrings and comments. They also run on JAX,
with `import jax.numpy as np` in place of the line below: see examples/README.md.
"""

import numpy as np

# --- Layers: each of these functions treats each row by itself ---


def gelu(x):
    """Keep large positive numbers, and turn large negative numbers into almost 0.

    The Gaussian error linear unit is a smooth form of `np.maximum(x, 0)`. The formula with tanh is
    Hendrycks and Gimpel's approximation (2016), as in OpenAI's code. NumPy computes squares fast,
    but all higher powers slowly, so `x * x * x` stands for `x**3`.

    >>> gelu(np.array([-2.0, 0.0, 2.0])).round(4)
    array([-0.0454,  0.    ,  1.9546])
    """
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def softmax(x):
    """Turn each row of scores `[..., n]` into probabilities: numbers from 0 to 1 that add up to 1.

    >>> softmax(np.array([1000.0, 1000.0, -1e10]))
    array([0.5, 0.5, 0. ])
    """
    # Subtracting the largest score prevents overflow in `exp` and does not change the result.
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exp_x / np.sum(exp_x, axis=-1, keepdims=True)


def layer_norm(x, g, b, eps=1e-5):
    """Bring each row of `x` `[..., n_embd]` to mean 0 and variance 1, multiply by `g`, and add `b`.

    "Norm" means normalisation here, not the length of a vector. However large `x` has grown, the
    next layer gets numbers of one scale. `g` is the gain, `b` the bias. `eps` prevents 0 / 0.

    >>> layer_norm(np.array([[1.0, 2.0, 3.0]]), g=np.ones(3), b=np.zeros(3)).round(3)
    array([[-1.225,  0.   ,  1.225]])
    """
    centred = x - np.mean(x, axis=-1, keepdims=True)
    return g * centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps) + b


def linear(x, w, b):
    """Multiply by weights and add a bias: `[n_seq, n_in] @ [n_in, n_out] + [n_out]`."""
    return x @ w + b


def ffn(x, c_fc, c_proj):
    """Feed-forward network: widen each row of `x` `[n_seq, n_embd]`, bend it, and narrow it again.

    `gelu` does the bending. Without it, the two linear layers could do no more than one.
    """
    hidden = gelu(linear(x, **c_fc))  # [n_seq, 4*n_embd]
    return linear(hidden, **c_proj)


# --- The model: attention, the only place where rows meet, and the stack of blocks around it ---


def attention(q, k, v, mask):
    """For each query, return the average of the values, weighted by how well their keys match it.

    A Python dict returns the one value whose key equals the query. Attention is like a dict in
    which each key can match more or less. The score of a query and a key is their dot product,
    divided by the root of d. (A logit is a score too, but of a token.) Then `mask` is added: 0
    changes nothing, and -1e10 hides a key, because softmax gives it the weight 0.

    >>> k, v = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[10.0], [20.0]])
    >>> attention(np.array([[50.0, 0.0]]), k, v, mask=0.0)  # a large score with the first key only
    array([[10.]])
    >>> attention(np.array([[1.0, 1.0]]), k, v, mask=0.0)  # the same score with both keys
    array([[15.]])
    >>> attention(np.array([[1.0, 1.0]]), k, v, mask=np.array([[-1e10, 0.0]]))  # first key hidden
    array([[20.]])

    Shapes: `q` `[..., n_seq, d]`, `k` and `v` `[..., n_k, d]`, `mask` `[n_seq, n_k]`. A dot product
    is a sum of d products. If each is 1 or -1 at random, the sum, a random walk, typically ends
    about the root of d away from 0. Undivided, such sums would make softmax pick a key by chance.
    """
    scores = (q / q.shape[-1] ** 0.5) @ k.swapaxes(-1, -2) + mask  # [..., n_seq, n_k]
    return softmax(scores) @ v


def mha(x, c_attn, c_proj, n_head, kv=None):
    """Multi-head attention: each token of `x` `[n_seq, n_embd]` looks at itself and earlier ones.

    `c_attn` makes three vectors from each row. The query says what the token is looking for. The
    key says what the token offers. The value is what goes to the tokens whose query matches
    the key. For example, the query of a verb may look for its subject. Then the key of an
    earlier noun may match, and the noun's value goes to the verb.

    Each head is a separate attention. Each of the `n_head` heads gets a piece of d numbers of every
    vector, so that it can look for something of its own. `c_proj` mixes what all of them found.

    `kv` `[2, n_head, n_past + n_seq, d]` is this block's part of the cache. On its third axis, the
    keys and values of earlier tokens come first, and `mha` writes those of `x` after them. The
    earlier ones would not change if they were computed again, because no token sees a later one.
    """
    n_seq, n_embd = x.shape
    # [n_seq, 3*n_embd] -> [n_seq, 3, n_head, d] -> [3, n_head, n_seq, d]
    q, k, v = linear(x, **c_attn).reshape(n_seq, 3, n_head, -1).transpose(1, 2, 0, 3)
    if kv is not None:
        kv[:, :, -n_seq:] = k, v  # k into kv[0], v into kv[1]
        k, v = kv  # those of all tokens so far, [n_head, n_k, d] each
    # For three tokens, the mask is [[0, -1e10, -1e10], [0, 0, -1e10], [0, 0, 0]]: for each query, a
    # row with 0 for the keys of its own token and of all before. `np.tri` has 1 where the mask has
    # 0, and 0 elsewhere. Its third argument adds a 1 for each past token: for one new token after
    # 7, the mask is eight zeros. Infinity cannot replace 1e10: 0 times infinity is NaN.
    mask = (np.tri(n_seq, k.shape[1], k.shape[1] - n_seq, dtype=x.dtype) - 1) * 1e10
    heads = attention(q, k, v, mask)  # [n_head, n_seq, d]
    return linear(heads.swapaxes(0, 1).reshape(n_seq, n_embd), **c_proj)  # heads side by side


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kv=None):
    """Add to `x` `[n_seq, n_embd]` what attention finds, and then what `ffn` makes of the sum.

    Only what `mha` and `ffn` read is normalised. `x` itself is only added to, so later blocks can
    still use what earlier ones added. The first GPT normalised each sum, which makes training
    harder. Training sends the gradient, which says how the model's error changes with `x`, from the
    last block back to the first. An addition passes the gradient on unchanged. Normalising divides
    it by the sum's standard deviation, mostly above 1, each time: little reaches the first blocks.
    """
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv=kv)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None):
    """Return logits `[n_seq, n_vocab]`, but with a cache only the last row of them, `[1, n_vocab]`.

    Without a cache, row i scores each token of the vocabulary as the next one after
    `inputs[: i + 1]`. Training needs every row. Sampling needs only the last row.

    Each id picks its row of `wte` `[n_vocab, n_embd]`. The row of `wpe` `[n_ctx, n_embd]` for the
    token's position is added to it. Without positions, attention in the first block would find the
    same for a "." after "dog bites man" as after "man bites dog": an average has no order.

    The logit of a token is the dot product of its row of `wte` and the row of `x` that describes
    the token expected next. The better the two descriptions agree, the larger is the logit. So one
    `wte` serves both to read tokens and to score them. Large rows of `x` would make extreme logits,
    so `ln_f` first brings the rows to one scale.

    A `cache` `[n_layer, 2, n_head, n_past + n_seq, d]` has a `kv` for each block (see `mha`).
    """
    n_past, wanted, kvs = 0, slice(None), [None] * len(blocks)
    if cache is not None:
        n_past, wanted, kvs = cache.shape[3] - len(inputs), slice(-1, None), cache
    x = wte[np.asarray(inputs)] + wpe[n_past : n_past + len(inputs)]
    for block, kv in zip(blocks, kvs, strict=True):
        x = transformer_block(x, **block, n_head=n_head, kv=kv)
    return layer_norm(x[wanted], **ln_f) @ wte.T


# --- Generation: from logits to a token, and from token to token ---


def sample(logits, random, temperature=1.0, top_k=None, top_p=1.0):
    """Sample an id, by the probabilities that softmax makes of one row of logits `[n_vocab]`.

    First, only the `top_k` likeliest ids stay. Then their logits are divided by the temperature:
    below 1, likely ids become even likelier, and above 1, unlikely ids get more of a chance. After
    that, only the likeliest of these ids stay: the fewest whose probabilities add up to `top_p` or
    more, or one id if `top_p` is 0. `random` is a random generator of NumPy.

    >>> logits, random = np.array([1.0, 4.0, 3.0, 0.0]), np.random.default_rng(1)
    >>> [sample(logits, random, temperature=0.8, top_k=2) for _ in range(10)]
    [1, 2, 1, 2, 1, 1, 2, 1, 1, 1]
    """
    if not (temperature > 0 and 0 <= top_p <= 1 and (top_k is None or top_k >= 1)):
        raise ValueError("temperature must be above 0, top_k 1 or more, and top_p from 0 to 1")
    ids = np.argsort(-logits)[:top_k]  # the likeliest first
    # In float32, a tiny probability added to a sum near 1 is lost: its id is never sampled.
    totals = np.cumsum(softmax(logits[ids] / temperature), dtype=float)
    totals = totals[: 1 + np.sum(totals < top_p)]  # also the one that reaches top_p
    # `totals` cuts the line from 0 to `totals[-1]` into parts, one for each id, longer if likelier.
    # `argmax` finds the first True: the part that a random point falls into.
    return int(ids[np.argmax(totals > random.random() * totals[-1])])


def stream(inputs, params, n_head, pick=np.argmax, n_tokens_to_generate=None):
    """Yield the ids that follow `inputs`, one by one; by default until the context is full.

    `pick` gets the logits `[n_vocab]` and returns an id. The default is greedy: it takes the
    likeliest. With `random = np.random.default_rng()`, `lambda logits: sample(logits, random)`
    samples instead. The cache, 72 MiB for 1,024 tokens in 124M, saves reading tokens again.

    Raises ValueError, at the first `next`, if the prompt is empty or has an id without a row in
    `wte`, if `n_tokens_to_generate` is below 0, or if prompt and new tokens exceed the context.
    """
    from numpy import empty  # even on JAX, whose arrays cannot be written into

    n_ctx, n_embd = params["wpe"].shape
    n_total = n_ctx if n_tokens_to_generate is None else len(inputs) + n_tokens_to_generate
    if not len(inputs) or min(inputs) < 0 or max(inputs) >= len(params["wte"]):
        raise ValueError("The prompt is empty, or it has an id without a row in wte.")
    if n_total not in range(len(inputs), n_ctx + 1):
        raise ValueError(f"The prompt and 0 or more new tokens must fit into {n_ctx:,} tokens.")
    cache = empty((len(params["blocks"]), 2, n_head, n_total, n_embd // n_head), np.float32)
    for n_k in range(len(inputs), n_total):
        # This slice is a view of the cache, so what `mha` writes into it stays in the cache.
        logits = gpt2(inputs, **params, n_head=n_head, cache=cache[:, :, :, :n_k])
        id = int(pick(logits[-1]))
        yield id
        inputs = [id]  # the only token that the model has not read yet


def generate(inputs, params, n_head, n_tokens_to_generate, pick=np.argmax):
    """Return the list of ids that `stream` yields."""
    return list(stream(inputs, params, n_head, pick, n_tokens_to_generate))


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir=None,
         temperature=None, top_k=None, top_p=None, seed=None, *, show=lambda _: None):  # fmt: skip
    """Continue a prompt with GPT-2, and return the text that it writes.

    Args:
        prompt: the text to continue; "" starts a new text; in a shell, - reads standard input
        n_tokens_to_generate: the most tokens to add; in English, about four letters each
        model_size: 124M, 355M, 774M or 1558M, a folder in models_dir such as 1M, or another folder
        models_dir: by default, the folder models beside this program; downloads go into it
        temperature: with 0, take the likeliest token each time; above 0, sample; a higher number
            makes unlikely tokens likelier; by default 0, or 1 with --top_k, --top_p or --seed
        top_k: sample only from this many of the likeliest tokens
        top_p: sample from the fewest likeliest tokens whose probabilities reach this number
        seed: a whole number; the same seed gives the same text again
        show: in Python, called with each piece of text as it comes
    """
    from itertools import takewhile

    from command import encode_prompt, number, picker
    from utils import load_encoder_hparams_and_params

    n_new = number("n_tokens_to_generate", n_tokens_to_generate, int, 0)
    pick = picker(sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    inputs = encode_prompt(prompt, encoder, hparams, n_new)
    new = stream(inputs, params, hparams["n_head"], pick, n_new)
    ids = takewhile(lambda id: id not in encoder.eos, new)  # up to the end of a text
    pieces = []
    for piece in encoder.decode_stream(ids):  # which waits for all parts of a rare character
        show(piece)
        pieces.append(piece)
    return "".join(pieces)


if __name__ == "__main__":
    from command import command_line

    command_line(main)
