"""How the tensors of a file hold the parameters of a decoder: names, orientation, and what is stored together.

A `Rule` says under which name a parameter (of one block) is found and how it lies there, as a view of the file's
tensor. The same view is read when loading and written when exporting, so that the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ppojax.models import parameters
from ppojax.models.spec import DecoderSpec

Order = Callable[[DecoderSpec], np.ndarray]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """Where a parameter lies.

    Attributes:
        name: of the tensor; `{layer}` is the block, `{expert}` the expert where each has a tensor of its own.
        transposed: the file's matrix is [out, in]; ours are [in, out].
        part: (n, of, interleaved): it is the n-th of several parameters along the last axis (in our orientation).
        order: the place in the file of each entry of our last axis.
    """

    name: str
    transposed: bool = True
    part: tuple[int, int, bool] | None = None
    order: Order | None = None

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """The part of a tensor that holds the parameter, in the parameter's shape but for `order`; a view."""
        view = tensor.swapaxes(-1, -2) if self.transposed and tensor.ndim > 1 else tensor
        if self.part is None:
            return view
        n, of, interleaved = self.part
        size = view.shape[-1] // of
        return view[..., n::of] if interleaved else view[..., n * size : (n + 1) * size]

    def file_shape(self, shape: Shape) -> Shape:
        """Shape of the tensor that holds a parameter of this shape (of one expert, where each has its own)."""
        inner = list(shape[1:] if self.by_expert else shape)
        if self.part is not None:
            inner[-1] *= self.part[1]
        if self.transposed and len(inner) > 1:
            inner[-2:] = inner[:-3:-1]
        return tuple(inner)

    @property
    def by_expert(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return "{expert}" in self.name


Rules = Mapping[str, tuple[Rule, ...]]  # parameter: the ways in which files hold it; the first is how we write it


class Place(NamedTuple):
    """A parameter of a decoder, stacked over blocks or not, and the rules under which files hold it."""

    path: tuple[str, ...]  # in the dict of parameters
    shape: Shape
    start: int | None  # the first block of its stack; None: it belongs to no block
    rules: tuple[Rule, ...]

    @property
    def inner(self) -> Shape:
        """Its shape in one block."""
        return self.shape if self.start is None else self.shape[1:]

    def names(self, rule: Rule) -> list[list[str]]:
        """Names of the tensors that hold it: one list a block, in which one a expert."""
        blocks = [0] if self.start is None else range(self.start, self.start + self.shape[0])
        experts = range(self.inner[0]) if rule.by_expert else [0]
        return [[rule.name.format(layer=n, expert=e) for e in experts] for n in blocks]

    def rule_for(self, found: Mapping[str, Any]) -> Rule:
        """The rule that a file with these tensors follows; the usual one where none fits."""
        return next((rule for rule in self.rules if self.names(rule)[0][0] in found), self.rules[0])


def places(spec: DecoderSpec, rules: Rules) -> Iterator[Place]:
    """List every parameter of a decoder, the largest single ones first.

    Raises KeyError when the rules do not know one of them: its family cannot express the spec.
    """
    yield Place(("embed",), parameters.embedding(spec).shape, None, rules["embed"])
    if not spec.tied:
        yield Place(("head",), parameters.embedding(spec).shape, None, rules["head"])
    yield Place(("norm",), parameters.norm(spec, spec.width).shape, None, rules["norm"])
    dense = 0 if spec.moe is None else spec.moe.dense_first
    stacks = [("layers", dense, spec.layers, spec.moe is not None)]
    if dense:
        stacks.insert(0, ("dense_layers", 0, dense, False))
    for stack, start, stop, experts in stacks:
        for name, leaf in parameters.block(spec, experts).items():
            yield Place((stack, name), (stop - start, *leaf.shape), start, rules[name])


def get(params: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Look up a parameter by its path."""
    found: Any = params
    for key in path:
        found = found[key]
    return found


def put(params: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a parameter by its path."""
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = value


def named(prefix: str, names: Mapping[str, str]) -> dict[str, tuple[Rule, ...]]:
    """Rules of parameters that lie alone and as usual: matrices [out, in], everything else as it is."""
    return {key: (Rule(prefix + name),) for key, name in names.items()}


TOP: Rules = {
    "embed": (Rule("model.embed_tokens.weight", transposed=False),),
    "head": (Rule("lm_head.weight", transposed=False),),
    "norm": (Rule("model.norm.weight"),),
}
LAYER = "model.layers.{layer}."
ATTENTION: Rules = named(
    LAYER,
    {"attn_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
    | {n: f"self_attn.{n}_proj.weight" for n in "qkvo"}
    | {f"{n}_bias": f"self_attn.{n}_proj.bias" for n in "qkvo"}
    | {f"{n}_norm": f"self_attn.{n}_norm.weight" for n in "qk"},
)
MLP: Rules = named(
    LAYER,
    {n: f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    | {f"{n}_bias": f"mlp.{n}_proj.bias" for n in ("gate", "up", "down")},
)
# Experts one by one, as the hub has them; or stacked and fused, as transformers 5 holds them in memory.
EXPERTS: Rules = {
    "router": (Rule(LAYER + "mlp.gate.weight"),),
    "expert_gate": (
        Rule(LAYER + "mlp.experts.{expert}.gate_proj.weight"),
        Rule(LAYER + "mlp.experts.gate_up_proj", part=(0, 2, False)),
    ),
    "expert_up": (
        Rule(LAYER + "mlp.experts.{expert}.up_proj.weight"),
        Rule(LAYER + "mlp.experts.gate_up_proj", part=(1, 2, False)),
    ),
    "expert_down": (
        Rule(LAYER + "mlp.experts.{expert}.down_proj.weight"),
        Rule(LAYER + "mlp.experts.down_proj"),
    ),
}
