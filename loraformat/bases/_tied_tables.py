"""Tables of tokens in a state dict: which may grow, and which the configuration ties together.

A model with tied embeddings uses one table at both ends. Its checkpoint mostly holds it once, and then the output
layer has no tensor of its own; the name that it would have is known from the family.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from loraformat.bases import Site
from loraformat.strict_json import JsonValue

INNER_CONFIGS: Final = ("text_config", "llm_config", "language_config")
"""Objects in a configuration that describe the language model inside a larger one."""

_TIE: Final = "tie_word_embeddings"
_INPUTS: Final = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings"})
_OUTPUTS: Final = frozenset({"lm_head", "embed_out"})
"""Last parts of the names of tables at the two ends of a model."""

_GROWING: Final = _INPUTS | _OUTPUTS
_GROWING_ENDS: Final = ("cls.predictions.decoder", "cls.predictions", "lm_head.decoder")
"""Ends of the names of modules with one number, or one row, for each token."""

_HEADS: Final = {
    "bert": "cls.predictions.decoder",
    "roberta": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder",
    "gpt_neox": "embed_out",
}
_USUAL_HEAD: Final = "lm_head"
_USUAL_TABLES: Final = {
    "embed_out": "gpt_neox.embed_in",
    "cls.predictions.decoder": "bert.embeddings.word_embeddings",
    "language_model.lm_head": "language_model.model.embed_tokens",
}
_USUAL_TABLE: Final = "model.embed_tokens"
_WRAPPED: Final = "language_model.model."
"""Prefix of the text model in the older names of models that also see; its head stands beside `model`."""

_WITH_HEAD: Final = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "DoubleHeadsModel")
_OTHER_HEADS: Final = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)


def grows(module: str) -> bool:
    """Say whether a module has one row, or one number, for each token."""
    ends = any(module == end or module.endswith(f".{end}") for end in _GROWING_ENDS)
    return ends or module.rpartition(".")[2] in _GROWING


def tie_sites(sites: Iterable[Site], config: Mapping[str, JsonValue]) -> list[Site]:
    """Return the sites with those of tied tables marked, and one for an output layer that has no tensor of its own."""
    sites = list(sites)
    tables = [site for site in sites if site.parameter == "weight" and _is_end(site.module) and site.weight is not None]
    if not tables or not _are_tied(tables, config):
        return sites
    first = next((site for site in tables if site.module.rpartition(".")[2] in _INPUTS), tables[0])
    group = [site for site in tables if site.stored_shape() == first.stored_shape()]
    names = [site.id for site in group]
    if all(site.module.rpartition(".")[2] in _INPUTS for site in group):
        names.append(f"{_name_head(first.module, config)}.weight")
    elif not any(site.module.rpartition(".")[2] in _INPUTS for site in group):
        names.append(f"{_USUAL_TABLES.get(first.module, _USUAL_TABLE)}.weight")
    tied = {site.id: _tie(site, site.id, names) for site in group}
    extra = [] if len(names) == len(group) else [_tie(first, names[-1], names)]
    return [tied.get(site.id, site) if site.parameter == "weight" else site for site in sites] + extra


def _is_end(module: str) -> bool:
    return module.rpartition(".")[2] in _INPUTS | _OUTPUTS or module.endswith("cls.predictions.decoder")


def _are_tied(tables: Sequence[Site], config: Mapping[str, JsonValue]) -> bool:
    """Say whether the configuration ties tables, in words or by a head that has no tensor."""
    keys = [site.weight.key for site in tables if site.weight is not None]
    if len(set(keys)) < len(keys):  # One tensor under two names, as torch saves tied tables.
        return True
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list | tuple) else ()
    has_head = any(isinstance(name, str) and name.endswith(_WITH_HEAD) for name in named)
    if named and all(isinstance(name, str) and name.endswith(_OTHER_HEADS) for name in named):
        return False  # Its family's word on ties is about models that put out tokens.
    stated = read_tie(config)
    if stated is not None:
        return stated is True
    return has_head and all(site.module.rpartition(".")[2] in _INPUTS for site in tables)


def read_tie(config: Mapping[str, JsonValue]) -> JsonValue:
    """Return what the configuration says of ties, None where it says nothing; an inner one's word counts first."""
    inner = (config.get(key) for key in INNER_CONFIGS)
    stated = [part[_TIE] for part in inner if isinstance(part, Mapping) and _TIE in part]
    return (stated or [config.get(_TIE)])[0]


def _name_head(table: str, config: Mapping[str, JsonValue]) -> str:
    model_type = config.get("model_type")
    head = _HEADS.get(model_type, _USUAL_HEAD) if isinstance(model_type, str) else _USUAL_HEAD
    return f"language_model.{head}" if table.startswith(_WRAPPED) else head


def _tie(site: Site, name: str, names: Iterable[str]) -> Site:
    assert site.weight is not None, "chosen so"
    weight = replace(site.weight, consumers=frozenset(names))
    evidence = site.evidence if name == site.id else "tie_word_embeddings"
    module = name.rpartition(".")[0]
    return replace(site, id=name, module=module, weight=weight, tied=name, evidence=evidence)
