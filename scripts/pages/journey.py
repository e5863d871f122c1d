"""Draws docs/journey.svg: how a model comes to be, and how a request is answered.

Plain SVG, written by hand in code, so that a change of a word is a change of a line here. Called by: write.py.
"""

from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 1120, 560
INK, SOFT = "#1d1f23", "#5b616b"
FILL = {"model": "#e7efff", "store": "#fff1d6", "serve": "#e3f4e8", "see": "#f1e9fb", "user": "#f3f4f6"}
EDGE = {"model": "#3d6fd1", "store": "#c98a1b", "serve": "#2f8a4e", "see": "#7d55b8", "user": "#7b828d"}


@dataclass(frozen=True)
class Box:
    """A step, with the command or the room that does it."""

    x: int
    y: int
    width: int
    height: int
    kind: str
    title: str
    lines: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[int, int]:
        return self.x, self.y + self.height // 2

    @property
    def right(self) -> tuple[int, int]:
        return self.x + self.width, self.y + self.height // 2

    @property
    def top(self) -> tuple[int, int]:
        return self.x + self.width // 2, self.y

    @property
    def bottom(self) -> tuple[int, int]:
        return self.x + self.width // 2, self.y + self.height


TEACHER = Box(30, 74, 150, 86, "user", "teacher", ("a Hugging Face", "checkpoint"))
PROFILE = Box(230, 74, 150, 86, "model", "profile", ("which cut? before", "any training"))
DISTILL = Box(430, 74, 170, 86, "model", "distill", ("Ray Train, FSDP2:", "new Q, K, V and a norm"))
EVALUATE = Box(650, 74, 170, 86, "model", "evaluate, gate", ("student against teacher,", "as it is served"))
REGISTRY = Box(870, 74, 220, 86, "store", "registry", ("versions that never change,", "aliases that move"))
CLIENT = Box(30, 330, 130, 86, "user", "client", ("any OpenAI", "client"))
GATEWAY = Box(
    225,
    310,
    190,
    126,
    "serve",
    "gateway",
    ("keys, quotas, fair queues,", "versions by weight,", "usage of each tenant"),
)
DECODE = Box(
    500,
    310,
    215,
    126,
    "serve",
    "decode pool",
    ("the whole model answers;", "prompt tokens skip the", "later layers here, too"),
)
PREFILL = Box(
    865, 310, 225, 126, "serve", "prefill pool", ("the first half of the model", "fills the KV cache of", "all layers")
)
POLICY = Box(500, 216, 590, 46, "see", "policy: sizes both pools from prompt lengths, queues and KV use")
METRICS = Box(
    225,
    486,
    865,
    46,
    "see",
    "Prometheus, Grafana boards, alerts, usage records: what arrives, what it takes, whose it is",
)


def draw() -> str:
    """The picture as SVG text."""
    boxes = (
        TEACHER,
        PROFILE,
        DISTILL,
        EVALUATE,
        REGISTRY,
        CLIENT,
        GATEWAY,
        DECODE,
        PREFILL,
        POLICY,
        METRICS,
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title text" font-family="system-ui, \'Segoe UI\', Helvetica, Arial, sans-serif">',
        '<title id="title">The journey of a model and of a request</title>',
        '<desc id="text">Above: a teacher is profiled, distilled, evaluated at a gate and published in the registry. '
        "Below: a client asks the gateway, which asks the decode pool, which takes the KV of long prompts from the "
        "prefill pool. The registry's versions fill both pools, a policy sizes them, and all of it is measured.</desc>",
        "<!-- Made by `make references` from scripts/pages/journey.py: do not edit. -->",
        f'<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{SOFT}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="#ffffff"/>',
        _draw_text(30, 44, "once for each model", SOFT, 15, weight=600),
        _draw_text(30, 296, "for each request", SOFT, 15, weight=600),
        *(_draw_box(box) for box in boxes),
        *(_draw_arrow(a.right, b.left) for a, b in ((TEACHER, PROFILE), (PROFILE, DISTILL), (DISTILL, EVALUATE))),
        _draw_arrow(EVALUATE.right, REGISTRY.left),
        _draw_text(845, 66, "publish, promote", SOFT, 12, anchor="middle"),
        _draw_arrow(CLIENT.right, GATEWAY.left, both=True),
        _draw_arrow(GATEWAY.right, DECODE.left, both=True),
        _draw_arrow((PREFILL.x, 360), (DECODE.x + DECODE.width, 360)),
        _draw_text(790, 350, "KV over NIXL", SOFT, 12, anchor="middle"),
        _draw_arrow((DECODE.x + DECODE.width, 400), (PREFILL.x, 400)),
        _draw_text(790, 420, "prompts for which", SOFT, 12, anchor="middle"),
        _draw_text(790, 436, "it is measured to pay", SOFT, 12, anchor="middle"),
        _draw_arrow((980, 160), (980, 216)),
        _draw_text(990, 192, "versions", SOFT, 12),
        _draw_arrow((607, 262), DECODE.top),
        _draw_arrow((977, 262), PREFILL.top),
        *(_draw_arrow(box.bottom, (box.bottom[0], METRICS.y)) for box in (GATEWAY, DECODE, PREFILL)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _draw_box(box: Box) -> str:
    shape = (
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="10" fill="{FILL[box.kind]}" '
        f'stroke="{EDGE[box.kind]}" stroke-width="1.5"/>'
    )
    middle = box.x + box.width // 2
    if not box.lines:
        return shape + _draw_text(middle, box.y + box.height // 2 + 5, box.title, INK, 14, anchor="middle")
    first = box.y + (box.height - 20 * len(box.lines) - 18) // 2 + 17
    rows = [_draw_text(middle, first, box.title, INK, 16, anchor="middle", weight=600)]
    rows += [
        _draw_text(middle, first + 22 + 19 * index, line, SOFT, 13, anchor="middle")
        for index, line in enumerate(box.lines)
    ]
    return shape + "".join(rows)


def _draw_text(x: int, y: int, text: str, colour: str, size: int, anchor: str = "start", weight: int = 400) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}">{escape(text)}</text>'
    )


def _draw_arrow(start: tuple[int, int], end: tuple[int, int], both: bool = False) -> str:
    (x, y), (to_x, to_y) = start, end
    begin = ' marker-start="url(#tip)"' if both else ""
    return (
        f'<line x1="{x}" y1="{y}" x2="{to_x}" y2="{to_y}" stroke="{SOFT}" stroke-width="1.6"{begin} '
        'marker-end="url(#tip)"/>'
    )
