"""An open question. Grade it with: python -m pytest assignments/open_question --submission FILE"""


def files():
    """-> (path of report.md, path of results.json), relative to this file or absolute.

    results.json as recover.py --out writes it: command, settings, versions, device, seconds, rows.
    """
    raise NotImplementedError("write files")
