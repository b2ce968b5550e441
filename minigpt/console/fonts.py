"""Draws pictures with Chinese labels: finds a font, and returns a matplotlib figure as the bytes of a file.

    plt.rcParams["font.family"] = [chinese_font() or "DejaVu Sans", "DejaVu Sans"]    # in a notebook

matplotlib has no font with Chinese characters, so the machine is searched for one. matplotlib is an optional
package: pip install 'minigpt[plot]'.
"""

import importlib.util
import io
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from minigpt.console.terminal import warn
from minigpt.errors import InputError

__all__ = ["chinese_font", "picture_bytes", "picture_kind", "require_plotting"]

_FONT_PACKAGE = "pylopdf_fonts_zh_cn"  # Python package with the font Noto Sans SC, part of minigpt[plot]
_FONT_NAMES = (  # beginnings of the names of known fonts, the best first
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans", "Noto Sans CJK", "Microsoft YaHei", "PingFang"),
    *("Hiragino Sans GB", "WenQuanYi", "SimHei", "Heiti", "STHeiti", "Noto Serif CJK", "Source Han Serif"),
    *("SimSun", "Songti", "Droid Sans Fallback", "Arial Unicode MS", "AR PL"),
)
_USUAL = "的一是不了人我在有问题回答长度词元步损失概率层头"  # characters that a font must have


def require_plotting(flag: str = "--plot") -> None:
    """Raise InputError if matplotlib is missing. Commands call this first, before a long computation."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(f"{flag} needs matplotlib, which is not installed: pip install 'minigpt[plot]'")


def picture_kind(path: Path, flag: str = "--plot") -> str:
    """Return the type of a picture file, given by its suffix.

    Raises:
        InputError: if matplotlib is missing, or does not write such files.
    """
    require_plotting(flag)
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kind = path.suffix.removeprefix(".").lower() or "png"
    known = FigureCanvasAgg.get_supported_filetypes()
    if kind not in known:
        raise InputError(f"{flag} {path}: .{kind} cannot be written; use .png (known: {', '.join(known)})")
    return kind


def picture_bytes(
    draw: Callable[[Any, bool], None], kind: str, size: tuple[float, float], advice: str = ""
) -> bytes:
    """Draw a figure and return the bytes of its file. matplotlib's settings do not change.

    Args:
        draw: a function that draws on the figure. Its second argument is True if a Chinese font was found.
        kind: type of the file, from `picture_kind`.
        size: width and height in inches.
        advice: text for the warning if there is no Chinese font.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    font = chinese_font()
    if font is None:
        warn(
            f"no font with Chinese characters is installed, so {advice or 'the picture lacks them'}; "
            "pip install 'minigpt[plot]', or install Noto Sans CJK SC (Debian: apt install fonts-noto-cjk)"
        )
    families = ["DejaVu Sans"] if font is None else [font, "DejaVu Sans"]
    picture = io.BytesIO()
    with mpl.rc_context({"font.family": families, "svg.fonttype": "path"}), warnings.catch_warnings():
        # No font has all characters. matplotlib would warn about each missing one, such as an emoji.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, font is not None)
        figure.savefig(picture, format=kind)
    return picture.getvalue()


def chinese_font(characters: Iterable[str] = _USUAL) -> str | None:
    """Return the name of a font with Chinese characters, registered with matplotlib; None: no such font.

    Args:
        characters: the characters that the font must have. Default: some usual characters.
    """
    from matplotlib import font_manager

    needed = set(characters)
    package = importlib.util.find_spec(_FONT_PACKAGE)
    if package is not None and package.origin is not None:
        for path in sorted(Path(package.origin).parent.glob("*Sans*.[ot]tf")):
            if _has(path, needed):
                font_manager.fontManager.addfont(path)
                return str(font_manager.get_font(path).family_name)
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    # matplotlib has a stored list of fonts. Add the fonts that were installed after that list was written.
    for fresh in set(font_manager.findSystemFonts()) - listed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                font_manager.fontManager.addfont(fresh)
            except (OSError, RuntimeError):  # skip a font file that is damaged
                continue
    for beginning in _FONT_NAMES:
        for entry in font_manager.fontManager.ttflist:
            if entry.name.startswith(beginning) and _has(Path(entry.fname), needed):
                return str(entry.name)
    return None


def _has(path: Path, characters: set[str]) -> bool:
    from matplotlib import font_manager

    try:
        present = font_manager.get_font(path).get_charmap()
    except (OSError, RuntimeError):  # the font is missing or damaged
        return False
    return all(ord(character) in present for character in characters)
