"""Options that several commands share: which model, how it runs, how it samples. Defaults live in the dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from . import console

if TYPE_CHECKING:
    from ..runtime.engine import GenerateOptions
    from ..runtime.session import Session

model_argument = click.argument("model")

SAMPLING = {  # option -> the field of SamplingParams it sets, its type, its help
    "temperature": ("temperature", float, "0: always the likeliest token; 1: as the model was trained."),
    "top-k": ("top_k", int, "Draw from the K likeliest tokens; 0: from all."),
    "top-p": ("top_p", float, "Draw from the likeliest tokens that make up this probability; 1: from all."),
    "min-p": ("min_p", float, "Leave out tokens below this share of the likeliest one's probability; 0: none."),
    "repetition-penalty": ("repetition", float, "Makes tokens that occurred less likely; 1: off."),
    "presence-penalty": ("presence", float, "Taken from the score of tokens in the answer, once; 0: off."),
    "frequency-penalty": ("frequency", float, "Taken from it for each occurrence; 0: off."),
}


def _stack(options: list[Callable]) -> Callable:
    """Several decorators as one; the first comes first in the help."""

    def decorate(function: Callable) -> Callable:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


KV_BITS = {"8": "int8", "16": "float16", "32": "float32"}


def kv_bits_option() -> Callable:
    """--kv-bits, as the cache's `kv_dtype`."""
    return click.option(
        "--kv-bits", "kv_dtype", type=click.Choice(list(KV_BITS)),
        callback=lambda ctx, param, value: KV_BITS.get(value),
        help="Of each key and value in the cache; default: the backend's choice, 16 (32 with --exact).",
    )  # fmt: skip


def runtime_options(context: bool = True, kv_bits: bool = False) -> Callable:
    """--backend, --exact, --threads; with --context and --kv-bits where they make sense."""
    options = [
        click.option("--backend", metavar="NAME", help="reference, cpu, cuda, mlx, …; default: the best one here."),
        click.option("--exact", is_flag=True, help="float32 activations, cache and products throughout."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads; default: one a core."),
    ]
    if context:
        help = "Tokens of prompt and answer together; default: what the model was made for, up to 8192."
        options.append(click.option("--context", type=click.IntRange(1), help=help))
    if kv_bits:
        options.append(kv_bits_option())
    return _stack(options)


def sampling_options() -> Callable:
    """How tokens are drawn. What is not given (None) is the model's own, from its generation_config.json."""
    options = [click.option(f"--{name}", type=type, help=help) for name, (_, type, help) in SAMPLING.items()]
    options += [
        click.option(
            "--logit-bias", "logit_bias", metavar="TOKEN:BIAS", multiple=True,
            help="Added to a token's score; the token by id or by its text. May be given several times.",
        ),
        click.option("--seed", type=int, help="Same seed, same text; default: another one each time."),
        click.option("--stop", multiple=True, help="A text that ends the answer. May be given several times."),
        click.option("--ignore-eos", is_flag=True, help="Go on where the model would end."),
    ]  # fmt: skip
    return _stack(options)


def adapter_option() -> Callable:
    """--adapter, as a list of (folder, weight) called `adapters`."""
    return click.option(
        "--adapter", "adapters", metavar="PATH[:WEIGHT]", multiple=True,
        callback=lambda ctx, param, values: [adapter_choice(value) for value in values],
        help="An adapter's folder (PEFT's or mlx-lm's); WEIGHT 1 is as trained. Several add up.",
    )  # fmt: skip


def only(what: str, holds: object, *names: str) -> None:
    """Options (by their parameters' names) that mean something for `what` alone are refused, rather than ignored, where
    that does not hold and they were given. Raises BadOption."""
    from click.core import ParameterSource

    from ..errors import BadOption

    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name) not in (ParameterSource.DEFAULT, None)
        if parameter.name in names and given and not holds:
            raise BadOption(f"{parameter.opts[0]} is for {what}.", "Leave it out.")


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def size(option: str, text: str) -> int:
    """80MB, 700M, 1.2 GiB, 75000000 -> bytes. Raises BadOption, naming the option."""
    import re

    from ..errors import BadOption

    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]?i?)b?\s*", text.lower())
    if not found or found[2] not in UNITS or float(found[1]) <= 0:
        raise BadOption(f"{option} {text!r} is no size.", "Write it such as 80MB, 1.2GB or 500MiB.")
    return int(float(found[1]) * UNITS[found[2]])


def adapter_choice(text: str) -> tuple[str, float]:
    """PATH[:WEIGHT] -> (path, weight). Raises BadOption for weights that make no sense."""
    import math

    from ..errors import BadOption

    path, colon, weight = text.rpartition(":")
    try:
        number = float(weight)
    except ValueError:
        return text, 1.0  # a colon in the path
    if not colon or not path:
        return text, 1.0
    if not math.isfinite(number):
        raise BadOption(f"{text}: a weight of {weight} makes no sense.", "Give a number, such as 0.5.")
    return path, number


def open_model(model: str, adapters: Sequence[tuple[str, float]] = (), **options: Any) -> Session:
    """`open_session`, with what is fetched and loaded shown on stderr, and the adapters attached."""
    from ..runtime.session import open_session

    with console.progress("Loading", unit="bytes") as progress:
        session = open_session(
            model, progress=lambda event: progress.update(event.done, event.total), say=console.status, **options
        )
    try:
        session.adapt(adapters)
    except BaseException:
        session.close()
        raise
    return session


def generate_options(
    session: Session, given: Mapping[str, Any], max_tokens: int, top_logprobs: int = 0
) -> GenerateOptions:
    """What the model's authors chose, changed by the options that were given (those of `sampling_options`). Raises
    BadOption for values that make no sense."""
    import os
    from dataclasses import replace

    from ..runtime.engine import GenerateOptions

    names = {name.replace("-", "_"): field for name, (field, _, _) in SAMPLING.items()}
    chosen = {field: given[name] for name, field in names.items() if given.get(name) is not None}
    return GenerateOptions(
        max_tokens=max_tokens,
        sampling=replace(session.default_sampling(), top_logprobs=top_logprobs, **chosen),
        seed=int.from_bytes(os.urandom(4), "big") if given.get("seed") is None else given["seed"],
        stop_ids=frozenset() if given.get("ignore_eos") else None,
        logit_bias=tuple(_bias(session, text) for text in given.get("logit_bias", ())),
    )


def _bias(session: Session, text: str) -> tuple[int, float]:
    """TOKEN:BIAS -> (id, bias)"""
    from ..errors import BadOption

    token, _, bias = text.rpartition(":")
    hint = "Use ID:BIAS or TEXT:BIAS, for example 42:-5 or ' dog':2.5"
    try:
        value = float(bias)
    except ValueError:
        raise BadOption(f"--logit-bias {text!r} does not end in a number.", hint) from None
    if not token:
        raise BadOption(f"--logit-bias {text!r} names no token.", hint)
    if token.isdecimal():
        return int(token), value
    ids = session.tokenizer.encode(token, add_special=False)
    if len(ids) != 1:
        raise BadOption(f"--logit-bias: {token!r} is {len(ids)} tokens of this model, not one.", hint)
    return ids[0], value
