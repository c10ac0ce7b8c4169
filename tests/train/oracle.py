"""The same run in torch, transformers and peft: from the same initial adapter, over the same batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from ondevice.train import Data, Settings
from ondevice.train.batches import batches_of, steps_of_rows
from ondevice.train.schedule import rate_at


def peft_preferences(model: Path, adapter: Path, data: Data, settings: Settings) -> Iterator[tuple[float, float]]:
    """Loss and gradient norm of each step of DPO or ORPO, written down from the papers' formulas."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network = pytest.importorskip("peft").PeftModel.from_pretrained(network, adapter, is_trainable=True)
    learnt = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, weight_decay=0)

    def logprob(sequence):
        ids = torch.from_numpy(sequence.ids).long()
        logprobs = network(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        return logprobs[torch.from_numpy(sequence.learnt[1:])]

    def dpo(chosen, rejected):
        with torch.no_grad(), network.disable_adapter():
            before = logprob(chosen).sum() - logprob(rejected).sum()
        return -torch.nn.functional.logsigmoid(
            settings.beta * (logprob(chosen).sum() - logprob(rejected).sum() - before)
        )

    def orpo(chosen, rejected):
        good, bad = logprob(chosen).mean(), logprob(rejected).mean()
        ratio = (good - torch.log1p(-good.exp())) - (bad - torch.log1p(-bad.exp()))
        return -good - settings.beta * torch.nn.functional.logsigmoid(ratio)

    of_pair = {"dpo": dpo, "orpo": orpo}[settings.objective]
    for step, rows in enumerate(islice(steps_of_rows(data.train, settings), settings.steps), 1):
        pairs = [data.train[i].sequences for row in rows for i in row]
        loss = torch.stack([of_pair(*pair) for pair in pairs]).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learnt, settings.clip)
        optimizer.param_groups[0]["lr"] = rate_at(settings, step, settings.steps)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), norm.item()


def peft_losses(model: Path, adapter: Path | None, data: Data, settings: Settings) -> Iterator[float]:
    """The loss of each step, float32, before its update. adapter: where it begins; None: the whole model is trained."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        prompt = json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
        network = pytest.importorskip("peft").PeftModel.from_pretrained(network, adapter, is_trainable=not prompt)
        if prompt:  # peft reads these frozen only
            network.prompt_encoder.requires_grad_(True)
    network.eval()  # no dropout of its own; gradients flow all the same
    learnt = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, weight_decay=settings.weight_decay)
    for step, rows in enumerate(islice(steps_of_rows(data.train, settings), settings.steps), 1):
        (batch,) = batches_of(data.train, rows, len(rows))
        ids, targets = (torch.from_numpy(a).long() for a in (batch.ids, batch.targets))
        mask = torch.arange(ids.shape[1])[None] < torch.from_numpy(batch.step.lengths)[:, None]
        logits = network(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :].float()  # a prompt says more
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, settings.clip)
        optimizer.param_groups[0]["lr"] = rate_at(settings, step, settings.steps)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
