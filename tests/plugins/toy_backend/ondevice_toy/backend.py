"""A whole backend: dense inference over plain NumPy arrays, with a cache."""

import numpy as np

from ondevice import schemes
from ondevice.backends import numerics, sampling
from ondevice.backends.base import Backend, Info, Sampled, cache_dtype
from ondevice.backends.reference import HostCache


class ToyBackend(Backend):
    name = "toy"
    features = frozenset({"cache"})
    exact = True

    def info(self):
        return Info(self.name, "one toy processor", "float32", self.exact, self.features)

    # life and transfer: here an array is an ndarray, and a weight one in full

    def prepare(self, tensor):
        return schemes.to_float(tensor)

    def array(self, values, dtype=None):
        return np.array(values, np.float32 if values.dtype.kind == "f" else np.int32)

    def numpy(self, a):
        return a

    def zeros(self, shape):
        return np.zeros(shape, np.float32)

    def dequantize(self, weight):
        return weight

    # forward

    def embed(self, weight, ids):
        return weight[ids]

    def linear(self, x, weight, bias=None):
        y = x @ weight.T
        return y if bias is None else y + bias

    def rms_norm(self, x, gain, eps, offset=0.0):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * numerics.gains(gain, x, offset)

    def layer_norm(self, x, gain, bias, eps):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * numerics.gains(gain, x)
        return y if bias is None else y + bias

    def act(self, x, kind):
        function, _slope = numerics.activation(kind)
        return function(x)

    def softcap(self, x, cap):
        return cap * np.tanh(x / cap)

    def take(self, x, rows):
        return x[rows]

    def split(self, x, sizes):
        return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=-1))

    def rope(self, x, step, freqs, interleaved=False, scale=1.0):
        positions = step.starts[:, None] + np.arange(x.shape[1])
        return numerics.rotate(x, positions[:, :, None].astype(np.float32) * freqs, interleaved, scale)

    # attention and its cache

    def new_cache(self, specs, slots, capacity, dtype=None):
        return HostCache(specs, slots, capacity, cache_dtype(dtype or "float32"))

    def attention(self, q, k, v, sinks, spec, step, layer):
        out = np.zeros((*q.shape[:3], v.shape[-1]), np.float32)
        for b, (start, n) in enumerate(zip(step.starts, step.lengths, strict=True)):
            keys, values, first = k[b, :n].swapaxes(0, 1), v[b, :n].swapaxes(0, 1), start
            segments = None if step.segments is None else (step.segments[b, :n],) * 2
            if step.cache is not None:
                step.cache.write(layer, step.slots[b], start, k[b, :n], v[b, :n])
                (keys, values), first = step.cache.read(layer, step.slots[b], start + n), 0
            seen = numerics.visible(np.arange(start, start + n), np.arange(first, start + n), spec, segments)
            for h in range(q.shape[2]):
                j = h * len(keys) // q.shape[2]
                sink = None if sinks is None else sinks[h]
                out[b, :n, h] = self.weights(q[b, :n, h] @ keys[j].T, seen, spec, sink) @ values[j]
        return out

    def weights(self, products, seen, spec, sink):
        """products [T, S] of queries and keys -> what each query takes of each value"""
        scores = products * spec.scale
        if spec.softcap is not None:
            scores = self.softcap(scores, spec.softcap)
        scores = np.where(seen, scores, -np.inf)
        if sink is None:
            return numerics.softmax(scores)
        return numerics.softmax(np.append(scores, np.full((len(scores), 1), sink), axis=1))[:, :-1]

    # the next token

    def sample(self, logits, params, u, counts=None, mask=None):
        return Sampled(*sampling.sample(logits, params, u, counts, mask))
