"""Reasons for which attention classes are refused, by what their names say they compute."""

from __future__ import annotations

_REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("rope", "rotary", "eva", "dinov3", "pixtral"),
        "rotary position embedding makes its queries and keys depend on the position, and no "
        "adapter knows how this class is given it",
    ),
    (
        ("window", "swin", "hiera"),
        "windowed attention never sees the whole grid, so the patterns scored here do not apply",
    ),
    (
        ("beit", "relpos", "relative", "data2vec", "samvision", "transformer_sam", "vitdet"),
        "it adds a relative position bias to the logits, which has no counterpart here",
    ),
    (
        ("diff",),
        "differential attention subtracts two softmax maps and is not one attention map per head",
    ),
    (("gated",), "a gate multiplies its output, which the replacement does not have"),
    (
        ("linear", "xca", "crosscov", "channel"),
        "it does not form a token-by-token attention map",
    ),
    (("talkinghead",), "it mixes the attention maps of its heads"),
    (
        ("cross", "pool", "latent", "classatt"),
        "its queries are not the tokens themselves, so there is no grid to aggregate on",
    ),
    (("text", "causal"), "text attention is causal or masked and has no patch grid"),
)


def is_attention_name(class_name: str) -> bool:
    """Whether a class is an attention layer by its name."""
    return any(word in class_name.lower() for word in ("attention", "attn", "xca"))


def refusal_by_name(class_name: str, module_name: str = "") -> str:
    """A sentence for an attention class that no adapter knows.

    Args:
        module_name: the module that defines it: some libraries call every attention ``Attention``.
    """
    lowered = f"{module_name.rpartition('.')[2]} {class_name}".lower()
    for words, reason in _REASONS:
        if any(word in lowered for word in words):
            return f"{class_name} cannot be replaced: {reason}."
    return (
        f"{class_name} is not known to dwattn; register an adapter for it with "
        "dwattn.adapters.register() if it computes plain softmax attention over a patch grid."
    )
