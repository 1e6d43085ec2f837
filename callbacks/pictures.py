"""Figures for the IMAGES tab, by matplotlib where it is installed (pip install matplotlib); without it there are none."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def can_draw() -> bool:
    """Whether matplotlib is here."""
    return find_spec("matplotlib") is not None


def blank(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    """A figure and its axes. Not by pyplot, which keeps every figure and may ask for a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def show(writers: list[SummaryWriter], tag: str, figure: Any, step: int) -> None:
    """Put the figure on the dashboard."""
    import numpy

    figure.canvas.draw()
    pixels = numpy.asarray(figure.canvas.buffer_rgba())[..., :3]
    for writer in writers:
        writer.add_image(tag, pixels, step, dataformats="HWC")
