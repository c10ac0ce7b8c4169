"""Our models in EleutherAI's lm-evaluation-harness (the extra `eval`), under the name `ondevice`.

The harness brings tasks, prompts, metrics; this class gives it log-likelihoods and continuations, batched. Importing
the module registers the name, for `lm_eval` and for `simple_evaluate(model="ondevice")`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ...backends.base import SamplingParams
from ...runtime.session import Session, open_session
from . import batch

ROWS = 16  # answers written side by side
MOST_NEW_TOKENS = 256  # where a task does not say


@register_model("ondevice")
class OnDeviceLM(TemplateLM):
    """One model. Give a Session, or `pretrained` (and backend, exact, …) for `open_session`."""

    def __init__(
        self,
        session: Session | None = None,
        pretrained: str | None = None,
        batch_size: int | str | None = None,
        max_length: int | None = None,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ):
        """batch_size: answers written side by side. progress: told what is done, how many requests, of how many.
        device, max_batch_size: the harness gives them to every model; --backend chooses here."""
        super().__init__()
        self.session = session or open_session(pretrained, **options)
        self.tokenizer = self.session.tokenizer
        self.max_length = max_length or self.session.capacity - len(self.session.decoder.front)
        self.rows = batch_size if isinstance(batch_size, int) else ROWS
        self.progress = progress

    # ------------------------------------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        """The token that stands where there is nothing: the end of a text, or of an answer."""
        named = self.tokenizer.named_ids
        return named["eos"] if "eos" in named else min(self.session.stop_ids, default=0)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        first = self.tokenizer.piece(self.prefix_token_id)
        special = not string.startswith(first) if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, add_special=special)

    @property
    def tokenizer_name(self) -> str:
        return str(self.session.path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.session.template.render(chat_history, add_generation_prompt)

    # ------------------------------------------------------------------------------------------------ requests

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitted(context, continuation) for _, context, continuation in requests]
        found: dict[int, tuple[float, bool]] = {}
        for i, score in batch.score(self.session.decoder, pairs):
            found[i] = (score.logprob, score.greedy)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
            self.progress("Scoring", len(found), len(pairs))
        return [found[i] for i in range(len(pairs))]

    def _fitted(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """What the model can hold: the last of both, as the harness's own models cut."""
        continuation = continuation[-self.max_length :]
        return (context + continuation)[-(self.max_length + 1) : -len(continuation)], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            own = [(None, *make_disjoint_window(window)) for window in cut]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), -len(requests[i].args[0])))
        texts: dict[int, str] = {}
        for at in range(0, len(order), self.rows):
            group = order[at : at + self.rows]
            while group:  # one way of drawing at a time
                same = [i for i in group if requests[i].args[1] == requests[group[0]].args[1]]
                texts |= zip(same, self._continue([requests[i].args for i in same]), strict=True)
                group = [i for i in group if i not in texts]
            self.progress("Answering", len(texts), len(requests))
        return [texts[i] for i in range(len(requests))]

    def _continue(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        wanted = normalize_gen_kwargs(requests[0][1], MOST_NEW_TOKENS)
        room = min(wanted["max_gen_toks"], self.max_length - 1)
        prompts = [
            (self.tok_encode(text) or [self.prefix_token_id])[-(self.max_length - room) :] for text, _ in requests
        ]
        stops = [stop for stop in wanted["until"] if stop]
        shown = [""] * len(prompts)
        streams = [self.tokenizer.stream() for _ in prompts]

        def stopped(row: int, id: int) -> bool:
            shown[row] += streams[row].push(id)
            return any(stop in shown[row] for stop in stops)

        sampling = _sampling(wanted)
        batch.generate(self.session.decoder, prompts, room, frozenset({self.eot_token_id}), sampling, stopped=stopped)
        texts = [_cut(text + stream.flush(), stops) for text, stream in zip(shown, streams, strict=True)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request, text)
        return texts


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _sampling(wanted: Mapping[str, Any]) -> SamplingParams:
    if not wanted.get("do_sample"):
        return SamplingParams()
    given = {name: wanted[name] for name in ("temperature", "top_k", "top_p", "min_p") if wanted.get(name) is not None}
    return SamplingParams(**({"temperature": 1.0} | given))
