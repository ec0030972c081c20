"""Draws the figures of docs/mathematics.md from the package itself.

    python docs/figures.py

writes docs/images/*.svg; another folder may be named as the only argument.
"""

from __future__ import annotations

import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import optax

from tgeo_jax import bilevel, geometry, losses, ranking

IMAGES = pathlib.Path(__file__).parent / "images"
# Told apart by people who do not see red and green, too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def main(folder: pathlib.Path = IMAGES) -> None:
    plt.rcParams.update({"svg.hashsalt": "tgeo_jax", "font.size": 11, "figure.dpi": 100})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figures = {
        "triangles": triangles,
        "pull": pull,
        "hypergradient": hypergradient,
        "soft_rank": soft_rank,
    }
    for name, draw in figures.items():
        figure = draw()
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


def triangles() -> plt.Figure:
    """Two samples of class 1 among three classes, as points of the triangle of predictions."""
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.866]])
    samples = {
        "the teacher is right": ([0.40, 0.48, 0.12], [0.78, 0.04, 0.18]),
        "the teacher is wrong": ([0.40, 0.48, 0.12], [0.12, 0.20, 0.68]),
    }
    mean = np.array([0.58, 0.21, 0.21])
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.8))
    for axis, (title, (student, teacher)) in zip(axes, samples.items(), strict=True):
        features = geometry.trilateral_features(
            jnp.array([student]), jnp.array([teacher]), jnp.array([0]),
            jnp.tile(mean, (3, 1)), "edges",
        )  # fmt: skip
        squares = dict(
            zip(geometry.relation_blocks("edges"), features.reshape(5, 3).sum(1), strict=True)
        )
        where = {"S": student, "T": teacher, "G": [1, 0, 0], "M": mean}
        at = {name: np.asarray(point) @ corners for name, point in where.items()}
        axis.fill(*corners.T, facecolor="none", edgecolor=GREY, linewidth=0.8)
        for edge, square in squares.items():
            a, b = edge.split("-")
            of_mean = "M" in edge
            axis.plot(
                *np.array([at[a], at[b]]).T,
                color=ORANGE if of_mean else BLUE, linestyle="--" if of_mean else "-",
                linewidth=1.2, label=f"|{a}{b}|$^2$ = {square:.2f}",
            )  # fmt: skip
        shifts = {"S": (6, -4), "T": (-4, 7), "G": (-15, -4), "M": (-2, 7)}
        for name, point in at.items():
            axis.plot(*point, "o", color="black", markersize=5, zorder=3)
            axis.annotate(
                name, point, xytext=shifts[name], textcoords="offset points", weight="bold"
            )
        for number, corner in enumerate(corners[1:], 2):
            above = (0, 5 if number == 3 else -14)
            axis.annotate(f"class {number}", corner, xytext=above, textcoords="offset points",
                          ha="center", color=GREY)  # fmt: skip
        axis.set(title=title, xlim=(-0.15, 1.12), ylim=(-0.12, 1.0))
        axis.set_aspect("equal")
        axis.axis("off")
        axis.legend(loc="upper left", fontsize=8.5, frameon=False, bbox_to_anchor=(-0.12, 1.0))
    figure.tight_layout()
    return figure


def pull() -> plt.Figure:
    """One inner step in the plane of parameters, for three ratios."""
    start, optimum = np.array([0.0, 0.0]), np.array([2.35, 1.1])
    to_label, to_teacher = np.array([0.5, 1.35]), np.array([1.5, 0.1])
    figure, axis = plt.subplots(figsize=(5.6, 3.7))
    x, y = np.meshgrid(np.linspace(-0.4, 3.0, 120), np.linspace(-0.4, 1.75, 120))
    outer = (x - optimum[0]) ** 2 + (y - optimum[1]) ** 2
    axis.contour(x, y, outer, levels=8, colors=GREY, linewidths=0.5)
    axis.plot(*optimum, "*", color=GREY, markersize=12)
    axis.annotate("held-out loss is least", optimum, xytext=(-6, 9), textcoords="offset points",
                  ha="center", color=GREY, fontsize=9)  # fmt: skip

    def arrow(origin, vector, color, text, shift):
        axis.annotate("", origin + vector, origin,
                      arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.6})  # fmt: skip
        axis.annotate(text, origin + vector, xytext=shift, textcoords="offset points",
                      color=color, fontsize=10)  # fmt: skip

    arrow(start, to_label, BLUE, r"label alone ($\alpha = 0$)", (5, 2))
    arrow(start, to_teacher, ORANGE, r"teacher alone ($\alpha = 1$)", (4, -12))
    half = 0.5 * (to_label + to_teacher)
    arrow(start, half, "black", r"$\theta'$ at $\alpha = \frac{1}{2}$", (-46, -50))
    downhill = 0.42 * (optimum - half)
    arrow(half, downhill, GREEN, r"$-\nabla L_{out}(\theta')$", (5, -3))
    axis.plot(*np.array([to_label, to_teacher]).T, ":", color="black", linewidth=1)
    axis.plot(*start, "o", color="black", markersize=5)
    axis.annotate(r"$\theta$", start, xytext=(-12, -4), textcoords="offset points")
    axis.set(xlim=(-0.4, 3.0), ylim=(-0.4, 1.75))
    axis.set_aspect("equal")
    axis.axis("off")
    return figure


def hypergradient() -> plt.Figure:
    """Held-out loss after one step over the ratio of one sample, and `one_step`'s tangents."""
    alphas, curve, points = outer_loss_over_ratio()
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    axis.plot(alphas, curve, color="black", label=r"$L_{out}(\theta'(\alpha))$, computed")
    for number, (alpha, value, slope) in enumerate(points):
        near = np.array([max(alpha - 0.17, 0), min(alpha + 0.17, 1)])
        label = "tangent from bilevel.one_step" if number == 0 else None
        axis.plot(near, value + slope * (near - alpha), color=ORANGE, linewidth=2, label=label)
        axis.plot(alpha, value, "o", color=ORANGE, markersize=5)
    axis.set(xlabel=r"ratio $\alpha$ of the sample", ylabel="held-out loss after one step")
    axis.legend(frameon=False)
    return figure


def outer_loss_over_ratio():
    """(alphas, outer losses, [(alpha, outer loss, slope)]) of a linear student with two samples."""
    inputs = jnp.array([[1.0, 0.3], [-0.2, 1.0]])
    labels, said = jnp.array([0, 1]), jnp.array([[-1.5, 2.0, 0.0], [0.0, 3.0, 0.0]])
    held_out, held_labels = jnp.array([[0.9, 0.5], [1.0, -0.1]]), jnp.array([0, 0])
    optimizer = optax.sgd(6.0)
    params = jnp.zeros((2, 3))

    def inner(params, alpha):
        logits_BxK = inputs @ params
        ratio_B = jnp.array([alpha, 0.5])
        hard_B = losses.cross_entropy(logits_BxK, labels)
        soft_B = losses.kl(logits_BxK, said, temperature=1.0)
        return jnp.mean((1 - ratio_B) * hard_B + ratio_B * soft_B)

    def outer(params):
        return jnp.mean(losses.cross_entropy(held_out @ params, held_labels))

    def step(alpha):
        found = bilevel.one_step(inner, outer, params, alpha, optimizer, optimizer.init(params))
        return found.outer_value, found.meta_grads

    alphas = jnp.linspace(0, 1, 101)
    values, slopes = jax.jit(jax.vmap(step))(alphas)
    points = [(float(alphas[i]), float(values[i]), float(slopes[i])) for i in (20, 50, 80)]
    return np.asarray(alphas), np.asarray(values), points


def soft_rank() -> plt.Figure:
    """The soft rank of one value that passes three others, for three strengths."""
    moving = jnp.linspace(-1.0, 4.0, 251)
    others = jnp.array([0.0, 1.0, 3.0])
    values = jnp.concatenate([moving[:, None], jnp.tile(others, (len(moving), 1))], axis=1)
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    for strength, color in ((0.05, "black"), (1.0, BLUE), (5.0, ORANGE)):
        ranks = ranking.soft_rank(values, strength=strength)[:, 0]
        axis.plot(moving, ranks, color=color, label=f"strength {strength:g}")
    for other in others:
        axis.axvline(float(other), color=GREY, linewidth=0.6, linestyle=":")
    axis.set(xlabel="value $z_1$, the others being 0, 1 and 3", ylabel="its soft rank")
    axis.set_yticks([1, 2, 3, 4])
    axis.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
