from transformers import Qwen3Config, Qwen3ForCausalLM

from ondevice.testing.family import TINY, check_family, randomise


class ToyConfig(Qwen3Config):
    model_type = "toy"


def test_toy(tmp_path):
    twin = randomise(Qwen3ForCausalLM(ToyConfig(**TINY)))
    twin.save_pretrained(tmp_path)
    check_family(tmp_path, twin)
