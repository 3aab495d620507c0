"""One colour, line and marker for each model, remedy and compressor, in every figure of the project.

    for (color, line, marker), name in zip(styles(names), names): ...
    plt = pyplot()

Colours are told apart by the colour-blind; lines and markers differ as well, so that grey print will do.
"""
import re

STYLES = {  # word in a row's name -> colour, line, marker; the first that fits
    "prompt": ("#d55e00", "--", "s"),
    "prefix": ("#cc79a7", (0, (5, 1)), "v"),
    "idp": ("#0072b2", "-.", "^"),
    "lora": ("#009e73", ":", "D"),
    "eora": ("#56b4e9", (0, (1, 1)), "P"),
    "dense": ("#999999", "-", "x"),
    "compressed": ("black", "-", "o"),
    "rtn": ("#e69f00", "--", "<"),
    "gptq": ("#666666", "-", ">"),
    "magnitude": ("#8c510a", "-.", "p"),
    "sparsegpt": ("#542788", ":", "h"),
}
SPARE = [("#e69f00", (0, (3, 1, 1, 1)), "X"), ("#8c510a", "--", "<"),
         ("#542788", "-.", ">"), ("#666666", ":", "*"), ("#f0e442", "-", "d")]
HATCHES = ("", "//", "..", "xx", "\\\\", "++")             # of bars


def style_of(name):
    """The style of the first word of STYLES that a name holds. -> (colour, line, marker), or None."""
    words = re.findall(r"[a-z]+", name.lower())
    return next((style for word, style in STYLES.items() if word in words), None)


def styles(names):
    """What the lines of one figure look like. -> [(colour, line, marker)].

    A name has the style of its word; a second one of that word, and one without, has one of the spares.
    """
    found, spare = [], 0
    for name in names:
        style = style_of(name)
        if style is None or style in found:
            style, spare = SPARE[spare % len(SPARE)], spare + 1
        found.append(style)
    return found


def pyplot():
    """matplotlib's pyplot, drawing to files. Only figures need it, so it is imported by them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt
