"""GPT-2 in sixty lines of NumPy, to read beside the tutorial "GPT in 60 Lines of NumPy".

Parameters are nested dicts of arrays, named as in OpenAI's checkpoints, so that `**` hands each
layer its own. Every function but `main` needs only NumPy and the functions it names; with
`import jax.numpy as np` in place of the next import, the same lines run, and train, on JAX.
"""

import numpy as np


def gelu(x):
    """Gaussian error linear unit, elementwise, by the tanh formula that GPT-2 was trained with.

    It is the approximation of Hendrycks and Gimpel (2016), section 2; `x * x * x` is much faster
    than a power.

    >>> gelu(np.array([-2.0, 0.0, 2.0])).round(4)
    array([-0.0454,  0.    ,  1.9546])
    """
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)))


def softmax(x):
    """Turn scores `[..., n]` into probabilities `[..., n]`; less the largest, no score overflows.

    >>> softmax(np.array([[1000.0, 1000.0], [0.0, -1e10]]))
    array([[0.5, 0.5],
           [1. , 0. ]])
    """
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exp_x / np.sum(exp_x, axis=-1, keepdims=True)


def layer_norm(x, g, b, eps=1e-5):
    """Scale each row of `x` `[..., n_embd]` to mean 0 and variance 1; multiply by `g`, add `b`.

    `eps`, 1e-5 in OpenAI's code, keeps a row of equal numbers from a division by zero.

    >>> layer_norm(np.array([[1.0, 2.0, 3.0]]), g=np.ones(3), b=np.zeros(3)).round(3)
    array([[-1.225,  0.   ,  1.225]])
    """
    x = x - np.mean(x, axis=-1, keepdims=True)
    return g * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) + b


def linear(x, w, b):
    """Project: `[n_seq, n_in] @ [n_in, n_out] + [n_out] -> [n_seq, n_out]`."""
    return x @ w + b


def ffn(x, c_fc, c_proj):
    """Feed each position forward: `[n_seq, n_embd] -> [n_seq, 4*n_embd] -> [n_seq, n_embd]`."""
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask):
    """Average the values for each query, weighted by how well each value's key matches the query.

    Queries `q` are `[..., n_q, d]`, keys `k` and values `v` `[..., n_k, d]`; the mask `[n_q, n_k]`
    is added to the scores, and the result is `[..., n_q, d]`.
    """
    return softmax((q / q.shape[-1] ** 0.5) @ k.swapaxes(-1, -2) + mask) @ v


def mha(x, c_attn, c_proj, n_head, kv=None):
    """Let each position attend to itself and those before it, in all heads at once.

    `x` and the result are `[n_seq, n_embd]`; a head has `d = n_embd / n_head` of the columns. `kv`
    `[2, n_head, n_past + n_seq, d]` holds the keys and values of `n_past` earlier positions, and
    those of `x` are written to its end.
    """
    n_seq = len(x)
    # [n_seq, 3*n_embd] -> [n_seq, 3, n_head, d] -> three times [n_head, n_seq, d]
    q, k, v = linear(x, **c_attn).reshape(n_seq, 3, n_head, -1).transpose(1, 2, 0, 3)
    if kv is not None:
        kv[0, :, -n_seq:], kv[1, :, -n_seq:] = k, v
        k, v = kv
    # [n_seq, n_past + n_seq]: 1e10, as in OpenAI's code, makes a later position's probability 0.
    mask = (np.tri(n_seq, k.shape[1], k.shape[1] - n_seq, dtype=x.dtype) - 1) * 1e10
    heads = attention(q, k, v, mask)  # [n_head, n_seq, d]
    return linear(heads.swapaxes(0, 1).reshape(x.shape), **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kv=None):
    """Add to `x` `[n_seq, n_embd]` what attention finds, then what the feed-forward makes of it."""
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv=kv)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None):
    """Return logits `[n_seq, n_vocab]`: how likely, after each of the ids `inputs`, each token is.

    With a cache `[n_layer, 2, n_head, n_past + n_seq, d]`, filled up to `n_past`, `inputs` go on
    from there, and only the last position's logits `[1, n_vocab]` come back.
    """
    n_past = 0 if cache is None else cache.shape[3] - len(inputs)
    x = np.take(wte, np.asarray(inputs), axis=0) + wpe[n_past : n_past + len(inputs)]
    for i, block in enumerate(blocks):
        x = transformer_block(x, **block, n_head=n_head, kv=None if cache is None else cache[i])
    return layer_norm(x if cache is None else x[-1:], **ln_f) @ wte.T


def whole_number(n):
    """Read a count of tokens, which may be text; raises ValueError if it is not 0, 1, 2 ..."""
    if not str(n).isdecimal():
        raise ValueError(f"n_tokens_to_generate must be a whole number, 0 or more, not {n!r}")
    return int(n)


def generate(inputs, params, n_head, n_tokens_to_generate):
    """Continue the ids `inputs` greedily: return the ids of the likeliest tokens, one by one.

    The first step reads the prompt, each later one a single token: the cache keeps what attention
    needs of those before. Raises ValueError if there is no prompt, or if prompt and new tokens
    together do not fit into the context, `n_ctx`.
    """
    from numpy import empty  # NumPy's even on JAX, whose arrays cannot be written to

    n_ctx, n_embd = params["wpe"].shape
    n_total = len(inputs) + whole_number(n_tokens_to_generate)
    if not 1 <= len(inputs) <= n_total <= n_ctx:
        fault = f"{len(inputs)} tokens of prompt, {n_total} with the new ones"
        raise ValueError(f"{fault}: the context takes 1 to {n_ctx}, so shorten one or the other")
    cache = empty((len(params["blocks"]), 2, n_head, n_total, n_embd // n_head), np.float32)
    step, outputs = list(inputs), []
    for n_seen in range(len(inputs), n_total):
        logits = gpt2(step, **params, n_head=n_head, cache=cache[:, :, :, :n_seen])
        step = [int(np.argmax(logits[-1]))]
        outputs += step
    return outputs


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir="models"):
    """Continue a prompt with GPT-2's likeliest tokens.

    Args:
        prompt: the text to go on from, "" for a new one; if it begins with a dash, --prompt="-..."
        n_tokens_to_generate: how many tokens to add, of about four letters each
        model_size: 124M, 355M, 774M or 1558M, or a folder in models_dir, such as the bundled 1M
        models_dir: where models are, and where a published one is downloaded to
    """
    from utils import load_encoder_hparams_and_params

    n_tokens_to_generate = whole_number(n_tokens_to_generate)  # before any download
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    inputs = encoder.encode(prompt) or [encoder.encoder["<|endoftext|>"]]
    return encoder.decode(generate(inputs, params, hparams["n_head"], n_tokens_to_generate))


if __name__ == "__main__":
    from utils import command_line

    command_line(main)
