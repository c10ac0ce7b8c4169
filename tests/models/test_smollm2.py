"""The real model: every token that a backend chooses, exact, is the one that transformers chooses in float32.

Transformers gets the weights that the GGUF's blocks stand for. It need not decode: one pass over the prompt and the
answer says what it would have chosen at every place, which proves the answer by induction.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ondevice.backends.base import Backend
from ondevice.backends.reference import create as create_reference
from ondevice.checkpoint import open_checkpoint
from ondevice.models.families import family_of
from ondevice.models.parameters import Parameters
from ondevice.runtime.engine import Engine, GenerateOptions, Token
from ondevice.runtime.tokenizer import load_tokenizer
from ondevice.schemes import to_float
from ondevice.testing.family import open_decoder
from tests.models import twins

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = (
    "The quick brown fox jumps over the lazy",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees because",
    "The capital of France is",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Die Würde des Menschen ist",
    "SELECT name, COUNT(*) FROM orders",
    "The mitochondrion is",
    "Q: What is 17 times 23?\nA:",
    "In 1969, Neil Armstrong",
    "Ingredients:\n- 200 g flour\n- 3 eggs\n",
    "import numpy as np\n\n",
    "The patient was admitted with",
    "To be, or not to be, that is",
    "Photosynthesis converts light into",
    '{"name": "Ada", "age": 36, "',
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a short poem about a compiler.<|im_end|>\n<|im_start|>assistant\n",
)
QUICK = {
    "reference": (1, 24),
    "cpu": (2, 64),
    "cuda": (1, 24),
    "mlx": (1, 12),
}  # prompts and tokens, where time matters


@pytest.fixture(scope="module")
def prompts(smollm2_gguf: Path) -> list[list[int]]:
    with open_checkpoint(smollm2_gguf) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.metadata)
    return [list(tokenizer.encode(text, add_special=True, parse_special=True)) for text in PROMPTS]


@pytest.fixture(scope="module")
def twin(smollm2_gguf: Path):
    """transformers' model in float32, with the numbers that our reader finds in the file."""
    with open_checkpoint(smollm2_gguf) as checkpoint:
        family, hf = family_of(checkpoint)
        parameters = Parameters(family, family.config(hf), checkpoint)
        tensors = {family.names.spell(name): torch.tensor(to_float(parameters[name])) for name in parameters}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf))
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


@pytest.fixture(scope="module")
def engine_of(smollm2_gguf: Path):
    """An engine of the model on a backend; the last one made is kept."""
    kept: dict[str, Engine] = {}

    def make(ops: Backend) -> Engine:
        if ops.name not in kept:
            kept.clear()
            kept[ops.name] = Engine(open_decoder(smollm2_gguf, ops), 256)
        return kept[ops.name]

    return make


def answer(engine: Engine, prompt: list[int], count: int) -> list[int]:
    return [e.id for e in engine.generate(prompt, GenerateOptions(max_tokens=count)) if isinstance(e, Token)]


def choices(twin, prompt: list[int], ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """What the twin chooses behind the prompt and behind each of the ids but the last; the logits [n, V]."""
    with torch.no_grad():
        logits = twin(torch.tensor([prompt + ids[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :].numpy()
    return logits.argmax(axis=-1), logits


def check(engine: Engine, twin, prompt: list[int], count: int) -> None:
    ids = answer(engine, prompt, count)
    chosen, logits = choices(twin, prompt, ids)
    assert len(ids) == count
    if ids != chosen.tolist():
        at = next(i for i, (a, b) in enumerate(zip(ids, chosen, strict=True)) if a != b)
        gap = logits[at].max() - logits[at, ids[at]]
        pytest.fail(f"token {at} is {ids[at]}, not {chosen[at]}, whose logit is {gap:.3g} higher")


@pytest.mark.parametrize("backend", twins.BACKENDS, indirect=True)
def test_a_few_answers(backend, engine_of, twin, prompts):
    count, tokens = QUICK[backend.name]
    for prompt in prompts[-count:]:
        check(engine_of(backend), twin, prompt, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("backend", twins.BACKENDS, indirect=True)
def test_every_answer(backend, engine_of, twin, prompts):
    for prompt in prompts:
        check(engine_of(backend), twin, prompt, 16 if backend.name == "mlx" else 64)  # MLX is slow on a CPU


@pytest.mark.slow
def test_the_twin_is_what_transformers_loads_and_decodes(smollm2_gguf, twin, prompts, engine_of):
    """Its own reading of the GGUF gives the same numbers, and its own decoding, with a cache, the same ids."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    ours = twin.state_dict()
    assert all(torch.equal(ours[name], values) for name, values in theirs.state_dict().items())
    engine = engine_of(create_reference())
    for prompt in prompts[:3]:
        with torch.no_grad():
            ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None)
        assert ids[0, len(prompt) :].tolist() == answer(engine, prompt, 64)
