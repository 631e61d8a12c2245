"""Images of the small benchmark: a `Spec` and a seed give one 64x64 image, antialiased, the same
every time.

`lay_out` decides what a correct image contains (where, how big, which of the unspecified colours),
`draw` renders it, and `degrade` lowers its quality in five levels for DeQA's task.

The scenes are plain, because the base has to be able to draw them after hours on two cores: objects
sit in the four corners, objects of a relation face each other, and only prompts in a style have a
finish, a shadow or a tint.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .specs import BACKGROUNDS, COLORS, SCENERIES, SHAPES, Spec, heldout_pair

SIZE, SUPER = 64, 4  # pixels of the image; drawn SUPER times larger, then averaged down
RADII = {1: 15.0, 2: 13.0, 3: 12.0, 4: 12.0, 5: 9.5}  # by the number of objects, in pixels
CORNERS, MIDDLE = ((16, 16), (48, 16), (16, 48), (48, 48)), (32, 32)  # centres of objects
# centres of small additional objects, and their radius
EXTRA_CENTRES, EXTRA_RADIUS = tuple((x, y) for x in (8, 32, 56) for y in (8, 32, 56)), 6.5
SIGN_BOX = (1, 17, 63, 47)  # (left, top, right, bottom): where every sign of the benchmark hangs
INK = {"black": (15, 15, 18), "navy": (18, 24, 90), "maroon": (95, 12, 20)}
PLAIN = {"white": (240, 240, 240), "gray": (150, 150, 150), "black": (28, 28, 28)}
GRADIENTS = {
    "sunset": ((255, 170, 80), (120, 50, 120)),
    "ocean": ((170, 225, 250), (10, 70, 150)),
    "meadow": ((190, 225, 255), (90, 170, 70)),
    "night": ((20, 22, 70), (60, 60, 120)),
}
DEGRADATIONS = ("blur", "noise", "blocks", "contrast")
LEVELS = (5, 4, 3, 2, 1)  # excellent ... bad, DeQA's scale


@dataclass(frozen=True)
class Item:
    shape: str
    color: str
    x: float
    y: float
    r: float  # half the height, in pixels


@dataclass(frozen=True)
class Scene:
    """Everything that decides the image."""

    items: tuple[Item, ...] = ()
    background: str = "white"
    finish: str = "flat"
    shadow: bool = False
    word: str = ""
    ink: str = "black"
    tint: int = 0  # brightness of the background, -8 to 8


def outline(shape: str, n: int = 48) -> np.ndarray:
    """Corner points of a unit shape, (n, 2), y down, inside [-1, 1]. The detector's templates use
    them too."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    if shape == "circle":
        return np.stack([np.cos(t), np.sin(t)], 1)
    if shape == "square":
        return np.array([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])
    if shape == "triangle":
        return np.array([(0, -0.95), (1, 0.85), (-1, 0.85)])
    if shape == "star":
        a = np.arange(10) * np.pi / 5 - np.pi / 2
        r = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
        return np.stack([r * np.cos(a), r * np.sin(a)], 1)
    if shape == "cross":
        arm, quarter_turn = [(-0.34, -0.95), (0.34, -0.95), (0.34, -0.34)], [(0, 1), (-1, 0)]
        turns = (np.linalg.matrix_power(quarter_turn, k) for k in range(4))
        return np.concatenate([arm @ turn for turn in turns])
    x = 16 * np.sin(t) ** 3  # heart
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 16.5, (y - 2.3) / 15.5], 1)


def _color(rng: random.Random, shape: str, avoid: Iterable[str] = ()) -> str:
    return rng.choice([c for c in COLORS if c not in avoid and not heldout_pair(shape, c)])


def lay_out(spec: Spec, seed: int) -> Scene:
    """A scene that is correct for the prompt; what the prompt leaves open is drawn from `seed`."""
    rng = random.Random(f"{spec.text}/{seed}")
    styled = spec.task == "pickscore"
    scene = Scene(
        background=spec.background or rng.choice(BACKGROUNDS),
        shadow=styled and rng.random() < 0.3,
        finish=spec.finish or "flat",
        tint=rng.randint(-8, 8) if styled else 0,
    )
    if spec.word:
        background = spec.background or rng.choice(BACKGROUNDS[1:] + SCENERIES)
        return replace(scene, background=background, word=spec.word, ink=rng.choice(list(INK)))
    objects = [spec.objects[0]] * spec.count + list(spec.objects[1:])
    n, colors = len(objects), []
    for shape, color in objects:
        same = spec.count > 1 and colors  # objects that are counted have one colour
        colors.append(same[0] if same else color or _color(rng, shape, colors))
    if spec.relation:
        first, across = 16 if spec.relation in ("left of", "above") else 48, rng.choice((16, 48))
        centres = [(first, across), (SIZE - first, across)]
        if spec.relation in ("above", "below"):
            centres = [(y, x) for x, y in centres]
    elif n == 1:
        centres = [MIDDLE if spec.size == "big" else rng.choice((*CORNERS, MIDDLE))]
    else:
        centres = rng.sample(CORNERS, min(n, 4)) + [MIDDLE] * (n - 4)
    r = {"small": 10.0, "big": 21.0}.get(spec.size) or RADII[n]
    items = (Item(s, c, x, y, r) for (s, _), c, (x, y) in zip(objects, colors, centres))
    return replace(scene, items=tuple(items))


def accompany(scene: Scene, rng: random.Random, n: int) -> Scene:
    """The scene with up to `n` additional small objects of any kind, where there is room; none on a
    sign."""
    items = list(scene.items)
    for x, y in rng.sample(EXTRA_CENTRES, 0 if scene.word else len(EXTRA_CENTRES)):
        if len(items) == len(scene.items) + n:
            break
        shape = rng.choice(SHAPES)
        new = Item(shape, _color(rng, shape), x, y, EXTRA_RADIUS)
        if all(math.dist((x, y), (i.x, i.y)) > new.r + i.r + 1 for i in items):
            items.append(new)
    return replace(scene, items=tuple(items))


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(fonts / "DejaVuSansMono-Bold.ttf"), size)


@lru_cache(maxsize=64)
def _background(name: str, tint: int) -> Image.Image:
    side = SIZE * SUPER
    if name in PLAIN:
        return Image.new("RGB", (side, side), tuple(c + tint for c in PLAIN[name]))
    top, bottom = (np.array(c, float) for c in GRADIENTS[name])
    ramp = np.linspace(0, 1, side)[:, None, None]
    pixels = np.broadcast_to((1 - ramp) * top + ramp * bottom + tint, (side, side, 3))
    return _image(pixels)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw(scene: Scene) -> Image.Image:
    """Paint a scene: RGB, 64x64, antialiased by averaging an image four times as large."""
    image = _background(scene.background, scene.tint).copy()
    pen = ImageDraw.Draw(image)
    if scene.word:
        _draw_sign(image, pen, scene)
    for item in scene.items:
        points = (outline(item.shape) * item.r + (item.x, item.y)) * SUPER
        rgb = COLORS[item.color]
        if scene.shadow:
            pen.polygon([tuple(p) for p in points + 7], _shadow(image))
        points = [tuple(p) for p in points]
        if scene.finish == "outlined":
            pen.polygon(points, rgb, outline=(10, 10, 10), width=7 if item.r > 11 else 4)
        else:
            pen.polygon(points, rgb, outline=rgb)
        if scene.finish == "glossy":
            cx, cy = (item.x - 0.18 * item.r) * SUPER, (item.y - 0.02 * item.r) * SUPER
            q = 0.17 * item.r * SUPER
            shine = tuple((255 * 3 + c) // 4 for c in rgb)
            pen.ellipse((cx - q, cy - q, cx + q, cy + q), shine)
    return image.reduce(SUPER)


def _shadow(image: Image.Image) -> tuple[int, ...]:
    """The colour of shadows: half of that at the left edge."""
    return tuple(c // 2 for c in image.getpixel((4, 128)))


def _draw_sign(image: Image.Image, pen: ImageDraw.ImageDraw, scene: Scene) -> None:
    left, top, right, bottom = SIGN_BOX
    board = [SUPER * v for v in (left + 1.5, top + 2, right - 1.5, bottom - 2)]
    ink, paper = INK[scene.ink], (246, 244, 238)
    if scene.shadow:
        pen.rounded_rectangle([v + 6 for v in board], 10, _shadow(image))
    frame = ink if scene.finish == "outlined" else None
    pen.rounded_rectangle(board, 10, paper, outline=frame, width=5)
    font = _font({2: 24, 3: 24, 4: 22, 5: 18}[len(scene.word)] * SUPER)
    middle = SIZE / 2 * SUPER, (top + bottom) / 2 * SUPER
    pen.text(middle, scene.word, ink, font, anchor="mm")


def degrade(image: Image.Image, kind: str, level: int, seed: int = 0) -> Image.Image:
    """Spoil an image: `kind` one of DEGRADATIONS, `level` 5 (untouched) down to 1 (bad)."""
    if level == 5:
        return image
    step = 4 - level  # 0 .. 3
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur((0.7, 1.2, 1.9, 3.0)[step]))
    pixels = np.asarray(image, float)
    if kind == "noise":
        noise = np.random.default_rng(seed).normal(0, (10, 20, 36, 60)[step], pixels.shape)
        return _image(pixels + noise)
    if kind == "contrast":
        mean = pixels.mean((0, 1), keepdims=True) * 0.5 + 64
        return _image(mean + (pixels - mean) * (0.7, 0.5, 0.34, 0.2)[step])
    buffer = io.BytesIO()  # blocks: what a harsh JPEG does
    image.save(buffer, "JPEG", quality=(30, 16, 8, 3)[step])
    return Image.open(buffer).convert("RGB")


def render(spec: Spec, seed: int) -> Image.Image:
    """A clean, right image of a prompt."""
    return draw(lay_out(spec, seed))
