"""Models that also see: the part that writes text is read out of their folders, and says what it says in them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ondevice.checkpoint import open_checkpoint
from ondevice.errors import BadFile
from ondevice.models.families import family_of
from ondevice.models.parameters import Parameters
from ondevice.testing.family import TINY, check_family, randomise
from tests.models.twins import DELTA, LLAMA4, SHARP

transformers = pytest.importorskip("transformers")
VISION = {
    "Gemma3": {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    },
    "Qwen2_5_VL": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 36, "patch_size": 4,
    },
    "Qwen3VL": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 36, "patch_size": 4,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    },
    "Qwen3VLMoe": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 36, "patch_size": 4,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    },
    "Llama4": {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
    },
    "Mistral3": {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    },
    "Qwen3_5": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 36, "patch_size": 4,
        "num_position_embeddings": 16,
    },
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TEXT = {
    "Gemma3": {"sliding_window": 5, "sliding_window_pattern": 2},
    "Qwen2_5_VL": {"hidden_size": 48, "rope_parameters": MROPE},
    "Qwen3VL": {"rope_parameters": MROPE},
    "Qwen3VLMoe": {
        "rope_parameters": MROPE,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "Llama4": LLAMA4 | {"num_local_experts": 5},
    "Mistral3": {"model_type": "ministral3", "rope_parameters": SHARP, "tie_word_embeddings": True},
    "Qwen3_5": DELTA,
}


def seeing(kind: str):
    pytest.importorskip("torch").manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        text_config=TINY | {"pad_token_id": 0} | TEXT[kind], vision_config=VISION[kind], image_token_id=5,
        image_token_index=5, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8,
    )  # fmt: skip
    return randomise(getattr(transformers, f"{kind}ForConditionalGeneration")(config))


@pytest.mark.parametrize("kind", VISION)
def test_the_text_part_of_a_model_that_sees(tmp_path, kind):
    twin = seeing(kind)
    twin.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert any("visual" in name or "vision" in name for name in checkpoint.names)
        assert family_of(checkpoint)[1]["model_type"] == twin.config.get_text_config().model_type
    check_family(tmp_path, twin)


def test_what_belongs_to_no_sense_is_still_named(tmp_path):
    """Only tensors of eyes and ears are left out silently."""
    seeing("Gemma3").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    config["text_config"]["layer_types"] = config["text_config"]["layer_types"][:2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(BadFile, match=r"not used: .*layers\.2\."):
        family, hf = family_of(checkpoint)
        Parameters(family, family.config(hf), checkpoint)


def test_a_config_from_before_there_were_parts(tmp_path):
    """As Qwen2.5-VL was published: the text's keys beside `vision_config`, positions by the axes of pictures."""
    twin = seeing("Qwen2_5_VL")
    twin.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rule = text.pop("rope_parameters")
    config |= text | {"model_type": "qwen2_5_vl", "rope_theta": rule["rope_theta"]}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": rule["mrope_section"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_family(tmp_path, twin)


def test_experts_as_they_were_published(tmp_path):
    """Qwen3-VL-MoE's stacks are [E, in, out] in files older than transformers 5."""
    twin = seeing("Qwen3VLMoe")
    twin.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    turned = {n: np.ascontiguousarray(v.swapaxes(1, 2)) if ".experts." in n else v for n, v in tensors.items()}
    assert any(turned[name].shape != tensors[name].shape for name in tensors)
    save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_family(tmp_path, twin)
