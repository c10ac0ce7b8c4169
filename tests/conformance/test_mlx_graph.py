"""What MLX is asked to do for one token: no more than mlx-lm asks it to, and all of it started once."""

import io
import re
from collections import Counter

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
mlx_llama = pytest.importorskip("mlx_lm.models.llama")

from mlx.utils import tree_unflatten  # noqa: E402

from ondevice.backends.base import SamplingParams, Step  # noqa: E402
from ondevice.backends.mlx.backend import MlxBackend  # noqa: E402
from ondevice.models.config import ModelConfig  # noqa: E402
from ondevice.models.decoder import Decoder  # noqa: E402
from ondevice.models.parameters import expected  # noqa: E402
from ondevice.models.random import random_tensor  # noqa: E402
from ondevice.runtime.engine import Engine, GenerateOptions  # noqa: E402

HF = {  # SmolLM2-135M, narrower
    "model_type": "llama", "vocab_size": 96, "hidden_size": 192, "num_hidden_layers": 30, "num_attention_heads": 3,
    "num_key_value_heads": 1, "intermediate_size": 256, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
THEIRS = {
    "embed": "model.embed_tokens", "norm": "model.norm", "attn_norm": "input_layernorm", "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}  # fmt: skip
PROMPT = [5, 17, 2, 40, 11]


@pytest.fixture(scope="module", params=[4, 16], ids=["4-bit", "dense"])
def models(request):
    """The same weights in our decoder and in mlx-lm's model."""
    config = ModelConfig.llama_like(HF)
    tensors = {name: random_tensor(name, shape, request.param, 32) for name, shape in expected(config).items()}
    ops = MlxBackend("float32", exact=True, fused=True)
    ours = Decoder(config, ops, {name: ops.prepare(tensor) for name, tensor in tensors.items()})
    theirs = mlx_llama.Model(mlx_llama.ModelArgs.from_dict(HF))
    if request.param == 4:
        from mlx.nn import quantize

        quantize(theirs, 32, 4)
    named = []
    for name, w in ours.weights.items():
        layer, _, rest = name.removeprefix("layers.").partition(".") if name.startswith("layers.") else ("", "", name)
        module = f"model.layers.{layer}.{THEIRS[rest]}" if layer else THEIRS[rest]
        parts = [("weight", w.values)] if hasattr(w, "values") else zip(("weight", "scales", "biases"), w.parts)  # noqa: B905
        named += [(f"{module}.{part}", values) for part, values in parts]
    theirs.update(tree_unflatten(named))
    return ours, theirs


def primitives(*arrays) -> Counter:
    """Names of the operations still to be done for these arrays, counted."""
    dot = io.StringIO()
    mx.export_to_dot(dot, *arrays)
    return Counter(re.findall(r'label ="(\w+)", shape=rectangle', dot.getvalue()))


def forward(decoder, cache, ids, start: int):
    step = Step(np.array([start], np.int32), np.array([ids.shape[1]], np.int32), np.zeros(1, np.int32), cache=cache)
    logits = decoder(ids, step, np.array([ids.shape[1] - 1], np.int32) if ids.shape[1] > 1 else None)
    cache.advance(step.slots, step.lengths)
    return logits.reshape(1, -1)


def test_no_more_primitives_than_mlx_lm(models, monkeypatch):
    """Its one step, from the last id to the next: the model and a greedy sampler. On the CPU, rope unfolds into its
    parts; on a GPU it is one, so it is counted as one."""
    from mlx_lm.models.cache import make_prompt_cache

    ours, theirs = models
    cache, their_cache = ours.new_cache(1, 64), make_prompt_cache(theirs)
    first = forward(ours, cache, ours.ops.array(np.array([PROMPT], np.int32)), 0)
    their_first = theirs(mx.array([PROMPT]), cache=their_cache)[:, -1, :]
    mx.eval(first, their_first, cache.layers, [c.state for c in their_cache])
    assert np.allclose(first, their_first, atol=1e-4 * float(mx.abs(their_first).max()))

    monkeypatch.setattr(mx.fast, "rope", lambda x, *args, **kwargs: mx.abs(x))
    last = mx.array([3], mx.int32)
    logits = forward(ours, cache, last.reshape(1, 1), len(PROMPT))
    their_logits = theirs(mx.array([3])[None], cache=their_cache)[:, -1, :]
    their_logprobs = their_logits - mx.logsumexp(their_logits, keepdims=True)
    got = primitives(ours.ops.sample(logits, [SamplingParams()], np.zeros(1, np.float32), launch=False).ids)
    want = primitives(mx.argmax(their_logprobs, axis=-1))
    assert got["Abs"] == want["Abs"] == 60
    assert sum(got.values()) > 30 * 20, "a decode step of 30 layers has more than this"
    assert sum(got.values()) <= sum(want.values()), (got - want, want - got)


def test_one_asynchronous_evaluation_a_token(models, monkeypatch):
    ours, started = models[0], []
    real = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (started.append(len(arrays)), real(*arrays)))
    monkeypatch.setattr(mx, "eval", lambda *arrays: pytest.fail("somebody waited"))
    engine = Engine(ours, 64)
    tokens = [t for t in engine.generate(PROMPT, GenerateOptions(max_tokens=6)) if hasattr(t, "id")]
    assert len(tokens) == len(started) == 6 and set(started) == {1}
