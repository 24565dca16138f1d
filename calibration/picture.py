"""Drawing: matplotlib without a screen, where it is installed."""

from typing import Any

from headstart.runtime.errors import MissingExtraError


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files only. Raises MissingExtraError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise MissingExtraError("Drawing", "bench") from error
    return pyplot
