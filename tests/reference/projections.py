"""Projections record by record, in plain numbers: slow and obvious."""

import itertools
import math


def clipped(value, low, high):
    return min(max(value, low), high)


def shrunk(v, lower, upper, shrink):
    """Every |v_j| made smaller by `shrink`, not beyond 0, then put into the box."""
    return [
        clipped(math.copysign(max(abs(x) - shrink, 0.0), x), low, high)
        for x, low, high in zip(v, lower, upper, strict=True)
    ]


def length(v):
    return math.fsum(abs(x) for x in v)


def l1_box_by_bisection(v, lower, upper, eps):
    """The nearest point of L1 ball ∩ box: bisection on the multiplier of the ball."""
    if length(shrunk(v, lower, upper, 0.0)) <= eps:
        return shrunk(v, lower, upper, 0.0)
    small, large = 0.0, max(abs(x) for x in v)
    for _ in range(200):
        middle = (small + large) / 2
        if middle in (small, large):
            break
        if length(shrunk(v, lower, upper, middle)) > eps:
            small = middle
        else:
            large = middle
    return shrunk(v, lower, upper, large)


def l1_box_by_sorting(v, lower, upper, eps):
    """The same from the breakpoints of the length as a function of the multiplier.

    Between two neighbouring breakpoints the length is a straight line, so the multiplier with the
    wanted length is found on the line.
    """
    if length(shrunk(v, lower, upper, 0.0)) <= eps:
        return shrunk(v, lower, upper, 0.0)
    points = {0.0}
    for x, low, high in zip(v, lower, upper, strict=True):
        points |= {abs(x), abs(x - clipped(x, low, high))}
    points = sorted(points)
    for small, large in itertools.pairwise(points):
        longer, shorter = (length(shrunk(v, lower, upper, s)) for s in (small, large))
        if shorter <= eps < longer:
            share = (longer - eps) / (longer - shorter)
            return shrunk(v, lower, upper, small + share * (large - small))
    raise AssertionError("the length falls from above eps to 0, so some line crosses eps")


def l2_then_box(v, lower, upper, eps):
    """Onto the sphere where outside the ball, then into the box."""
    norm = math.sqrt(math.fsum(x * x for x in v))
    scale = eps / norm if norm > eps else 1.0
    return [clipped(x * scale, low, high) for x, low, high in zip(v, lower, upper, strict=True)]


def linf_and_box(v, lower, upper, eps):
    return [
        clipped(clipped(x, -eps, eps), low, high)
        for x, low, high in zip(v, lower, upper, strict=True)
    ]


def l1_steepest(grad, delta, lower, upper, density):
    """±1/k on the k largest gradients among the coordinates that can still move that way."""
    movable = [
        j
        for j, g in enumerate(grad)
        if (g > 0 and delta[j] < upper[j]) or (g < 0 and delta[j] > lower[j])
    ]
    k = max(1, round(density * len(grad)))
    chosen = sorted(movable, key=lambda j: -abs(grad[j]))[:k]
    return [math.copysign(1 / len(chosen), g) if j in chosen else 0.0 for j, g in enumerate(grad)]
