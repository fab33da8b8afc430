"""What a loss was computed from: the leaves of its graph."""

from collections.abc import Iterator

from torch import Tensor


def leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a backward of `loss` would give a gradient, each once."""
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a node that accumulates a gradient
        if variable is not None:
            yield variable
        stack.extend(before for before, _ in node.next_functions)
