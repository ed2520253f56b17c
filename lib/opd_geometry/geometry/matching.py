"""Which matrix of one checkpoint is which of another, where their paths differ.

Exact names come first. What is left is matched by a normal form of the path, which
leaves off what wrappers put there and writes hub names as transformers 5 does; what is
left then by its tail, from the blocks on, whatever stands before; and the last by what
transformers itself renames when it loads that family. A match counts only where it is
one to one and both have the same shape.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

# Put into the path by a wrapper, wherever it is.
WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "_ddp_module",
    "original_module",
    "base_layer",
}
# At the head of a path: what holds the language model or the whole model.
ROOTS = {
    "model",
    "base_model",
    "pretrained_model",
    "thinker",
    "language_model",
    "text_model",
    "transformer",
    "gpt_neox",
    "llm",
    "app",
    "dcp",
    "actor",
    "policy",
    "student",
    "state_dict",
}
# Names of the hub and of Megatron -> names of transformers 5.
RENAMED = {
    "block_sparse_moe": "mlp",
    "feed_forward": "mlp",
    "ffn": "mlp",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
    "tok_embeddings": "embed_tokens",
    "unembed_tokens": "lm_head",
    "self_attention": "self_attn",
    "linear_proj": "o_proj",
    "linear_fc2": "down_proj",
    "word_embeddings": "embed_tokens",
    "output_layer": "lm_head",
    "shared_experts": "shared_expert",
}
# Their queries and keys have the rows of each head in another order than transformers'
# own (rotary embedding by pairs, not by halves), so these are never matched by path.
ROTARY = {"wq", "wk"}


def normal_form(name: str) -> str:
    """A tensor's path without what wrappers add, under the names of transformers 5.

    >>> normal_form("module.model.layers.0.block_sparse_moe.experts.1.w2.weight")
    'layers.0.mlp.experts.1.down_proj.weight'
    """
    modules = [m for m in name.split(".") if m not in WRAPPERS]
    while len(modules) > 2 and modules[0] in ROOTS:
        modules = modules[1:]
    if modules[:1] == ["output"]:  # Llama's own name of the head
        modules = ["lm_head", *modules[1:]]
    if "vision_tower" in modules[:1]:
        modules = [m for m in modules if m != "vision_model"]
    modules = [RENAMED.get(m, m) for m in modules]
    path = ".".join(modules)
    # Llama's own values and outputs have the rows that transformers' have.
    path = re.sub(r"\.attention\.w([vo])(?=\.|$)", r".self_attn.\1_proj", path)
    path = re.sub(r"\.router\.layer\.", ".router.", path)
    path = re.sub(r"(^|\.)mlp\.router\.", r"\1mlp.gate.", path)
    path = re.sub(r"\.gate\.moe_statics\.", ".moe_statics.", path)
    path = re.sub(r"\.mlp\.(\d+)\.", r".mlp.experts.\1.", path)  # Granite's stacks
    modules = path.split(".")
    if modules[-1] != "weight" and "experts" in modules:
        modules = [*modules, "weight"]
    return ".".join(modules)


# Where a model's own names begin; its towers' and stacks' names are kept before them.
ANCHORS = {"layers", "layer", "h", "blocks", "block", "embed_tokens", "wte", "lm_head"}
ANCHORS |= {"norm", "ln_f", "final_layernorm", "word_embeddings", "embed_in"}
OTHER_MODELS = (
    "encoder depth vision visual image video audio speech talker mtp nextn draft "
    "teacher ref reference critic reward value ema old tower projector qformer merger "
    "connector cross target judge rm prm verifier"
)
KEPT = frozenset(re.findall(r"\w+", OTHER_MODELS))


def tail_form(name: str) -> str:
    """A normal form less whatever leads to the blocks and tells of no other model.

    >>> tail_form("engine.net.model.layers.0.mlp.up_proj.weight")
    'layers.0.mlp.up_proj.weight'
    """
    modules = normal_form(name).split(".")
    first = next((i for i, m in enumerate(modules) if m in ANCHORS), 0)
    kept = [m for m in modules[:first] if KEPT & {*m.lower().split("_")}]
    return ".".join([*kept, *modules[first:]])


def unwrapped(name: str) -> str:
    """A name less what wrappers and towers put in front, for a table to show.

    >>> unwrapped("language_model.model.layers.0.q_proj.weight")
    'model.layers.0.q_proj.weight'
    """
    modules = [m for m in name.split(".") if m not in WRAPPERS]
    kept = [m for m in modules if m not in ROOTS - {"model", "transformer", "gpt_neox"}]
    while kept[:2] == ["model", "model"]:
        kept = kept[1:]
    return ".".join(kept)


def match(
    before: Mapping[str, tuple[int, ...]],
    after: Mapping[str, tuple[int, ...]],
    families: Collection[str] = (),
) -> dict[str, str]:
    """Names of one checkpoint to those of another.

    Args:
        before, after: name to shape.
        families: of models, as config.json names them, outermost first.

    Returns:
        Every name that both have, then those whose normal forms agree, one to one and
        with equal shapes; in the order of ``before``.
    """
    found = {name: name for name in before if name in after}
    for step in (lambda: normal_form, lambda: tail_form, lambda: loaded_form(families)):
        if len(found) not in (len(before), len(after)):
            found |= _by_form(before, after, found, step())
    return {name: found[name] for name in before if name in found}


def loaded_form(families: Collection[str]) -> Callable[[str], str]:
    """The tail of a name after the renamings of transformers' own loader.

    Only where a tensor is renamed and not changed: no order of rows is.

    >>> loaded_form(["gpt_neox"])("embed_out.weight")
    'lm_head.weight'
    """
    if not families:
        return tail_form
    from transformers import conversion_mapping
    from transformers.core_model_loading import PrefixChange, WeightRenaming

    known: list[str] = [*families]
    for family in families:
        known += _classes_of(family)
    rules = [
        rule
        for family in dict.fromkeys(known)
        for rule in conversion_mapping.get_checkpoint_conversion_mapping(family) or ()
        if type(rule) in (PrefixChange, WeightRenaming)
    ]

    def form(name: str) -> str:
        for rule in rules:
            name = rule.rename_source_key(name)[0]
        return tail_form(name)

    return form


def _classes_of(family: str) -> list[str]:
    """Names of the family's classes, under which some renamings stand."""
    from transformers.models.auto import modeling_auto

    found: list[str] = []
    for table in ("MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"):
        names = getattr(modeling_auto, table).get(family, ())
        found += [names] if isinstance(names, str) else names
    return found


def _by_form(
    before: Mapping[str, tuple[int, ...]],
    after: Mapping[str, tuple[int, ...]],
    found: Mapping[str, str],
    form_of: Callable[[str], str],
) -> dict[str, str]:
    """Further names whose forms agree, one to one and with equal shapes."""
    known = {*found.values()}
    # A form that another match has already is not free.
    taken = {form_of(name) for name in found}
    left = [n for n in before if n not in found], [n for n in after if n not in known]
    forms: list[dict[str, list[str]]] = [defaultdict(list), defaultdict(list)]
    for names, by_form in zip(left, forms, strict=True):
        for name in names:
            if not ROTARY & {*name.split(".")}:
                by_form[form_of(name)].append(name)
    pairs = {}
    for form, names in forms[0].items():
        others = forms[1].get(form, [])
        if form in taken or len(names) != 1 or len(others) != 1:
            continue
        if before[names[0]] == after[others[0]]:
            pairs[names[0]] = others[0]
    return pairs


def renamings(pairs: Mapping[str, str]) -> list[str]:
    """Pairs of names that differ, as few lines: what differs, and how often.

    >>> renamings({"model.layers.0.q.weight": "m.layers.0.q.weight", "a": "a"})
    ['model.layers.*.q.weight is m.layers.*.q.weight']
    """
    alike: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for before, after in pairs.items():
        if before != after:
            alike[_differing(before, after)].append((before, after))
    return [
        f"{_folded(before)} is {_folded(after)}"
        + (f", and {len(rest)} more alike" if rest else "")
        for (before, after), *rest in alike.values()
    ]


def _folded(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _differing(before: str, after: str) -> tuple[str, str]:
    """What is left of two names without the head and the tail that they share."""
    a, b = before.split("."), after.split(".")
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    fold = [re.sub(r"\d+", "*", ".".join(x)) for x in (a, b)]
    return fold[0], fold[1]
