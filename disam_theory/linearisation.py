r"""A scalar function $\ell(w;x)$ -> its Hessian product, traced once and split: what needs the vector, and what not.

The product $v\mapsto\nabla^2\ell(w;x)v$ is one program of $(w,x,v)$. Its part without $v$, the *binding*, runs once for
each $(w,x)$, and its values are kept; the rest, linear in $v$, runs for each product. ``torch.func.linearize`` does the
same for one fixed $(w,x)$, and traces anew for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.func import functionalize, grad, jvp
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from disam_theory.errors import UsageError
from disam_theory.losses import Params

Tensors = tuple[Tensor, ...]
DEPENDS_ON_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class Linearised:
    """The two programs of one function, for data of one shape."""

    binding: Callable[..., Tensors]  # (*w, *x) -> what the products need
    product: Callable[..., Tensors]  # (*v, *that) -> the Hessian product, one tensor a parameter


def linearise(function: Callable[..., Tensor], params: Params, data: Tensors) -> Linearised:
    """The programs of ``function(params, *data)``, a scalar, traced at these shapes and dtypes.

    Raises:
        UsageError: what the function does depends on the values of its tensors, so that one trace is not enough.
    """
    names, m = list(params), len(params)

    def product(*arguments: Tensor) -> Tensors:
        vectors, at, x = arguments[:m], arguments[m : 2 * m], arguments[2 * m :]
        w, v = dict(zip(names, at, strict=True)), dict(zip(names, vectors, strict=True))
        image: Params = jvp(lambda point: grad(function)(point, *x), (w,), (v,))[1]
        return tuple(image[name] for name in names)

    zeros = tuple(torch.zeros_like(p) for p in params.values())
    try:
        # functionalize: a product that wrote into a kept value would spoil the next. fake: tensors without values, so
        # that a program that depends on them is refused, and not traced for the first micro-batch alone
        trace = make_fx(functionalize(product), tracing_mode="fake", _allow_non_fake_inputs=True)
        traced = trace(*zeros, *params.values(), *data)
    except DEPENDS_ON_VALUES as error:
        reason = "what the loss computes depends on the values of its tensors (an if, or a selection by a mask)"
        raise UsageError(f"{reason}, so it cannot be traced; try another mode") from error
    traced.graph.eliminate_dead_code()
    return _split(traced, vectors=m)


def _split(traced: GraphModule, *, vectors: int) -> Linearised:
    """The graph cut into the nodes that the first ``vectors`` arguments do not reach, and those they do."""
    nodes = list(traced.graph.nodes)
    arguments = [node for node in nodes if node.op == "placeholder"]
    moving = set(arguments[:vectors])
    for node in nodes:
        if node.op != "output" and moving & set(node.all_input_nodes):
            moving.add(node)
    results = nodes[-1].args[0]
    wanted = {source for node in moving for source in node.all_input_nodes} | set(results)
    kept = [node for node in nodes if node in wanted - moving and node.op != "get_attr"]
    still = [node for node in nodes[:-1] if node not in moving and node not in arguments]
    constants = [node for node in still if node.op == "get_attr"]
    binding = _graph(traced, arguments[vectors:], still, kept)
    steps = constants + [node for node in nodes if node in moving and node not in arguments]
    return Linearised(binding, _graph(traced, arguments[:vectors] + kept, steps, results))


def _graph(root: GraphModule, inputs: list[Node], steps: list[Node], results: Sequence[Node]) -> GraphModule:
    """A program of its own: ``inputs`` are given, ``steps`` are done in order, ``results`` come out."""
    graph = Graph()
    own: dict[Node, Node] = {}
    for k, node in enumerate(inputs):
        own[node] = graph.placeholder(f"given{k}")
    for node in steps:
        own[node] = graph.node_copy(node, own.__getitem__)
    graph.output(tuple(own[node] for node in results))
    graph.eliminate_dead_code()
    return GraphModule(root, graph)
