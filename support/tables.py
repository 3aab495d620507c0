"""Tables: Markdown, the one way it is written here."""


def markdown(head, rows):
    """A Markdown table. head: its column names; rows: lists of as many cells -> str."""
    lines = [line_of(head), "|" + "---|" * len(head), *map(line_of, rows)]
    return "\n".join(lines)


def line_of(cells):
    """One line. A bar or a line break inside a cell (they come in file names) would end it."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
