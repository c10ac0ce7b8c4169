"""`ondevice generate MODEL --prompt …`: continue a text, or answer one message."""

from __future__ import annotations

import json
import math
import sys
from contextlib import closing
from itertools import zip_longest

import click

from . import console
from .model_options import (
    adapter_option,
    generate_options,
    model_argument,
    open_model,
    runtime_options,
    sampling_options,
)

MAX_TOKENS = 256


@click.command("generate")
@model_argument
@click.option("--prompt", help="The text to continue; - reads it from stdin, as does a pipe without --prompt.")
@click.option("--chat", is_flag=True, help="The prompt is a message: the model's chat template is put around it.")
@click.option("--system", help="With --chat: what the model is told first.")
@click.option("--max-tokens", type=click.IntRange(1), help=f"Default: {MAX_TOKENS}; 1 with --top-logprobs.")
@click.option("--compare", is_flag=True, help="With --adapter: the model's own answer and the adapted one's.")
@click.option("--top-logprobs", default=0, type=click.IntRange(0), help="List the N likeliest next tokens instead.")
@sampling_options()
@adapter_option()
@runtime_options(kv_bits=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, at the end.")
def command(
    model, prompt, chat, system, max_tokens, compare, top_logprobs, stop, as_json,
    backend, exact, context, threads, kv_dtype, adapters, **sampling,
):  # fmt: skip
    """Continue a text with MODEL (a folder, a .gguf file, a Hub repo or a catalog name).

    The prompt is taken as it is, plus what the model's tokenizer itself adds; special tokens in it count as such. From
    stdin, one newline at its end is left out. Text goes to stdout as it comes, speed to stderr. What is not given of
    temperature and the like is as the model's generation_config.json says; without one, the likeliest token is taken.
    """
    from ..errors import BadOption

    if system is not None and not chat:
        raise BadOption("--system has no place in a plain prompt.", "Add --chat, or put it in the prompt yourself.")
    if compare and not adapters:
        raise BadOption("--compare has nothing to compare with.", "Add --adapter PATH.")
    text = _read_prompt(prompt)
    runtime = {"backend": backend, "exact": exact, "context": context, "threads": threads, "kv_dtype": kv_dtype}
    with open_model(model, adapters, **runtime) as session:
        max_tokens = max_tokens or (1 if top_logprobs else MAX_TOKENS)
        options = generate_options(session, sampling, max_tokens=max_tokens, top_logprobs=top_logprobs)
        if chat:
            messages = [] if system is None else [{"role": "system", "content": system}]
            ids = session.encode_messages([*messages, {"role": "user", "content": text}])
        else:
            ids = session.encode_prompt(text)
        if compare:
            answers = _both(session, adapters, ids, options, stop)
        else:
            answers = [(*stream(session.generate(ids, options, stop), not as_json and not top_logprobs), "")]
        answers = [
            (finished, describe(session, ids, options, tokens, finished), who) for tokens, finished, who in answers
        ]
    if as_json:
        console.json({"model": model, **_compared([facts for _, facts, _ in answers]), "adapters": _named(adapters)})
        return
    if compare and not top_logprobs:
        console.side_by_side([(who, finished.text) for finished, _, who in answers])
    for finished, facts, who in answers:
        if who and top_logprobs:
            console.answer(f"{who}:")
        for token in facts.get("top_logprobs", ()):
            _print_top(token)
        _print_stats(facts, finished, who)


def _both(session, adapters, ids, options, stop) -> list[tuple]:
    """(tokens, finished, who) of the model alone, then with its adapters: the same draws, so that they alone differ."""
    answers = []
    for who, attached in (("base", []), ("with adapter", adapters)):
        session.adapt(attached)
        answers.append((*stream(session.generate(ids, options, stop), False), who))
    return answers


def _compared(facts: list[dict]) -> dict:
    """For programs: one answer as it is; two, and the first token in which they differ."""
    if len(facts) == 1:
        return facts[0]
    base, tuned = (f["token_ids"] for f in facts)
    differing = (i for i, (a, b) in enumerate(zip_longest(base, tuned)) if a != b)
    return {"base": facts[0], "tuned": facts[1], "first_difference": next(differing, None)}


def _named(adapters) -> list[dict]:
    return [{"path": path, "weight": weight} for path, weight in adapters]


def _read_prompt(prompt: str | None) -> str:
    from ..errors import BadFile, BadOption

    if prompt not in (None, "-"):
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise BadOption("There is no prompt.", "Give --prompt TEXT, or pipe a text in.")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError:
        raise BadFile("What came from stdin is not UTF-8 text.", "Convert it first: iconv -t utf-8.") from None


def stream(events, show: bool):
    """Runs an answer to its end, shown as it comes if `show`: (its tokens, TextFinished)."""
    from ..runtime.text import Piece

    tokens = []
    try:
        with closing(events):
            for event in events:
                if isinstance(event, Piece):
                    tokens.append(event.token)
                text = event.text if isinstance(event, Piece) else event.last_text
                if show and text:
                    console.answer(text, end="")
    finally:
        if show and tokens:
            console.answer()
    return tokens, event


def describe(session, prompt_ids, options, tokens, finished) -> dict:
    """An answer for programs: what went in, what came out, how fast."""
    from ..machine import peak_memory_bytes

    facts = {
        "text": finished.text,
        "token_ids": finished.token_ids,
        "prompt_token_ids": list(prompt_ids),
        "finish_reason": finished.reason,
        "backend": session.backend.name,
        "device": session.backend.info().device,
        "seed": options.seed,
        "reused_tokens": finished.reused_tokens,
        "load_seconds": session.load_seconds,
        "time_to_first_token_seconds": finished.first_token_seconds,
        "prefill_tokens_per_second": finished.prefill_tokens_per_second,
        "decode_tokens_per_second": finished.decode_tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if options.sampling.top_logprobs:
        facts["top_logprobs"] = [
            {
                **_likelihood(session, token.id, token.logprob),
                "top": [_likelihood(session, id, logprob) for id, logprob in token.top],
            }
            for token in tokens
        ]
    return facts


def _likelihood(session, id: int, logprob: float) -> dict:
    return {"id": id, "token": session.tokenizer.piece(id), "logprob": logprob, "probability": math.exp(logprob)}


def _print_top(token: dict) -> None:
    """The list of what could have come, the chosen one marked."""
    rows = [
        (
            "*" if t["id"] == token["id"] else "",
            f"{t['probability']:8.3%}",
            json.dumps(t["token"], ensure_ascii=False),
            t["id"],
        )
        for t in token["top"]
    ]
    console.table(rows, ("", "    prob.", "token", "id"))


def _print_stats(facts: dict, finished, who: str = "") -> None:
    count, seconds = len(facts["token_ids"]), facts["time_to_first_token_seconds"]
    prefill, decode = facts["prefill_tokens_per_second"], facts["decode_tokens_per_second"]
    console.status(
        f"{who}{': ' if who else ''}prompt {finished.prompt_tokens} tokens, {prefill:.1f} a second; "
        f"first token after {seconds:.2f} s; "
        f"{count} tokens, {decode:.1f} a second, ended by {facts['finish_reason']}; "
        f"{facts['backend']}: {facts['device']}; {facts['peak_memory_bytes'] / 1e6:.0f} MB"
    )
