"""An output head that is stored as the embedding: what becomes of the pair when one of them changes.

By default what PEFT's merged model holds: a LoRA on either goes into the shared tensor; a tensor saved
whole (modules_to_save) unties the two, and the config says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lorasurgery.errors import MatchError, UsageError
from lorasurgery.layouts import EMBEDDINGS, HEADS
from lorasurgery.model import Model
from lorasurgery.naming import Part
from lorasurgery.target import Share, Target
from lorasurgery.targets import Resolved, same_values

POLICIES = ("auto", "shared", "untie", "refuse")
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
_HEAD_OF = {
    "gpt_neox": "embed_out.weight", "whisper": "proj_out.weight", "roberta": "lm_head.decoder.weight",
    "xlm-roberta": "lm_head.decoder.weight", "camembert": "lm_head.decoder.weight",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settled:
    """`resolved` without tied heads among the missing; `copies`: new tensor -> the stored one it begins as."""

    resolved: Resolved
    copies: Mapping[str, str] = field(default_factory=dict)
    untied: bool = False
    notes: tuple[str, ...] = ()


def settle(model: Model, resolved: Resolved, policy: str) -> Settled:
    """Apply a tie policy; models whose head has a tensor of its own are left as they are.

    Raises UsageError for an unknown policy, MatchError under `refuse`.
    """
    if policy not in POLICIES:
        raise UsageError(f"--tied {policy}: unknown. Known: {', '.join(POLICIES)}.")
    pair = tied_pair(model)
    if pair is None:
        return Settled(resolved)
    head, embedding = pair
    sites = [s for name, s in resolved.missing.items() if name.endswith(HEADS)]
    missing = {n: s for n, s in resolved.missing.items() if not n.endswith(HEADS)}
    info = model.weights.info(embedding)
    shares = tuple(Share(site, Part(embedding), info, turned=False) for site in sites)
    wholes = dict(resolved.replaced)
    resolved = replace(resolved, missing=missing, replaced=wholes)
    adapted = embedding in resolved.targets
    if not (shares or adapted or head in wholes or embedding in wholes):
        return Settled(resolved)
    if policy == "refuse":
        raise MatchError(
            f"{model.path}: {head} is tied to {embedding}, and the adapter changes one of them. "
            "Choose --tied shared or --tied untie."
        )
    twins = head in wholes and same_values(wholes[head], wholes.get(embedding))
    if twins:
        del wholes[head]
    # beside the factors of an adapted layer PEFT keeps its base, which is no change
    own = (head in wholes and not shares) or (embedding in wholes and not adapted and not twins)
    if policy == "untie" or (policy == "auto" and own):
        return _untie(resolved, pair, shares)
    return _share(resolved, pair, shares)


def tied_pair(model: Model) -> tuple[str, str] | None:
    """The head's name and the stored embedding that it shares, if the head has no tensor of its own."""
    kind = str(model.config.get("model_type", ""))
    languages = [a for a in model.config.get("architectures") or () if a.endswith(_LANGUAGE_MODELS)]
    if not languages or model.config.get("tie_word_embeddings") is False:
        return None
    if any(name.endswith(HEADS) for name in model.weights):
        return None
    embedding = next((n for end in EMBEDDINGS for n in model.weights if n.endswith(end)), None)
    if embedding is None:
        return None
    masked = languages[0].endswith("ForMaskedLM")
    usual = "cls.predictions.decoder.weight" if masked else "lm_head.weight"
    return _HEAD_OF.get(kind, usual), embedding


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a model whose head has become a tensor of its own."""
    changed = {**config, "tie_word_embeddings": False}
    text = config.get("text_config")
    if isinstance(text, dict) and "tie_word_embeddings" in text:
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed


def _untie(resolved: Resolved, pair: tuple[str, str], shares: tuple[Share, ...]) -> Settled:
    head, embedding = pair
    targets = dict(resolved.targets)
    if shares:
        targets[head] = Target(head, shares)
    note = f"{head} is now a tensor of its own, and tie_word_embeddings is false."
    copies = {head: embedding}
    return Settled(replace(resolved, targets=targets), copies, untied=True, notes=(note,))


def _share(resolved: Resolved, pair: tuple[str, str], shares: tuple[Share, ...]) -> Settled:
    head, embedding = pair
    targets, wholes = dict(resolved.targets), dict(resolved.replaced)
    if head in wholes:
        wholes.setdefault(embedding, wholes.pop(head))
    before = targets[embedding].shares if embedding in targets else ()
    # ensure_weight_tying stores one trained change twice: it is merged once
    kept = tuple(s for s in shares if not any(_copies(s, other) for other in before))
    if before or kept:
        targets[embedding] = Target(embedding, before + kept)
    note = (
        f"{head} is tied to {embedding}: the change is merged into the shared tensor and acts on "
        "both. --tied untie keeps them apart, as the unmerged adapter does."
    )
    return Settled(replace(resolved, targets=targets, replaced=wholes), notes=(note,))


def _copies(share: Share, other: Share) -> bool:
    """Whether two sites hold the same factors."""
    import numpy as np

    one, two = share.site.load(), other.site.load()
    same = all(np.array_equal(one[k], two[k]) for k in one.keys() & two.keys())
    return same and share.site.config == other.site.config and share.weight == other.weight
