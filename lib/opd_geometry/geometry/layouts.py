"""How families of models name, turn, fuse and stack their weights.

A tensor becomes matrices (outputs, inputs), named as if they had been stored apart:
- Conv1D stores (inputs, outputs) and is turned;
- fused q, k, v and fused gate, up are split in the order of their family;
- a stack of experts (three dimensions) becomes one matrix an expert.
Each matrix has a part of the model (language, vision, ...), and within that part a
role and a layer. Orders that a family has to itself are in the tables below.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from opd_geometry.geometry.storage import FLOAT_DTYPES, Stored

WHOLE = slice(None)

# --- parts -------------------------------------------------------------------------

PARTS = ("language", "vision", "audio", "talker", "mtp", "projector", "other")
# The first that has a component of the path, talkers before the towers inside them.
PART_OF = (
    (
        "talker",
        r"talker\w*|depth_decoder|code2wav|token2wav|code_predictor|tts\w*|vocoder",
    ),
    (
        "projector",
        r"\w*_projector|projector|(patch_)?merger|mlp_AR|deepstack_merger_list|aligner|gen_aligner|"
        r"generation_aligner|connector|resampler\w*|abstractor|q_?former|embed_vision|"
        r"embed_audio|vision_language_adapter|(language|modality)_projection|"
        r"(vision|visual|image|img|image_to_text|audio|speech|sound)_"
        r"(proj\w*|adapter|connector)|image_newline|mlp1",
    ),
    (
        "vision",
        r"visual|vision|vit|vpm|vte|\w*(vision|image|img|visual|video)_(\w+_)?(tower|model|"
        r"encoder|backbone|transformer|embed\w*|processor|module|moe|mlp|expert\w*)|"
        r"vq_?model|sam(_model|_encoder|_vit)?|"
        r"gen(eration)?_(head|embed\w*|vision_model)|siglip\w*|clip_model",
    ),
    (
        "audio",
        r"apm|(audio|speech|sound)_(tower|model|encoder|backbone|embed)|audio|speech|"
        r"(acoustic|semantic)_(tokenizer|encoder)\w*|whisper\w*|perception|ctc_\w+",
    ),
    ("mtp", r"mtp\w*|nextn\w*|eagle\w*|medusa\w*"),
    (
        "other",
        r"(protein|molecule|graph|point(_?cloud)?|time_?series|(word_)?timestamp|action|"
        r"motion|depth|touch|sensor)_(tower|model|encoder|backbone|expert|head)|dit|"
        r"gemma_expert|expert_model|diffusion_(head|model)",
    ),
)
_PART_OF = tuple((part, re.compile(pattern)) for part, pattern in PART_OF)
# Added to a config: of the whole, which family; and whether the language model has a
# path of its own.
WHOLE_FAMILY, BESIDE_LANGUAGE = "whole model_type", "beside a language_model"
# What an encoder of that plain name encodes, by the family.
ENCODES = {
    "granite_speech": "audio",
    "granite_speech_plus": "audio",
    "speech-encoder-decoder": "audio",
    "vision-encoder-decoder": "vision",
    "pix2struct": "vision",
    "pp_formulanet": "vision",
}
LANGUAGE = re.compile(r"language_model|text_model|text_decoder|llm|language_backbone")


def part_of(modules: list[str], config: Mapping[str, Any]) -> str:
    """Part of the model that a path lies in.

    Args:
        modules: the path's components.
        config: of the language model: layers beyond its own predict further tokens, and
            an encoder beside a language model of its own is another tower.

    >>> part_of("model.visual.merger.mlp.0".split("."), {})
    'projector'
    """
    for part, pattern in _PART_OF:
        if any(pattern.fullmatch(module) for module in modules):
            return part
    if "encoder" in modules[:2] and not any(map(LANGUAGE.fullmatch, modules)):
        family = str(config.get(WHOLE_FAMILY))
        if family in ENCODES or config.get(BESIDE_LANGUAGE):
            return ENCODES.get(family, "other")
    if "decoder" not in modules and "encoder" not in modules:
        n_layers = count(config, "num_hidden_layers")
        if n_layers and count(config, "num_nextn_predict_layers"):
            beyond = layer_of(".".join(modules) + ".") >= n_layers
            return "mtp" if beyond else "language"
    return "language"


# --- roles -------------------------------------------------------------------------

ATTENTION_LEAVES = {
    "q": "q_proj wq query query_proj q_lin q Wq to_q project_q",
    "k": "k_proj wk key key_proj k_lin k Wk to_k project_k",
    "v": "v_proj wv value value_proj v_lin v Wv to_v project_v",
    "o": "o_proj",
}
# These are o only below a module of attention: feed-forward parts use them too.
OUTPUT_LEAVES = (
    "wo Wo out_proj dense c_proj out_lin linear_proj o proj output to_out attn_out "
    "attention_out"
)
# w1, w3, w2 are the names of gate, up and down in Mixtral and in Llama's own files.
MLP_LEAVES = {
    "gate": "gate_proj w1 wi_0 c_fc_0 proj_up_gate",
    "up": "up_proj w3 wi wi_1 c_fc c_fc_1 fc1 fc_in dense_h_to_4h linear_fc1 Wi "
    "proj_up ff_proj",
    "down": "down_proj w2 wo c_proj fc2 fc_out dense_4h_to_h linear_fc2 Wo proj_down "
    "ff_out output_linear",
}
# These are an MLP's only right below one: others have them, too.
INNER_LEAVES = {
    "up": "linear1 lin1 intermediate layer_1",
    "down": "linear2 lin2 output layer_2",
}
MLP_PARENT = re.compile(r"mlp\w*|\w*_mlp|ffns?|feed_forward|ff", re.IGNORECASE)
OUTER_LEAVES = {
    "embed": "embed_tokens tok_embeddings word_embeddings word_embedding tokens_embed "
    "token_embedding embed_in wte embeddings shared",
    "head": "lm_head embed_out output output_layer output_projection head ff_out",
    "router": "gate router wg",
}


def _by_leaf(table: Mapping[str, str]) -> dict[str, str]:
    return {leaf: role for role, leaves in table.items() for leaf in leaves.split()}


_ATTENTION, _MLP, _INNER, _OUTER = map(
    _by_leaf, (ATTENTION_LEAVES, MLP_LEAVES, INNER_LEAVES, OUTER_LEAVES)
)
# Families that give a name another meaning.
FAMILY_ROLES = {"qwen": {"w1": "up", "w2": "gate"}}

EXPERT_ROLES = {"gate": "expert_gate", "up": "expert_up", "down": "expert_down"}
ALL_ROLES = {
    *_ATTENTION.values(),
    *_MLP.values(),
    *_OUTER.values(),
    *EXPERT_ROLES.values(),
    "expert_other",
    "other",
}


def in_attention(modules: list[str]) -> bool:
    """Whether a path leads through a module of attention, and then through no MLP.

    >>> in_attention(["cross_attn_layers", "0", "mlp", "gate_proj"])
    False
    """
    for module in reversed(modules[:-1]):
        if MLP_PARENT.fullmatch(module):
            return False
        if re.search(r"attn|attention", module, re.IGNORECASE):
            return True
    return False


def role_of(modules: list[str], model_type: object = None) -> str:
    """Role by the last module's whole name and by where it lies.

    So qkv_proj is never taken for v_proj, nor a gate of attention for one of an MLP.

    >>> role_of(["mlp", "gate_proj"]), role_of(["self_attn", "gate_proj"])
    ('gate', 'other')
    """
    if modules[-1] == "linear" and len(modules) > 1:  # a layer within a wrapper's
        modules = modules[:-1]
    leaf = modules[-1]
    if "experts" in modules and in_attention(modules):  # of attention: JetMoE
        return "expert_other"
    if "experts" in modules:
        return EXPERT_ROLES.get(_mlp_role(leaf, model_type), "expert_other")
    if in_attention(modules):
        return "o" if leaf in OUTPUT_LEAVES.split() else _ATTENTION.get(leaf, "other")
    outside = layer_of(".".join([*modules, ""])) < 0
    if "router" in modules[-2:] or _OUTER.get(leaf) == "router":
        return "router"
    decodes = leaf == "decoder" and modules[-2:-1] in (["lm_head"], ["predictions"])
    if outside and decodes:
        return "head"
    if leaf == "dense":
        return {"intermediate": "up", "output": "down"}.get(modules[-2], "other")
    return _by_place(modules, model_type, outside)


def _by_place(modules: list[str], model_type: object, outside: bool) -> str:
    """Role outside of attention: of an MLP in a block, of a vocabulary without."""
    leaf = modules[-1]
    parents = [m for m in modules[:-1] if MLP_PARENT.fullmatch(m)]
    if leaf in _OUTER and not parents and (outside or leaf == "embed_tokens"):
        return _OUTER[leaf]
    found = _mlp_role(leaf, model_type)
    if found == "other" and parents and modules[-2] in (parents[-1], "0", "1"):
        found = _INNER.get(leaf, "other")
    if found == "other" and not parents:
        found = _ATTENTION.get(leaf, "other")
    return found


def _mlp_role(leaf: str, model_type: object) -> str:
    own = FAMILY_ROLES.get(str(model_type), {})
    return own.get(leaf) or _MLP.get(leaf, "other")


def layer_of(name: str) -> int:
    """Index of the block that a name lies in, -1 outside of the blocks."""
    found = re.search(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d{1,6})\.", name)
    return int(found[1]) if found else -1


# --- configs -----------------------------------------------------------------------

LANGUAGE_KEYS = (
    "thinker_config",
    "text_config",
    "llm_config",
    "language_config",
    "language_model_config",
    "decoder_config",
)
SYNONYMS = {
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": (
        "num_kv_heads",
        "n_head_kv",
        "multi_query_group_num",
        "kv_n_heads",
    ),
    "hidden_size": ("n_embd", "d_model", "dim"),
    "head_dim": ("kv_channels", "d_kv"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
}
MOST = 2**24  # no model has more heads, layers or rows of a head


def count(config: Mapping[str, Any], name: str) -> int | None:
    """A positive size out of a config, under any of its names; None if it has none."""
    for key in (name, *SYNONYMS.get(name, ())):
        value = config.get(key)
        if type(value) is int and 0 < value <= MOST:
            return value
    return None


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config with its language model's part on top, wherever that lies."""
    found = {**config, WHOLE_FAMILY: config.get("model_type")}
    for _ in range(len(LANGUAGE_KEYS)):
        inner = next(
            (found[key] for key in LANGUAGE_KEYS if isinstance(found.get(key), dict)),
            None,
        )
        if inner is None:
            break
        tie = found.get("tie_word_embeddings", inner.get("tie_word_embeddings"))
        outer = {k: v for k, v in found.items() if k not in LANGUAGE_KEYS}
        found = {**outer, **inner, "tie_word_embeddings": tie}
    if count(found, "num_attention_heads") is None:
        found = {**found, **_sizes_within(found)}
    attention = found.get("attn_config")  # MPT, DBRX
    return {**found, **attention} if isinstance(attention, dict) else found


def families_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The families that a config names, of the whole and then of its parts."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    said = [each.get("model_type") for each in (config, *inner)]
    return tuple(dict.fromkeys(name for name in said if isinstance(name, str)))


def _sizes_within(config: Mapping[str, Any]) -> dict[str, Any]:
    """The one config within, of no tower, that has sizes of attention; or {}."""
    found = [
        inner
        for key, inner in config.items()
        if isinstance(inner, dict)
        and part_of(key.removesuffix("_config").split("."), {}) == "language"
        and key not in ("quantization_config", "attn_config")
        and count(inner, "num_attention_heads")
        and count(inner, "hidden_size")
    ]
    return found[0] if len(found) == 1 else {}


@dataclass(frozen=True)
class Layout:
    """What is known of a checkpoint beside one tensor's own name and shape.

    Attributes:
        config: of the language model.
        shapes: of all tensors, to tell one order from another.
        turned: whether Conv1D stores (inputs, outputs).
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    turned: bool = False

    @property
    def model_type(self) -> str:
        """As config.json names the family, or nothing."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else ""


def layout_of(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Layout:
    """The layout of a checkpoint.

    Args:
        config: of the language model.
        shapes: name to shape of every tensor.
    """
    within = any(LANGUAGE.fullmatch(m) for name in shapes for m in name.split("."))
    layout = Layout({**config, BESIDE_LANGUAGE: within}, shapes)
    turned = layout.model_type in CONV1D
    if not layout.model_type:
        fused = [s for n, s in shapes.items() if n.endswith(".c_attn.weight")]
        turned = any(len(s) == 2 and s[1] == 3 * s[0] for s in fused)
    return replace(layout, turned=turned)


# --- matrices ----------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a checkpoint.

    Attributes:
        name: the tensor's name, or the part's own for a fused or stacked tensor.
        role: q, k, v, o, gate, up, down, embed, head, router, expert_gate,
            expert_up, expert_down, expert_other or other.
        layer: index of the block, -1 outside of the blocks.
        shape: (n_rows, n_cols), rows are outputs.
        dtype: stored dtype, as torch names it, such as "bfloat16".
        part: of the model: language, vision, audio, talker, mtp, projector or other.
    """

    name: str
    role: str
    layer: int
    shape: tuple[int, int]
    dtype: str
    part: str = "language"

    @property
    def n_bytes(self) -> int:
        """What it takes in its file."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return self.shape[0] * self.shape[1] * itemsize


@dataclass(frozen=True)
class Cut:
    """Where a matrix lies in its tensor.

    Attributes:
        matrix: what it is.
        tensor: where it lies.
        rows: of its outputs; of each group where they lie in groups.
        expert: of a stack, which.
        transposed: whether the tensor, or each expert of it, is (inputs, outputs).
        groups: how many groups of outputs follow each other, each with some of these
            rows (q, k and v head by head); 1 for rows that lie together.
    """

    matrix: Matrix
    tensor: Stored
    rows: slice
    expert: int | None = None
    transposed: bool = False
    groups: int = 1

    def of(self, tensor: Any) -> Tensor:
        """This part of a tensor, or of a place that stands for it.

        A view of a tensor, unless its rows lie in groups.
        """
        before = () if self.expert is None else (self.expert,)
        if self.groups > 1:
            whole = tensor[(*before, WHOLE)]
            whole = whole.T if self.transposed else whole
            return in_groups(whole, self.rows, self.groups)
        w: Tensor = tensor[(*before, *([WHOLE] if self.transposed else []), self.rows)]
        return w.T if self.transposed else w

    def read(self) -> Tensor:
        """(n_rows, n_cols) in memory of its own."""
        return self.of(self.tensor.place).contiguous()


def in_groups(w: Tensor, rows: slice, groups: int) -> Tensor:
    """Some rows of every group of rows."""
    grouped = w.reshape(groups, -1, w.shape[-1])
    return grouped[:, rows].reshape(-1, w.shape[-1])


@dataclass(frozen=True)
class Skipped:
    """One tensor that is not measured, and why.

    Attributes:
        name, shape, dtype: as its file describes it.
        reason: in words.
        unreadable: whether it holds weights that could not be read as they are
            (quantised, empty, a slice): such tensors do not count as missing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str
    unreadable: bool = False


NO_ENTRIES = (
    "no entries: as ZeRO-3 saves weights that were not gathered "
    "(stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py)"
)


def modules_of(name: str) -> list[str]:
    """Components of a tensor's path, less the last "weight"."""
    return name.removesuffix(".weight").split(".")


def cuts_or_reason(tensor: Stored, layout: Layout) -> list[Cut] | str:
    """The matrices of one stored tensor, or why it has none."""
    modules, ndim = modules_of(tensor.name), len(tensor.shape)
    if 0 in tensor.shape:
        return NO_ENTRIES
    if ndim < 2:
        return "a scalar" if ndim == 0 else "one-dimensional: a norm or a bias"
    stacked = _stack_position(modules)
    if ndim == 3 and stacked is not None:
        return _expert_cuts(tensor, modules, stacked, layout)
    if ndim > 2:
        return f"{ndim}-dimensional and not a stack of experts: not a matrix"
    if stacked is not None and modules[stacked] == "experts":
        return (
            "two-dimensional under 'experts' without a number: biases or a flat stack"
        )
    turned = layout.turned and modules[-1] in CONV1D_LEAVES
    if modules[-1] in FUSED_QKV:
        shape = tensor.shape[::-1] if turned else tensor.shape
        tower = part_of(modules, layout.config) != "language"
        split = _qkv_rows(modules[-1], shape, layout, tower)
        if isinstance(split, str):
            return split
        return _cuts(tensor, modules, layout, split[0], turned, split[1])
    if halves := _fused_halves(tensor, modules, layout):
        n_rows = tensor.shape[0]
        if n_rows % 2:
            return f"fused {modules[-1]} of {n_rows} rows, which do not halve"
        rows_of = _below(halves, (n_rows // 2, n_rows // 2))
        return _cuts(tensor, modules, layout, rows_of)
    return _cuts(tensor, modules, layout, {modules[-1]: WHOLE}, turned)


def _cuts(
    tensor: Stored,
    modules: list[str],
    layout: Layout,
    rows_of: Mapping[str, slice],
    turned: bool = False,
    groups: int = 1,
) -> list[Cut]:
    """Rows of a two-dimensional tensor, under names as if stored apart."""
    n_out, n_in = tensor.shape[::-1] if turned else tensor.shape
    cuts = []
    for leaf, rows in rows_of.items():
        own = [*modules[:-1], leaf]
        name = tensor.name if own == modules else ".".join([*own, "weight"])
        shape = (groups * len(range(*rows.indices(n_out // groups))), n_in)
        role, part = role_of(own, layout.model_type), part_of(own, layout.config)
        matrix = Matrix(name, role, layer_of(name), shape, tensor.dtype, part)
        cuts.append(Cut(matrix, tensor, rows, None, turned, groups))
    return cuts


def _below(names: Sequence[str], lengths: Sequence[int]) -> dict[str, slice]:
    """Rows of parts that stand one below the other."""
    parts = zip(names, lengths, accumulate(lengths), strict=True)
    return {name: slice(end - n, end) for name, n, end in parts}


# --- fused q, k and v --------------------------------------------------------------

CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "jais"}
CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn", "c_fc2"}
# One below the other: all rows of q, then of k, then of v.
STACKED = "stacked"
# Head by head: q, k and v of the first head, then of the second.
BY_HEAD = "by head"
# Group by group: the queries of a key-value head, then its key, then its value.
BY_GROUP = "by group"
# As codegen has it, in four groups: the queries of a group, its values, its keys.
FOUR_GROUPS = "in four groups"
OWN = "own"  # of a family, not known here: not split
FUSED_QKV = {
    "qkv_proj": STACKED,
    "W_pack": STACKED,
    "c_attn": STACKED,
    "Wqkv": STACKED,
    "qkv": STACKED,
    "to_qkv": STACKED,
    "att_proj": STACKED,
    "in_proj_weight": STACKED,
    "wqkv": BY_GROUP,
    "linear_qkv": BY_GROUP,
    "query_key_value": None,
}
QKV_OF_FAMILY = {
    "codegen": FOUR_GROUPS,
    "minimax": BY_HEAD,
    "gpt_neox": BY_HEAD,
    "gpt_neox_japanese": BY_HEAD,
    "bloom": BY_HEAD,
    "persimmon": BY_HEAD,
    "fuyu": BY_HEAD,
    "chatglm": STACKED,
    "chatglm4v": STACKED,
    "phi3small": BY_GROUP,
}
QKV_NAMES = ("q_proj", "k_proj", "v_proj")


def _qkv_order(leaf: str, layout: Layout) -> str:
    config, family = layout.config, layout.model_type
    if family in ("falcon", "RefinedWeb", "RefinedWebModel"):
        if config.get("new_decoder_architecture") is True or family == "RefinedWeb":
            return BY_GROUP
        return STACKED if config.get("multi_query", True) else BY_HEAD
    if family == "chatglm" and count(config, "num_key_value_heads") is None:
        return BY_HEAD  # the first of that name
    if family.startswith("bailing"):
        return STACKED
    if family == "gpt_bigcode":
        return STACKED if config.get("multi_query", True) else BY_HEAD
    return QKV_OF_FAMILY.get(family) or FUSED_QKV[leaf] or OWN


def _heads(layout: Layout, order: str) -> tuple[int, int, int] | None:
    """(heads, key-value heads, rows of a head) as config.json has them."""
    config, family = layout.config, layout.model_type
    n_heads = count(config, "num_attention_heads")
    if n_heads is None:
        return None
    n_kv = count(config, "num_key_value_heads") or n_heads
    if order == BY_HEAD:
        n_kv = n_heads
    old_falcon = family in ("falcon", "RefinedWebModel") and order == STACKED
    if old_falcon or (family == "gpt_bigcode" and order == STACKED):
        n_kv = 1
    width = count(config, "hidden_size") or 0
    return n_heads, n_kv, count(config, "head_dim") or width // n_heads


def _qkv_rows(
    leaf: str, shape: tuple[int, ...], layout: Layout, tower: bool
) -> tuple[dict[str, slice], int] | str:
    """Where q, k and v lie in each group of rows, and how many groups; or why not.

    Heads are known of the language model alone; towers have q, k, v as they are.
    """
    n_rows, n_cols = shape
    order, even = _qkv_order(leaf, layout), n_rows == 3 * n_cols
    whole, thirds = {leaf: WHOLE}, _below(QKV_NAMES, (n_cols,) * 3)
    if tower and even:
        return thirds, 1
    if order == FOUR_GROUPS and even and n_cols % 4 == 0:
        return _below(("q_proj", "v_proj", "k_proj"), (n_cols // 4,) * 3), 4
    if order == OWN:
        return whole, 1
    heads = _heads(layout, order)
    if heads:
        n_heads, n_kv, head_dim = heads
        if (n_heads + 2 * n_kv) * head_dim == n_rows and n_heads % n_kv == 0:
            groups = 1 if order == STACKED else n_kv
            lengths = [n * head_dim // groups for n in (n_heads, n_kv, n_kv)]
            return _below(QKV_NAMES, lengths), groups
    if leaf != "qkv_proj":
        return (thirds if order == STACKED and even else whole), 1
    if heads is None:
        return f"fused {leaf}, and no config.json beside it says how many heads"
    n_heads, n_kv, head_dim = heads
    return (
        f"fused {leaf} of {n_rows} rows, where config.json's heads "
        f"need {n_heads * head_dim} + 2 x {n_kv * head_dim}"
    )


# --- fused gate and up -------------------------------------------------------------

# Fused where they have twice the rows that the way back has columns.
GATED = {
    "dense_h_to_4h": "dense_4h_to_h",
    "linear_fc1": "linear_fc2",
    "input_linear": "output_linear",
    "Wi": "Wo",
    "ff_proj": "ff_out",
}
UP_FIRST = {"ff_proj"}  # as OLMo and Molmo have it


def _fused_halves(
    tensor: Stored, modules: list[str], layout: Layout
) -> tuple[str, str] | None:
    """Names of the halves of a tensor that holds gate above up."""
    if modules[-1] == "gate_up_proj":
        # Phi-4's audio encoder has them the other way round.
        turned = modules[-2] in ("feed_forward_in", "feed_forward_out")
        return ("up_proj", "gate_proj") if turned else ("gate_proj", "up_proj")
    back = GATED.get(modules[-1])
    if back is None or in_attention(modules):
        return None
    shape = layout.shapes.get(".".join([*modules[:-1], back, "weight"]))
    fused = shape is not None and len(shape) == 2 and tensor.shape[0] == 2 * shape[1]
    if not fused:
        return None
    names = ("gate_proj", "up_proj")
    return names[::-1] if modules[-1] in UP_FIRST else names


# --- stacks of experts -------------------------------------------------------------

EXPERTS_IN_OUT = {"gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe_text"}
EXPERTS_INTERLEAVED = {"gpt_oss"}
# Granite's stacks lie in block_sparse_moe itself, under names of their own.
STACK_ALIASES = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}
FUSED_STACKS = (  # gate and up in one stack, and the way back; the last is Aria's
    ("gate_up_proj", "down_proj"),
    ("input_linear", "output_linear"),
    ("fc1", "fc2"),
)


def _stack_position(modules: list[str]) -> int | None:
    """Index of the module that holds a stack of experts, None where there is none."""
    for name in ("experts", "shared_experts"):
        if name in modules:
            i = modules.index(name)
            numbered = re.fullmatch(r"(expert_)?\d+", ".".join(modules[i + 1 : i + 2]))
            return None if numbered else i
    granite = modules[-2:-1] in (["block_sparse_moe"], ["mlp"])
    if granite and modules[-1] in STACK_ALIASES:
        return len(modules) - 2
    return None


def _expert_cuts(
    tensor: Stored, modules: list[str], stacked: int, layout: Layout
) -> list[Cut] | str:
    """One matrix an expert, or two where gate and up are fused, as (out, in)."""
    n_experts, n_first, n_second = tensor.shape
    stack, leaf = modules[: stacked + 1], ".".join(modules[stacked + 1 :])
    if not in_attention(modules):  # JetMoE's attention has experts as well
        leaf = STACK_ALIASES.get(leaf, leaf)
    # As saved after MXFP4 was made into bf16, under the name of its codes.
    leaf = leaf.removesuffix("_blocks")
    in_out = _beside(stack, layout)
    if in_out is None:
        in_out = _stored_in_out(leaf, n_first, n_second, layout)
    elif leaf in ("fc1", "fc2"):
        leaf = {"fc1": "gate_up_proj", "fc2": "down_proj"}[leaf]
    if leaf == "gate_up_proj" and in_out is None:
        return (
            "fused gate_up_proj of experts, and no config.json beside it has a "
            f"hidden_size of {n_first} or {n_second} to tell its order"
        )
    n_out, n_in = (n_second, n_first) if in_out else (n_first, n_second)
    if leaf == "gate_up_proj" and n_out % 2:
        return f"fused gate_up_proj of {n_out} outputs, which do not halve"
    part = part_of(stack, layout.config)
    cuts = []
    for expert in range(n_experts):
        for own, rows in _expert_rows(leaf, n_out, layout).items():
            role = _expert_role(stack, own, layout)
            path = [*stack, str(expert), *([own] if own else []), "weight"]
            name, shape = ".".join(path), (len(range(*rows.indices(n_out))), n_in)
            matrix = Matrix(name, role, layer_of(name), shape, tensor.dtype, part)
            cuts.append(Cut(matrix, tensor, rows, expert, bool(in_out)))
    return cuts


def _expert_rows(leaf: str, n_out: int, layout: Layout) -> dict[str, slice]:
    """Where the matrices of one expert lie in its outputs.

    A plain stack needs no splitting, so an unknown order costs only the names of its
    two sides.
    """
    if leaf != "gate_up_proj":
        return {leaf: WHOLE}
    if layout.model_type in EXPERTS_INTERLEAVED:
        return {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    return _below(("gate_proj", "up_proj"), (n_out // 2, n_out // 2))


def _expert_role(stack: list[str], leaf: str, layout: Layout) -> str:
    role = _mlp_role(leaf, layout.model_type)
    if stack[-1] == "shared_experts":  # which every token passes
        return role
    if in_attention([*stack, leaf]):
        return "expert_other"
    return EXPERT_ROLES.get(role, "expert_other")


def _beside(stack: list[str], layout: Layout) -> bool | None:
    """Whether experts are stored as (in, out), by gate and up against down.

    (2 I, H) and (H, I), or (H, 2 I) and (I, H): no sizes fit both. None where one of
    the two is not there.
    """
    for leaves in FUSED_STACKS:
        up, down = (_stack_shape(".".join([*stack, x]), layout) for x in leaves)
        if up and down:
            out_in = up[1:] == (2 * down[2], down[1])
            return None if out_in == (up[1:] == (down[2], 2 * down[1])) else not out_in
    return None


def _stack_shape(name: str, layout: Layout) -> tuple[int, ...] | None:
    for known in (name, f"{name}.weight", f"{name}_blocks"):
        if len(layout.shapes.get(known, ())) == 3:
            return layout.shapes[known]
    return None


def _stored_in_out(
    leaf: str, n_first: int, n_second: int, layout: Layout
) -> bool | None:
    """Whether each expert is stored as (in, out); None where nothing tells."""
    hidden = count(layout.config, "hidden_size")
    n_in, n_out = n_second, n_first
    if _MLP.get(leaf) == "down":
        n_in, n_out = n_out, n_in  # hidden is the output of down, the input of others
    if n_in == n_out == hidden:
        return layout.model_type in EXPERTS_IN_OUT
    if hidden not in (n_in, n_out):
        return None
    return n_out == hidden


# --- in memory ---------------------------------------------------------------------


class _Nowhere:
    """The place of a tensor that is in memory already."""

    def __getitem__(self, index: Any) -> Tensor:
        raise TypeError("a tensor in memory has no file to be read from")

    def files(self) -> tuple[Any, ...]:
        """None."""
        return ()


def matrices_in_memory(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, tuple[Matrix, Tensor]]:
    """The matrices of a model that is loaded, under the names its checkpoint has.

    Args:
        tensors: name to tensor, as of ``model.named_parameters()``.
        config: of the model, as of ``model.config.to_dict()``: head counts of a fused
            qkv_proj, the order of stacked experts.

    Returns:
        Name to (matrix, its (n_rows, n_cols) view of the tensor), in natural order;
        what `list_skipped` would list is left out. Fused q, k and v that lie head by
        head have no view of their own and stay one matrix, of role other.

    >>> found = matrices_in_memory({"layers.0.q_proj.weight": torch.eye(2)}, {})
    >>> [(matrix.role, matrix.layer) for matrix, _ in found.values()]
    [('q', 0)]
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layout = layout_of(language_config(dict(config)), shapes)
    found: dict[str, tuple[Matrix, Tensor]] = {}
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in FLOAT_DTYPES.values():
            continue
        stored = Stored(name, shapes[name], dtype, _Nowhere())
        cuts = cuts_or_reason(stored, layout)
        if isinstance(cuts, str):
            continue
        if any(cut.groups > 1 for cut in cuts):
            modules = modules_of(name)
            cuts = _cuts(stored, modules, layout, {modules[-1]: WHOLE})
        found |= {cut.matrix.name: (cut.matrix, cut.of(tensor)) for cut in cuts}
    return {name: found[name] for name in sorted(found, key=natural)}


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    pieces = re.split(r"(\d+)", name)
    return [(int(p), "") if p.isdecimal() and len(p) < 20 else (-1, p) for p in pieces]
