"""Figures as inline SVG: a few shapes, axes with units, direct labels, and a text alternative.

Sizes are in units of the view box, which is as wide as a phone: a page puts charts beside each other rather than making
one wider, so that their text has about one size everywhere. Colours are classes of the page's style sheet.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

WIDTH, HEIGHT = 360, 236
LINE = 14
# Sizes of letters in the style sheet: of ticks, and of labels, which are bold.
TICK, LABEL = 11.0, 11.5


@dataclass(frozen=True)
class Series:
    """A line of a chart: its label, points (x, y) and colour class; a `flat` one is one value at every x."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    flat: bool = False
    # Points are marked where each is a measurement of its own.
    marks: bool = True
    # By point, what is written beside it.
    notes: Sequence[str] = ()


def percent(value: float) -> str:
    """0.5 as 50 %."""
    return f"{100 * value:g} %"


def plain(value: float) -> str:
    """A number as it is."""
    return f"{value:g}"


def breadth(words: str, size: float, bold: bool = False) -> float:
    """How wide a text is at most in a common sans serif font; nothing can be measured here."""

    def of(letter: str) -> float:
        if letter in "MW@%mw" or unicodedata.east_asian_width(letter) in "WF":
            return 1.0
        return 0.75 if letter.isupper() else 0.62

    return size * (1.12 if bold else 1.0) * sum(map(of, words))


def shortened(words: str, size: float, room: float, bold: bool = False) -> str:
    """A text that fits, its end left out where it does not."""
    if breadth(words, size, bold) <= room:
        return words
    while words and breadth(f"{words}…", size, bold) > room:
        words = words[:-1]
    return f"{words}…"


def ticks(low: float, high: float, most: int = 5, top: float = math.inf) -> list[float]:
    """At least two round numbers, from at or below `low` to at or above `high`; of values up to `top` none above it."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        # One round value: it ends the axis where nothing can be above it, and begins it elsewhere.
        first, last = (first - 1, last) if last * step >= top else (first, last + 1)
    return [round(number * step, 12) for number in range(first, last + 1)]


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    y: str,
    x_ticks: Sequence[float] | None = None,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
    x_text: Callable[[float], str] = plain,
    shares: bool = False,
    marked: tuple[float, str] | None = None,
    diagonal: bool = False,
) -> Markup:
    """A line chart.

    Args:
        series: at least one, with finite values.
        title: what it shows, the head of the text alternative.
        x, y: what the axes show, with units.
        x_ticks: where; None chooses.
        log: the x axis is logarithmic, to base 2.
        low, high: ends of the y axis, where they shall not follow from the values.
        x_text: how the values of x are written.
        shares: those of y are shares, at most 1, and written in percent.
        marked: an x to mark with a vertical line, and its label.
        diagonal: draw y = x.
    """
    xs = [point[0] for one in series if not one.flat for point in one.points]
    ys = [point[1] for one in series for point in one.points]
    y_text, top = (percent, 1.0) if shares else (plain, math.inf)
    y_ticks = ticks(min(ys) if low is None else low, max(ys) if high is None else high, top=top)
    if x_ticks is None:
        x_ticks = whole_ticks(min(xs), max(xs)) if not log else powers(min(xs), max(xs))
    left, right = min(*xs, *x_ticks), max(*xs, *x_ticks)
    names = {one.name: shortened(one.name, LABEL, WIDTH / 3, bold=True) for one in series}
    area = (
        12 + max(breadth(y_text(tick), TICK) for tick in y_ticks),
        30,
        WIDTH - 9 - max(breadth(name, LABEL, bold=True) for name in names.values()),
        HEIGHT - 38,
    )

    def across(value: float) -> float:
        scale = math.log2 if log else float
        share = (scale(value) - scale(left)) / (scale(right) - scale(left)) if right > left else 0.5
        return round(area[0] + share * (area[2] - area[0]), 1)

    def up(value: float) -> float:
        return round(area[3] - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (area[3] - area[1]), 1)

    drawn = [text(6, 12, y, "axis", "start")]
    for tick in y_ticks:
        drawn.append(line(area[0], up(tick), area[2], up(tick), "grid"))
        drawn.append(text(area[0] - 6, up(tick) + 4, y_text(tick), "tick", "end"))
    for tick in x_ticks:
        drawn.append(text(across(tick), area[3] + 16, x_text(tick), "tick", "middle"))
        drawn.append(line(across(tick), area[3], across(tick), area[3] + 4, "rule"))
    drawn.append(line(area[0], area[3], area[2], area[3], "rule"))
    drawn.append(text((area[0] + area[2]) / 2, HEIGHT - 4, x, "axis", "middle"))
    if marked:
        place = across(marked[0])
        drawn.append(line(place, area[1], place, area[3], "mark"))
        near_end = place + breadth(marked[1], TICK) > area[2]
        drawn.append(
            text(place + (-5 if near_end else 5), area[3] - 6, marked[1], "note", "end" if near_end else "start")
        )
    if diagonal:
        drawn.append(line(across(y_ticks[0]), up(y_ticks[0]), across(y_ticks[-1]), up(y_ticks[-1]), "mark"))
    ends, written = [], []
    # Texts that end at a place: those of the ticks, and notes.
    taken = [(area[0] - 6, up(tick) + 4, y_text(tick)) for tick in y_ticks]
    for one in series:
        points = [(left, one.points[0][1]), (right, one.points[0][1])] if one.flat else one.points
        at = [(across(px), up(py)) for px, py in points]
        path = " ".join(f"{px:g},{py:g}" for px, py in at)
        drawn.append(Markup('<polyline class="line {}{}" points="{}"/>').format(one.colour, " flat" * one.flat, path))
        if not one.flat and (one.marks or len(at) == 1):
            drawn += [Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.6"/>').format(one.colour, *p) for p in at]
        for (px, py), note in zip(at, one.notes, strict=False):
            if is_free(px - 5, py - 5, note, taken):
                taken.append((px - 5, py - 5, note))
                written.append(text(*taken[-1], "note", "end"))
        ends.append((at[-1][1], one))
    for place, one in apart(ends, area[1], area[3]):
        written.append(text(area[2] + 7, place + 4, names[one.name], f"label {one.colour}", "start"))
    return svg(title, Markup("").join(drawn + written), said(series, x, x_text, y_text))


def is_free(x: float, y: float, words: str, taken: Sequence[tuple[float, float, str]]) -> bool:
    """Whether a text that ends at (x, y) lies on none of others, (x, y, words) each."""
    return all(
        abs(y - other_y) >= TICK or x <= other_x - breadth(other, TICK) or other_x <= x - breadth(words, TICK)
        for other_x, other_y, other in taken
    )


def said(series: Sequence[Series], x: str, x_text: Callable[[float], str], y_text: Callable[[float], str]) -> str:
    """What a line chart shows, in words."""
    words = []
    for one in series:
        (x0, y0), (x1, y1) = one.points[0], one.points[-1]
        ends = f"{short(y0, y_text)} at {x_text(x0)} to {short(y1, y_text)} at {x_text(x1)}"
        words.append(f"{one.name} " + (short(y0, y_text) if one.flat or len(one.points) == 1 else ends))
    return f"{'; '.join(words)}. Across: {x}."


def short(value: float, text: Callable[[float], str]) -> str:
    """A value in at most four digits."""
    return text(float(f"{value:.4g}"))


def whole_ticks(low: float, high: float) -> list[float]:
    """Whole numbers, as epochs are counted: the first, the last and round ones between."""
    if high - low <= 5:
        return [float(number) for number in range(math.ceil(low), math.floor(high) + 1)] or [low]
    between = [tick for tick in ticks(low, high, 4) if low < tick < high and tick == int(tick)]
    apart_by = (high - low) / 8
    return [low, *(tick for tick in between if tick - low > apart_by and high - tick > apart_by), high]


def powers(low: float, high: float) -> list[float]:
    """The powers of two from `low` to `high`, every second or third where there are many."""
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return [2.0**power for power in range(first, last + 1, 1 + (last - first) // 8)]


def apart(ends: list[tuple[float, Series]], top: float, bottom: float) -> list[tuple[float, Series]]:
    """Labels moved so far that none lies on another, and none beyond the area."""
    ends = sorted(ends, key=lambda end: end[0])
    places = [end[0] for end in ends]
    for _ in range(100):
        moved = False
        for i, (above, below) in enumerate(pairwise(places)):
            if below - above < LINE - 0.1:
                middle = (above + below) / 2
                places[i], places[i + 1], moved = middle - LINE / 2, middle + LINE / 2, True
        places[0] += max(0.0, top - places[0])
        places[-1] -= max(0.0, places[-1] - bottom)
        if not moved:
            break
    return [(round(place, 1), one) for place, (_, one) in zip(places, ends, strict=True)]


def matrix(counts: Sequence[Sequence[float]], names: Sequence[str], *, title: str) -> Markup:
    """A confusion matrix with its counts: rows are the true classes, columns the answers; colour is the row's share."""
    names = [shortened(name, TICK, WIDTH / 4) for name in names]
    longest = max(breadth(name, TICK) for name in names)
    left = 22 + longest
    cell = (WIDTH - left - 2) / len(names)
    bottom = math.sqrt(0.5) * longest + 40
    high = 8 + cell * len(names) + bottom
    drawn = []
    for i, row in enumerate(counts):
        total = sum(row) or 1
        middle = 8 + cell * (i + 0.5)
        drawn.append(text(left - 6, middle + 3.5, names[i], "tick", "end"))
        for j, count in enumerate(row):
            # The root, so that rare confusions are seen at all.
            strength = round(math.sqrt(count / total), 2)
            kind = "right" if i == j else "wrong"
            drawn.append(
                Markup(
                    '<rect class="cell {}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" opacity="{}"/>'
                ).format(kind, left + cell * j, 8 + cell * i, cell - 1, cell - 1, strength)
            )
            if count:
                shade = "on" if strength > 0.8 else "ink"
                drawn.append(text(left + cell * (j + 0.5) - 0.5, middle + 3, f"{count:g}", f"{shade} count", "middle"))
    for j, name in enumerate(names):
        x, y = left + cell * (j + 0.5) + 2, 8 + cell * len(names) + 11
        drawn.append(
            Markup(
                '<text class="tick" text-anchor="end" transform="translate({:.1f} {:.1f}) rotate(-45)">{}</text>'
            ).format(x, y, name)
        )
    drawn.append(text(left + cell * len(names) / 2, high - 5, "answer of the student", "axis", "middle"))
    drawn.append(
        Markup('<text class="axis" text-anchor="middle" transform="translate(11 {:.1f}) rotate(-90)">{}</text>').format(
            8 + cell * len(names) / 2, "true class"
        )
    )
    right = sum(row[i] for i, row in enumerate(counts))
    return svg(
        title, Markup("").join(drawn), f"{right:g} of {sum(map(sum, counts)):g} answers are on the diagonal.", high
    )


def svg(title: str, drawn: Markup, alternative: str, height: float = HEIGHT) -> Markup:
    """A figure with its text alternative."""
    return Markup('<svg class="chart" viewBox="0 0 {} {:g}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, round(height, 1), f"{title}: {alternative}", drawn
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(kind, x1, y1, x2, y2)


def text(x: float, y: float, words: str, kind: str, anchor: str) -> Markup:
    """A word or a few."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, words)
