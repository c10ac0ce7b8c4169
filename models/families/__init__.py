"""Families: each a short file that says how a config.json becomes a ModelConfig and what its tensors are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import Unsupported
from ...registry import broken_families, did_you_mean, families
from ...tensors import Tensor
from ..config import ModelConfig
from .views import ROWS, WRITTEN, viewed_shape

if TYPE_CHECKING:
    from ...checkpoint import Checkpoint

MARKS = {"mlx", "module", "swapped", "raised"}  # what a name is, besides how ours lies there
STOPS = ("eos_token_id", "bos_token_id", "pad_token_id")


class NameMap(dict):
    """Our names -> a checkpoint's. `{i}` stands for the layer, `{e}` for the expert, `{h}` for the head of a norm; a
    tuple lists alternatives, best first. Biases need no entries: `x.bias` is found beside `x`'s `….weight`. Behind a
    name, `|` and how ours lies in that tensor (families/views.py), `|mlx` where it is mlx-lm's name and not
    transformers', or `|module` where it is what transformers calls it in memory, whatever its files call it;
    `|raised`: gains to which mlx-lm adds one before it saves them; `|swapped`: a parameter [experts, in, out] there,
    which PEFT takes for [experts, out, in]."""

    IGNORED = re.compile(
        r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$|^lm_head\.weight$|^rope_(freqs|factors_(long|short))\.weight$"
        r"|\.activation_scale$"
    )

    SENSES = re.compile(  # of a model that also sees or hears; and what guesses several tokens ahead
        r"^(model\.)?(visual|vision_\w+|audio_\w+|embed_(vision|audio)|multi_modal_projector|mtp)\."
    )

    def __or__(self, other: Mapping) -> NameMap:
        return NameMap({**self, **other})

    def places(self, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every name that one of ours may have in a checkpoint, `{e}` left in, and how it lies there."""
        for spelled, views in self.marked(name):
            yield spelled, tuple(view for view in views if view not in MARKS)

    def marked(self, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """`places`, with their marks among the views."""
        layer = re.match(r"layers\.(\d+)\.", name)
        key = re.sub(r"^layers\.\d+\.", "layers.{i}.", name)
        beside = key not in self and key.endswith(".bias")
        patterns = self.get(key.removesuffix(".bias") if beside else key, ())
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            spelled, *views = (pattern.replace("{i}", layer[1]) if layer else pattern).split("|")
            yield spelled.removesuffix("weight") + "bias" if beside else spelled, tuple(views)

    def spellings(self, name: str) -> tuple[str, ...]:
        """The names alone."""
        return tuple(spelled for spelled, _ in self.places(name))

    def written(self, name: str, mlx: bool) -> tuple[str, tuple[str, ...]]:
        """Under which name one of ours is written, and how it lies there (for views.stored): Hugging Face's, or
        mlx-lm's where it has another. Raises Unsupported where a file of either has no place for it."""
        places = sorted(self.marked(name), key=lambda place: ("mlx" in place[1]) != mlx)
        written = (place for place in places if set(place[1]) - MARKS <= WRITTEN)
        spelled, views = next(written, (None, ()))
        if spelled is None:
            raise Unsupported(f"There is no place for {name} in a file of this model.", "Use the model as it is.")
        views = tuple("filters" if mlx and view == "kernels" else view for view in views if mlx or view != "raised")
        return spelled, tuple(view for view in views if view in ROWS or not (view == "mlx" or name.endswith(".bias")))

    def raised(self, name: str) -> bool:
        """Whether mlx-lm adds one to these gains."""
        return any("raised" in views for _, views in self.marked(name))

    def spell(self, name: str) -> str:
        """The first of them, or our own name where this map has none."""
        return next(iter(self.spellings(name)), name)

    def find(
        self, name: str, checkpoint: Checkpoint, several: int, shape: Sequence[int]
    ) -> tuple[list[str], tuple[str, ...]]:
        """The names under which a checkpoint holds one of our tensors (one; `several`, one an expert or head; [] if it
        is missing) and how it lies there: the first way that gives ours its shape, if any does."""
        found: tuple[list[str], tuple[str, ...]] = ([], ())
        for place, views in self.places(name):
            for spelling in (place, *_inside(place)):
                count = several if re.search(r"\{[eh]\}", spelling) else 1
                spelled = (re.sub(r"\{[eh]\}", str(n), spelling) for n in range(count))
                names = [*takewhile(checkpoint.__contains__, spelled)]
                if 0 < len(names) == count:
                    held = checkpoint.outline(names[0]).shape
                    if not views or viewed_shape(held, views, shape, name.endswith(".bias")) == tuple(shape):
                        return names, views
                    found = found if found[0] else (names, views)
        return found

    def ignored(self, name: str) -> bool:
        """A tensor that says nothing which the config or another tensor does not."""
        return bool(self.IGNORED.search(name))

    def apart(self, name: str, layers: range) -> bool:
        """A tensor of something that a model has besides what writes text word by word. layers: numbers of those behind
        the last one, which guess several tokens ahead."""
        layer = re.search(r"(?:^|\.)(?:layers|blk)\.(\d+)\.", name)
        return bool(self.SENSES.search(name)) or (layer is not None and int(layer[1]) in layers)


def _inside(name: str) -> tuple[str, ...]:
    """What a tensor is called where the model that writes text is a part of one that also sees or hears, and where it
    was saved without its head."""
    outer, _, bare = name.partition(".")
    if outer == "transformer":
        return (bare,)
    return (
        (f"model.language_model.{bare}", f"language_model.{name}") if outer == "model" else (f"language_model.{name}",)
    )


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp writes this family: its architecture's name, its tensor names, its metadata as a config.json, and
    how a tensor is brought back to Hugging Face's arrangement (None: as it is). keys: those of its metadata that no
    other family has, as in `gguf.KEYS`, for writing; usual: what llama.cpp insists on where a config.json is silent.
    rearrange: `arrange` undone, where that is more than an order of rows or a constant.
    when: which files of that architecture are this family's, by their metadata. also: other architectures that are
    read as this one, such as that of a model that sees. differs: what llama.cpp computes otherwise, for people."""

    architecture: str
    names: NameMap
    config: Callable[[Mapping, Checkpoint], dict]
    arrange: Callable[[str, Tensor, ModelConfig], Tensor] | None = None
    keys: Mapping[str, str] = field(default_factory=dict)
    when: Callable[[Mapping], bool] = lambda metadata: True
    rearrange: Callable[[str, Tensor, ModelConfig], Tensor] | None = None
    usual: Callable[[ModelConfig], Mapping[str, Any]] = lambda config: {}
    also: tuple[str, ...] = ()
    differs: str = ""


@dataclass(frozen=True)
class Family:
    name: str
    model_types: tuple[str, ...]
    config: Callable[[Mapping], ModelConfig]
    names: NameMap
    gguf: Gguf | None = field(default=None)
    models: str = ""  # what people call them, for lists


LLAMA = NameMap(
    {
        "embed": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
        "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm.weight",
        "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.attn.q": "model.layers.{i}.self_attn.q_proj.weight",
        "layers.{i}.attn.k": "model.layers.{i}.self_attn.k_proj.weight",
        "layers.{i}.attn.v": "model.layers.{i}.self_attn.v_proj.weight",
        "layers.{i}.attn.o": "model.layers.{i}.self_attn.o_proj.weight",
        "layers.{i}.mlp.gate": "model.layers.{i}.mlp.gate_proj.weight",
        "layers.{i}.mlp.up": "model.layers.{i}.mlp.up_proj.weight",
        "layers.{i}.mlp.down": "model.layers.{i}.mlp.down_proj.weight",
        "layers.{i}.attn.qkv": "model.layers.{i}.self_attn.qkv_proj.weight",
        "layers.{i}.mlp.gate_up": "model.layers.{i}.mlp.gate_up_proj.weight",
        "layers.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm.weight",
        "layers.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm.weight",
    }
)
SANDWICH = LLAMA | {  # a norm in front of and behind each half of a block
    "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}


def experts(
    module: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", inside: str = ""
) -> dict[str, tuple]:
    """Names of experts, one a tensor below `module`, or stacked as mlx-lm has them, or as transformers has them in
    memory, below `inside` where that is another module."""
    parts = {"gate": (gate, "gate_up_proj|first"), "up": (up, "gate_up_proj|last"), "down": (down, "down_proj")}
    return {
        f"layers.{{i}}.moe.{ours}": (
            f"{module}.experts.{{e}}.{theirs}.weight",
            f"{module}.switch_mlp.{ours}_proj.weight|mlx",
            f"{inside or module}.experts.{held}|module",
        )
        for ours, (theirs, held) in parts.items()
    }


def joined(
    part: str, *files: tuple[str, str], mlx: str = "", rows: tuple[str, str] = ("first", "last"), end: str = ""
) -> dict[str, tuple]:
    """Names of the three maps of `part` ("mlp", "moe", "moe.shared") where files have gate and up in one tensor. files:
    what holds gate and up, as which `rows`, and what holds down; mlx: the module in which mlx-lm has all three apart;
    end: ".bias", where it is theirs."""
    held = [{"gate": f"{both}|{rows[0]}", "up": f"{both}|{rows[1]}", "down": down} for both, down in files]
    apart = {ours: (f"{mlx}.{ours}_proj{end or '.weight'}|mlx",) if mlx else () for ours in ("gate", "up", "down")}
    return {f"layers.{{i}}.{part}.{ours}{end}": (*own, *(its[ours] for its in held)) for ours, own in apart.items()}


def shared_expert(module: str, name: str = "shared_expert") -> dict[str, str]:
    """Names of the expert that every token goes through, and of its gate."""
    parts = {f"shared.{part}": f"{name}.{part}_proj" for part in ("gate", "up", "down")}
    parts["shared_gate"] = "shared_expert_gate"
    return {f"layers.{{i}}.moe.{ours}": f"{module}.{theirs}.weight" for ours, theirs in parts.items()}


def family_of(checkpoint: Checkpoint) -> tuple[Family, dict]:
    """The family a checkpoint belongs to, and its config.json (translated, where the file is a GGUF).

    Raises Unsupported when no family is known for it, naming those that are.
    """
    if checkpoint.kind != "gguf":
        hf = text_part(checkpoint.config)
        return family_for(hf, checkpoint.path, checkpoint), hf
    kind = checkpoint.metadata.get("general.architecture")
    family = _serving(
        kind,
        lambda f: (f.gguf.architecture, *f.gguf.also) if f.gguf and f.gguf.when(checkpoint.metadata) else (),
        checkpoint.path,
        checkpoint,
    )
    return family, family.gguf.config(checkpoint.metadata, checkpoint)


def text_part(config: Mapping) -> Mapping:
    """Of a config.json whose model also sees or hears: that of the part which writes text. Others as they are."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    stops = {key: config[key] for key in STOPS if config.get(key) is not None}
    tied = config.get("tie_word_embeddings")  # of the whole, to which the head belongs
    return {**stops, **text} | ({} if tied is None else {"tie_word_embeddings": tied})


def family_for(config: Mapping, path: Path, checkpoint: Checkpoint | None = None) -> Family:
    """The family of a config.json that came from `path`, its tensors in `checkpoint` if they are there."""
    return _serving(config.get("model_type"), lambda f: f.model_types, path, checkpoint)


def _serving(
    kind: object, types: Callable[[Family], Sequence[str]], path: Path, checkpoint: Checkpoint | None
) -> Family:
    serving = {name: family for name, family in families().items() if kind in types(family)}
    if not serving:
        broken = "".join(f" The plug-in {name} failed: {why:.200}." for name, why in broken_families().items())
        known = {t for family in families().values() for t in types(family)}
        like = _like(checkpoint, kind)
        raise Unsupported(
            f"{path} is a model of type {kind!r:.60}, which is not known here.{like}",
            f"{did_you_mean(str(kind), known)} docs/families.md shows how to add one.{broken}",
        )
    if len(serving) > 1:
        raise Unsupported(
            f"{path} is a model of type {kind!r}, which {' and '.join(serving)} both claim.", "Uninstall one of them."
        )
    return next(iter(serving.values()))


def _like(checkpoint: Checkpoint | None, kind: object) -> str:
    from ..nearest import nearest  # which needs this module

    found = nearest(checkpoint, str(kind)) if checkpoint else ""
    return f" Most like it: {found}." if found else ""
