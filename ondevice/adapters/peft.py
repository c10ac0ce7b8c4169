"""PEFT's folders: adapter_config.json and adapter_model.safetensors (https://github.com/huggingface/peft)."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadFile, Unsupported
from ..models.families.views import stored, viewed, viewed_shape
from ..models.fields import flag, number, optional, several, table, whole
from ..tensors import Tensor
from . import stacks
from .adapter import Adapter, LowRank
from .files import CONFIG, file_of, json_of, read_config, read_tensors, stacked, transposed, unfit
from .modules import Modules, Place, grouped
from .pieces import Parts, apart, together

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PROMPT = "PROMPT_TUNING"
EMBEDDINGS = "prompt_embeddings"
PARTS = {  # how a tensor's name ends -> what it is, and whether it lies the other way round here
    ".lora_A.weight": ("down", False),
    ".lora_B.weight": ("up", False),
    ".lora_embedding_A": ("down", True),
    ".lora_embedding_B": ("up", False),
    ".lora_magnitude_vector": ("magnitude", False),
    ".lora_magnitude_vector.weight": ("magnitude", False),
}
BASE = ".base_layer.weight"  # a copy of what was there before, which PEFT keeps beside an embedding's update
OTHERS = (  # settings that change what an adapter means, and are not read here
    "layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "velora_config",
    "kasa_config", "use_bdlora", "arrow_config", "monteclora_config", "lora_bias",
)  # fmt: skip
REBASED = ("pissa", "olora", "corda", "lora_ga", "loftq")  # starts that change the base as well


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says. targets: names, or one regular expression; None where nothing is said."""

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] | str | None = None
    excluded: tuple[str, ...] | str = ()
    saved: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()  # stacks of experts
    layers: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    base: str = ""

    def rank_of(self, path: str) -> int:
        return self.ranks.get(_pattern(self.ranks, path), self.rank)

    def scale_of(self, path: str) -> float:
        rank = self.rank_of(path)
        alpha = self.alphas.get(_pattern(self.alphas, path), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def names(self, path: str, head: bool) -> bool:
        """Whether a module is one of the targets. head: it is the output head, which "all-linear" leaves out."""
        if self.targets is None or _among(self.excluded, path):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.saved):
            return False
        if self.targets == "all-linear":
            return not head
        return _among(self.targets, path) and self._in_layers(path)

    def _in_layers(self, path: str) -> bool:
        if not self.layers or isinstance(self.targets, str) or path in self.targets:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((m for m in (re.match(p, path) for p in patterns) if m), None)
        return found is not None and int(found[1]) in self.layers


def _among(names: tuple[str, ...] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _pattern(patterns: Mapping[str, Any], path: str) -> str:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), "")


# ------------------------------------------------------------------------------------------------ reading


def read(folder: Path, modules: Modules) -> Adapter:
    """The adapter in a folder, checked against a model: BadFile names every mismatch."""
    if read_config(folder).get("peft_type") == PROMPT:
        return _prompt(folder, modules)
    settings = read_settings(folder)
    raw, problems = _sorted(read_tensors(folder / WEIGHTS), modules)
    updates, more = _updates(raw, settings, modules)
    of_stacks, most = stacks.read(
        raw.stacks, lambda key: _among(settings.parameters, key), settings.rank_of, settings.scale_of, modules
    )
    problems += more + most + _untouched(raw, settings, modules)
    updates |= of_stacks
    if problems:
        raise unfit(folder, grouped(problems))
    if not updates and not raw.replaced:
        raise BadFile(f"The adapter {folder} changes nothing.", "Get the adapter again.")
    return Adapter(updates, raw.replaced, settings.rslora, settings.dropout, settings.base)


def _prompt(folder: Path, modules: Modules) -> Adapter:
    """A soft prompt (Lester et al. 2021)."""
    config, tensors = read_config(folder), read_tensors(folder / WEIGHTS)
    if config.get("num_transformer_submodules") not in (None, 1):
        raise Unsupported(f"{folder} is a soft prompt of a kind that is not read here.", "Train it anew: lora-train.")
    width, found = modules.shapes["embed"][1], tensors.get(EMBEDDINGS)
    if found is None or len(tensors) != 1:
        raise BadFile(f"{folder} holds {', '.join(tensors) or 'nothing'}, not {EMBEDDINGS}.", "Get the adapter again.")
    if len(found.shape) != 2 or not found.shape[0] or found.shape[1] != width:
        raise unfit(folder, [f"{EMBEDDINGS} is {list(found.shape)}, not [tokens, {width}]"])
    return Adapter({}, base=str(config.get("base_model_name_or_path") or ""), prompt=found)


def read_settings(folder: Path) -> Settings:
    """Raises BadFile for values that make no sense, Unsupported for kinds of adapters that are not read here."""
    config = read_config(folder)
    try:
        _check_kind(folder, config)
        layers = config.get("layers_to_transform")
        made = Settings(
            rank=whole(config, "r", 8),
            alpha=number(config, "lora_alpha", 8),
            rslora=flag(config, "use_rslora"),
            dora=flag(config, "use_dora"),
            targets=_words(config, "target_modules"),
            excluded=_words(config, "exclude_modules") or (),
            saved=tuple(several(config, "modules_to_save", str)),
            parameters=tuple(several(config, "target_parameters", str)),
            layers=(layers,) if type(layers) is int else tuple(several(config, "layers_to_transform", int)),
            layers_pattern=_patterns(config),
            ranks={key: whole(table(config, "rank_pattern"), key) for key in table(config, "rank_pattern")},
            alphas={key: number(table(config, "alpha_pattern"), key) for key in table(config, "alpha_pattern")},
            dropout=optional(number, config, "lora_dropout") if config.get("lora_dropout") else 0.0,
            base=str(config.get("base_model_name_or_path") or ""),
        )
        for pattern in (*made.saved, *made.layers_pattern, *made.ranks, *made.alphas):
            re.compile(pattern)
        return made
    except BadFile as error:
        raise BadFile(f"{folder / CONFIG}: {error.message}", "Get the adapter again, or correct this file.") from None
    except re.error as error:
        raise BadFile(f"{folder / CONFIG} has a strange pattern: {error}.", "Correct this file.") from None


def _check_kind(folder: Path, config: Mapping) -> None:
    hint = "Merge it where it was made (merge_and_unload in PEFT), and give the result as a model."
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        known = "LoRA, rsLoRA, DoRA and prompt tuning are read here"
        raise Unsupported(f"{folder} is an adapter of type {kind!r:.40}; {known}.", hint)
    used = [name for name in OTHERS if config.get(name)]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(REBASED):
        used.append(f"init_lora_weights = {start!r:.40}, which changes the base")
    if used:
        raise Unsupported(f"{folder} uses what is not read here: {', '.join(used)}.", hint)


def _words(config: Mapping, key: str) -> tuple[str, ...] | str | None:
    """A list of names, or one regular expression."""
    if isinstance(config.get(key), str):
        re.compile(config[key])
        return config[key]
    return tuple(several(config, key, str)) or None


def _patterns(config: Mapping) -> tuple[str, ...]:
    found = _words(config, "layers_pattern") or ()
    return (found,) if isinstance(found, str) else found


@dataclass
class _Raw:
    """Tensors by what they are: updates by module and part, those of experts that have a module each by place and part,
    those of stacks of experts by module, depth and part, whole ones by our name."""

    updates: dict[str, Parts] = field(default_factory=lambda: defaultdict(dict))
    experts: dict[Place, Parts] = field(default_factory=lambda: defaultdict(dict))
    stacks: dict[str, dict[int, Parts]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(dict)))
    replaced: dict[str, Tensor] = field(default_factory=dict)


def _sorted(tensors: Mapping[str, Tensor], modules: Modules) -> tuple[_Raw, list[str]]:
    raw, problems = _Raw(), []
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
        ending = next((e for e in PARTS if path.endswith(e)), None)
        owner = _owner(path.removesuffix(ending), raw, modules) if ending else None
        if owner is not None:
            part, turned = PARTS[ending]
            owner[part] = transposed(tensor) if turned else tensor
        elif ending is not None:
            problems.append(f"there is no {path}")
        else:
            problems += _whole(path, tensor, raw, modules)
    return raw, problems


def _owner(path: str, raw: _Raw, modules: Modules) -> Parts | None:
    """Where the parts of an update at a path are collected; None where the model has nothing there."""
    if path in modules.held and modules.is_matrix(path):
        return raw.updates[path]
    place = modules.at(path)
    if place is not None:
        return raw.updates[modules.homes[place.name]] if place.expert is None else raw.experts[place]
    found = stacks.stem(path)
    return raw.stacks[found[0]][found[1]] if found else None


def _whole(path: str, tensor: Tensor, raw: _Raw, modules: Modules) -> list[str]:
    """A tensor that stands for one of the model's."""
    plain = path.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    place, views = modules.tensors.get(plain, (None, ()))
    if place is None or place.expert is not None:
        return [f"there is no {path}"]
    shape, bias = modules.shapes[place.name], place.name.endswith(".bias")
    if viewed_shape(tensor.shape, views, shape, bias) != shape:
        return [f"{path} is {list(tensor.shape)}, which does not hold {list(shape)}"]
    if not path.endswith(BASE):
        raw.replaced[place.name] = viewed(tensor, views, shape, bias)
    return []


def _updates(raw: _Raw, settings: Settings, modules: Modules) -> tuple[dict[str, LowRank], list[str]]:
    """Under our names, experts stacked; and everything that does not fit."""
    problems, updates, experts = [], {}, {}
    for path, parts in raw.updates.items():
        key = f"{path}.weight" if _among(settings.parameters, f"{path}.weight") else path
        pieces = modules.held[path]
        shapes = [modules.shapes[piece.name] for piece in pieces]
        shape = sum(math.prod(shape[:-1]) for shape in shapes), shapes[0][-1]
        faults = _faults(path, parts, settings.rank_of(key), settings.dora, shape, pieces[0].name == "embed")
        problems += faults
        if not faults:
            updates |= apart(parts, settings.scale_of(key), pieces, modules)
    for place, parts in raw.experts.items():
        path, shape = modules.paths[place], modules.shapes[place.name][1:]
        faults = _faults(path, parts, settings.rank_of(path), settings.dora, shape, False)
        problems += faults
        if not faults:
            experts[place] = LowRank(parts["down"], parts["up"], settings.scale_of(path), parts.get("magnitude"))
    if problems:
        return {}, problems
    for name in dict.fromkeys(place.name for place in experts):
        found = [experts.get(Place(name, e)) for e in range(modules.shapes[name][0])]
        problems += [f"there is no update of {modules.paths[Place(name, e)]}" for e, u in enumerate(found) if u is None]
        if all(found):
            updates[name] = _stack(found)
    return updates, problems


def _faults(
    path: str, parts: Mapping[str, Tensor], r: int, dora: bool, shape: tuple[int, ...], embedding: bool
) -> list[str]:
    """What is wrong with one module's update."""
    outputs, inputs = shape[-2:]
    wanted = {"down": (r, inputs), "up": (outputs, r)} | ({"magnitude": (outputs,)} if dora else {})
    if embedding:
        wanted = {"down": (outputs, r), "up": (inputs, r)} | ({"magnitude": (inputs,)} if dora else {})
    faults = [f"{path} lacks {part}" for part in wanted if part not in parts]
    faults += [f"{path} has {part}, which its config does not say" for part in parts if part not in wanted]
    for part, tensor in parts.items():
        if part in wanted and tensor.shape != wanted[part]:
            faults.append(f"{path}: {part} is {list(tensor.shape)}, not {list(wanted[part])}")
    return faults


def _stack(updates: list[LowRank]) -> LowRank:
    downs, ups = ([getattr(u, part) for u in updates] for part in ("down", "up"))
    return LowRank(stacked(downs), stacked(ups), updates[0].scale)


def _untouched(raw: _Raw, settings: Settings, modules: Modules) -> list[str]:
    """Targets that the config names and the file does not hold, and those that no module of the model answers to."""
    held = {*raw.stacks, *raw.updates, *(modules.paths[place] for place in raw.experts)}
    problems = [
        f"{path} is a target, and the file holds no update of it"
        for path in _wanted(settings, modules, apart=bool(raw.experts))
        if path not in held
    ]
    paths = {False: [*modules.matrices()], True: _parameters(modules)}
    for stack, targets in ((False, settings.targets), (True, settings.parameters)):
        for target in targets if isinstance(targets, tuple) else ():
            if not any(_among((target,), path) for path in paths[stack]):
                problems.append(f"the target {target} is no {'parameter' if stack else 'module'} of it")
    for path in paths[True]:
        if _among(settings.parameters, path) and path.rpartition(".")[0] not in held:
            problems.append(f"{path} is a target, and the file holds no update of it")
    return problems


def _wanted(settings: Settings, modules: Modules, apart: bool) -> Iterator[str]:
    """Modules that the config names. apart: experts have a module each; where transformers holds them stacked, names
    that mean other modules too do not mean them."""
    for path in modules.matrices():
        if (apart or path in modules.held) and settings.names(path, modules.homes.get("head") == path):
            yield path


def _parameters(modules: Modules) -> list[str]:
    """Paths of what may be adapted as a parameter: experts' stacks, and matrices of modules that are no plain ones."""
    return [*stacks.parameters(modules), *(f"{path}.weight" for path in modules.matrices() if path in modules.held)]


# ------------------------------------------------------------------------------------------------ writing


def files(adapter: Adapter, modules: Modules) -> dict[str, bytes]:
    """The files of a folder that PEFT reads."""
    if adapter.prompt is not None:
        return _prompt_files(adapter, adapter.prompt, modules)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for path, update in _by_module(adapter.updates, modules).items():
        tensors |= _named(path, update, modules.homes.get("embed") == path)
        key = f"{path}.weight" if _routes(path, modules) else path
        ranks[key], alphas[key] = update.rank, _alpha(update, adapter.rslora)
    parameters = [key for key in ranks if key.endswith(".weight")]
    for module, path, update, parts in stacks.write(adapter.updates, modules):
        tensors |= {f"{PREFIX}{module}.lora_A.weight": parts["down"], f"{PREFIX}{module}.lora_B.weight": parts["up"]}
        ranks[path], alphas[path] = update.rank, _alpha(update, adapter.rslora)
        parameters.append(path)
    for name, tensor in adapter.replaced.items():
        owner, _, last = _spelled(name, modules).rpartition(".")
        wrapped = ".base_layer" if owner in ranks else ""  # as PEFT's own module has it inside
        tensors[f"{PREFIX}{owner}{wrapped}.{last}"] = _as_stored(name, tensor, modules)
    config = _config(adapter, modules, ranks, alphas, parameters)
    return {CONFIG: json_of(config), WEIGHTS: file_of(tensors)}


def _prompt_files(adapter: Adapter, prompt: Tensor, modules: Modules) -> dict[str, bytes]:
    config = {
        "peft_type": PROMPT, "task_type": "CAUSAL_LM", "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1], "num_transformer_submodules": 1, "num_layers": len(modules.config.layers),
        "prompt_tuning_init": "RANDOM", "base_model_name_or_path": adapter.base or None, "inference_mode": True,
    }  # fmt: skip
    return {CONFIG: json_of(config), WEIGHTS: file_of({EMBEDDINGS: prompt})}


def _named(path: str, update: LowRank, embedding: bool) -> dict[str, Tensor]:
    path = PREFIX + path
    if embedding:
        named = {f"{path}.lora_embedding_A": transposed(update.down), f"{path}.lora_embedding_B": update.up}
    else:
        named = {f"{path}.lora_A.weight": update.down, f"{path}.lora_B.weight": update.up}
    return named | ({} if update.magnitude is None else {f"{path}.lora_magnitude_vector": update.magnitude})


def _by_module(updates: Mapping[str, LowRank], modules: Modules) -> dict[str, LowRank]:
    """The updates of transformers' modules. Raises Unsupported, naming every weight that has no module there."""
    homeless = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in updates if name not in modules.homes})
    if homeless:
        raise Unsupported(f"PEFT's format has no place for {', '.join(homeless)}.", "Adapt other weights.")
    paths = [path for path in dict.fromkeys(modules.homes[name] for name in updates) if not modules.is_stack(path)]
    pieces = {path: modules.held[path] for path in paths}
    return {path: together([updates.get(p.name) for p in held], held, modules) for path, held in pieces.items()}


def _routes(path: str, modules: Modules) -> bool:
    """Routers are modules in some versions of transformers, and parameters in others."""
    return modules.held[path][0].name.endswith(".router")


def _as_stored(name: str, tensor: Tensor, modules: Modules) -> Tensor:
    views = next(piece.views for piece in modules.held[_home_of(name, modules)] if piece.name == name)
    return stored([tensor], [views], name.endswith(".bias"))


def _home_of(name: str, modules: Modules) -> str:
    """Raises Unsupported for what transformers holds together with something else."""
    path = modules.homes.get(name)
    if path is None or len(modules.held[path]) > 1:
        raise Unsupported(f"PEFT's format has no place for {name}, whole.", "Adapt other weights.")
    return path


def _spelled(name: str, modules: Modules) -> str:
    path = _home_of(name, modules)
    return path if name.endswith(".bias") else f"{path}.weight"


def _alpha(update: LowRank, rslora: bool) -> float:
    alpha = update.scale * (math.sqrt(update.rank) if rslora else update.rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _config(
    adapter: Adapter, modules: Modules, ranks: dict[str, int], alphas: dict[str, float], parameters: list[str]
) -> dict[str, Any]:
    rank, alpha = (Counter(d.values()).most_common(1)[0][0] if d else 8 for d in (ranks, alphas))
    saved = [_spelled(name, modules) for name in adapter.replaced]
    biases = [name for name in saved if name.endswith(".bias")]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "fan_in_fan_out": False,
        "bias": "all" if biases else "none",
        "target_modules": _targets(set(ranks) - set(parameters), modules),
        "target_parameters": parameters or None,
        "modules_to_save": sorted(n.removesuffix(".weight") for n in saved if n not in biases) or None,
        "rank_pattern": {re.escape(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(path): a for path, a in alphas.items() if a != alpha},
    }


def _targets(held: set[str], modules: Modules) -> list[str]:
    """The modules' last names, where these mean no other module; else whole paths."""
    short = tuple(sorted({path.rpartition(".")[2] for path in held}))
    meant = {path for path in modules.matrices() if path in modules.held and _among(short, path)}
    return list(short) if meant == held else sorted(held)
