"""A figure for scripts and notebooks. Imported only where one is drawn: it needs matplotlib."""

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):  # type: ignore[misc, unused-ignore]
    """Shown by notebooks, without `%matplotlib inline` too: matplotlib's own figure is a line of text there."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()
